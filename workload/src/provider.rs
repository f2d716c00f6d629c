//! The trait that a movable workload implements: the `cooperative` state provider.
//!
//! [`crate::session::Session`] speaks the protocol and tracks the phases. It calls a provider only when its phase
//! allows it, on the thread that handles the session's descriptors, and never two methods at once.
//!
//! ```text
//!   source:  prepare_export, items ── read_dirty* ── freeze, connections ─┬─ (retire: exit)
//!                                                                           └─ resume
//!   target:  prepare_import ── import*, early_complete | apply* ── import_connections
//!              ── validate* ── activate ── serve
//! ```
//!
//! A morph is safe only if the provider guarantees two things: between `freeze` and `resume` it answers no client and
//! changes no shared state; until `serve` has succeeded it reads from no client and changes no shared state.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::arena::ArenaError;
use crate::handover::message::{Check, FailureCode, Mode, StateDigest};
use crate::handover::table::ConnectionBuffers;

/// The description that a workload registers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name of the program.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The kinds of state that it can move, see [`crate::handover::message::state_kind`].
    pub state_kinds: u32,
    /// How, see [`crate::handover::message::mode_bit`].
    pub modes: u32,
}

/// Current figures, see [`crate::handover::message::Status`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Memory that would move, in bytes.
    pub state_bytes: u64,
    /// Bytes of it in use.
    pub used_bytes: u64,
    /// Written bytes per second, a recent average.
    pub dirty_bytes_per_s: u64,
    /// Established client connections.
    pub connections: u32,
    /// Items held.
    pub items: u64,
    /// Requests answered by this process.
    pub requests: u64,
}

/// Size of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportSize {
    /// Memory in bytes; the target makes room for as much.
    pub total_len: u64,
    /// Bytes that the first round carries; 0 in [`Mode::ByReference`].
    pub dirty_bytes: u64,
}

/// Something that moves before the freeze.
#[derive(Debug)]
pub enum OutgoingItem<'a> {
    /// A memory region: a memfd, sealed against shrinking.
    Memory {
        /// Name, unique in the workload.
        name: String,
        /// Size in bytes.
        len: u64,
        /// The memfd.
        fd: BorrowedFd<'a>,
    },
    /// Any open file.
    File {
        /// Name, unique in the workload.
        name: String,
        /// The file.
        fd: BorrowedFd<'a>,
    },
    /// A listening socket.
    Listener {
        /// Name, as in LISTEN_FDNAMES.
        name: String,
        /// The socket.
        fd: BorrowedFd<'a>,
    },
}

/// An established connection, with what is buffered for it.
#[derive(Debug)]
pub struct OutgoingConnection<'a> {
    /// The socket.
    pub fd: BorrowedFd<'a>,
    /// The workload's own state for it, at most
    /// [`crate::handover::table::MAX_CONNECTION_STATE_BYTES`].
    pub state: Vec<u8>,
    /// Read from the socket, not yet executed.
    pub input: &'a [u8],
    /// Answers not yet written to the socket.
    pub output: &'a [u8],
}

/// Written bytes, to be copied.
#[derive(Debug)]
pub struct DirtyChunk<'a> {
    /// Memory section.
    pub section: u32,
    /// Place in the section.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// [`OutgoingItem`] as it arrives.
#[derive(Debug)]
pub enum IncomingItem {
    /// A memory region.
    Memory {
        /// Name, unique in the workload.
        name: String,
        /// Size in bytes, as the source says it.
        len: u64,
        /// The memfd.
        fd: OwnedFd,
    },
    /// Any open file.
    File {
        /// Name, unique in the workload.
        name: String,
        /// The file.
        fd: OwnedFd,
    },
    /// A listening socket.
    Listener {
        /// Name, as in LISTEN_FDNAMES.
        name: String,
        /// The socket.
        fd: OwnedFd,
    },
}

/// [`OutgoingConnection`] as it arrives.
#[derive(Debug)]
pub struct IncomingConnection {
    /// The socket.
    pub fd: OwnedFd,
    /// The buffered data.
    pub buffers: ConnectionBuffers,
}

