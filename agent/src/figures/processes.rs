//! Figures of this process and its descendants: see proc_pid_stat(5), proc_pid_io(5).

use std::fs::read_to_string;

use super::{Counters, field};

/// Most processes that are summed up.
const PROCESSES_MAX: usize = 256;

pub(super) fn counters(memory_limit_kib: u64) -> Counters {
    let mut sum = Counters::default();
    let mut resident_kib = 0_u64;
    let mut pending = vec![std::process::id()];
    let mut seen = 0;
    while let Some(pid) = pending.pop() {
        seen += 1;
        if seen > PROCESSES_MAX {
            break;
        }
        let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        sum.busy_ticks += ticks(&stat).unwrap_or(0);
        let status = read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        resident_kib += field(&status, "VmRSS").unwrap_or(0);
        let io = read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        sum.io_read_bytes += field(&io, "read_bytes").unwrap_or(0);
        sum.io_write_bytes += field(&io, "write_bytes").unwrap_or(0);
        let children = read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        pending.extend(
            children
                .split_whitespace()
                .filter_map(|w| w.parse::<u32>().ok()),
        );
    }
    sum.memory_total_kib = memory_limit_kib.max(resident_kib);
    sum.memory_available_kib = sum.memory_total_kib - resident_kib;
    sum
}

/// Time in user and kernel mode (fields 14 and 15), with that of ended children (16 and 17).
fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold spaces and parentheses itself.
    let (_, after) = stat.rsplit_once(')')?;
    let words = after.split_whitespace().skip(11).take(4);
    words.map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        assert_eq!(ticks(stat), Some(11 + 12 + 13 + 14));
        assert_eq!(ticks("garbage"), None);
    }
}
