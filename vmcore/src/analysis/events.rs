//! Faults, warnings and panics in the kernel log.
//!
//! An event begins with its title and ends with the next title or its end mark. In between:
//!
//! ```text
//! BUG: kernel NULL pointer dereference, address: 0000000000000000        title
//! Oops: 0002 [#1] PREEMPT SMP NOPTI
//! CPU: 0 PID: 1 Comm: init Not tainted 6.1.0                             who
//! Hardware name: QEMU Standard PC
//! RIP: 0010:sysrq_handle_crash+0x16/0x20                                 where
//! RAX: 0000000000000000 RBX: …                                           registers
//! Call Trace:
//!  __handle_sysrq.cold+0x44/0x11c                                        calls; `?` marks an unreliable one
//! Modules linked in: pvpanic_pci …
//! ---[ end trace 0000000000000000 ]---
//! ```

use serde::Serialize;

use super::titles::{is_die, title};
use crate::kernel::log::Log;

/// Maximum number of events kept: half of them the first, half the last.
const EVENTS_MAX: usize = 64;
/// Maximum number of calls of one event.
const CALLS_MAX: usize = 256;
/// Maximum size of one text, bytes.
const TEXT_MAX_BYTES: usize = 4096;

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A fault in the kernel's code.
    Oops,
    /// A failed check of the kernel's own; the kernel continued.
    Warning,
    /// A CPU is stuck, or a task waits too long.
    Lockup,
    /// The kernel gave up.
    Panic,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its kind.
    pub kind: EventKind,
    /// Its first line.
    pub title: String,
    /// Nanoseconds since boot.
    pub time_ns: u64,
    /// CPU, task and taint, in the kernel's format.
    pub who: Option<String>,
    /// The number of the CPU.
    pub cpu: Option<u32>,
    /// Pid of the task.
    pub pid: Option<u32>,
    /// The task's name.
    pub comm: Option<String>,
    /// The machine's name from the firmware.
    pub hardware: Option<String>,
    /// The kernel's location.
    pub rip: Option<String>,
    /// Names and values of the kernel's registers, hexadecimal.
    pub registers: Vec<(String, String)>,
    /// The code around the instruction, hexadecimal.
    pub code: Option<String>,
    /// The calls that led there, innermost first.
    pub call_trace: Vec<String>,
    /// The loaded modules.
    pub modules: Option<Vec<String>>,
}

impl Event {
    fn new(kind: EventKind, title: &str, time_ns: u64) -> Self {
        Self {
            kind,
            title: cut(title),
            time_ns,
            who: None,
            cpu: None,
            pid: None,
            comm: None,
            hardware: None,
            rip: None,
            registers: Vec::new(),
            code: None,
            call_trace: Vec::new(),
            modules: None,
        }
    }
}

/// Returns the events of a log. Messages from programs are ignored, whatever they contain, and only the first
/// line of a message can start an event.
pub fn events(log: &Log) -> Vec<Event> {
    let mut reader = Reader::default();
    for record in log.records.iter().filter(|record| record.is_of_kernel()) {
        let text = String::from_utf8_lossy(&record.text);
        let lines = text.lines().skip_while(|line| line.is_empty());
        for (number, line) in lines.enumerate() {
            let kind = title(line).filter(|_| number == 0);
            reader.line(line, kind, record.time_ns, record.caller);
        }
    }
    reader.done.into_iter().map(|open| open.event).collect()
}

/// An event that is being parsed.
struct Open {
    event: Event,
    /// The task or CPU that reported it; lines of others may come in between.
    caller: u32,
    /// True while further lines belong to the event.
    open: bool,
    in_trace: bool,
    /// The registers that follow are not the kernel's at the time of the fault.
    registers_over: bool,
}

#[derive(Default)]
struct Reader {
    done: Vec<Open>,
}

