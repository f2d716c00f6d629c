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
//! Committing, in this order and no other:
//!
//! ```text
//! FREEZE old ─▶ last round ─▶ ACTIVATE new ─▶ commit record durable ─▶ SERVE new ─▶ RETIRE old ─▶ fence old
//!                                             └── the commit point ──┘
//! ```
//!
//! Invariants:
//! * Before the commit record the end is the source generation serving and the target fenced; after
//!   it, the target serving and the source fenced. SERVE is sent only after the record is durable;
//!   the source is resumed only after the target is fenced. So both never serve.
//! * What commits is validated, and what takes over is fenced: [`Validated`] and
//!   [`FenceCertificate`](crate::fence::FenceCertificate) can be had in one place each.
//! * Every phase has a deadline.

mod engine;
mod events;
mod phases;
mod transitions;

pub use engine::Engine;
pub use events::{Action, Answer, CommitLimit, Event, Outcome, Step};
pub use phases::{
    Committable, Committing, Failed, Morph, Negotiating, Preparing, Transferring, Validated,
    Validating,
};

pub use transitions::TRANSITIONS;

use std::time::Duration;

use crate::message::{Capabilities, TransferMode, capability};

/// Most rounds of pre-copy before the last one.
pub const ROUNDS_MAX: u32 = 10;
/// Longest time for one step between the freeze and the commit record: the workload stands still.
pub const FROZEN_STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the answer to SERVE, or to the source's rollback, before the request is sent again. Silence
/// never ends a side here: that side holds the only state, and its failure detector is the judge of its life.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Times that SERVE, or the source's rollback, may be refused.
pub const REQUEST_ATTEMPTS: u32 = 5;
/// Wait before it is asked for again.
pub const REQUEST_RETRY: Duration = Duration::from_millis(200);
/// Default for [`Config::expiry`].
pub const EXPIRY: Duration = Duration::from_secs(600);
/// Wait before a fence that was not confirmed is tried again.
pub const FENCE_RETRY: Duration = Duration::from_secs(1);
/// Times it is tried.
pub const FENCE_ATTEMPTS: u32 = 10;

/// What a morph may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Longest time for one phase.
    pub phase_timeout: Duration,
    /// Longest time that a validated morph waits for its commit, and a transferred one for its validation; then it is
    /// rolled back.
    pub expiry: Duration,
    /// Budget for the downtime.
    pub downtime_budget: Duration,
    /// What the steps of the commit cost apart from the last round and the exchanges with both sides:
    /// the durable write, and what the caller does in between.
    pub step_overhead: Duration,
    /// State kinds that must move.
    pub required_kinds: u32,
    /// Modes that the backend makes possible.
    pub possible_modes: u32,
}

/// One side's answer in the negotiation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// What it can do.
    pub capabilities: Capabilities,
    /// Version of its state's format.
    pub state_version: u32,
    /// Bytes of state (source).
    pub state_bytes: u64,
    /// How fast it changes, bytes a second (source).
    pub dirty_bytes_per_s: u64,
    /// What it says is missing; not empty in a veto.
    pub missing: Vec<String>,
    /// Time from the question to this answer, which took its agent and its workload as a step of the
    /// commit does.
    pub round_trip: Duration,
}

