//! Resource usage of a process, from `/proc` (proc_pid_stat(5), proc_pid_status(5)).

use std::time::Duration;

/// Returns the CPU time of all threads of `pid` so far, user and system.
pub(crate) fn cpu_time(pid: i32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // The name may contain blanks and parentheses.
    let (_, rest) = text.rsplit_once(')').expect("a stat line");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    let per_second = u64::try_from(per_second.ok().flatten().unwrap_or(100)).unwrap_or(100);
    // Fields 14 and 15; the first field after the name is field 3.
    Duration::from_millis((ticks(11) + ticks(12)) * 1000 / per_second)
}

/// Returns the resident memory of `pid`, MiB.
pub(crate) fn resident_mib(pid: i32) -> f64 {
    kib(&format!("/proc/{pid}/status"), "VmRSS:") / 1024.0
}

/// Returns the peak resident memory of `pid` since its start or [`forget_peak`], MiB.
pub(crate) fn peak_mib(pid: i32) -> f64 {
    kib(&format!("/proc/{pid}/status"), "VmHWM:") / 1024.0
}

/// Resets [`peak_mib`] to the current resident memory (proc(5), clear_refs).
pub(crate) fn forget_peak(pid: i32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("it is a process of ours");
}

/// Returns the proportional set size of `pid`, MiB: shared pages are divided among their processes.
pub(crate) fn proportional_mib(pid: i32) -> f64 {
    kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:") / 1024.0
}

/// Returns the memory that the system has available, MiB.
pub(crate) fn available_mib() -> f64 {
    kib("/proc/meminfo", "MemAvailable:") / 1024.0
}

/// Returns the live child processes of `pid`.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().flat_map(str::parse).collect()
}

fn kib(path: &str, field: &str) -> f64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    number.unwrap_or_else(|| panic!("{path} has no {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_uses_something() {
        let own = i32::try_from(std::process::id()).unwrap();
        while cpu_time(own).is_zero() {
            std::hint::black_box((0..1_000_000_u64).sum::<u64>());
        }
        assert!(resident_mib(own) > 0.1 && proportional_mib(own) > 0.1);
        assert!(available_mib() > 1.0);
    }
}