impl Reader {
    fn line(&mut self, line: &str, kind: Option<EventKind>, time_ns: u64, caller: u32) {
        // The last event from this caller.
        let mut told = self.done.iter_mut().rev();
        let last = told.find(|event| event.caller == caller);
        let last = last.filter(|event| event.open);
        if let Some(kind) = kind {
            if !last.is_some_and(|last| last.goes_on_with(line, kind)) {
                self.begin(kind, line, time_ns, caller);
            }
            return;
        }
        if let Some(last) = last {
            last.line(line);
        }
    }

    fn begin(&mut self, kind: EventKind, title: &str, time_ns: u64, caller: u32) {
        if self.done.len() == EVENTS_MAX {
            self.done.remove(EVENTS_MAX / 2);
        }
        self.done.push(Open {
            event: Event::new(kind, title, time_ns),
            caller,
            open: true,
            in_trace: false,
            registers_over: false,
        });
    }
}

impl Open {
    fn line(&mut self, line: &str) {
        if line.starts_with("---[ end ") {
            self.open = false;
        } else if line == "Call Trace:" {
            self.in_trace = true;
            self.registers_over = true;
        } else if self.in_trace && line.starts_with(' ') {
            if self.event.call_trace.len() < CALLS_MAX {
                self.event.call_trace.push(cut(line.trim()));
            }
        } else {
            self.in_trace = false;
            if line.starts_with("RIP: 0033:") {
                self.registers_over = true;
            }
            detail(&mut self.event, line, self.registers_over);
        }
    }

    /// Returns whether the line continues the event. The line from `die()` is the second line of a fault whose first
    /// line has the better name: "BUG: unable to handle page fault", or "kernel BUG at", which is an invalid opcode for
    /// the CPU.
    fn goes_on_with(&self, line: &str, kind: EventKind) -> bool {
        let same = kind == EventKind::Oops && self.event.kind == EventKind::Oops;
        same && is_die(line) && self.event.rip.is_none()
    }
}

/// How a kernel ended, from its events: the last panic, and its cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ending<'a> {
    /// The last panic.
    pub panic: Option<&'a Event>,
    /// The cause of the panic. Without a panic, the last fault or lockup: the kernel may have continued.
    pub cause: Option<&'a Event>,
}

/// Texts of panics that follow an earlier event: the kernel's last words after an oops, a warning or a lockup that it
/// does not tolerate. Every other panic has a reason of its own: earlier events in the log did not end the kernel.
const FOLLOWS: [(&str, &[EventKind]); 11] = [
    ("Fatal exception", &[EventKind::Oops]),
    ("Machine halted", &[EventKind::Oops]),
    ("Aiee, killing interrupt handler", &[EventKind::Oops]),
    ("Attempted to kill ", &[EventKind::Oops]),
    ("kernel stack overflow", &[EventKind::Oops]),
    ("stack guard hit", &[EventKind::Oops]),
    ("invalid or fatal FRED event", &[EventKind::Oops]),
    ("panic_on_warn", &[EventKind::Warning, EventKind::Oops]),
    ("softlockup: hung tasks", &[EventKind::Lockup]),
    ("hung_task: blocked tasks", &[EventKind::Lockup]),
    ("RCU Stall", &[EventKind::Lockup]),
];

/// Returns how a kernel ended. `events` are in the order of their occurrence.
pub fn ending(events: &[Event]) -> Ending<'_> {
    let is_panic = |event: &Event| event.kind == EventKind::Panic;
    let Some(at) = events.iter().rposition(is_panic) else {
        return Ending {
            panic: None,
            cause: last_of(events, &[EventKind::Oops, EventKind::Lockup]),
        };
    };
    let (before, panic) = (&events[..at], &events[at]);
    let mut follows = FOLLOWS.iter();
    let follows = follows.find(|(says, _)| panic.title.contains(says));
    Ending {
        panic: Some(panic),
        cause: follows.and_then(|(_, kinds)| last_of(before, kinds)),
    }
}

