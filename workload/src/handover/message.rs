//! The messages on the handover socket and on the peer channel.
//!
//! ```text
//!   agent (old)                workload (old)        workload (new)              agent (new)
//!     |  PrepareExport + peer fd   |                      |   PrepareImport + peer fd  |
//!     |--------------------------->|  Part (memory, ...)  |<---------------------------|
//!     |                            |=====================>|  map, prefault             |
//!     |<------------- Prepared ----|  EndOfEarly          |---- ImportReady ---------->|
//!     |  Freeze                    |=====================>|                            |
//!     |--------------------------->|  Part (connections)  |                            |
//!     |<--------------- Frozen ----|  Frozen              |                            |
//!     |                            |=====================>|<-------------- Activate ---|
//!     |                            |                      |---- Activated{nonce} ----->|
//!     |                            |                      |<----------------- Serve ---|
//!     |  Retire                    |                      |---- Serving -------------->|
//!     |--------------------------->|  (exit)
//! ```
//!
//! `--` is the handover socket between a workload and its own agent, `==` the peer channel between
//! the two workloads, which carries state by reference only. In rounds mode there is no peer
//! channel: the source answers [`Request::ReadDirty`] with [`Reply::Chunk`], the target takes
//! [`Request::Apply`].
//!
//! Invariants:
//! - Each request carries an id; exactly one final reply answers it with the same id. Replies may be late (an import
//!   that waits for its peer), but never come twice.
//! - After `Frozen` the source answers no client and writes no shared state until `Resume`.
//! - Before `Serving` the target reads from no client and writes no shared state.
//! - `Serve` and `Resume` compete for one word in the shared memory; only one of them can win. The loser answers
//!   [`FailureCode::Fenced`] and exits.

use serde::{Deserialize, Serialize};

/// Version of this protocol; a workload with another one is refused.
pub const PROTOCOL_VERSION: u32 = 1;

/// Kinds of state, as bits: the values KMP's MORPH_NEGOTIATE uses.
pub mod state_kind {
    /// Memory regions.
    pub const MEMORY: u32 = 1;
    /// Open files of any kind.
    pub const FILES: u32 = 2;
    /// Listening sockets.
    pub const LISTENERS: u32 = 4;
    /// Established connections with what is buffered for them.
    pub const CONNECTIONS: u32 = 8;
}

/// Ways to move memory, as bits: the values KMP's MORPH_NEGOTIATE uses.
pub mod mode_bit {
    /// See [`super::Mode::ByReference`].
    pub const BY_REFERENCE: u32 = 1;
    /// See [`super::Mode::Rounds`].
    pub const ROUNDS: u32 = 2;
}

/// How memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Both sides map the same memory; descriptors and connections move too.
    ByReference,
    /// Memory is copied in rounds of what was written since; connections do not move.
    Rounds,
}

/// The role that a workload is started in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Begin with empty state and serve at once.
    Serve,
    /// The target of a morph: hold still until state has come and `Serve` is said.
    Standby,
}

/// The phase of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Answers clients.
    Serving,
    /// Answers clients and tracks what it writes, for an export.
    Exporting,
    /// Source: answers no client, writes nothing.
    Frozen,
    /// Target: waits for state.
    Standby,
    /// Target: has its state, could answer.
    Activated,
    /// Told to exit.
    Retired,
}

/// Identifies a frozen state; equal on both sides of a morph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDigest {
    /// Digest over all content.
    pub digest: u64,
    /// Count of changes since the state was created.
    pub counter: u64,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// Agent to workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Answers the workload's [`Reply::Register`]; has no reply itself.
    Registered {
        /// [`PROTOCOL_VERSION`] of the agent.
        protocol: u32,
        /// The role of this process.
        role: Role,
        /// Name of the instance.
        instance: String,
        /// Generation of the instance.
        generation: u64,
        /// Kernel release the instance reports.
        kernel_release: String,
    },
    /// How are you? Reply: [`Reply::Status`]. Allowed in every phase.
    Query,
    /// Source: make ready to export. In [`Mode::ByReference`] one descriptor is attached: the
    /// peer channel. Reply: [`Reply::Prepared`]. A second one starts over.
    PrepareExport {
        /// How memory will move.
        mode: Mode,
    },
    /// Source, rounds: the next dirty bytes. Reply: [`Reply::Chunk`].
    ReadDirty {
        /// At most this many bytes; capped at [`super::MAX_CHUNK_BYTES`].
        max_bytes: u32,
    },
    /// Source: stop answering and writing. Reply: [`Reply::Frozen`].
    Freeze,
    /// Source: take the export back and go on serving, whether frozen or not.
    /// Reply: [`Reply::Resumed`], or [`FailureCode::Fenced`] when the target serves already.
    Resume,
    /// Either side: exit without touching shared state. Reply: [`Reply::Retired`].
    Retire,
    /// Target: make room for the state. In [`Mode::ByReference`] one descriptor is attached: the
    /// peer channel; the reply comes once the early parts are here and mapped.
    /// Reply: [`Reply::ImportReady`].
    PrepareImport {
        /// How memory will move.
        mode: Mode,
        /// Rounds: size of the memory to be filled, from [`Reply::Prepared`]. Else 0.
        total_len: u64,
    },
    /// Target, rounds: bytes of [`Reply::Chunk`]. Reply: [`Reply::Applied`]. Several may be outstanding; they are
    /// applied in order.
    Apply {
        /// Memory section, from the chunk.
        section: u32,
        /// Place in the section.
        offset: u64,
    },
    /// Target: check what is here. Before the freeze this checks all that holds still, after it
    /// the content too. Reply: [`Reply::Validated`].
    Validate {
        /// Time to spend on the content, in microseconds.
        budget_us: u32,
    },
    /// Target, after the freeze: get ready to answer, but answer no client yet. Reply: [`Reply::Activated`].
    Activate {
        /// Given back in the reply.
        nonce: u64,
        /// Time to spend on checking the content, in microseconds.
        budget_us: u32,
    },
    /// Target, after the commit is recorded: answer clients. Reply: [`Reply::Serving`], or
    /// [`FailureCode::Fenced`] when the source has resumed.
    Serve,
}

