//! CPU, memory and I/O figures of the instance, from `/proc`.
//!
//! A guest reports the figures of its kernel. An agent of the embedded backend has no kernel of its own: it reports
//! sums over itself and its descendants, and the host's pressure figures. Samples are taken at most once per
//! [`SAMPLE_INTERVAL`], however many heartbeats ask.

mod processes;
mod system;

use std::time::{Duration, Instant};

use kmp_proto::message::PRESSURE_ABSENT;

/// Shortest time between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// The scope of the figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The whole kernel.
    System,
    /// This process and its descendants, limited to this much memory.
    Processes {
        /// KiB; 0 if there is no limit.
        memory_limit_kib: u64,
    },
}

/// One sample, as carried by a heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// CPUs the instance may use.
    pub cpu_count: u16,
    /// Busy share of their time since the sample before, 0 to 1000.
    pub cpu_busy_permille: u16,
    /// PSI `some avg10` in hundredths of a percent, or [`PRESSURE_ABSENT`].
    pub pressure_cpu: u16,
    /// The same for memory.
    pub pressure_memory: u16,
    /// The same for I/O.
    pub pressure_io: u16,
    /// Memory, KiB.
    pub memory_total_kib: u64,
    /// Memory that can still be had, KiB.
    pub memory_available_kib: u64,
    /// Bytes read from storage since the start.
    pub io_read_bytes: u64,
    /// Bytes written to storage since the start.
    pub io_write_bytes: u64,
}

/// Counters that only grow, and levels.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    /// CPU time spent busy, clock ticks.
    busy_ticks: u64,
    memory_total_kib: u64,
    memory_available_kib: u64,
    io_read_bytes: u64,
    io_write_bytes: u64,
}

/// Takes samples and keeps the last.
#[derive(Debug)]
pub struct Sampler {
    scope: Scope,
    cpu_count: u16,
    last: Option<(Instant, u64)>,
    figures: Figures,
}

impl Sampler {
    /// A sampler for `scope`; `cpu_count` CPUs, or as many as this process may use when 0.
    pub fn new(scope: Scope, cpu_count: usize) -> Self {
        let usable = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if cpu_count == 0 { usable } else { cpu_count };
        Self {
            scope,
            cpu_count: u16::try_from(count).unwrap_or(u16::MAX),
            last: None,
            figures: Figures::default(),
        }
    }

    /// The figures, sampled now when the last sample is older than [`SAMPLE_INTERVAL`].
    pub fn figures(&mut self) -> Figures {
        let now = Instant::now();
        let fresh = self
            .last
            .is_some_and(|(at, _)| now.duration_since(at) < SAMPLE_INTERVAL);
        if !fresh {
            self.sample(now);
        }
        self.figures
    }

    fn sample(&mut self, now: Instant) {
        let counters = match self.scope {
            Scope::System => system::counters(),
            Scope::Processes { memory_limit_kib } => processes::counters(memory_limit_kib),
        };
        let busy = self.last.map_or(0, |(at, ticks)| {
            let spent = counters.busy_ticks.saturating_sub(ticks);
            permille(spent, now.duration_since(at), self.cpu_count)
        });
        self.last = Some((now, counters.busy_ticks));
        self.figures = Figures {
            cpu_count: self.cpu_count,
            cpu_busy_permille: busy,
            pressure_cpu: pressure("cpu"),
            pressure_memory: pressure("memory"),
            pressure_io: pressure("io"),
            memory_total_kib: counters.memory_total_kib,
            memory_available_kib: counters.memory_available_kib,
            io_read_bytes: counters.io_read_bytes,
            io_write_bytes: counters.io_write_bytes,
        };
    }
}

/// The kernel's unit of CPU time in `/proc`, ticks a second: USER_HZ, 100 on every Linux that this
/// program is built for.
const TICKS_PER_SECOND: u64 = 100;

fn permille(ticks: u64, elapsed: Duration, cpus: u16) -> u16 {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let capacity = millis.saturating_mul(TICKS_PER_SECOND * u64::from(cpus)) / 1000;
    let share = ticks.saturating_mul(1000) / capacity.max(1);
    u16::try_from(share.min(1000)).unwrap_or(1000)
}

fn pressure(resource: &str) -> u16 {
    std::fs::read_to_string(format!("/proc/pressure/{resource}"))
        .ok()
        .and_then(|text| some_avg10(&text))
        .unwrap_or(PRESSURE_ABSENT)
}

/// `some avg10=1.23 avg60=…` in hundredths of a percent.
fn some_avg10(text: &str) -> Option<u16> {
    let line = text.lines().find_map(|l| l.strip_prefix("some avg10="))?;
    let (whole, rest) = line.split_once('.')?;
    let hundredths = rest.get(..2)?.parse::<u16>().ok()?;
    whole
        .parse::<u16>()
        .ok()?
        .checked_mul(100)?
        .checked_add(hundredths)
}

/// The number after `name` in a file of lines such as `Name:   123 kB` or `name 123`.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let first = words.next()?;
        let is_it = first.strip_suffix(':').unwrap_or(first) == name;
        is_it.then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_in_hundredths_of_a_percent() {
        let text = "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=99.00\n";
        assert_eq!(some_avg10(text), Some(1234));
        assert_eq!(some_avg10("full avg10=1.00\n"), None);
        assert_eq!(some_avg10("some avg10=x\n"), None);
    }

    #[test]
    fn counters_are_read_by_their_whole_name() {
        let text = "oom_kill_other 3\noom_kill 7\npgfault 1\n";
        assert_eq!(field(text, "oom_kill"), Some(7));
        assert_eq!(field(text, "oom"), None);
        let meminfo = "MemAvailable2: 1 kB\nMemAvailable:     182340 kB\n";
        assert_eq!(field(meminfo, "MemAvailable"), Some(182_340));
        assert_eq!(field("MemAvailable:\n", "MemAvailable"), None);
    }

    #[test]
    fn a_busy_process_shows_as_busy_and_its_memory_as_used() {
        let limit = 1 << 22;
        let mut sampler = Sampler::new(
            Scope::Processes {
                memory_limit_kib: limit,
            },
            1,
        );
        let first = sampler.figures();
        assert_eq!(first.cpu_busy_permille, 0);
        assert!(first.memory_available_kib < limit && first.memory_available_kib > 0);
        let begin = Instant::now();
        let mut spins = 0_u64;
        while begin.elapsed() <= SAMPLE_INTERVAL {
            spins = std::hint::black_box(spins + 1);
        }
        assert!(sampler.figures().cpu_busy_permille > 100);
    }

    #[test]
    fn a_guest_reports_its_kernels_figures() {
        let figures = Sampler::new(Scope::System, 0).figures();
        assert!(figures.memory_total_kib > figures.memory_available_kib);
        assert!(figures.memory_available_kib > 0);
        assert!(figures.cpu_count > 0);
    }

    #[test]
    fn the_busy_share_never_exceeds_the_whole() {
        assert_eq!(permille(u64::MAX, Duration::ZERO, 1), 1000);
        assert_eq!(permille(50, Duration::from_secs(1), 1), 500);
        assert_eq!(permille(50, Duration::from_secs(1), 2), 250);
    }
}