fn last_of<'a>(events: &'a [Event], kinds: &[EventKind]) -> Option<&'a Event> {
    let mut newest = events.iter().rev();
    newest.find(|event| kinds.contains(&event.kind))
}

/// Adds a detail line to an event. The first line of each kind counts.
fn detail(event: &mut Event, line: &str, registers_over: bool) {
    let fill = |slot: &mut Option<String>, text: &str| {
        slot.get_or_insert_with(|| cut(text));
    };
    if line.starts_with("CPU: ") {
        if event.who.is_none() {
            event.cpu = word_after(line, "CPU: ").and_then(|word| word.parse().ok());
            event.pid = word_after(line, "PID: ").and_then(|word| word.parse().ok());
            event.comm = comm(line);
            event.who = Some(cut(line));
        }
    } else if let Some(name) = line.strip_prefix("Hardware name: ") {
        fill(&mut event.hardware, name);
    } else if let Some(list) = line.strip_prefix("Modules linked in:") {
        let list = list.split("[last unloaded").next().unwrap_or_default();
        let names = list.split_whitespace().map(cut).collect();
        event.modules.get_or_insert(names);
    } else if registers_over {
    } else if let Some(rip) = line.strip_prefix("RIP: 0010:") {
        fill(&mut event.rip, rip);
    } else if let Some(code) = line.strip_prefix("Code: ") {
        fill(&mut event.code, code);
    } else {
        event.registers.extend(registers(line));
    }
}

/// Returns the task's name: the text before its taint.
fn comm(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("Comm: ")?;
    let end = [" Not tainted", " Tainted: "]
        .iter()
        .filter_map(|mark| rest.rfind(mark))
        .min();
    Some(cut(rest.get(..end?)?))
}

fn word_after<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    line.split_once(mark)?.1.split_whitespace().next()
}

/// Parses the registers of one line, which repeats `NAME: digits`. Of `RSP: 0018:digits`, the last digits count.
fn registers(line: &str) -> Vec<(String, String)> {
    let mut words = line.split_whitespace().peekable();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_suffix(':').filter(|name| is_register(name)) else {
            // Not a line of registers, or the end of the registers in it.
            return found;
        };
        let Some(value) = words.next() else {
            return found;
        };
        let digits = value.rsplit(':').next().unwrap_or(value);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return found;
        }
        found.push((name.to_owned(), digits.to_owned()));
    }
    found
}

fn is_register(name: &str) -> bool {
    const OTHERS: [&str; 7] = ["EFLAGS", "ORIG_RAX", "CR0", "CR2", "CR3", "CR4", "CS"];
    let general = name.strip_prefix('R').is_some_and(|rest| {
        rest.len() == 2
            && rest
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    });
    general || OTHERS.contains(&name)
}

