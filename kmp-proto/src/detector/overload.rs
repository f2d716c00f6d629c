//! Overload, derived from the instance's own figures: reported, but never a reason to fence.

use std::fmt;

use crate::message::{HeartbeatRspFixed, PRESSURE_ABSENT, WorkloadState};
use crate::time::Instant;

/// Number of consecutive samples above (or below) the limits that change the result: a spike is not an
/// overload, and a dip is not a relief.
pub const OVERLOAD_SAMPLES: u32 = 5;
/// CPU pressure (PSI `some avg10`) of an overloaded instance, hundredths of a percent.
const CPU_LIMIT: u16 = 90_00;
/// Memory pressure of an overloaded instance, hundredths of a percent.
const MEMORY_LIMIT: u16 = 50_00;
/// I/O pressure of an overloaded instance, hundredths of a percent.
const IO_LIMIT: u16 = 90_00;

/// The load that one heartbeat answer reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// CPU pressure, hundredths of a percent; [`PRESSURE_ABSENT`] if unknown.
    pub pressure_cpu: u16,
    /// Memory pressure.
    pub pressure_memory: u16,
    /// I/O pressure.
    pub pressure_io: u16,
    /// The program has failed or ended.
    pub workload_down: bool,
}

impl From<&HeartbeatRspFixed> for Sample {
    fn from(answer: &HeartbeatRspFixed) -> Self {
        Self {
            pressure_cpu: answer.pressure_cpu,
            pressure_memory: answer.pressure_memory,
            pressure_io: answer.pressure_io,
            workload_down: matches!(
                answer.workload,
                WorkloadState::Failed | WorkloadState::Exited
            ),
        }
    }
}

impl Sample {
    /// Returns the sample without pressure figures, for an instance that is a process: the figures describe
    /// the whole machine.
    #[must_use]
    pub fn without_pressure(self) -> Self {
        Self {
            pressure_cpu: PRESSURE_ABSENT,
            pressure_memory: PRESSURE_ABSENT,
            pressure_io: PRESSURE_ABSENT,
            ..self
        }
    }

    /// Returns the figures above their limits.
    fn excess(self) -> Option<Excess> {
        let above = |value: u16, limit: u16| value != PRESSURE_ABSENT && value >= limit;
        if self.workload_down {
            Some(Excess::WorkloadDown)
        } else if above(self.pressure_memory, MEMORY_LIMIT) {
            Some(Excess::Memory(self.pressure_memory))
        } else if above(self.pressure_cpu, CPU_LIMIT) {
            Some(Excess::Cpu(self.pressure_cpu))
        } else if above(self.pressure_io, IO_LIMIT) {
            Some(Excess::Io(self.pressure_io))
        } else {
            None
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Excess {
    WorkloadDown,
    Memory(u16),
    Cpu(u16),
    Io(u16),
}

/// An overload, with its evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    /// Start of the overload.
    pub since: Instant,
    excess: Excess,
}

impl Overload {
    /// Returns whether a load is part of the evidence; the end of the program is evidence, but not a load.
    pub fn is_load(&self) -> bool {
        self.excess != Excess::WorkloadDown
    }
}

impl fmt::Display for Overload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut stalled = |what: &str, value: u16| {
            let (whole, hundredths) = (value / 100, value % 100);
            write!(
                f,
                "its programs waited for {what} {whole}.{hundredths:02} % of the time"
            )
        };
        match self.excess {
            Excess::WorkloadDown => f.write_str("its program had ended"),
            Excess::Memory(value) => stalled("memory", value),
            Excess::Cpu(value) => stalled("a CPU", value),
            Excess::Io(value) => stalled("I/O", value),
        }
    }
}

/// Evaluates the samples.
#[derive(Debug, Default)]
pub(super) struct Watch {
    overload: Option<Overload>,
    /// Number of consecutive samples that contradict the current result.
    contrary: u32,
    contrary_since: Option<Instant>,
}

impl Watch {
    pub(super) fn overload(&self) -> Option<&Overload> {
        self.overload.as_ref()
    }

    pub(super) fn take(&mut self, sample: Sample, now: Instant) {
        let excess = sample.excess();
        if excess.is_some() == self.overload.is_some() {
            self.contrary = 0;
            self.contrary_since = None;
            if let (Some(overload), Some(excess)) = (&mut self.overload, excess) {
                overload.excess = excess;
            }
            return;
        }
        let since = *self.contrary_since.get_or_insert(now);
        self.contrary += 1;
        if self.contrary >= OVERLOAD_SAMPLES {
            self.overload = excess.map(|excess| Overload { since, excess });
            self.contrary = 0;
            self.contrary_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(pressure_memory: u16) -> Sample {
        Sample {
            pressure_cpu: PRESSURE_ABSENT,
            pressure_memory,
            pressure_io: 0,
            workload_down: false,
        }
    }

    #[test]
    fn a_spike_is_no_overload_and_a_dip_is_no_relief() {
        let mut watch = Watch::default();
        let mut at = 0;
        let mut take = |watch: &mut Watch, memory: u16, times: u32| {
            for _ in 0..times {
                at += 1;
                watch.take(sample(memory), Instant::from_nanos(at));
            }
        };
        take(&mut watch, 80_00, OVERLOAD_SAMPLES - 1);
        take(&mut watch, 0, 1);
        assert_eq!(watch.overload(), None);
        take(&mut watch, 80_25, OVERLOAD_SAMPLES);
        let overload = watch.overload().copied();
        assert_eq!(
            overload.map(|o| o.to_string()),
            Some("its programs waited for memory 80.25 % of the time".to_owned())
        );
        assert_eq!(
            overload.map(|o| o.since),
            Some(Instant::from_nanos(u64::from(OVERLOAD_SAMPLES) + 1))
        );
        take(&mut watch, 0, OVERLOAD_SAMPLES - 1);
        assert!(watch.overload().is_some());
        take(&mut watch, 0, 1);
        assert_eq!(watch.overload(), None);
    }

    #[test]
    fn a_kernel_without_pressure_figures_is_not_overloaded_by_that() {
        let mut watch = Watch::default();
        for at in 0..20 {
            watch.take(sample(PRESSURE_ABSENT), Instant::from_nanos(at));
        }
        assert_eq!(watch.overload(), None);
    }

    #[test]
    fn what_belongs_to_the_machine_is_no_load_of_the_instance() {
        let mut all = Sample {
            pressure_cpu: 10_000,
            pressure_io: 10_000,
            ..sample(10_000)
        };
        let judged = |sample: Sample| {
            let mut watch = Watch::default();
            for at in 0..u64::from(OVERLOAD_SAMPLES) {
                watch.take(sample, Instant::from_nanos(at));
            }
            watch.overload().map(Overload::is_load)
        };
        assert_eq!(judged(all), Some(true));
        assert_eq!(judged(all.without_pressure()), None);
        all.workload_down = true;
        assert_eq!(judged(all.without_pressure()), Some(false));
    }
}
