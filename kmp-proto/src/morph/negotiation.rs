//! Chooses the state provider and the mode of a morph from the offers of both sides, in the daemon's order
//! of preference.

use std::fmt;
use std::time::Duration;

use super::{Config, Incompatible, Missing};
use crate::message::{ProviderOffer, Side, StateProvider, TransferMode, capability};

/// One side's answer in the negotiation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Its statement about each of its providers.
    pub providers: Vec<ProviderOffer>,
    /// Time from the request to this answer. Like a step of the commit, the answer involves the
    /// agent and its workload.
    pub round_trip: Duration,
}

/// The result of a negotiation. Only [`negotiate`] creates one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// The provider that carries the state.
    pub provider: StateProvider,
    /// The transfer mode.
    pub mode: TransferMode,
    /// Size of the state as stated by the source, bytes.
    pub state_bytes: u64,
    /// The other providers that the daemon knows, in its order of preference.
    pub passed_over: Vec<PassedOver>,
}

/// A provider that does not carry the morph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// The provider.
    pub provider: StateProvider,
    /// The reason.
    pub why: WhyNot,
}

/// Why a provider does not carry a morph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// Possible, but the daemon prefers another one.
    LessPreferred(StateProvider),
    /// Not possible; the list is never empty.
    Impossible(Vec<Missing>),
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LessPreferred(chosen) => write!(f, "possible, but {chosen} is preferred"),
            Self::Impossible(missing) => {
                for (index, missing) in missing.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    write!(f, "{separator}{missing}")?;
                }
                Ok(())
            }
        }
    }
}

impl Offer {
    /// Returns the side's offer for `provider`; `None` if it has none.
    fn of(&self, provider: StateProvider) -> Option<&ProviderOffer> {
        self.providers.iter().find(|o| o.provider == provider)
    }

    /// Returns the providers that the side can use.
    fn possible(&self) -> Vec<StateProvider> {
        let possible = self.providers.iter().filter(|o| o.is_possible());
        possible.map(|offer| offer.provider).collect()
    }
}

/// The kinds of state, with names for people.
const KINDS: [(u32, &str); 4] = [
    (capability::MEMORY, "memory"),
    (capability::FDS, "file descriptors"),
    (capability::LISTENERS, "listening sockets"),
    (capability::CONNECTIONS, "connections"),
];

/// Chooses the first provider in [`Config::preference`] that both sides can use for the required state. Ignores
/// providers that are not in that list.
///
/// # Errors
/// If no provider is possible: the offers of both sides, and the reason for each provider.
pub fn negotiate(config: &Config, source: &Offer, target: &Offer) -> Result<Choice, Incompatible> {
    let mut chosen = None;
    let mut passed_over = Vec::new();
    for provider in config.preference.iter().copied() {
        let why = match (judge(config, provider, source, target), &chosen) {
            (Err(missing), _) => WhyNot::Impossible(missing),
            (Ok(_), Some((before, _, _))) => WhyNot::LessPreferred(*before),
            (Ok((mode, state_bytes)), None) => {
                chosen = Some((provider, mode, state_bytes));
                continue;
            }
        };
        passed_over.push(PassedOver { provider, why });
    }
    match chosen {
        Some((provider, mode, state_bytes)) => Ok(Choice {
            provider,
            mode,
            state_bytes,
            passed_over,
        }),
        None => Err(Incompatible {
            source: source.possible(),
            target: target.possible(),
            passed_over,
        }),
    }
}

/// Determines the mode in which `provider` moves state between these sides, and the number of bytes.
fn judge(
    config: &Config,
    provider: StateProvider,
    source: &Offer,
    target: &Offer,
) -> Result<(TransferMode, u64), Vec<Missing>> {
    let (source, target) = (source.of(provider), target.of(provider));
    let sides = [(Side::Source, source), (Side::Target, target)];
    let lacks = |(side, offer)| lacking(config.required_kinds, side, offer);
    let missing: Vec<_> = sides.into_iter().flat_map(lacks).collect();
    let (Some(source), Some(target), true) = (source, target, missing.is_empty()) else {
        return Err(missing);
    };
    if source.state_version != target.state_version {
        return Err(vec![Missing::StateVersion {
            source_version: source.state_version,
            target_version: target.state_version,
        }]);
    }
    let mode = match source.modes & target.modes & config.possible_modes {
        modes if modes & capability::BY_REFERENCE != 0 => TransferMode::ByReference,
        modes if modes & capability::ROUNDS != 0 => TransferMode::Rounds,
        _ => return Err(vec![Missing::Mode]),
    };
    Ok((mode, source.memory_bytes))
}

