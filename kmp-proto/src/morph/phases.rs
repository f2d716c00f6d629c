//! The phases of a morph as types: each owns only its phase's data, each transition consumes it.

use std::time::Duration;

use super::{Config, ROUNDS_MAX};
use crate::message::{Check, CheckResult, TransferMode};

/// A morph in the phase `P`.
#[derive(Debug)]
pub struct Morph<P> {
    pub(super) config: Config,
    pub(super) phase: P,
}

/// The target kernel boots; both sides acknowledge.
#[derive(Debug, Default)]
pub struct Preparing {
    pub(super) new_healthy: bool,
    pub(super) old_ready: bool,
    pub(super) new_ready: bool,
}

/// Both state what they can do.
#[derive(Debug, Default)]
pub struct Negotiating {
    pub(super) old: Option<super::Offer>,
    pub(super) new: Option<super::Offer>,
}

/// State moves while the source kernel serves.
#[derive(Debug)]
pub struct Transferring {
    pub(super) mode: TransferMode,
    pub(super) rounds: Rounds,
}

/// What is known of the rounds so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rounds {
    pub(super) number: u32,
    pub(super) dirty_bytes: u64,
    pub(super) bytes_per_s: u64,
    /// What the exchanges of the commit take.
    pub(super) exchanges: Duration,
}

impl Rounds {
    /// How long the last round would take now.
    pub(super) fn last_round(self) -> Duration {
        if self.dirty_bytes == 0 {
            return Duration::ZERO;
        }
        let nanos =
            u128::from(self.dirty_bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes the result of a copied round. True when another one is worth its time: the last round would
    /// take more than half of the budget, and this one made it shorter.
    pub(super) fn applied(
        &mut self,
        budget: Duration,
        sent: u64,
        dirty: u64,
        took: Duration,
    ) -> bool {
        let before = self.last_round();
        let first = self.number <= 1;
        if sent > 0 {
            let nanos = took.as_nanos().max(1);
            let rate = u128::from(sent) * 1_000_000_000 / nanos;
            self.bytes_per_s = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        self.dirty_bytes = dirty;
        let now = self.last_round();
        now > budget / 2 && self.number < ROUNDS_MAX && (first || now < before)
    }
}

/// The target kernel checks what it has.
#[derive(Debug)]
pub struct Validating {
    pub(super) mode: TransferMode,
    pub(super) rounds: Rounds,
}

/// Validated; waits for the commit.
#[derive(Debug)]
pub struct Committable {
    pub(super) mode: TransferMode,
    pub(super) rounds: Rounds,
}

/// Past the decision to commit.
#[derive(Debug)]
pub struct Committing {
    pub(super) mode: TransferMode,
    pub(super) rounds: Rounds,
}

/// The proof that the target kernel has validated its state. Made by [`Morph::on_report`] only.
#[derive(Debug)]
pub struct Validated {
    _proof: (),
}

/// Why a morph cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// Checks that did not hold.
    #[error("validation failed: {}", .0.join("; "))]
    Validation(Vec<String>),
    /// The estimated downtime is above the budget.
    #[error("the estimated downtime of {estimate:?} is above the budget of {budget:?}")]
    OverBudget {
        /// The estimate.
        estimate: Duration,
        /// The budget.
        budget: Duration,
    },
}

impl Morph<Preparing> {
    /// Begins.
    pub fn begin(config: Config) -> Self {
        Self {
            config,
            phase: Preparing::default(),
        }
    }

    /// Both sides are ready.
    pub(super) fn ready(self) -> Morph<Negotiating> {
        Morph {
            config: self.config,
            phase: Negotiating::default(),
        }
    }
}

impl Morph<Negotiating> {
    pub(super) fn agreed(self, mode: TransferMode, exchanges: Duration) -> Morph<Transferring> {
        let rounds = Rounds {
            number: 1,
            exchanges,
            ..Rounds::default()
        };
        Morph {
            config: self.config,
            phase: Transferring { mode, rounds },
        }
    }
}

impl Morph<Transferring> {
    pub(super) fn transferred(self) -> Morph<Validating> {
        let Transferring { mode, rounds } = self.phase;
        Morph {
            config: self.config,
            phase: Validating { mode, rounds },
        }
    }
}

impl Morph<Validating> {
    /// Takes the validation report. The only origin of [`Validated`].
    ///
    /// # Errors
    /// [`Failed::Validation`] with the checks that did not hold.
    pub fn on_report(self, checks: &[Check]) -> Result<(Morph<Committable>, Validated), Failed> {
        let failed: Vec<_> = checks
            .iter()
            .filter(|c| c.result == CheckResult::Failed)
            .map(|c| format!("{}: {}", c.name, c.detail))
            .collect();
        if checks.is_empty() {
            return Err(Failed::Validation(vec![
                "the report lists no check".to_owned(),
            ]));
        }
        if !failed.is_empty() {
            return Err(Failed::Validation(failed));
        }
        let Validating { mode, rounds } = self.phase;
        let phase = Committable { mode, rounds };
        Ok((
            Morph {
                config: self.config,
                phase,
            },
            Validated { _proof: () },
        ))
    }
}

impl Morph<Committable> {
    /// The downtime to expect.
    pub fn estimate(&self) -> Duration {
        let last_round = match self.phase.mode {
            // Nothing is copied: what changes is in the target's reach already.
            TransferMode::ByReference => Duration::ZERO,
            TransferMode::Rounds => self.phase.rounds.last_round(),
        };
        let exchanges = self.phase.rounds.exchanges;
        let steps = self.config.step_overhead.saturating_add(exchanges);
        steps.saturating_add(last_round)
    }

    /// Decides to commit: consumes the proof of validation.
    ///
    /// # Errors
    /// [`Failed::OverBudget`], with the morph and its proof unchanged, when the estimate is above
    /// the budget and `force` is not set.
    #[expect(
        clippy::result_large_err,
        reason = "a refusal gives the morph back; it is moved once in a morph's life"
    )]
    pub fn commit(
        self,
        proof: Validated,
        force: bool,
    ) -> Result<Morph<Committing>, (Self, Validated, Failed)> {
        let (estimate, budget) = (self.estimate(), self.config.downtime_budget);
        if estimate > budget && !force {
            return Err((self, proof, Failed::OverBudget { estimate, budget }));
        }
        let Committable { mode, rounds } = self.phase;
        Ok(Morph {
            config: self.config,
            phase: Committing { mode, rounds },
        })
    }
}
