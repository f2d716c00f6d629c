//! Figures of a whole kernel: see proc_stat(5), proc_meminfo(5), proc_vmstat(5).

use std::fs::read_to_string;

use super::{Counters, field};

pub(super) fn counters() -> Counters {
    let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
    let vmstat = read_to_string("/proc/vmstat").unwrap_or_default();
    // pgpgin and pgpgout count KiB, whatever their names say.
    let io = |name| field(&vmstat, name).unwrap_or(0).saturating_mul(1024);
    Counters {
        busy_ticks: busy_ticks(&read_to_string("/proc/stat").unwrap_or_default()),
        memory_total_kib: field(&meminfo, "MemTotal").unwrap_or(0),
        memory_available_kib: field(&meminfo, "MemAvailable").unwrap_or(0),
        io_read_bytes: io("pgpgin"),
        io_write_bytes: io("pgpgout"),
    }
}

/// Every field of the `cpu` line but idle (4th) and iowait (5th); guest time is in user already.
fn busy_ticks(stat: &str) -> u64 {
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else {
        return 0;
    };
    line.split_whitespace()
        .take(8)
        .enumerate()
        .filter(|(place, _)| !matches!(place, 3 | 4))
        .filter_map(|(_, word)| word.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy_time() {
        let stat = "cpu  10 1 5 1000 500 2 3 4 100 0\ncpu0 1 1 1 1\n";
        assert_eq!(busy_ticks(stat), 25);
    }
}
