//! The host scheduler's statistics for the threads of an instance.
//!
//! `/proc/<pid>/task/<tid>/schedstat` (proc_pid_schedstat(5), CONFIG_SCHED_INFO) has the time on a CPU and the time
//! runnable but waiting for one, both in nanoseconds, and the number of time slices. `stat` next to it shows whether
//! the thread is runnable now.

use std::path::Path;
use std::time::Duration;

use crate::contract::{ProcessId, ThreadTime};
use crate::process::Stat;

/// Returns the accounts of all threads of these processes.
pub(crate) fn accounts(processes: &[ProcessId]) -> Vec<ThreadTime> {
    let lives =
        |known: &&ProcessId| matches!(Stat::read(known.pid), Ok(Some(now)) if now.is(known));
    let living = processes.iter().filter(lives);
    living.flat_map(|known| of_threads(known.pid)).collect()
}

fn of_threads(pid: i32) -> Vec<ThreadTime> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.filter_map(|task| of_thread(&task.path())).collect()
}

fn of_thread(task: &Path) -> Option<ThreadTime> {
    let thread = task.file_name()?.to_str()?.parse().ok()?;
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    let schedstat = std::fs::read_to_string(task.join("schedstat")).ok()?;
    account(thread, &stat, &schedstat)
}

fn account(thread: i32, stat: &str, schedstat: &str) -> Option<ThreadTime> {
    let mut figures = schedstat.split_whitespace();
    let mut next = || Some(Duration::from_nanos(figures.next()?.parse().ok()?));
    Some(ThreadTime {
        thread,
        ran: next()?,
        waited: next()?,
        runnable: Stat::parse(thread, stat)?.state == b'R',
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read() {
        let stat = |state: &str| format!("7 (CPU 0/TCG) {state} 1 7 7 0 -1 0 {}", "0 ".repeat(14));
        let read = account(7, &stat("R"), "181661303 16344540447 6323\n").unwrap();
        assert_eq!(
            read,
            ThreadTime {
                thread: 7,
                ran: Duration::from_nanos(181_661_303),
                waited: Duration::from_nanos(16_344_540_447),
                runnable: true,
            }
        );
        assert!(!account(7, &stat("S"), "1 2 3").unwrap().runnable);
        for other in ["", "1", "1 x 2"] {
            assert_eq!(account(7, &stat("S"), other), None);
        }
        assert_eq!(account(7, "7 (x", "1 2 3"), None);
    }

    /// The test starts more threads than the one CPU that they may use, so that some of them wait on any machine.
    #[test]
    fn threads_that_share_a_cpu_wait_for_it() {
        let own = i32::try_from(std::process::id()).unwrap();
        let waited = || {
            of_threads(own)
                .iter()
                .map(|time| time.waited)
                .sum::<Duration>()
        };
        let before = waited();
        if of_threads(own).is_empty() {
            eprintln!("this kernel keeps no schedstat");
            return;
        }
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut one = rustix::thread::CpuSet::new();
                    one.set(0);
                    let _ = rustix::thread::sched_setaffinity(None, &one);
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while waited() < before + Duration::from_millis(50) {
                assert!(std::time::Instant::now() < deadline, "nothing waited");
                std::thread::yield_now();
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
