//! The beginnings of log lines that start an event.

use super::events::EventKind;

/// The titles, in the order of the attempts.
const TITLES: [(&str, EventKind); 14] = [
    ("Kernel panic - not syncing: ", EventKind::Panic),
    ("BUG: soft lockup", EventKind::Lockup),
    ("watchdog: BUG: soft lockup", EventKind::Lockup),
    ("watchdog: CPU", EventKind::Lockup),
    ("INFO: task ", EventKind::Lockup),
    ("rcu: INFO: ", EventKind::Lockup),
    ("BUG: ", EventKind::Oops),
    ("kernel BUG at ", EventKind::Oops),
    ("Kernel BUG at ", EventKind::Oops),
    // Precedes a fault from which the kernel cannot return.
    ("traps: PANIC: ", EventKind::Oops),
    ("PANIC: ", EventKind::Oops),
    (
        "NMI watchdog: Watchdog detected hard LOCKUP",
        EventKind::Lockup,
    ),
    ("watchdog: Watchdog detected hard LOCKUP", EventKind::Lockup),
    ("WARNING: ", EventKind::Warning),
];

/// Returns the event that starts at this line, if any.
pub(super) fn title(line: &str) -> Option<EventKind> {
    let title = TITLES.iter().find(|(start, _)| line.starts_with(start));
    title
        .map(|(_, kind)| *kind)
        .or_else(|| is_die(line).then_some(EventKind::Oops))
}

/// Returns whether `die()` wrote the line, with any message: `double fault: 0000 [#1] PREEMPT SMP`, and from Linux
/// 6.10 on `Oops: double fault: 0000 [#1] SMP`. The line has an error code of four or more digits, and a counter.
pub(super) fn is_die(line: &str) -> bool {
    let Some((before, behind)) = line.split_once(" [#") else {
        return false;
    };
    let counted = behind.split_once(']').is_some_and(|(count, _)| {
        !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit())
    });
    let code = before.rsplit_once(": ").is_some_and(|(title, code)| {
        let is_digit = |byte: u8| byte.is_ascii_hexdigit();
        !title.is_empty() && code.len() >= 4 && code.bytes().all(is_digit)
    });
    // "Split lock detected" puts a line break before the code.
    let code_alone = before
        .strip_prefix(": ")
        .is_some_and(|code| code.len() >= 4);
    counted && (code || code_alone)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages passed to `die()` and `__die()` on x86 in Linux 5.10 to 6.12: traps.c, fault.c, cet.c, tdx, FRED.
    const DIE: [&str; 27] = [
        "Oops",
        "Bad pagetable",
        "divide error",
        "divide_error",
        "overflow",
        "invalid opcode",
        "coprocessor segment overrun",
        "invalid TSS",
        "segment not present",
        "stack segment",
        "alignment check",
        "Split lock detected",
        "kernel stack overflow (page fault)",
        "kernel stack overflow (double-fault)",
        "stack guard page",
        "double fault",
        "bounds",
        "general protection fault",
        "segment-related general protection fault",
        "general protection fault, probably for non-canonical address 0xdead000000000100",
        "general protection fault, maybe for address 0xffff888000000000",
        "int3",
        "fpu exception",
        "simd exception",
        "unexpected #NM exception",
        "invalid or fatal FRED event",
        "VE fault",
    ];

    #[test]
    fn whatever_die_is_called_with_begins_an_oops_in_both_forms() {
        for title_of_die in DIE {
            for line in [
                format!("{title_of_die}: 0000 [#1] PREEMPT SMP NOPTI"),
                format!("Oops: {title_of_die}: 0002 [#12] SMP NOPTI"),
            ] {
                assert_eq!(title(&line), Some(EventKind::Oops), "{line}");
                assert!(is_die(&line), "{line}");
            }
        }
    }

    #[test]
    fn what_only_looks_like_it_begins_nothing() {
        for line in [
            "usb 1-1: 0000 #1",
            "eth0: link up [#1]",
            "x: 12 [#1]",
            "x: 0000 [#]",
            "rcu: \tMax phase no-delay instances is 1000.",
        ] {
            assert_eq!(title(line), None, "{line}");
        }
    }
}
