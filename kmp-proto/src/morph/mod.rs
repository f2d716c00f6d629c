//! Morph: moving a running workload from one kernel to another.
//!
//! ```text
//! Preparing ─▶ Negotiating ─▶ Transferring ─▶ Validating ─▶ Committable ─▶ Committing ─▶ Done
//!     │             │              │              │              │             │
//!     └─────────────┴──────────────┴──────┬───────┴──────────────┘             │ before the
//!                                         ▼                                    │ commit record
//!                                    RollingBack ◀─────────────────────────────┘
//! ```
//!
//! The order of the steps of a commit is fixed:
//!
//! ```text
//! FREEZE source ─▶ last round ─▶ ACTIVATE target ─▶ commit record durable ─▶ SERVE target ─▶ RETIRE source ─▶ fence source
//!                                                   └── the commit point ──┘
//! ```
//!
//! Invariants:
//! * Before the commit record, the morph ends with the source serving and the target fenced; after it, with the target
//!   serving and the source fenced. So both never serve.
//! * Types with a single origin enforce this: only a [`Committable`] morph commits, and only [`Morph::on_report`]
//!   creates one; SERVE is sent with a [`CommitRecord`], which the journal creates from a [`CommitOrder`]; the source
//!   is asked to resume with the target's [`FenceCertificate`](crate::fence::FenceCertificate).
//! * Every phase has a deadline, except those that wait for the journal or a backend, which bound their own work.

mod engine;
mod events;
mod negotiation;
mod phases;
mod reasons;
mod record;
mod stage;
mod transitions;

pub use engine::Engine;
pub use events::{Action, Answer, CommitLimit, Estimate, Event, Outcome};
pub use negotiation::{Choice, Offer, PassedOver, WhyNot, negotiate};
pub use phases::{
    Activating, Committable, FencingSource, FencingTarget, Freezing, Held, LastRound, Morph,
    Negotiating, Preparing, Recording, Resuming, Retiring, Serving, Transferring, Validating,
};
pub use reasons::{
    Incompatible, Invalid, Missing, OverBudget, RollbackReason, SourceFailure, TargetFailure,
};
pub use record::{CommitOrder, CommitRecord};
pub use stage::{Phase, Stage};
pub use transitions::TRANSITIONS;

use std::time::Duration;

use crate::message::StateProvider;

/// Maximum number of pre-copy rounds before the last round.
pub const ROUNDS_MAX: u32 = 10;
/// Time limit for each step between the freeze and the commit record, while the workload is frozen.
pub const FROZEN_STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum wait for the answer to SERVE, or to the source's rollback, before the request is sent again. Silence never
/// ends a side here: that side holds the only state, and only its failure detector decides whether it is alive.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of refusals of SERVE, or of the source's rollback.
pub const REQUEST_ATTEMPTS: u32 = 5;
/// Wait before a refused request is sent again.
pub const REQUEST_RETRY: Duration = Duration::from_millis(200);
/// Default for [`Config::expiry`].
pub const EXPIRY: Duration = Duration::from_secs(600);
/// Wait before a fence that was not confirmed is retried.
pub const FENCE_RETRY: Duration = Duration::from_secs(1);
/// Maximum number of attempts at a fence.
pub const FENCE_ATTEMPTS: u32 = 10;

/// The limits of a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Maximum time for one phase.
    pub phase_timeout: Duration,
    /// Maximum time that a validated morph waits for its commit, and a transferred one for its validation, before it
    /// is rolled back.
    pub expiry: Duration,
    /// Budget for the downtime.
    pub downtime_budget: Duration,
    /// The cost of the commit's steps apart from the last round and the exchanges with both sides: the durable write,
    /// and the caller's own work.
    pub step_overhead: Duration,
    /// The providers that may carry the state; the first one that both sides can use is chosen.
    pub preference: &'static [StateProvider],
    /// State kinds that must move.
    pub required_kinds: u32,
    /// Modes that the backend supports.
    pub possible_modes: u32,
    /// Wait for [`Event::ValidationRequested`] once the first round is applied.
    pub validate_on_request: bool,
}

#[cfg(test)]
mod tests {
    use super::negotiation::exchanges;
    use super::*;
    use crate::message::{Check, CheckResult, ProviderOffer, capability};

    pub(super) fn config() -> Config {
        Config {
            phase_timeout: Duration::from_secs(60),
            expiry: Duration::from_secs(600),
            downtime_budget: Duration::from_millis(10),
            step_overhead: Duration::from_millis(1),
            preference: StateProvider::ALL,
            required_kinds: capability::MEMORY,
            possible_modes: capability::BY_REFERENCE | capability::ROUNDS,
            validate_on_request: false,
        }
    }

    pub(super) fn offer(kinds: u32, modes: u32) -> Offer {
        Offer {
            providers: vec![ProviderOffer {
                provider: StateProvider::Cooperative,
                memory_bytes: 0,
                dirty_bytes_per_s: 0,
                state_kinds: kinds,
                modes,
                state_version: 1,
                why_not: String::new(),
            }],
            ..Offer::default()
        }
    }

    #[test]
    fn the_estimate_counts_the_exchanges_of_the_commit() {
        let millis = Duration::from_millis;
        let side = |round_trip| Offer {
            round_trip: millis(round_trip),
            ..offer(1, 1)
        };
        let mut morph = Morph::<Preparing>::begin(config(), 7, 8);
        morph.target_is_healthy();
        let phases::Preparation::Waiting(morph) = morph.prepared(crate::message::Side::Source)
        else {
            panic!("the target has not acknowledged");
        };
        let phases::Preparation::Ready(morph) = morph.prepared(crate::message::Side::Target) else {
            panic!("both have acknowledged");
        };
        let choice = negotiate(&config(), &side(3), &side(5)).unwrap();
        let morph = morph.agreed(&choice, exchanges(&side(3), &side(5)));
        let round = phases::Round {
            sent_bytes: 0,
            dirty_bytes: 0,
            took: Duration::ZERO,
        };
        let phases::Progress::Over(morph) = morph.applied(round) else {
            panic!("one round is enough by reference");
        };
        let check = Check {
            name: "index".to_owned(),
            result: CheckResult::Passed,
            duration_us: 1,
            detail: String::new(),
        };
        let morph = morph.on_report(&[check]).unwrap();
        // Freeze; activate and serve; the overhead of one millisecond is extra.
        assert_eq!(morph.estimate().measured, millis(3 + 2 * 5));
        assert_eq!(morph.estimate().total(), millis(3 + 2 * 5 + 1));
        let (_, refused) = morph.commit(CommitLimit::Planned).unwrap_err();
        assert_eq!(refused.estimate, millis(14));
    }
}
