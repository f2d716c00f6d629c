//! State providers: they move the state of a workload from one kernel to another.
//!
//! [`crate::morph`] and [`crate::rounds`] keep the order of a morph's steps and speak the protocol; a provider
//! carries out each step. A provider is one file here and one row in `PROVIDERS`. For each morph the daemon chooses
//! one of the providers that both sides offer; [`Providers`] refuses any other.
//!
//! The steps fit three kinds of providers:
//!
//! | step | the workload takes part | an image of its processes | memory shown to the next kernel |
//! |---|---|---|---|
//! | `offer` | asks the workload | looks whether the kernel can | looks what can be kept |
//! | `export` | the workload prepares | a first image, while it runs | names the memory: references |
//! | `read` | what has changed | what has changed | – |
//! | `freeze` | the workload stops, and takes its digest | stops the processes | stops whatever writes there |
//! | `import`, `apply` | the workload maps or takes it | keeps the image | maps what the references name |
//! | `validate` | the workload checks | checks the image | checks the references |
//! | `activate` | the workload takes over | makes the processes, stopped | takes the memory over |
//! | `serve` | the workload serves | lets the processes run | lets the workload run |
//! | `resume` | the workload serves again | lets the processes run again | lets whatever writes there run |
//! | `retire` | the workload ends | ends the processes | lets go of the memory |
//! | `abandon` | – | ends what was made | unmaps |
//!
//! Rules for a provider:
//! - Until `freeze` is answered the workload serves, whatever `export` and `read` do. From then until `resume` or
//!   `retire` it changes nothing and answers no client.
//! - `freeze` and `activate` return the same digest if the target has the state that the source froze. The daemon
//!   compares the two; the provider decides what the digest covers, and that changes with the version of its state.
//! - `freeze`, `activate`, `serve`, `resume` and `retire` are part of the downtime: each must answer within
//!   [`FROZEN_STEP_TIMEOUT`](kmp_proto::morph::FROZEN_STEP_TIMEOUT), or the morph is rolled back.
//! - The agent performs each step once, and one at a time; it repeats a failed step, and calls `resume` even if
//!   nothing was frozen.
//! - A provider's memory is bounded, and released after `resume`, `retire` or `abandon`.

mod choice;
mod cooperative;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use kmp_proto::message::{Check, PROVIDERS_MAX, Reference, StateProvider, TransferMode};
use kmp_proto::wire::ErrorCode;

use crate::refusal::Refusal;
use crate::workload::Workload;

pub use choice::{Chosen, Providers};

/// The providers of this agent. Which one a morph uses is the daemon's choice: the order here means nothing.
const PROVIDERS: &[Make] = &[cooperative::make];

const _: () = assert!(PROVIDERS.len() <= PROVIDERS_MAX);

/// Makes a provider for an instance.
type Make = fn(&Host) -> Arc<dyn Provider>;

/// The parts of an instance that its providers use.
#[derive(Clone, Debug)]
pub struct Host {
    /// The program.
    pub workload: Workload,
    /// The handover socket of the previous generation, if that runs on the same kernel.
    pub predecessor: Option<PathBuf>,
}

/// The current ability of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ability {
    /// Bytes of state.
    pub memory_bytes: u64,
    /// How fast it changes, bytes a second.
    pub dirty_bytes_per_s: u64,
    /// Kinds of state that move: bits of [`capability`](kmp_proto::message::capability).
    pub state_kinds: u32,
    /// Ways in which they move: bits of [`capability`](kmp_proto::message::capability).
    pub modes: u32,
    /// Version of the state's own format; a morph takes the same on both sides.
    pub state_version: u32,
}

/// State that is about to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// The morph's session.
    pub session: u64,
    /// How the state is to move.
    pub mode: TransferMode,
}

/// State that is ready to leave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Bytes of all of it.
    pub total_bytes: u64,
    /// Bytes that the first round has to send.
    pub dirty_bytes: u64,
    /// By reference: what the target is to map, where it has to be named.
    pub references: Vec<Reference>,
}

