//! What both sides of a morph can do, and whether that is enough.

use std::time::Duration;

use super::{Config, Missing};
use crate::message::{Capabilities, Side, TransferMode, capability};

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

/// The kinds of state, and what people call them.
const KINDS: [(u32, &str); 4] = [
    (capability::MEMORY, "memory"),
    (capability::FDS, "file descriptors"),
    (capability::LISTENERS, "listening sockets"),
    (capability::CONNECTIONS, "connections"),
];

/// How state moves, if both sides can do what is required.
///
/// # Errors
/// What is missing; never empty.
pub fn negotiate(
    config: &Config,
    source: &Offer,
    target: &Offer,
) -> Result<TransferMode, Vec<Missing>> {
    let mut missing = Vec::new();
    for (side, offer) in [(Side::Source, source), (Side::Target, target)] {
        let vetoes = offer.missing.iter().cloned();
        missing.extend(vetoes.map(|text| Missing::Vetoed(side, text)));
        let have = offer.capabilities;
        if have.providers & capability::COOPERATIVE == 0 {
            missing.push(Missing::Provider(side));
            continue;
        }
        let lacking = KINDS
            .iter()
            .filter(|(bit, _)| config.required_kinds & !have.state_kinds & bit != 0);
        missing.extend(lacking.map(|(_, name)| Missing::StateKind(side, name)));
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    if source.state_version != target.state_version {
        return Err(vec![Missing::StateVersion {
            source_version: source.state_version,
            target_version: target.state_version,
        }]);
    }
    let modes = source.capabilities.modes & target.capabilities.modes & config.possible_modes;
    match modes {
        0 => Err(vec![Missing::Mode]),
        _ if modes & capability::BY_REFERENCE != 0 => Ok(TransferMode::ByReference),
        _ => Ok(TransferMode::Rounds),
    }
}

/// What the exchanges of a commit take while the workload stands still, going by how long both sides
/// took to negotiate: FREEZE with the source, ACTIVATE and SERVE with the target.
pub(super) fn exchanges(source: &Offer, target: &Offer) -> Duration {
    let target = target.round_trip.saturating_mul(2);
    source.round_trip.saturating_add(target)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config, offer};
    use super::*;

    #[test]
    fn the_outcome_is_what_both_have_reference_before_rounds() {
        let both = capability::BY_REFERENCE | capability::ROUNDS;
        let (source, target) = (offer(1, both), offer(1, both));
        assert_eq!(
            negotiate(&config(), &source, &target),
            Ok(TransferMode::ByReference)
        );
        let target = offer(1, capability::ROUNDS);
        assert_eq!(
            negotiate(&config(), &source, &target),
            Ok(TransferMode::Rounds)
        );
    }

    #[test]
    fn a_veto_lists_everything_that_is_missing() {
        let config = Config {
            required_kinds: 1 | 4,
            ..config()
        };
        let source = offer(1, 1);
        let missing = negotiate(&config, &source, &Offer::default()).unwrap_err();
        let expected = [
            Missing::StateKind(Side::Source, "listening sockets"),
            Missing::Provider(Side::Target),
        ];
        assert_eq!(missing, expected);
        let target = offer(5, 2);
        assert_eq!(
            negotiate(&config, &offer(5, 1), &target),
            Err(vec![Missing::Mode])
        );
        let other = Offer {
            state_version: 2,
            ..offer(5, 1)
        };
        let differ = Missing::StateVersion {
            source_version: 1,
            target_version: 2,
        };
        assert_eq!(negotiate(&config, &offer(5, 1), &other), Err(vec![differ]));
    }
}
