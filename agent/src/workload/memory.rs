//! The memory that the program may use, and whether the kernel ended it for want of memory.

use std::path::Path;

/// The variable in which a program is told how many bytes of memory it may use.
pub const MEMORY_ENV: &str = "KMORPH_MEMORY_BYTES";
/// Part of a guest's available memory, in percent, that its program may use: the rest is for the agent, the kernel's
/// buffers, and its reserve against an out-of-memory kill.
const GUEST_SHARE_PERCENT: u64 = 75;

/// What there is for the program, and who counts its kills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that it may use; 0 when that is not limited.
    pub bytes: u64,
    /// The kernel is the instance's own: what it kills for want of memory is this instance's.
    pub own_kernel: bool,
}

impl Memory {
    /// Of an instance that is a process of a host, limited to `bytes`.
    pub fn of_process(bytes: u64) -> Self {
        Self {
            bytes,
            own_kernel: false,
        }
    }

    /// Of a guest, as its kernel says now.
    pub fn of_kernel() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available_kib = field(&text, "MemAvailable:").unwrap_or(0);
        Self {
            bytes: available_kib.saturating_mul(1024) / 100 * GUEST_SHARE_PERCENT,
            own_kernel: true,
        }
    }

    /// Processes that the instance's kernel has killed for want of memory; `None` when it does not say.
    pub(super) fn oom_kills(self) -> Option<u64> {
        if !self.own_kernel {
            return None;
        }
        oom_kills(Path::new("/proc/vmstat"))
    }
}

/// The counter `oom_kill` of vmstat (Linux 4.13 and newer).
fn oom_kills(vmstat: &Path) -> Option<u64> {
    field(&std::fs::read_to_string(vmstat).ok()?, "oom_kill")
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_whole_name() {
        let text = "oom_kill_other 3\noom_kill 7\npgfault 1\n";
        assert_eq!(field(text, "oom_kill"), Some(7));
        assert_eq!(field(text, "oom"), None);
        assert_eq!(
            field("MemAvailable:     182340 kB\n", "MemAvailable:"),
            Some(182_340)
        );
    }
}
