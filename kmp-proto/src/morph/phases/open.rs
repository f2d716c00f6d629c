//! The phases up to the validation: the source serves, and a rollback is always possible.

use std::time::Duration;

use super::super::events::CommitLimit;
use super::super::negotiation::{self, Choice, Offer};
use super::super::reasons::{Incompatible, Invalid, OverBudget};
use super::super::{Config, Estimate, ROUNDS_MAX};
use super::commit::Freezing;
use super::{Morph, Pair};
use crate::message::{Check, CheckResult, Side, StateProvider, TransferMode};

/// The target kernel boots; both sides acknowledge.
#[derive(Debug)]
pub struct Preparing {
    pub(in crate::morph) config: Config,
    target_healthy: bool,
    source_ready: bool,
    target_ready: bool,
}

/// Both sides state their capabilities.
#[derive(Debug)]
pub struct Negotiating {
    pub(in crate::morph) config: Config,
    source: Option<Offer>,
    target: Option<Offer>,
}

/// A round is under way while the source serves.
#[derive(Debug)]
pub struct Transferring {
    pub(in crate::morph) transfer: Transfer,
}

/// The first round is applied, and the validation has not been requested yet.
#[derive(Debug)]
pub struct Held {
    pub(in crate::morph) transfer: Transfer,
    applied: Round,
}

/// The target validates the received state.
#[derive(Debug)]
pub struct Validating {
    pub(in crate::morph) transfer: Transfer,
}

/// The target has validated its state. Only [`Morph::on_report`] creates this phase, and only this phase commits.
#[derive(Debug)]
pub struct Committable {
    pub(in crate::morph) transfer: Transfer,
}

/// The transfer of state, and its measurements.
#[derive(Debug)]
pub(in crate::morph) struct Transfer {
    pub(in crate::morph) config: Config,
    pub(in crate::morph) provider: StateProvider,
    pub(in crate::morph) mode: TransferMode,
    /// Number of the round under way, or of the last one.
    pub(in crate::morph) round: u32,
    dirty_bytes: u64,
    bytes_per_s: u64,
    /// Expected duration of the commit's exchanges.
    exchanges: Duration,
}

/// The data moved by a round.
#[derive(Clone, Copy, Debug)]
pub(in crate::morph) struct Round {
    pub(in crate::morph) sent_bytes: u64,
    pub(in crate::morph) dirty_bytes: u64,
    pub(in crate::morph) took: Duration,
}

/// The next phase after an acknowledgement.
pub(in crate::morph) enum Preparation {
    /// The acknowledgement of the other side is missing.
    Waiting(Morph<Preparing>),
    /// Both sides have acknowledged.
    Ready(Morph<Negotiating>),
}

/// The next phase after an offer.
pub(in crate::morph) enum Agreement {
    /// The offer of the other side is missing.
    Waiting(Morph<Negotiating>),
    /// Both sides can do what is required.
    Agreed(Morph<Transferring>, Choice),
    /// The sides are incompatible.
    Refused(Pair, Incompatible),
}

/// The next phase after a round.
pub(in crate::morph) enum Progress {
    /// Another round, which makes the last one shorter.
    Again(Morph<Transferring>),
    /// The validation.
    Over(Morph<Validating>),
    /// A user must request the validation.
    Held(Morph<Held>),
}

impl Morph<Preparing> {
    /// Begins a morph.
    pub fn begin(config: Config, source: u64, target: u64) -> Self {
        Self {
            pair: Pair { source, target },
            phase: Preparing {
                config,
                target_healthy: false,
                source_ready: false,
                target_ready: false,
            },
        }
    }

    /// Records that the target is healthy. Returns false if that was known.
    pub(in crate::morph) fn target_is_healthy(&mut self) -> bool {
        !std::mem::replace(&mut self.phase.target_healthy, true)
    }

    /// Records the acknowledgement of a side. The target's counts only once the target is healthy: it is not asked
    /// before.
    pub(in crate::morph) fn prepared(mut self, side: Side) -> Preparation {
        match side {
            Side::Source => self.phase.source_ready = true,
            Side::Target => self.phase.target_ready = self.phase.target_healthy,
        }
        if !(self.phase.source_ready && self.phase.target_ready) {
            return Preparation::Waiting(self);
        }
        let phase = Negotiating {
            config: self.phase.config,
            source: None,
            target: None,
        };
        Preparation::Ready(Self::with(self.pair, phase))
    }
}

impl Morph<Negotiating> {
    /// Records the offer of a side.
    pub(in crate::morph) fn offered(mut self, side: Side, offer: Offer) -> Agreement {
        match side {
            Side::Source => self.phase.source = Some(offer),
            Side::Target => self.phase.target = Some(offer),
        }
        let Negotiating {
            config,
            source: Some(source),
            target: Some(target),
        } = &self.phase
        else {
            return Agreement::Waiting(self);
        };
        match negotiation::negotiate(config, source, target) {
            Ok(choice) => {
                let exchanges = negotiation::exchanges(source, target);
                Agreement::Agreed(self.agreed(&choice, exchanges), choice)
            }
            Err(incompatible) => Agreement::Refused(self.pair, incompatible),
        }
    }