fn cut(text: &str) -> String {
    let end = (0..=TEXT_MAX_BYTES.min(text.len()))
        .rev()
        .find(|n| text.is_char_boundary(*n));
    text[..end.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::log::Record;

    fn log(text: &str) -> Log {
        let record = |(n, line): (usize, &str)| Record {
            time_ns: n as u64,
            caller: 0,
            facility: 0,
            text: line.as_bytes().to_vec(),
        };
        Log {
            records: text.lines().enumerate().map(record).collect(),
            ..Log::default()
        }
    }

    const OOPS: &str = "\
usb 1-1: new device
BUG: kernel NULL pointer dereference, address: 0000000000000000
#PF: supervisor write access in kernel mode
Oops: 0002 [#1] PREEMPT SMP NOPTI
CPU: 1 UID: 0 PID: 77 Comm: my prog Tainted: G            E      6.12.9 #1
Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.16.3
RIP: 0010:sysrq_handle_crash+0x16/0x20
Code: eb d1 e8 4d <c6> 04 25
RSP: 0018:ffffb0e2c0013e38 EFLAGS: 00010246
RAX: 0000000000000000 RBX: 0000000000000063 RCX: 0000000000000000
CR2: 0000000000000000 CR3: 0000000002a50000 CR4: 00000000000006b0
Call Trace:
 <TASK>
 __handle_sysrq.cold+0x44/0x11c
 ? vfs_write+0xc7/0x3f0
RIP: 0033:0x47b7a0
RAX: ffffffffffffffda RBX: 0000000000000001 RCX: 000000000047b7a0
 </TASK>
Modules linked in: pvpanic_pci(E) pvpanic(E) [last unloaded: x]
---[ end trace 0000000000000000 ]---
RIP: 0010:other+0x1/0x2
Kernel panic - not syncing: Fatal exception
Kernel Offset: 0x15400000
";

    #[test]
    fn an_oops_is_read_with_its_registers_calls_and_modules() {
        let events = events(&log(OOPS));
        assert_eq!(events.len(), 2, "{events:?}");
        let oops = &events[0];
        assert_eq!(oops.kind, EventKind::Oops);
        assert_eq!(
            oops.title,
            "BUG: kernel NULL pointer dereference, address: 0000000000000000"
        );
        assert_eq!((oops.cpu, oops.pid, oops.time_ns), (Some(1), Some(77), 1));
        assert_eq!(oops.comm.as_deref(), Some("my prog"));
        assert_eq!(oops.rip.as_deref(), Some("sysrq_handle_crash+0x16/0x20"));
        let register = |name: &str| {
            let mut all = oops.registers.iter().filter(|(n, _)| n == name);
            let value = all.next().map(|(_, value)| value.as_str());
            assert!(all.next().is_none(), "{name} twice");
            value
        };
        assert_eq!(register("RSP"), Some("ffffb0e2c0013e38"));
        assert_eq!(register("EFLAGS"), Some("00010246"));
        assert_eq!(register("RAX"), Some("0000000000000000"));
        assert_eq!(register("CR3"), Some("0000000002a50000"));
        assert_eq!(
            oops.call_trace[1..],
            ["__handle_sysrq.cold+0x44/0x11c", "? vfs_write+0xc7/0x3f0"]
        );
        let modules = ["pvpanic_pci(E)", "pvpanic(E)"].map(str::to_owned).to_vec();
        assert_eq!(oops.modules, Some(modules));
        assert_eq!(events[1].kind, EventKind::Panic);
        assert_eq!(events[1].rip, None);
    }

    #[test]
    fn a_log_full_of_warnings_still_ends_with_its_fault_and_its_panic() {
        let text = "WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2\n".repeat(1000) + OOPS;
        let events = events(&log(&text));
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!(
            events[EVENTS_MAX - 1].title,
            "Kernel panic - not syncing: Fatal exception"
        );
        assert!(told(&text).1.unwrap().contains("NULL pointer"));
    }

    /// Titles of the panic and of its cause.
    fn told(text: &str) -> (Option<String>, Option<String>) {
        ended(&log(text))
    }

    fn ended(log: &Log) -> (Option<String>, Option<String>) {
        let events = events(log);
        let ending = ending(&events);
        let title = |event: &Event| event.title.clone();
        (ending.panic.map(title), ending.cause.map(title))
    }

    #[test]
    fn the_cause_is_the_last_fault_before_the_last_panic() {
        let text = "\
BUG: unable to handle page fault for address: ffff000000000001
Oops: 0000 [#1] SMP
RIP: 0010:one+0x1/0x2
---[ end trace 0000000000000000 ]---
INFO: task a:1 blocked for more than 3 seconds.
general protection fault, probably for non-canonical address 0xdead: 0000 [#2] SMP
RIP: 0010:two+0x1/0x2
---[ end trace 0000000000000000 ]---
Kernel panic - not syncing: Fatal exception
";
        let (panic, cause) = told(text);
        assert_eq!(
            panic.as_deref(),
            Some("Kernel panic - not syncing: Fatal exception")
        );
        assert!(cause.unwrap().starts_with("general protection fault"));
    }

    #[test]
    fn a_fault_that_the_kernel_bore_is_not_the_cause_of_a_panic_of_another_kind() {
        let bore = OOPS.split("Kernel panic").next().unwrap();
        let hung = "INFO: task crasher:91 blocked for more than 3 seconds.\n";
        let end = "Kernel panic - not syncing: sysrq triggered crash\n";
        for before in [bore, hung] {
            let (panic, cause) = told(&format!("{before}{end}"));
            assert_eq!((panic.as_deref(), cause), (Some(end.trim_end()), None));
        }
        // The lockup is the cause of this panic.
        let end = "Kernel panic - not syncing: hung_task: blocked tasks\n";
        assert_eq!(
            told(&format!("{bore}{hung}{end}")).1.as_deref(),
            Some(hung.trim_end())
        );
    }

    #[test]
    fn a_bug_and_the_invalid_opcode_behind_it_are_one_event() {
        for die in [
            "invalid opcode: 0000 [#1] SMP",
            "Oops: invalid opcode: 0000 [#1] SMP",
        ] {
            let text = format!("kernel BUG at mm/slub.c:435!\n{die}\nRIP: 0010:f+0x1/0x2\n");
            let events = events(&log(&text));
            assert_eq!(events.len(), 1, "{events:?}");
            assert_eq!(events[0].title, "kernel BUG at mm/slub.c:435!");
            assert_eq!(events[0].rip.as_deref(), Some("f+0x1/0x2"));
        }
    }

    /// Linux 6.1 on an unmapped stack: `die()` prints no "Oops: " there.
    #[test]
    fn a_double_fault_is_the_cause_of_the_panic_behind_it() {
        for die in [
            "double fault: 0000 [#1] PREEMPT SMP NOPTI",
            "Oops: double fault: 0000 [#1] SMP",
        ] {
            for told_before in ["traps: PANIC: double fault, error_code: 0x0\n", ""] {
                let text = format!(
                    "{told_before}{die}\nCPU: 0 PID: 81 Comm: a Not tainted\nRIP: 0010:f+0x250/0x5e0\n\
                     ---[ end trace 0000000000000000 ]---\n\
                     Kernel panic - not syncing: Fatal exception in interrupt\n"
                );
                let events = events(&log(&text));
                assert_eq!(events.len(), 2, "{events:?}");
                let cause = ending(&events).cause.unwrap();
                assert!(cause.title.contains("double fault"), "{cause:?}");
                assert_eq!((cause.cpu, cause.pid), (Some(0), Some(81)));
            }
        }
    }

    #[test]
    fn what_a_program_writes_counts_for_nothing_and_another_cpu_does_not_mix_in() {
        let record = |facility: u8, caller: u32, text: &str| Record {
            time_ns: 0,
            caller,
            facility,
            text: text.as_bytes().to_vec(),
        };
        let log = Log {
            records: vec![
                record(1, 9, "Kernel panic - not syncing: a fake by a program"),
                record(
                    0,
                    7,
                    "a name of a program\nKernel panic - not syncing: fake",
                ),
                record(
                    0,
                    7,
                    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
                ),
                record(0, 8, "RIP: 0010:another+0x1/0x2"),
                record(1, 7, "RIP: 0010:fake+0x1/0x2"),
                record(0, 7, "Oops: 0002 [#1] PREEMPT SMP NOPTI"),
                record(0, 7, "RIP: 0010:real+0x1/0x2"),
                record(0, 7, "Kernel panic - not syncing: Fatal exception"),
                record(3, 9, "BUG: a fake at the end"),
            ],
            ..Log::default()
        };
        let all = events(&log);
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!(all[0].rip.as_deref(), Some("real+0x1/0x2"));
        let (panic, cause) = ended(&log);
        assert!(panic.unwrap().ends_with(": Fatal exception"));
        assert!(cause.unwrap().ends_with("address: 0000000000000008"));
    }
}