/// State that is about to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The morph's session.
    pub session: u64,
    /// How it comes.
    pub mode: TransferMode,
    /// Bytes of all of it, as the source says.
    pub total_bytes: u64,
    /// By reference: what the source's provider has named. A kernel that may have failed wrote it: check it.
    pub references: Vec<Reference>,
}

/// A part of a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its offset in the state, as defined by the provider.
    pub offset: u64,
    /// The bytes; none when nothing is left.
    pub data: Vec<u8>,
    /// Bytes that are still to be sent after these.
    pub dirty_bytes: u64,
}

/// A way to move the state of the instance's workload. The module documentation has the rules.
#[async_trait]
pub trait Provider: fmt::Debug + Send + Sync {
    /// Which one it is, in the protocol.
    fn id(&self) -> StateProvider;

    /// The provider's ability in this instance.
    ///
    /// # Errors
    /// Why it cannot be used, for people; never empty.
    async fn offer(&self) -> Result<Ability, String>;

    /// Source: makes the state ready to leave, while the workload serves.
    ///
    /// # Errors
    /// Why not; the morph is rolled back. So with all that follow.
    async fn export(&self, export: Export) -> Result<Exported, Refusal>;

    /// Source, by reference: a descriptor for the target's agent on the same kernel, which has asked for it on the
    /// handover socket.
    ///
    /// # Errors
    /// As for [`Self::export`]; always, unless a provider says otherwise.
    async fn hand_over(&self) -> Result<OwnedFd, Refusal> {
        let text = format!("the provider {} does not pass descriptors", self.id());
        Err(Refusal::new(ErrorCode::UnexpectedInState, text))
    }

    /// Source, in rounds: the next part of the state, of at most `max_bytes`.
    ///
    /// # Errors
    /// As for [`Self::export`].
    async fn read(&self, max_bytes: usize) -> Result<Piece, Refusal>;

    /// Source: has the workload stand still. The digest of its state.
    ///
    /// # Errors
    /// As for [`Self::export`]; the workload then still serves.
    async fn freeze(&self) -> Result<u64, Refusal>;

    /// Source: has the workload serve as if there had been no morph, and lets go of what was made ready.
    ///
    /// # Errors
    /// As for [`Self::export`]; it is asked again.
    async fn resume(&self) -> Result<(), Refusal>;

    /// Source: ends the workload, whose state is the target's.
    ///
    /// # Errors
    /// As for [`Self::export`]; the fence follows in any case.
    async fn retire(&self) -> Result<(), Refusal>;

    /// Target: makes room, or maps what is there.
    ///
    /// # Errors
    /// As for [`Self::export`].
    async fn import(&self, import: Import) -> Result<(), Refusal>;

    /// Target, in rounds: takes what [`Self::read`] gave at the source.
    ///
    /// # Errors
    /// As for [`Self::export`].
    async fn apply(&self, offset: u64, data: Vec<u8>) -> Result<(), Refusal>;

    /// Target: checks what has come, before the workload stands still for it. At least one check.
    ///
    /// # Errors
    /// As for [`Self::export`].
    async fn validate(&self) -> Result<Vec<Check>, Refusal>;

    /// Target: takes over what the source froze, ready to serve. The digest of that state. `nonce` is the request's;
    /// whoever holds the state repeats it.
    ///
    /// # Errors
    /// As for [`Self::export`].
    async fn activate(&self, nonce: u64) -> Result<u64, Refusal>;

    /// Target: serves. The state is the target's from here on.
    ///
    /// # Errors
    /// As for [`Self::export`]; it is asked again.
    async fn serve(&self) -> Result<(), Refusal>;

    /// Target: the morph is undone; lets go of what came. The agent then ends the program that it started.
    async fn abandon(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_has_each_provider_that_the_protocol_names() {
        let host = Host {
            workload: Workload::none(),
            predecessor: None,
        };
        let mut made: Vec<_> = PROVIDERS.iter().map(|make| make(&host).id()).collect();
        let mut named = StateProvider::ALL.to_vec();
        made.sort_by_key(|id| id.value());
        named.sort_by_key(|id| id.value());
        assert_eq!(made, named);
    }
}