/// Returns the requirements for a provider that one side does not meet.
fn lacking(required_kinds: u32, side: Side, offer: Option<&ProviderOffer>) -> Vec<Missing> {
    let Some(offer) = offer else {
        return vec![Missing::NotOffered(side)];
    };
    if !offer.is_possible() {
        return vec![Missing::Unable(side, offer.why_not.clone())];
    }
    let lacking = |(bit, _): &&(u32, &str)| required_kinds & !offer.state_kinds & bit != 0;
    let lacking = KINDS.iter().filter(lacking);
    lacking
        .map(|(_, name)| Missing::StateKind(side, name))
        .collect()
}

/// Returns the expected duration of a commit's exchanges while the workload is frozen, based on the time both sides
/// took to negotiate: FREEZE with the source, ACTIVATE and SERVE with the target.
pub(super) fn exchanges(source: &Offer, target: &Offer) -> Duration {
    let target = target.round_trip.saturating_mul(2);
    source.round_trip.saturating_add(target)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config, offer};
    use super::*;

    const BOTH: u32 = capability::BY_REFERENCE | capability::ROUNDS;
    /// A provider that has no name in this version.
    const OTHER: StateProvider = StateProvider::Other(64);

    /// Returns the same offer with another provider.
    fn of(provider: StateProvider, offer: &Offer) -> ProviderOffer {
        ProviderOffer {
            provider,
            ..offer.providers[0].clone()
        }
    }

    #[test]
    fn by_reference_goes_before_rounds() {
        let mode = |source, target| {
            let choice = negotiate(&config(), &offer(1, source), &offer(1, target));
            choice.map(|choice| choice.mode)
        };
        assert_eq!(mode(BOTH, BOTH), Ok(TransferMode::ByReference));
        assert_eq!(mode(BOTH, capability::ROUNDS), Ok(TransferMode::Rounds));
        // A mode unknown to this version does not count.
        assert!(mode(BOTH | 4, 4).is_err());
    }

    #[test]
    fn the_first_of_the_preferred_providers_that_both_can_use_is_chosen() {
        let mut source = offer(1, BOTH);
        let mut target = source.clone();
        source.providers.push(of(OTHER, &source));
        target.providers.insert(0, of(OTHER, &target));
        let with = |preference| Config {
            preference,
            ..config()
        };
        let other_first = with(&[OTHER, StateProvider::Cooperative]);
        let choice = negotiate(&other_first, &source, &target).unwrap();
        assert_eq!(choice.provider, OTHER);
        let less = PassedOver {
            provider: StateProvider::Cooperative,
            why: WhyNot::LessPreferred(OTHER),
        };
        assert_eq!(choice.passed_over, [less]);
        target.providers[0].why_not = "no room".to_owned();
        let choice = negotiate(&other_first, &source, &target).unwrap();
        assert_eq!(choice.provider, StateProvider::Cooperative);
        let unable = Missing::Unable(Side::Target, "no room".to_owned());
        let why = WhyNot::Impossible(vec![unable]);
        let provider = OTHER;
        assert_eq!(choice.passed_over, [PassedOver { provider, why }]);
        // Providers unknown to the daemon are not in its order of preference.
        target.providers[0].why_not.clear();
        target.providers.truncate(1);
        let refused = negotiate(&config(), &source, &target).unwrap_err();
        assert_eq!(refused.passed_over.len(), 1);
        assert_eq!(refused.target, [OTHER]);
    }

    #[test]
    fn without_a_common_provider_the_reason_lists_what_each_side_offers_and_lacks() {
        let reason = |config: &Config, source: &Offer, target: &Offer| {
            let refused = negotiate(config, source, target).unwrap_err();
            let [PassedOver { provider, why }] = &refused.passed_over[..] else {
                panic!("{refused:?}");
            };
            assert_eq!(*provider, StateProvider::Cooperative);
            let WhyNot::Impossible(missing) = why else {
                panic!("{why:?}");
            };
            (missing.clone(), refused.to_string())
        };
        let all = Config {
            required_kinds: 1 | 4,
            ..config()
        };
        let (missing, text) = reason(&all, &offer(1, 1), &Offer::default());
        let expected = [
            Missing::StateKind(Side::Source, "listening sockets"),
            Missing::NotOffered(Side::Target),
        ];
        assert_eq!(missing, expected);
        assert_eq!(
            text,
            "no state provider that both kernels can use (the source offers cooperative, the target none): \
             cooperative: source kernel: cannot move listening sockets; target kernel: it does not have this provider"
        );
        let (missing, _) = reason(&all, &offer(5, 1), &offer(5, 2));
        assert_eq!(missing, [Missing::Mode]);
        let mut other = offer(5, 1);
        other.providers[0].state_version = 2;
        let (missing, _) = reason(&all, &offer(5, 1), &other);
        let differ = Missing::StateVersion {
            source_version: 1,
            target_version: 2,
        };
        assert_eq!(missing, [differ]);
    }
}