/// One check of a validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Short name, such as `arena header`.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// How long it took, in microseconds.
    pub duration_us: u32,
    /// The finding; part of a sentence.
    pub detail: String,
}

/// The status that a workload reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its phase.
    pub phase: Phase,
    /// Memory that would move, in bytes.
    pub state_bytes: u64,
    /// Bytes of it in use.
    pub used_bytes: u64,
    /// Written bytes per second, a recent average.
    pub dirty_bytes_per_s: u64,
    /// Established client connections.
    pub connections: u32,
    /// Items held, such as keys.
    pub items: u64,
    /// Requests answered since the process started.
    pub requests: u64,
    /// See [`state_kind`].
    pub state_kinds: u32,
    /// See [`mode_bit`].
    pub modes: u32,
}

/// The cause of a failure, which determines the possible reactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// Not allowed in this phase. Nothing changed.
    WrongPhase,
    /// The workload cannot do that. Nothing changed.
    Unsupported,
    /// The request or what came with it is malformed. Nothing changed.
    BadRequest,
    /// The state is damaged or of a version that this workload cannot read.
    BadState,
    /// The other side owns the state. This process exits right after saying so.
    Fenced,
    /// The peer channel broke or was silent for too long.
    Peer,
    /// The system refused something.
    System,
}

/// Workload to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// First message of a workload, with id 0.
    Register {
        /// [`PROTOCOL_VERSION`] of the workload.
        protocol: u32,
        /// Name of the program.
        name: String,
        /// Its version.
        version: String,
        /// Its process id, in its own namespace.
        pid: u32,
        /// See [`state_kind`].
        state_kinds: u32,
        /// See [`mode_bit`].
        modes: u32,
    },
    /// Answers [`Request::Query`].
    Status(Status),
    /// Answers [`Request::PrepareExport`].
    Prepared {
        /// Size of the memory, in bytes: `total_len` of [`Request::PrepareImport`].
        total_len: u64,
        /// Bytes that the first round will carry.
        dirty_bytes: u64,
    },
    /// Answers [`Request::ReadDirty`]; the bytes are the packet's data.
    Chunk {
        /// Memory section.
        section: u32,
        /// Place in the section.
        offset: u64,
        /// Bytes still dirty after this chunk. An empty chunk means none were left.
        dirty_bytes: u64,
    },
    /// Answers [`Request::Freeze`].
    Frozen {
        /// The current state.
        state: StateDigest,
        /// Bytes still to be read with [`Request::ReadDirty`] (rounds).
        dirty_bytes: u64,
        /// Connections handed to the peer.
        connections: u32,
        /// From request to reply, in microseconds.
        elapsed_us: u32,
    },
    /// Answers [`Request::Resume`]: clients are being answered again.
    Resumed,
    /// Answers [`Request::Retire`]; the process exits with status 0.
    Retired,
    /// Answers [`Request::PrepareImport`].
    ImportReady {
        /// Bytes mapped and present before the freeze.
        prefaulted_bytes: u64,
    },
    /// Answers [`Request::Apply`].
    Applied,
    /// Answers [`Request::Validate`].
    Validated {
        /// All checks passed.
        passed: bool,
        /// The checks, in order.
        checks: Vec<Check>,
    },
    /// Answers [`Request::Activate`].
    Activated {
        /// From the request.
        nonce: u64,
        /// The state on this side; equals the source's [`Reply::Frozen`].
        state: StateDigest,
        /// Connections taken over.
        connections: u32,
    },
    /// Answers [`Request::Serve`]: clients are being answered.
    Serving {
        /// From request to reply, in microseconds.
        elapsed_us: u32,
    },
    /// The request was not done.
    Failed {
        /// The cause.
        code: FailureCode,
        /// What was attempted and what happened.
        text: String,
    },
}

/// One part of the transferred state; it belongs to the descriptor at the same position in the packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "item")]
pub enum Item {
    /// A memory region: a memfd.
    Memory {
        /// Name, unique in the workload.
        name: String,
        /// Size in bytes.
        len: u64,
    },
    /// Any open file.
    File {
        /// Name, unique in the workload.
        name: String,
    },
    /// A listening socket.
    Listener {
        /// Name, as in LISTEN_FDNAMES.
        name: String,
    },
    /// The buffered data of all connections: a memfd, see [`super::table`].
    ConnectionTable {
        /// Connections in it.
        count: u32,
        /// Its size in bytes.
        len: u64,
    },
    /// An established connection.
    Connection {
        /// Its place in the connection table.
        index: u32,
    },
}

/// Source workload to target workload, on the peer channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "peer")]
pub enum PeerMessage {
    /// Some items, each with its descriptor. At most [`super::MAX_FDS_PER_PACKET`].
    Part {
        /// The items.
        items: Vec<Item>,
    },
    /// Everything that can move before the freeze has been sent.
    EndOfEarly,
    /// All has been sent; the source holds still.
    Frozen {
        /// The state.
        state: StateDigest,
        /// Connections sent since [`PeerMessage::EndOfEarly`].
        connections: u32,
    },
    /// The source serves again: forget what came since `EndOfEarly`.
    Resumed,
}
