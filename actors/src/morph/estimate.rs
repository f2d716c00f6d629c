//! Estimates the overhead of a commit on this machine from earlier commits.
//!
//! The engine estimates the last round and the exchanges with both sides, which it has measured, and adds an overhead:
//! the durable write of the commit record, and everything else that it cannot measure beforehand. The overhead of the
//! next morph is the median overhead of the latest ones.

use std::collections::VecDeque;
use std::time::Duration;

use kmp_proto::message::TransferMode;

use crate::model::rows::MorphRow;

/// Number of commits kept for each mode.
const REMEMBERED: usize = 9;
/// The overhead before the first commit.
const UNKNOWN: Duration = Duration::from_millis(1);

/// The overheads of the latest commits, by mode.
#[derive(Debug, Default)]
pub struct Downtimes {
    by_reference: VecDeque<Duration>,
    rounds: VecDeque<Duration>,
}

impl Downtimes {
    /// Learns from the journal's morphs, oldest first.
    pub fn from_journal(morphs: &[MorphRow]) -> Self {
        let mut known = Self::default();
        for morph in morphs {
            known.learn(morph);
        }
        known
    }

    /// Learns from a morph that has ended; ignores morphs without a commit.
    pub fn learn(&mut self, morph: &MorphRow) {
        let taken = morph.status.downtime.as_ref().map(|steps| steps.total_us);
        let (Some(taken), Some(measured)) = (taken, morph.estimate_without_overhead_us) else {
            return;
        };
        let overheads = match morph.status.mode.as_deref() {
            Some("by_reference") => &mut self.by_reference,
            Some("rounds") => &mut self.rounds,
            _ => return,
        };
        if overheads.len() == REMEMBERED {
            overheads.pop_front();
        }
        overheads.push_back(Duration::from_micros(taken.saturating_sub(measured)));
    }

    /// Returns the expected overhead of the next commit.
    pub fn overhead(&self, mode: TransferMode) -> Duration {
        let known = match mode {
            TransferMode::ByReference => &self.by_reference,
            TransferMode::Rounds => &self.rounds,
        };
        let mut sorted: Vec<_> = known.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(UNKNOWN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::rows::KernelChoice;
    use crate::model::{DowntimeSteps, MorphPhase, MorphRecord};

    fn morph(mode: &str, measured: Option<u64>, taken: Option<u64>) -> MorphRow {
        let downtime = taken.map(|total_us| DowntimeSteps {
            total_us,
            ..DowntimeSteps::default()
        });
        MorphRow {
            status: MorphRecord {
                instance: "web".to_owned(),
                session: 1,
                operation: "op-1".to_owned(),
                phase: MorphPhase::Committed,
                from_generation: 1,
                to_generation: 2,
                from_kernel: String::new(),
                to_kernel: String::new(),
                provider: None,
                other_providers: Vec::new(),
                mode: Some(mode.to_owned()),
                state_bytes: 0,
                sent_bytes: 0,
                rounds: 1,
                checks: Vec::new(),
                downtime_budget_us: 10_000,
                estimated_downtime_us: None,
                expires_at: None,
                downtime,
                reason: None,
                started_at: String::new(),
                ended_at: None,
            },
            phase: "done".to_owned(),
            committed: true,
            kernel: KernelChoice {
                path: "/boot/vmlinuz".into(),
                release: "6.1".to_owned(),
                sha256: String::new(),
                cmdline: String::new(),
                initramfs: None,
            },
            estimate_without_overhead_us: measured,
        }
    }

    #[test]
    fn the_next_estimate_is_what_the_last_commits_took() {
        let mut known = Downtimes::default();
        assert_eq!(known.overhead(TransferMode::Rounds), UNKNOWN);
        for taken in [21_000, 400_000, 19_000, 20_000, 22_000] {
            known.learn(&morph("rounds", Some(5_000), Some(taken)));
        }
        // A single slow commit does not change the median.
        assert_eq!(
            known.overhead(TransferMode::Rounds),
            Duration::from_millis(16)
        );
        assert_eq!(known.overhead(TransferMode::ByReference), UNKNOWN);
        known.learn(&morph("by_reference", Some(500), None));
        assert_eq!(
            known.overhead(TransferMode::ByReference),
            UNKNOWN,
            "it was rolled back"
        );
    }

    #[test]
    fn a_machine_that_changes_is_learned_anew() {
        let before = vec![morph("by_reference", Some(500), Some(2_500)); 40];
        let mut known = Downtimes::from_journal(&before);
        assert_eq!(
            known.overhead(TransferMode::ByReference),
            Duration::from_millis(2)
        );
        for _ in 0..REMEMBERED / 2 + 1 {
            known.learn(&morph("by_reference", Some(500), Some(8_500)));
        }
        assert_eq!(
            known.overhead(TransferMode::ByReference),
            Duration::from_millis(8)
        );
    }
}
