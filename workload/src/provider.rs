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
    /// Its transfer modes, see [`crate::handover::message::mode_bit`].
    pub modes: u32,
}

/// Current figures, see [`crate::handover::message::Status`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Size of the memory to move, in bytes.
    pub state_bytes: u64,
    /// Number of its bytes in use.
    pub used_bytes: u64,
    /// Rate of writes, in bytes per second, a recent average.
    pub dirty_bytes_per_s: u64,
    /// Number of established client connections.
    pub connections: u32,
    /// Number of items.
    pub items: u64,
    /// Number of requests answered by this process.
    pub requests: u64,
}

/// Size of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportSize {
    /// Size of the memory in bytes; the target reserves the same size.
    pub total_len: u64,
    /// Number of bytes in the first round; 0 in [`Mode::ByReference`].
    pub dirty_bytes: u64,
}

/// An item that moves before the freeze.
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

/// An established connection, with its buffered data.
#[derive(Debug)]
pub struct OutgoingConnection<'a> {
    /// The socket.
    pub fd: BorrowedFd<'a>,
    /// The workload's own state for it, at most
    /// [`crate::handover::table::MAX_CONNECTION_STATE_BYTES`].
    pub state: Vec<u8>,
    /// Data read from the socket and not yet executed.
    pub input: &'a [u8],
    /// Answers not yet written to the socket.
    pub output: &'a [u8],
}

/// Written bytes to copy.
#[derive(Debug)]
pub struct DirtyChunk<'a> {
    /// Memory section.
    pub section: u32,
    /// Offset in the section.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// [`OutgoingItem`] on the target.
#[derive(Debug)]
pub enum IncomingItem {
    /// A memory region.
    Memory {
        /// Name, unique in the workload.
        name: String,
        /// Size in bytes, as stated by the source.
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

/// [`OutgoingConnection`] on the target.
#[derive(Debug)]
pub struct IncomingConnection {
    /// The socket.
    pub fd: OwnedFd,
    /// The buffered data.
    pub buffers: ConnectionBuffers,
}

/// Why a provider's method failed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ProviderError {
    /// The kind of failure.
    pub code: FailureCode,
    /// The attempted action and the error.
    pub text: String,
}

impl ProviderError {
    /// Creates an error of the given kind.
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

/// A movable workload. The module's diagram shows the order of calls.
pub trait Provider {
    /// Returns the description that the workload registers with.
    fn describe(&self) -> Description;

    /// Returns the current figures. Called in every phase; cheap.
    fn figures(&self) -> Figures;

    /// Source: prepares the export. In [`Mode::Rounds`] all memory in use counts as written from
    /// here on. A second call starts again. Continues to serve.
    ///
    /// # Errors
    /// Any; then nothing has changed.
    fn prepare_export(&mut self, mode: Mode) -> Result<ExportSize>;

    /// Source, [`Mode::ByReference`]: returns the items that move before the freeze.
    fn items(&self) -> Vec<OutgoingItem<'_>>;

    /// Source, [`Mode::Rounds`]: returns the next written bytes, at most `max_bytes`; `None` if
    /// none are left.
    ///
    /// # Errors
    /// Any; then the export is abandoned.
    fn read_dirty(&mut self, max_bytes: usize) -> Result<Option<DirtyChunk<'_>>>;

    /// Source, [`Mode::Rounds`]: returns the number of bytes that [`Provider::read_dirty`] has not returned yet.
    fn dirty_bytes(&self) -> u64;

    /// Source: stops answering and writing, at once. Must not copy state or compute a digest of all
    /// contents, because clients wait.
    ///
    /// # Errors
    /// Any; then the provider continues to serve.
    fn freeze(&mut self) -> Result<StateDigest>;

    /// Source, [`Mode::ByReference`], frozen: returns the established connections.
    fn connections(&self) -> Vec<OutgoingConnection<'_>>;

    /// Source: continues to serve, whether frozen or not, and drops the export.
    ///
    /// # Errors
    /// [`FailureCode::Fenced`] if the target serves; then the process exits.
    fn resume(&mut self) -> Result<()>;

    /// Target: prepares the import. `total_len` is 0 in [`Mode::ByReference`].
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn prepare_import(&mut self, mode: Mode, total_len: u64) -> Result<()>;

    /// Target, [`Mode::ByReference`]: imports one item.
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn import(&mut self, item: IncomingItem) -> Result<()>;

    /// Target, [`Mode::ByReference`]: all items have arrived. Maps and prefaults now, while the source still serves.
    /// Returns the number of populated bytes.
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn early_complete(&mut self) -> Result<u64>;

    /// Target, [`Mode::Rounds`]: applies the bytes of a [`DirtyChunk`].
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn apply(&mut self, section: u32, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Target, [`Mode::ByReference`]: imports the connections, after the freeze. They must not be
    /// read before [`Provider::serve`].
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn import_connections(&mut self, connections: Vec<IncomingConnection>) -> Result<()>;

    /// Target: the source has resumed. Closes the connections, which the source serves.
    fn forget_connections(&mut self);

    /// Target: checks the received state. `frozen`: the source is frozen, so that the contents can
    /// be checked too, for at most `budget`.
    fn validate(&mut self, frozen: bool, budget: Duration) -> Vec<Check>;

    /// Target: gets ready to answer a first request, but answers no client. `expected` is the source's frozen
    /// state, if known here.
    ///
    /// # Errors
    /// Any; then the morph is abandoned.
    fn activate(&mut self, expected: Option<StateDigest>, budget: Duration) -> Result<StateDigest>;

    /// Target: takes over the state and serves.
    ///
    /// # Errors
    /// [`FailureCode::Fenced`] if the source has resumed; then the process exits.
    fn serve(&mut self) -> Result<()>;
}
