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
//! `--` is the handover socket between a workload and its own agent, `==` the peer channel between the two
//! workloads, which carries state by reference only. In rounds mode there is no peer channel: the source answers
//! [`Request::ReadDirty`] with [`Reply::Chunk`], the target takes [`Request::Apply`].
//!
//! Invariants:
//! - Each request carries an id; exactly one final reply answers it with the same id. A reply may be late (an import
//!   that waits for its peer), but is never repeated.
//! - After `Frozen` the source answers no client and writes no shared state until `Resume`.
//! - Before `Serving` the target reads from no client and writes no shared state.
//! - `Serve` and `Resume` compete for one word in the shared memory; only one of them can win. The loser answers
//!   [`FailureCode::Fenced`] and exits.

use serde::{Deserialize, Serialize};

/// Version of this protocol; the agent refuses a workload with another version.
pub const PROTOCOL_VERSION: u32 = 1;

/// Kinds of state, as bits, with the values of KMP's MORPH_NEGOTIATE.
pub mod state_kind {
    /// Memory regions.
    pub const MEMORY: u32 = 1;
    /// Open files of any kind.
    pub const FILES: u32 = 2;
    /// Listening sockets.
    pub const LISTENERS: u32 = 4;
    /// Established connections with their buffered data.
    pub const CONNECTIONS: u32 = 8;
}

/// Ways to move memory, as bits, with the values of KMP's MORPH_NEGOTIATE.
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
    /// Memory is copied in rounds, each with the changes since the previous one; connections do not move.
    Rounds,
}

/// The initial role of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Start with empty state and serve at once.
    Serve,
    /// The target of a morph: wait until the state has arrived and for `Serve`.
    Standby,
}

/// The phase of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Answers clients.
    Serving,
    /// Answers clients and tracks its writes, for an export.
    Exporting,
    /// Source: answers no clients, writes nothing.
    Frozen,
    /// Target: waits for its state.
    Standby,
    /// Target: has its state and could answer.
    Activated,
    /// Has been told to exit.
    Retired,
}

/// Identifies a frozen state: the digests on both sides of a morph are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDigest {
    /// Digest of all contents.
    pub digest: u64,
    /// Number of changes since the state was created.
    pub counter: u64,
    /// Number of bytes in use.
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
        /// Release of the instance's kernel.
        kernel_release: String,
    },
    /// Requests the status. Reply: [`Reply::Status`]. Permitted in every phase.
    Query,
    /// Source: prepare the export. In [`Mode::ByReference`] one descriptor is attached: the peer
    /// channel. Reply: [`Reply::Prepared`]. A second request starts again.
    PrepareExport {
        /// The way to move memory.
        mode: Mode,
    },
    /// Source, rounds: send the next dirty bytes. Reply: [`Reply::Chunk`].
    ReadDirty {
        /// Maximum number of bytes; capped at [`super::MAX_CHUNK_BYTES`].
        max_bytes: u32,
    },
    /// Source: stop answering and writing. Reply: [`Reply::Frozen`].
    Freeze,
    /// Source: abandon the export and continue to serve, whether frozen or not. Reply:
    /// [`Reply::Resumed`], or [`FailureCode::Fenced`] if the target already serves.
    Resume,
    /// Either side: exit without touching shared state. Reply: [`Reply::Retired`].
    Retire,
    /// Target: prepare for the state. In [`Mode::ByReference`] one descriptor is attached: the peer
    /// channel; the reply follows once the early parts are received and mapped. Reply:
    /// [`Reply::ImportReady`].
    PrepareImport {
        /// The way to move memory.
        mode: Mode,
        /// Rounds: size of the memory to fill, from [`Reply::Prepared`]. Else 0.
        total_len: u64,
    },
    /// Target, rounds: bytes of [`Reply::Chunk`]. Reply: [`Reply::Applied`]. Several may be outstanding; they are
    /// applied in order.
    Apply {
        /// Memory section, from the chunk.
        section: u32,
        /// Offset in the section.
        offset: u64,
    },
    /// Target: check the received state. Before the freeze this checks only the constant parts,
    /// after it the contents too. Reply: [`Reply::Validated`].
    Validate {
        /// Maximum time for the check of the contents, in microseconds.
        budget_us: u32,
    },
    /// Target, after the freeze: get ready to answer, but answer no clients yet. Reply: [`Reply::Activated`].
    Activate {
        /// Repeated in the reply.
        nonce: u64,
        /// Maximum time for the check of the contents, in microseconds.
        budget_us: u32,
    },
    /// Target, after the commit record: answer clients. Reply: [`Reply::Serving`], or
    /// [`FailureCode::Fenced`] if the source has resumed.
    Serve,
}

