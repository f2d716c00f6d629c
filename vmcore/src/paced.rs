//! Reads memory at a limited rate, to leave memory bandwidth for live instances.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::MemoryError;
use crate::memory::{PhysRange, PhysicalMemory};

/// Minimum rate, MiB/s: at a lower rate a stop would take too long, because a thread notices it only
/// between two reads of at most 1 MiB.
pub const RATE_MIN_MIB_S: u64 = 8;
/// Maximum rate, MiB/s: above the bandwidth of memory.
pub const RATE_MAX_MIB_S: u64 = 65_536;

/// A rate between [`RATE_MIN_MIB_S`] and [`RATE_MAX_MIB_S`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    mib_s: u64,
}

impl Rate {
    /// Converts a number of MiB/s; `None` if it is out of bounds.
    pub fn mib_per_second(mib_s: u64) -> Option<Self> {
        let within = (RATE_MIN_MIB_S..=RATE_MAX_MIB_S).contains(&mib_s);
        within.then_some(Self { mib_s })
    }

    /// Returns the time for this number of bytes.
    fn time_for(self, bytes: usize) -> Duration {
        let nanos = bytes as u128 * 1_000_000_000 / (u128::from(self.mib_s) << 20);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Limits the total rate of all readers of a memory.
#[derive(Debug)]
pub struct Pace {
    rate: Rate,
    /// Time until which the reads so far use up the rate.
    paid: Mutex<Instant>,
}

impl Pace {
    /// Starts at this rate.
    pub fn new(rate: Rate) -> Self {
        Self {
            rate,
            paid: Mutex::new(Instant::now()),
        }
    }

    /// Waits until this number of bytes may be read.
    pub fn wait(&self, bytes: usize) {
        let now = Instant::now();
        let paid = self.reserve(now, bytes);
        std::thread::sleep(paid.saturating_duration_since(now));
    }

    /// Reserves time after the reads so far, and returns when the read may proceed. Idle time is not saved up, so no
    /// burst follows.
    fn reserve(&self, now: Instant, bytes: usize) -> Instant {
        let mut paid = self.paid.lock().unwrap_or_else(|e| e.into_inner());
        *paid = (*paid).max(now) + self.rate.time_for(bytes);
        *paid
    }
}

/// A memory whose readers share a rate limit. Memory that is known to be zero does not count.
pub struct Paced<'a> {
    memory: &'a dyn PhysicalMemory,
    pace: &'a Pace,
}

impl<'a> Paced<'a> {
    /// Applies this rate limit to the memory.
    pub fn new(memory: &'a dyn PhysicalMemory, pace: &'a Pace) -> Self {
        Self { memory, pace }
    }
}

impl PhysicalMemory for Paced<'_> {
    fn ranges(&self) -> &[PhysRange] {
        self.memory.ranges()
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.pace.wait(buf.len());
        self.memory.read(phys, buf)
    }

    fn next_data(&self, phys: u64, end: u64) -> u64 {
        self.memory.next_data(phys, end)
    }

    fn next_present(&self, phys: u64, end: u64) -> u64 {
        self.memory.next_present(phys, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ones([PhysRange; 1]);

    impl PhysicalMemory for Ones {
        fn ranges(&self) -> &[PhysRange] {
            &self.0
        }

        fn read(&self, _phys: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
            buf.fill(1);
            Ok(())
        }
    }

    const MIB: usize = 1 << 20;

    #[test]
    fn rates_have_bounds() {
        for (mib_s, good) in [
            (0, false),
            (RATE_MIN_MIB_S - 1, false),
            (RATE_MIN_MIB_S, true),
            (RATE_MAX_MIB_S, true),
            (RATE_MAX_MIB_S + 1, false),
        ] {
            assert_eq!(Rate::mib_per_second(mib_s).is_some(), good, "{mib_s}");
        }
    }

    #[test]
    fn reads_queue_and_idle_time_is_lost() {
        let pace = Pace::new(Rate::mib_per_second(10).unwrap());
        let start = *pace.paid.lock().unwrap();
        let tenth = Duration::from_millis(100);
        assert_eq!(pace.reserve(start, MIB), start + tenth);
        assert_eq!(pace.reserve(start, 2 * MIB), start + 3 * tenth);
        let later = start + 50 * tenth;
        assert_eq!(pace.reserve(later, MIB), later + tenth);
    }

    #[test]
    fn threads_share_the_rate() {
        let end = 4 * MIB as u64;
        let memory = Ones([PhysRange { start: 0, end }]);
        let pace = Pace::new(Rate::mib_per_second(16).unwrap());
        let paced = Paced::new(&memory, &pace);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut buf = vec![0; MIB];
                    paced.read(0, &mut buf).unwrap();
                    assert_eq!(buf[MIB - 1], 1);
                });
            }
        });
        assert!(begun.elapsed() >= Duration::from_millis(250));
    }
}
