//! What a guest's kernel has found in itself: lockdep, KASAN and their like write it to the log.

/// How a report begins.
const HEADS: [&str; 4] = ["BUG: ", "WARNING: ", "UBSAN: ", "INFO: task "];
/// Lines of a report that are shown.
const LINES_MAX: usize = 120;

/// The reports in a log.
pub(crate) fn reports(log: &[String]) -> Vec<String> {
    let begins = |line: &String| HEADS.iter().any(|head| line.contains(head));
    let heads = log.iter().enumerate().filter(|(_, line)| begins(line));
    heads
        .map(|(at, _)| log[at..log.len().min(at + LINES_MAX)].join("\n"))
        .collect()
}

#[test]
fn reports_are_found_in_a_log() {
    let log = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let lock =
        "[ 1.0] WARNING: possible circular locking dependency detected\n6.12.117 Not tainted";
    assert_eq!(reports(&log(&format!("KERF ok\n{lock}"))), [lock]);
    let memory = "[ 1.0] BUG: KASAN: slab-use-after-free in look+0x1/0x2 [kerf_vsock]";
    assert_eq!(reports(&log(memory)), [memory]);
    let notice = "[ 0.0] rcu: RCU callback double-/use-after-free debug is enabled.";
    assert_eq!(reports(&log(notice)), Vec::<String>::new());
}