/// What both sides can do, or what is missing.
///
/// # Errors
/// The list of what is missing, for people.
pub fn negotiate(config: &Config, old: &Offer, new: &Offer) -> Result<TransferMode, Vec<String>> {
    let mut missing = Vec::new();
    for (side, offer) in [("old", old), ("new", new)] {
        missing.extend(offer.missing.iter().map(|m| format!("{side} kernel: {m}")));
        let have = offer.capabilities;
        if have.providers & capability::COOPERATIVE == 0 {
            missing.push(format!(
                "{side} kernel: no workload that takes part in a morph"
            ));
            continue;
        }
        for (bit, name) in [
            (capability::MEMORY, "memory"),
            (capability::FDS, "file descriptors"),
            (capability::LISTENERS, "listening sockets"),
            (capability::CONNECTIONS, "connections"),
        ] {
            if config.required_kinds & bit != 0 && have.state_kinds & bit == 0 {
                missing.push(format!("{side} kernel: cannot move {name}"));
            }
        }
    }
    let modes = old.capabilities.modes & new.capabilities.modes & config.possible_modes;
    if missing.is_empty() && old.state_version != new.state_version {
        missing.push(format!(
            "the state's format: old version {}, new version {}",
            old.state_version, new.state_version
        ));
    }
    if missing.is_empty() && modes == 0 {
        missing.push("a way to move state that both sides and the backend have".to_owned());
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    if modes & capability::BY_REFERENCE != 0 {
        Ok(TransferMode::ByReference)
    } else {
        Ok(TransferMode::Rounds)
    }
}

/// What the exchanges of a commit take while the workload stands still, going by how long both sides
/// took to negotiate: FREEZE with the source, ACTIVATE and SERVE with the target.
pub(crate) fn exchanges(old: &Offer, new: &Offer) -> Duration {
    let new = new.round_trip.saturating_mul(2);
    old.round_trip.saturating_add(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            phase_timeout: Duration::from_secs(60),
            expiry: Duration::from_secs(600),
            downtime_budget: Duration::from_millis(10),
            step_overhead: Duration::from_millis(1),
            required_kinds: capability::MEMORY,
            possible_modes: capability::BY_REFERENCE | capability::ROUNDS,
        }
    }

    fn offer(kinds: u32, modes: u32) -> Offer {
        let providers = capability::COOPERATIVE;
        let capabilities = Capabilities {
            state_kinds: kinds,
            providers,
            modes,
        };
        Offer {
            capabilities,
            state_version: 1,
            ..Offer::default()
        }
    }

    #[test]
    fn the_outcome_is_what_both_have_reference_before_rounds() {
        let both = capability::BY_REFERENCE | capability::ROUNDS;
        let (old, new) = (offer(1, both), offer(1, both));
        assert_eq!(
            negotiate(&config(), &old, &new),
            Ok(TransferMode::ByReference)
        );
        let new = offer(1, capability::ROUNDS);
        assert_eq!(negotiate(&config(), &old, &new), Ok(TransferMode::Rounds));
    }

    #[test]
    fn the_estimate_counts_the_exchanges_of_the_commit() {
        let millis = Duration::from_millis;
        let side = |round_trip| Offer {
            round_trip: millis(round_trip),
            ..offer(1, 1)
        };
        let morph = Morph::begin(config())
            .ready()
            .agreed(TransferMode::ByReference, exchanges(&side(3), &side(5)));
        let check = crate::message::Check {
            name: "index".to_owned(),
            result: crate::message::CheckResult::Passed,
            duration_us: 1,
            detail: String::new(),
        };
        let (morph, proof) = morph.transferred().on_report(&[check]).unwrap();
        // Freeze; activate and serve; and the overhead of a millisecond.
        assert_eq!(morph.estimate(), millis(3 + 2 * 5 + 1));
        let refused = morph.commit(proof, false).unwrap_err().2;
        assert!(matches!(refused, Failed::OverBudget { .. }), "{refused}");
    }

    #[test]
    fn a_veto_lists_everything_that_is_missing() {
        let config = Config {
            required_kinds: 1 | 4,
            ..config()
        };
        let old = offer(1, 1);
        let missing = negotiate(&config, &old, &Offer::default()).unwrap_err();
        assert_eq!(missing.len(), 2, "{missing:?}");
        let new = offer(5, 2);
        assert_eq!(negotiate(&config, &offer(5, 1), &new).unwrap_err().len(), 1);
        let other = Offer {
            state_version: 2,
            ..offer(5, 1)
        };
        assert!(negotiate(&config, &offer(5, 1), &other).unwrap_err()[0].contains("version 2"));
    }
}