    pub(in crate::morph) fn agreed(
        self,
        choice: &Choice,
        exchanges: Duration,
    ) -> Morph<Transferring> {
        let transfer = Transfer {
            config: self.phase.config,
            provider: choice.provider,
            mode: choice.mode,
            round: 1,
            dirty_bytes: 0,
            bytes_per_s: 0,
            exchanges,
        };
        Self::with(self.pair, Transferring { transfer })
    }
}

impl Morph<Transferring> {
    /// Records an applied round.
    pub(in crate::morph) fn applied(self, round: Round) -> Progress {
        let transfer = self.phase.transfer;
        if transfer.config.validate_on_request && transfer.round == 1 {
            let phase = Held {
                transfer,
                applied: round,
            };
            return Progress::Held(Self::with(self.pair, phase));
        }
        Self::after(self.pair, transfer, round)
    }

    fn after(pair: Pair, mut transfer: Transfer, round: Round) -> Progress {
        if transfer.applied(round) {
            transfer.round += 1;
            return Progress::Again(Self::with(pair, Transferring { transfer }));
        }
        Progress::Over(Self::with(pair, Validating { transfer }))
    }
}

impl Morph<Held> {
    /// Records the request for the validation, which begins as soon as another round is not worth its time.
    pub(in crate::morph) fn go_on(self) -> Progress {
        let Held { transfer, applied } = self.phase;
        Morph::<Transferring>::after(self.pair, transfer, applied)
    }
}

impl Morph<Validating> {
    /// Handles the validation report. The only origin of a [`Committable`].
    ///
    /// # Errors
    /// The failed checks; an empty list if the report has no checks.
    pub fn on_report(self, checks: &[Check]) -> Result<Morph<Committable>, Invalid> {
        let failed = checks.iter().filter(|c| c.result == CheckResult::Failed);
        let failed: Vec<_> = failed.cloned().collect();
        if checks.is_empty() || !failed.is_empty() {
            return Err(Invalid { failed });
        }
        let transfer = self.phase.transfer;
        Ok(Self::with(self.pair, Committable { transfer }))
    }
}

impl Morph<Committable> {
    /// Returns the expected downtime.
    pub fn estimate(&self) -> Estimate {
        let transfer = &self.phase.transfer;
        let last_round = match transfer.mode {
            // No copy is needed: the target can reach the changed state already.
            TransferMode::ByReference => Duration::ZERO,
            TransferMode::Rounds => transfer.last_round(),
        };
        Estimate {
            measured: transfer.exchanges.saturating_add(last_round),
            overhead: transfer.config.step_overhead,
        }
    }

    /// Decides to commit.
    ///
    /// # Errors
    /// The unchanged morph, if the estimate is above the limit.
    #[expect(
        clippy::result_large_err,
        reason = "a refusal gives the morph back; it is moved once in a morph's life"
    )]
    pub fn commit(self, limit: CommitLimit) -> Result<Morph<Freezing>, (Self, OverBudget)> {
        let estimate = self.estimate().total();
        let budget = match limit {
            CommitLimit::Planned => self.phase.transfer.config.downtime_budget,
            CommitLimit::Within(budget) => budget,
            CommitLimit::None => Duration::MAX,
        };
        if estimate > budget {
            return Err((self, OverBudget { estimate, budget }));
        }
        let Transfer {
            provider,
            mode,
            round,
            ..
        } = self.phase.transfer;
        let phase = Freezing {
            provider,
            mode,
            round,
        };
        Ok(Self::with(self.pair, phase))
    }
}

impl Transfer {
    /// Returns the expected duration of the last round at this time.
    fn last_round(&self) -> Duration {
        if self.dirty_bytes == 0 {
            return Duration::ZERO;
        }
        let nanos =
            u128::from(self.dirty_bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Records the result of a round. Returns true if another round is worth its time: the mode copies state, the
    /// last round would take more than half of the budget, and this round has made it shorter.
    fn applied(&mut self, round: Round) -> bool {
        let before = self.last_round();
        let first = self.round <= 1;
        if round.sent_bytes > 0 {
            let nanos = round.took.as_nanos().max(1);
            let rate = u128::from(round.sent_bytes) * 1_000_000_000 / nanos;
            self.bytes_per_s = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        self.dirty_bytes = round.dirty_bytes;
        let now = self.last_round();
        self.mode == TransferMode::Rounds
            && now > self.config.downtime_budget / 2
            && self.round < ROUNDS_MAX
            && (first || now < before)
    }
}
