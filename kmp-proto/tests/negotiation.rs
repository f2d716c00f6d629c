//! The choice of a state provider, for any offers and any order of preference, against its definition.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use kmp_proto::message::{ProviderOffer, StateProvider, TransferMode, capability};
use kmp_proto::morph::{Config, Offer, WhyNot, negotiate};
use proptest::prelude::*;

/// Providers offered in these tests. The daemon knows only the providers of its preference.
const ALL: [StateProvider; 4] = [
    StateProvider::Cooperative,
    StateProvider::Other(2),
    StateProvider::Other(64),
    StateProvider::Other(3),
];
/// Orders of preference.
const PREFERENCES: &[&[StateProvider]] = &[
    &[ALL[0]],
    &[ALL[1], ALL[0]],
    &[ALL[0], ALL[1], ALL[2]],
    &[ALL[2], ALL[1], ALL[0]],
    &[],
];

fn config(preference: &'static [StateProvider], kinds: u32, modes: u32) -> Config {
    Config {
        phase_timeout: Duration::from_secs(60),
        expiry: Duration::from_secs(600),
        downtime_budget: Duration::from_millis(10),
        step_overhead: Duration::from_millis(2),
        preference,
        required_kinds: kinds,
        possible_modes: modes,
        validate_on_request: false,
    }
}

/// An offer of one side, of some of the providers, each once, in any order.
fn offer() -> impl Strategy<Value = Offer> {
    // Most offers have most capabilities: otherwise, two providers that are both possible would be too rare.
    let kinds = prop_oneof![5 => Just(15_u32), 1 => 0..16_u32];
    let modes = prop_oneof![5 => 1..8_u32, 1 => Just(0_u32)];
    let version = prop_oneof![5 => Just(1_u32), 1 => Just(2_u32)];
    let possible = proptest::bool::weighted(0.8);
    let one = (kinds, modes, version, possible, 0..100_u64);
    let one = proptest::option::weighted(0.9, one);
    let some = proptest::collection::vec((one, 0..100_u8), ALL.len());
    some.prop_map(|some| {
        let mut placed = Vec::new();
        for (provider, (one, place)) in ALL.into_iter().zip(some) {
            let Some((state_kinds, modes, state_version, possible, memory_bytes)) = one else {
                continue;
            };
            let why_not = if possible { "" } else { "no room" };
            let offer = ProviderOffer {
                provider,
                memory_bytes,
                dirty_bytes_per_s: 0,
                state_kinds,
                modes,
                state_version,
                why_not: why_not.to_owned(),
            };
            placed.push((place, offer));
        }
        placed.sort_by_key(|(place, _)| *place);
        Offer {
            providers: placed.into_iter().map(|(_, offer)| offer).collect(),
            ..Offer::default()
        }
    })
}

fn find(offer: &Offer, provider: StateProvider) -> Option<&ProviderOffer> {
    offer.providers.iter().find(|o| o.provider == provider)
}

/// The definition: returns the mode in which both sides can use the provider for the required kinds, or `None`.
fn possible(
    config: &Config,
    provider: StateProvider,
    [source, target]: [&Offer; 2],
) -> Option<TransferMode> {
    let (source, target) = (find(source, provider)?, find(target, provider)?);
    let kinds = source.state_kinds & target.state_kinds;
    let modes = source.modes & target.modes & config.possible_modes;
    let fits = source.why_not.is_empty()
        && target.why_not.is_empty()
        && kinds & config.required_kinds == config.required_kinds
        && source.state_version == target.state_version;
    match modes {
        _ if !fits => None,
        modes if modes & capability::BY_REFERENCE != 0 => Some(TransferMode::ByReference),
        modes if modes & capability::ROUNDS != 0 => Some(TransferMode::Rounds),
        _ => None,
    }
}

proptest! {
    #[test]
    fn the_first_preferred_provider_that_is_possible_is_chosen_and_each_other_one_explained(
        preference in proptest::sample::select(PREFERENCES),
        (kinds, modes) in (0..16_u32, 0..4_u32),
        source in offer(),
        target in offer(),
    ) {
        let config = config(preference, kinds, modes);
        let how = |provider| possible(&config, provider, [&source, &target]);
        let first = preference.iter().copied().find(|p| how(*p).is_some());
        let passed_over = match negotiate(&config, &source, &target) {
            Ok(choice) => {
                prop_assert_eq!(Some(choice.provider), first);
                prop_assert_eq!(Some(choice.mode), how(choice.provider));
                let bytes = find(&source, choice.provider).unwrap().memory_bytes;
                prop_assert_eq!(choice.state_bytes, bytes);
                choice.passed_over
            }
            Err(incompatible) => {
                prop_assert_eq!(first, None);
                let usable = |offer: &Offer| {
                    let usable = offer.providers.iter().filter(|o| o.why_not.is_empty());
                    usable.map(|o| o.provider).collect::<Vec<_>>()
                };
                prop_assert_eq!(&incompatible.source, &usable(&source));
                prop_assert_eq!(&incompatible.target, &usable(&target));
                incompatible.passed_over
            }
        };
        let explained: Vec<_> = passed_over.iter().map(|p| p.provider).collect();
        let others: Vec<_> = preference.iter().copied().filter(|p| Some(*p) != first).collect();
        prop_assert_eq!(explained, others);
        for other in passed_over {
            match other.why {
                WhyNot::LessPreferred(chosen) => {
                    prop_assert_eq!(Some(chosen), first);
                    prop_assert!(how(other.provider).is_some());
                }
                WhyNot::Impossible(missing) => {
                    prop_assert!(!missing.is_empty());
                    prop_assert!(how(other.provider).is_none());
                }
            }
        }
    }
}

#[test]
fn the_daemons_own_preference_names_each_provider_of_the_protocol_once() {
    let set = StateProvider::set(StateProvider::ALL);
    let bits: u32 = StateProvider::ALL.iter().map(|p| p.value()).sum();
    assert_eq!(set, bits);
    for provider in StateProvider::ALL {
        assert!(provider.is_in(set) && !provider.is_in(!set));
        assert_eq!(StateProvider::from_value(provider.value()), *provider);
    }
    assert!(!StateProvider::from_value(0).is_in(u32::MAX), "0 is no bit");
}