/// One check of a validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Short name, such as `arena header`.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// Its duration, in microseconds.
    pub duration_us: u32,
    /// The finding; part of a sentence.
    pub detail: String,
}

/// The status that a workload reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its phase.
    pub phase: Phase,
    /// Size of the memory to move, in bytes.
    pub state_bytes: u64,
    /// Number of its bytes in use.
    pub used_bytes: u64,
    /// Rate of writes, in bytes per second, a recent average.
    pub dirty_bytes_per_s: u64,
    /// Number of established client connections.
    pub connections: u32,
    /// Number of items, such as keys.
    pub items: u64,
    /// Number of requests answered since the process started.
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
    /// Not permitted in this phase. Nothing has changed.
    WrongPhase,
    /// The workload does not support this. Nothing has changed.
    Unsupported,
    /// The request, or its data or descriptors, are malformed. Nothing has changed.
    BadRequest,
    /// The state is damaged, or has a version that this workload cannot read.
    BadState,
    /// The other side owns the state. This process exits right after this reply.
    Fenced,
    /// The peer channel failed or timed out.
    Peer,
    /// A system call failed.
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
        /// Its pid, in its own namespace.
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
        /// Number of bytes in the first round.
        dirty_bytes: u64,
    },
    /// Answers [`Request::ReadDirty`]; the data of the packet contains the bytes.
    Chunk {
        /// Memory section.
        section: u32,
        /// Offset in the section.
        offset: u64,
        /// Number of bytes still dirty after this chunk. An empty chunk means that none were left.
        dirty_bytes: u64,
    },
    /// Answers [`Request::Freeze`].
    Frozen {
        /// The current state.
        state: StateDigest,
        /// Number of bytes still to be read with [`Request::ReadDirty`] (rounds).
        dirty_bytes: u64,
        /// Number of connections sent to the peer.
        connections: u32,
        /// Time from request to reply, in microseconds.
        elapsed_us: u32,
    },
    /// Answers [`Request::Resume`]: the workload answers clients again.
    Resumed,
    /// Answers [`Request::Retire`]; the process exits with status 0.
    Retired,
    /// Answers [`Request::PrepareImport`].
    ImportReady {
        /// Number of bytes mapped and populated before the freeze.
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
        /// The nonce of the request.
        nonce: u64,
        /// The state of this side; equal to the source's [`Reply::Frozen`].
        state: StateDigest,
        /// Number of connections taken over.
        connections: u32,
    },
    /// Answers [`Request::Serve`]: the workload answers clients.
    Serving {
        /// Time from request to reply, in microseconds.
        elapsed_us: u32,
    },
    /// The request failed.
    Failed {
        /// The cause.
        code: FailureCode,
        /// The attempted action and the error.
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
        /// Number of connections in it.
        count: u32,
        /// Its size in bytes.
        len: u64,
    },
    /// An established connection.
    Connection {
        /// Its index in the connection table.
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
    /// The end of the items that can move before the freeze.
    EndOfEarly,
    /// The end of all items; the source is frozen.
    Frozen {
        /// The state.
        state: StateDigest,
        /// Number of connections sent since [`PeerMessage::EndOfEarly`].
        connections: u32,
    },
    /// The source serves again: discard all items since `EndOfEarly`.
    Resumed,
}
