//! For how long the host kept processes from running.
//!
//! `/proc/<pid>/task/<tid>/schedstat` (proc_pid_schedstat(5), CONFIG_SCHED_INFO): time on a CPU, time ready to run and
//! waiting for one, both in nanoseconds, and how often it was given one.

use std::path::Path;
use std::time::Duration;

use crate::contract::ProcessId;
use crate::process::Stat;

/// Time that the threads of these processes waited for a CPU, in sum. None when the host does not tell of any.
pub(crate) fn waited(processes: &[ProcessId]) -> Option<Duration> {
    let each = processes.iter().filter_map(of_process);
    each.reduce(Duration::saturating_add)
}

fn of_process(process: &ProcessId) -> Option<Duration> {
    let stat = Stat::read(process.pid).ok()??;
    if stat.start_ticks != process.start_ticks {
        return None;
    }
    of_threads(process.pid)
}

fn of_threads(pid: i32) -> Option<Duration> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let each = tasks.flatten().filter_map(|task| of_thread(&task.path()));
    each.reduce(Duration::saturating_add)
}

fn of_thread(task: &Path) -> Option<Duration> {
    let text = std::fs::read_to_string(task.join("schedstat")).ok()?;
    waited_in(&text)
}

fn waited_in(schedstat: &str) -> Option<Duration> {
    let nanoseconds = schedstat.split_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_figure_is_the_wait() {
        let waited = waited_in("181661303 16344540447 6323\n").unwrap();
        assert_eq!(waited, Duration::from_nanos(16_344_540_447));
        for other in ["", "1", "1 x 2"] {
            assert_eq!(waited_in(other), None);
        }
    }

    /// More threads than the one CPU that they may use, so that some of them wait whatever the machine does.
    #[test]
    fn threads_that_share_a_cpu_wait_for_it() {
        let own = i32::try_from(std::process::id()).unwrap();
        let Some(before) = of_threads(own) else {
            eprintln!("this kernel keeps no schedstat");
            return;
        };
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut one = nix::sched::CpuSet::new();
                    one.set(0).unwrap();
                    let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one);
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while of_threads(own).unwrap() < before + Duration::from_millis(50) {
                assert!(std::time::Instant::now() < deadline, "nothing waited");
                std::thread::yield_now();
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