/// Why a provider could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ProviderError {
    /// The kind of failure.
    pub code: FailureCode,
    /// What was attempted and what happened.
    pub text: String,
}

impl ProviderError {
    /// An error of the given kind.
    pub fn new(code: FailureCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

impl From<ArenaError> for ProviderError {
    fn from(error: ArenaError) -> Self {
        let code = match &error {
            ArenaError::NotOwner(_) => FailureCode::Fenced,
            ArenaError::Corrupt { .. } | ArenaError::Incompatible(_) => FailureCode::BadState,
            ArenaError::Full | ArenaError::System { .. } => FailureCode::System,
        };
        Self::new(code, error.to_string())
    }
}

/// Result of a provider's method.
pub type Result<T> = std::result::Result<T, ProviderError>;

/// A workload that can be moved. See the module's picture for the order of calls.
pub trait Provider {
    /// The description that the workload registers with.
    fn describe(&self) -> Description;

    /// Current figures. Called in every phase; cheap.
    fn figures(&self) -> Figures;

    /// Source: make ready. In [`Mode::Rounds`] all memory in use counts as written from here on.
    /// A second call starts over. Goes on serving.
    ///
    /// # Errors
    /// Any; nothing has changed then.
    fn prepare_export(&mut self, mode: Mode) -> Result<ExportSize>;

    /// Source, [`Mode::ByReference`]: what moves before the freeze.
    fn items(&self) -> Vec<OutgoingItem<'_>>;

    /// Source, [`Mode::Rounds`]: the next written bytes, at most `max_bytes`; `None` when none
    /// are left.
    ///
    /// # Errors
    /// Any; the export is given up then.
    fn read_dirty(&mut self, max_bytes: usize) -> Result<Option<DirtyChunk<'_>>>;

    /// Source, [`Mode::Rounds`]: bytes that [`Provider::read_dirty`] has still to give.
    fn dirty_bytes(&self) -> u64;

    /// Source: stop answering and writing, at once. No copying and no digest over all content
    /// here: clients wait.
    ///
    /// # Errors
    /// Any; it goes on serving then.
    fn freeze(&mut self) -> Result<StateDigest>;

    /// Source, [`Mode::ByReference`], frozen: the established connections.
    fn connections(&self) -> Vec<OutgoingConnection<'_>>;

    /// Source: go on serving, whether frozen or not; forget the export.
    ///
    /// # Errors
    /// [`FailureCode::Fenced`] when the target serves; the process exits then.
    fn resume(&mut self) -> Result<()>;

    /// Target: make room. `total_len` is 0 in [`Mode::ByReference`].
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn prepare_import(&mut self, mode: Mode, total_len: u64) -> Result<()>;

    /// Target, [`Mode::ByReference`]: one item.
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn import(&mut self, item: IncomingItem) -> Result<()>;

    /// Target, [`Mode::ByReference`]: all items are here. Map and prefault now, while the source still serves. Returns the bytes made present.
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn early_complete(&mut self) -> Result<u64>;

    /// Target, [`Mode::Rounds`]: bytes of a [`DirtyChunk`].
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn apply(&mut self, section: u32, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Target, [`Mode::ByReference`]: the connections, after the freeze. Not to be read from
    /// before [`Provider::serve`].
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn import_connections(&mut self, connections: Vec<IncomingConnection>) -> Result<()>;

    /// Target: the source has resumed. Close the connections: they are served elsewhere.
    fn forget_connections(&mut self);

    /// Target: check what is here. `frozen`: whether the source holds still, so that the
    /// content can be checked too, for at most `budget`.
    fn validate(&mut self, frozen: bool, budget: Duration) -> Vec<Check>;

    /// Target: get ready to answer a first request, but answer no client. `expected` is the state that the source
    /// froze, if known here.
    ///
    /// # Errors
    /// Any; the morph is given up then.
    fn activate(&mut self, expected: Option<StateDigest>, budget: Duration) -> Result<StateDigest>;

    /// Target: take the state and serve.
    ///
    /// # Errors
    /// [`FailureCode::Fenced`] when the source has resumed; the process exits then.
    fn serve(&mut self) -> Result<()>;
}
