//! What a guest's kernel has found in itself: lockdep, KASAN, KCSAN and their like write it to the log.

/// How a report begins.
const HEADS: [&str; 4] = ["BUG: ", "WARNING: ", "UBSAN: ", "INFO: task "];
/// How KCSAN begins, and what it writes around its reports.
const RACE: &str = "BUG: KCSAN: ";
const RULE: &str = "==========";
const MODULE: &str = "[kerf_vsock]";

/// The reports in a log.
pub(crate) struct Reports {
    /// Those that nobody but this module can be the cause of, whole.
    pub(crate) ours: Vec<String>,
    /// The first lines of data races in which this module is not involved: the kernel has some of its own.
    pub(crate) of_others: Vec<String>,
}

impl Reports {
    pub(crate) fn of(log: &[String]) -> Self {
        let mut reports = Self {
            ours: Vec::new(),
            of_others: Vec::new(),
        };
        for (at, line) in log.iter().enumerate() {
            if !HEADS.iter().any(|head| line.contains(head)) {
                continue;
            }
            let rest = log[at + 1..].iter();
            let end = rest.take_while(|line| !line.contains(RULE)).count();
            let whole = &log[at..at + 1 + end.min(LINES_MAX)];
            if line.contains(RACE) && !whole.iter().any(|line| line.contains(MODULE)) {
                reports.of_others.push(line.clone());
            } else {
                reports.ours.push(whole.join("\n"));
            }
        }
        reports
    }
}

/// Lines of a report that are looked at.
const LINES_MAX: usize = 120;

#[test]
fn a_race_of_the_kernel_alone_is_not_ours() {
    let log = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let core = log(
        "====\n[ 1.0] BUG: KCSAN: data-race in timer / tick\n tick+0x1\n==========\nKERF ok [kerf_vsock]",
    );
    let reports = Reports::of(&core);
    assert_eq!((reports.ours.len(), reports.of_others.len()), (0, 1));
    let ours = log(
        "[ 1.0] BUG: KCSAN: data-race in timer / look\n look+0x1/0x2 [kerf_vsock]\n==========\nmore",
    );
    assert_eq!(Reports::of(&ours).ours, [ours[..2].join("\n")]);
    let lock =
        log("[ 1.0] WARNING: possible circular locking dependency detected\n6.12.117 Not tainted");
    assert_eq!(Reports::of(&lock).ours.len(), 1);
}
