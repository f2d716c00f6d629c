//! MORPH_NEGOTIATE: the state providers, and each side's statement about its own.

use super::{LayoutError, Payload, SessionReply, TEXT_MAX_BYTES, at_most, clip, fixed_only};
use crate::wire::Layout;
use crate::wire::field::{fixed, open_enum};
use crate::wire::record::{CRITICAL, PROVIDER, append, records};

/// Maximum number of providers in one MORPH_NEGOTIATE reply: that many fit, with [`TEXT_MAX_BYTES`] of text each.
pub const PROVIDERS_MAX: usize = 12;

open_enum! {
    /// A method of moving the state of a workload from one kernel to another.
    ///
    /// Each number is one bit, so that `providers` of MORPH_NEGOTIATE is a set. The order of the rows is the
    /// daemon's order of preference: it chooses the first provider that both sides can use.
    StateProvider: u32 {
        /// The workload itself, which has registered with its agent.
        Cooperative = 1, "cooperative";
    }
}

impl StateProvider {
    /// Returns the set of these providers, as in MORPH_NEGOTIATE.
    pub fn set(of: &[Self]) -> u32 {
        of.iter().fold(0, |set, provider| set | provider.value())
    }

    /// Returns whether `set` contains this provider.
    pub const fn is_in(self, set: u32) -> bool {
        let bit = self.value();
        bit != 0 && set & bit == bit
    }
}

/// Bits of the sets in a [`ProviderOffer`].
pub mod capability {
    /// State kind: memory.
    pub const MEMORY: u32 = 1;
    /// State kind: file descriptors.
    pub const FDS: u32 = 2;
    /// State kind: listening sockets.
    pub const LISTENERS: u32 = 4;
    /// State kind: established connections.
    pub const CONNECTIONS: u32 = 8;
    /// Mode: by reference, in memory that both sides can map.
    pub const BY_REFERENCE: u32 = 1;
    /// Mode: copied in rounds.
    pub const ROUNDS: u32 = 2;
}

fixed! {
    /// MORPH_NEGOTIATE.
    pub MorphNegotiate, 16 {
        /// The session.
        session: u64 = 0,
        /// The providers that the daemon supports: bits of [`StateProvider`].
        providers: u32 = 8,
        ; reserved 4
    }
}

fixed! {
    /// Fixed part of a PROVIDER record.
    ProviderFixed, 32 {
        memory_bytes: u64 = 0,
        dirty_bytes_per_s: u64 = 8,
        provider: StateProvider = 16,
        state_kinds: u32 = 20,
        modes: u32 = 24,
        state_version: u32 = 28,
        ; reserved 0
    }
}

/// One side's statement about one of its providers: a PROVIDER record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderOffer {
    /// The provider.
    pub provider: StateProvider,
    /// Bytes of state (source; else 0).
    pub memory_bytes: u64,
    /// Rate of change of the state, bytes per second (source; else 0).
    pub dirty_bytes_per_s: u64,
    /// Kinds of state that the provider moves, see [`capability`].
    pub state_kinds: u32,
    /// Transfer modes of the provider, see [`capability`].
    pub modes: u32,
    /// Version of the state's own format.
    pub state_version: u32,
    /// Why the side cannot use the provider now, for people; empty if it can. At most [`TEXT_MAX_BYTES`] bytes are
    /// sent.
    pub why_not: String,
}

impl ProviderOffer {
    /// Returns whether the side can use the provider.
    pub fn is_possible(&self) -> bool {
        self.why_not.is_empty()
    }

    fn parse(bytes: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, text) = ProviderFixed::split(bytes)?;
        if text.len() > TEXT_MAX_BYTES {
            return Err(LayoutError::TextTooLong {
                kind: PROVIDER,
                limit: TEXT_MAX_BYTES,
            });
        }
        let why_not = core::str::from_utf8(text).map_err(|_| LayoutError::NotText)?;
        let ProviderFixed {
            memory_bytes,
            dirty_bytes_per_s,
            provider,
            state_kinds,
            modes,
            state_version,
        } = fixed;
        Ok(Self {
            provider,
            memory_bytes,
            dirty_bytes_per_s,
            state_kinds,
            modes,
            state_version,
            why_not: why_not.to_owned(),
        })
    }

    fn append(&self, out: &mut Vec<u8>) {
        let mut bytes = Vec::new();
        ProviderFixed {
            memory_bytes: self.memory_bytes,
            dirty_bytes_per_s: self.dirty_bytes_per_s,
            provider: self.provider,
            state_kinds: self.state_kinds,
            modes: self.modes,
            state_version: self.state_version,
        }
        .append(&mut bytes);
        bytes.extend_from_slice(clip(&self.why_not, TEXT_MAX_BYTES).as_bytes());
        append(out, PROVIDER, CRITICAL, &bytes);
    }
}

/// Reply to MORPH_NEGOTIATE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NegotiateReply {
    /// The session.
    pub session: u64,
    /// The requested providers that the side has; each at most once.
    pub offers: Vec<ProviderOffer>,
}

impl NegotiateReply {
    fn distinct(&self) -> Result<(), LayoutError> {
        at_most(self.offers.len(), PROVIDERS_MAX)?;
        let mut seen = std::collections::BTreeSet::new();
        let again = |offer: &ProviderOffer| !seen.insert(offer.provider.value());
        match self.offers.iter().any(again) {
            true => Err(LayoutError::Repeated(PROVIDER)),
            false => Ok(()),
        }
    }
}

impl Payload for NegotiateReply {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (SessionReply { session }, rest) = SessionReply::split(payload)?;
        let mut offers = Vec::new();
        for record in records(rest) {
            let record = record?;
            match record.kind {
                PROVIDER if offers.len() == PROVIDERS_MAX => {
                    return Err(LayoutError::TooMany(PROVIDERS_MAX));
                }
                PROVIDER => offers.push(ProviderOffer::parse(record.bytes)?),
                _ => record.skip()?,
            }
        }
        let reply = Self { session, offers };
        reply.distinct()?;
        Ok(reply)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let session = self.session;
        SessionReply { session }.append(out);
        for offer in &self.offers {
            offer.append(out);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        self.distinct()
    }
}

fixed_only!(MorphNegotiate);

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("MORPH_NEGOTIATE", MorphNegotiate::LAYOUT),
    ("MORPH_NEGOTIATE", SessionReply::LAYOUT),
    ("MORPH_NEGOTIATE", ProviderFixed::LAYOUT),
];
