//! Offer and choice of the provider for a session.
//!
//! ```text
//!  offer(session) ─▶ offered ── choose(session, provider) ─▶ chosen ─▶ every step of the session
//! ```
//!
//! Each step requires a [`Chosen`], and [`Providers::choose`] creates one only for a provider offered in the same
//! session, so a daemon cannot use a provider that this side has not offered.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmp_proto::message::{ProviderOffer, StateProvider};
use kmp_proto::wire::ErrorCode;

use super::{Host, PROVIDERS, Provider};
use crate::refusal::Refusal;

/// Longest wait for what one provider can do. All are asked at the same time.
const OFFER_TIMEOUT: Duration = Duration::from_secs(5);

/// The providers of an instance, and which of them its morph uses.
#[derive(Debug)]
pub struct Providers {
    all: Vec<Arc<dyn Provider>>,
    talks: Mutex<Talks>,
}

#[derive(Debug, Default)]
struct Talks {
    /// The offer in the latest session.
    offered: (u64, Vec<StateProvider>),
    /// The latest choice, with its session.
    chosen: Option<(u64, Chosen)>,
}

/// The provider that a session uses. Nobody else makes one:
///
/// ```compile_fail,E0423
/// use kmorph_agent::provider::{Chosen, Provider};
///
/// fn any(provider: std::sync::Arc<dyn Provider>) -> Chosen {
///     Chosen(provider)
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Chosen(Arc<dyn Provider>);

impl Deref for Chosen {
    type Target = dyn Provider;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl Providers {
    /// The providers of this agent.
    pub fn of(host: &Host) -> Self {
        Self::new(PROVIDERS.iter().map(|make| make(host)).collect())
    }

    fn new(all: Vec<Arc<dyn Provider>>) -> Self {
        Self {
            all,
            talks: Mutex::default(),
        }
    }

    /// With one more.
    #[cfg(test)]
    pub(crate) fn beside(mut self, provider: Arc<dyn Provider>) -> Self {
        self.all.push(provider);
        self
    }

    fn talks(&self) -> MutexGuard<'_, Talks> {
        self.talks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statements of this side in `session` about its providers that are in the set `asked`.
    pub async fn offer(&self, session: u64, asked: u32) -> Vec<ProviderOffer> {
        let asked = self.all.iter().filter(|p| p.id().is_in(asked));
        let asked: Vec<_> = asked
            .map(|provider| {
                let asked = provider.clone();
                let offer = async move { asked.offer().await };
                let within = tokio::time::timeout(OFFER_TIMEOUT, offer);
                (provider.id(), tokio::spawn(within))
            })
            .collect();
        let mut offers = Vec::with_capacity(asked.len());
        for (provider, ability) in asked {
            let ability = match ability.await {
                Ok(Ok(ability)) => ability,
                Ok(Err(_)) => Err(format!("no answer within {} s", OFFER_TIMEOUT.as_secs())),
                Err(_) => Err("the agent has an error in this provider".to_owned()),
            };
            let why_not = ability.as_ref().err().cloned().unwrap_or_default();
            let ability = ability.ok();
            offers.push(ProviderOffer {
                provider,
                memory_bytes: ability.map_or(0, |a| a.memory_bytes),
                dirty_bytes_per_s: ability.map_or(0, |a| a.dirty_bytes_per_s),
                state_kinds: ability.map_or(0, |a| a.state_kinds),
                modes: ability.map_or(0, |a| a.modes),
                state_version: ability.map_or(0, |a| a.state_version),
                why_not,
            });
        }
        let possible = offers.iter().filter(|offer| offer.is_possible());
        let possible = possible.map(|offer| offer.provider).collect();
        self.talks().offered = (session, possible);
        offers
    }

    /// The daemon has chosen `provider` for `session`. Repeating that changes nothing.
    ///
    /// # Errors
    /// If `session` was not offered it, or uses another one.
    pub fn choose(&self, session: u64, provider: StateProvider) -> Result<Chosen, Refusal> {
        let mut talks = self.talks();
        if let Some((now, chosen)) = &talks.chosen
            && *now == session
        {
            return chosen.if_it_is(provider, session);
        }
        let (offered_in, offered) = &talks.offered;
        let found = self.all.iter().find(|p| p.id() == provider);
        match found {
            Some(found) if *offered_in == session && offered.contains(&provider) => {
                let chosen = Chosen(found.clone());
                talks.chosen = Some((session, chosen.clone()));
                Ok(chosen)
            }
            _ => {
                let text = format!("the provider {provider} was not offered in session {session}");
                Err(Refusal::new(ErrorCode::Incompatible, text))
            }
        }
    }

    /// The provider that `session` uses.
    ///
    /// # Errors
    /// If none was chosen yet.
    pub fn chosen(&self, session: u64) -> Result<Chosen, Refusal> {
        match &self.talks().chosen {
            Some((now, chosen)) if *now == session => Ok(chosen.clone()),
            _ => {
                let text = format!("the transfer of session {session} has not begun");
                Err(Refusal::new(ErrorCode::UnexpectedInState, text))
            }
        }
    }

    /// The provider used last, in any session; `None` if none has been used.
    pub fn latest(&self) -> Option<Chosen> {
        let talks = self.talks();
        talks.chosen.as_ref().map(|(_, chosen)| chosen.clone())
    }
}

impl Chosen {
    /// This one, if it is `provider`.
    ///
    /// # Errors
    /// If `session` uses another.
    pub fn if_it_is(&self, provider: StateProvider, session: u64) -> Result<Self, Refusal> {
        if self.id() == provider {
            return Ok(self.clone());
        }
        let text = format!(
            "session {session} uses the provider {}, not {provider}",
            self.id()
        );
        Err(Refusal::new(ErrorCode::Incompatible, text))
    }
}
