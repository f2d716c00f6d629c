//! Whether each CPU of a guest runs at all: a thread on each gives a sign of life, a pulse, several times a second.
//!
//! A CPU that hangs with interrupts off takes nothing with it but what was on it, and the others answer for the guest.
//!
//! Time is counted in pulses, not taken from a clock: a guest that stood still as a whole finds that all its CPUs are late,
//! and none of them is to blame. The count goes on by one when any CPU gives its pulse and an interval is over since it
//! went on last; what a CPU is behind it is for how long that CPU has run nothing while another one ran.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kmp_proto::message::CpuStall;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::priority::Scheduling;

/// Time between two pulses of a CPU.
const PULSE_INTERVAL: Duration = Duration::from_millis(250);
/// Pulses that a CPU may miss and is not reported: a busy CPU, or a busy host, is late by some.
const MISSED_MAX: u64 = 3;
/// Stack of a thread that gives pulses, bytes.
const STACK_BYTES: usize = 64 << 10;

/// The pulses of all CPUs.
#[derive(Clone, Debug)]
pub struct Pulses(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    begun: Instant,
    /// The count, see the module.
    count: AtomicU64,
    /// When it went on last, nanoseconds since `begun`.
    went_on: AtomicU64,
    /// Number and last pulse of each CPU.
    cpus: Vec<(u16, AtomicU64)>,
}

impl Pulses {
    /// Pulses that nobody gives: of an instance that has no kernel of its own.
    pub fn none() -> Self {
        Self::of(Vec::new())
    }

    /// Starts a thread on each CPU that the agent was started with. One CPU alone needs none: when it hangs, nobody answers.
    ///
    /// # Errors
    /// When the system gives no thread, or does not tell which CPUs there are. Threads that were started go on.
    pub fn start(started_with: &Scheduling) -> io::Result<Self> {
        let usable = started_with.usable_cpus()?.into_iter();
        let usable: Vec<u16> = usable.filter_map(|cpu| u16::try_from(cpu).ok()).collect();
        if usable.len() < 2 {
            return Ok(Self::none());
        }
        let pulses = Self::of(usable.clone());
        for (place, cpu) in usable.into_iter().enumerate() {
            let pulses = pulses.clone();
            let thread = std::thread::Builder::new().name(format!("pulse-{cpu}"));
            thread.stack_size(STACK_BYTES).spawn(move || {
                let mut own = CpuSet::new();
                // Where it cannot be had, such as a CPU that was taken offline, another CPU gives its pulses.
                let _ = own
                    .set(cpu.into())
                    .and_then(|()| sched_setaffinity(Pid::from_raw(0), &own));
                loop {
                    pulses.pulse(place, pulses.0.begun.elapsed());
                    std::thread::sleep(PULSE_INTERVAL);
                }
            })?;
        }
        Ok(pulses)
    }

    fn of(cpus: Vec<u16>) -> Self {
        Self(Arc::new(Counts {
            begun: Instant::now(),
            count: AtomicU64::new(0),
            went_on: AtomicU64::new(0),
            cpus: cpus
                .into_iter()
                .map(|cpu| (cpu, AtomicU64::new(0)))
                .collect(),
        }))
    }

    /// The CPU in this place of the list lives, so long after the start.
    fn pulse(&self, place: usize, now: Duration) {
        let counts = &self.0;
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let interval = u64::try_from(PULSE_INTERVAL.as_nanos()).unwrap_or(u64::MAX);
        let went_on = counts.went_on.load(Ordering::Relaxed);
        if now.saturating_sub(went_on) >= interval {
            let order = Ordering::Relaxed;
            // Of several that see the interval over, one goes on.
            let won = counts.went_on.compare_exchange(went_on, now, order, order);
            if won.is_ok() {
                counts.count.fetch_add(1, order);
            }
        }
        if let Some((_, last)) = counts.cpus.get(place) {
            last.store(counts.count.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The CPUs that run nothing, if there are any.
    pub fn stall(&self) -> Option<CpuStall> {
        let count = self.0.count.load(Ordering::Relaxed);
        let behind = self.0.cpus.iter().map(|(cpu, last)| {
            let missed = count.saturating_sub(last.load(Ordering::Relaxed));
            (missed, *cpu)
        });
        let stalled: Vec<_> = behind.filter(|(missed, _)| *missed > MISSED_MAX).collect();
        let (missed, cpu) = *stalled.iter().max_by_key(|(missed, _)| *missed)?;
        let interval = u64::try_from(PULSE_INTERVAL.as_millis()).unwrap_or(u64::MAX);
        Some(CpuStall {
            cpu,
            count: u16::try_from(stalled.len()).unwrap_or(u16::MAX),
            stalled_ms: u32::try_from(missed.saturating_mul(interval)).unwrap_or(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pulses of the CPUs in these places, once in each interval from `begin` to `end`, in milliseconds.
    fn beat(pulses: &Pulses, places: &[usize], begin: u64, end: u64) {
        for at in (begin..end).step_by(250) {
            for place in places {
                pulses.pulse(*place, Duration::from_millis(at));
            }
        }
    }

    #[test]
    fn a_cpu_that_gives_no_pulse_while_others_do_is_named_with_the_time() {
        let pulses = Pulses::of(vec![0, 1, 5]);
        beat(&pulses, &[0, 1, 2], 250, 5_000);
        assert_eq!(pulses.stall(), None);
        beat(&pulses, &[0, 1], 5_000, 5_750);
        assert_eq!(pulses.stall(), None, "three missed");
        beat(&pulses, &[0], 5_750, 8_000);
        let stall = pulses.stall().unwrap();
        assert_eq!((stall.cpu, stall.count, stall.stalled_ms), (5, 2, 3_000));
        beat(&pulses, &[0, 1, 2], 8_000, 8_250);
        assert_eq!(pulses.stall(), None);
    }

    #[test]
    fn a_guest_that_stood_still_has_no_cpu_to_blame() {
        let pulses = Pulses::of(vec![0, 1]);
        beat(&pulses, &[0, 1], 250, 1_000);
        // An hour later CPU 0 is the first to go on.
        beat(&pulses, &[0], 3_600_000, 3_600_250);
        assert_eq!(pulses.stall(), None);
    }

    #[test]
    fn one_cpu_alone_is_not_asked() {
        let pulses = Pulses::of(vec![0]);
        beat(&pulses, &[], 0, 10_000);
        assert_eq!(pulses.stall(), None);
        assert_eq!(Pulses::none().stall(), None);
    }

    #[test]
    fn the_cpus_of_this_machine_give_pulses() {
        let pulses = Pulses::start(&Scheduling::default()).unwrap();
        let wanted = u64::from(!pulses.0.cpus.is_empty()) * 2;
        let deadline = Instant::now() + Duration::from_secs(60);
        while pulses.0.count.load(Ordering::Relaxed) < wanted {
            assert!(Instant::now() < deadline, "{pulses:?}");
            std::thread::sleep(PULSE_INTERVAL / 10);
        }
    }
}
