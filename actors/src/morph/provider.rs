//! Selects the state provider of a morph: the order of preference, and the record of the choice.

use kmp_proto::message::StateProvider;
use kmp_proto::morph::{Choice, PassedOver};

use super::MorphSession;
use crate::model::OtherProvider;

/// The available state providers, in order of preference.
pub(super) const PREFERENCE: &[StateProvider] = StateProvider::ALL;

impl MorphSession {
    /// Records the provider that the negotiation selected.
    pub(super) fn chosen(&mut self, choice: Choice) {
        let provider = choice.provider.to_string();
        self.say(format!("morph: state provider {provider}"));
        self.status.provider = Some(provider);
        self.status.other_providers = passed_over(&choice.passed_over);
        self.status.state_bytes = choice.state_bytes;
    }
}

/// Returns the providers that the morph does not use.
pub(super) fn passed_over(providers: &[PassedOver]) -> Vec<OtherProvider> {
    let providers = providers.iter();
    providers
        .map(|PassedOver { provider, why }| OtherProvider {
            provider: provider.to_string(),
            reason: why.to_string(),
        })
        .collect()
}
