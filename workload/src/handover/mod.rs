//! The handover socket, between an agent and its workload, and the transfer of state between two workloads.
//!
//! The agent starts the workload with one end of a Unix SEQPACKET socket pair, named in [`AGENT_FD_ENV`]. Each packet
//! is a JSON message, then raw data, with descriptors attached; all sizes are bounded. [`message`] shows the sequence
//! of a whole morph.

#[cfg(feature = "tokio")]
mod agent_end;
pub mod message;
mod packet;
mod spawn;
pub mod table;

#[cfg(feature = "tokio")]
pub use agent_end::{AgentEnd, AgentEndError};
pub use packet::{HandoverError, Incoming, Packet, PacketSocket};
pub use spawn::{ActivatedListener, attach};

/// Environment variable with the number of the workload's end of the handover socket.
pub const AGENT_FD_ENV: &str = "KMORPH_AGENT_FD";
/// Maximum size of the JSON in a packet, in bytes.
pub const MAX_JSON_BYTES: usize = 32 * 1024;
/// Maximum size of the data in a packet, and so of one chunk of memory, in bytes.
pub const MAX_CHUNK_BYTES: usize = 64 * 1024;
/// Maximum number of descriptors in a packet. The kernel's own limit is 253.
pub const MAX_FDS_PER_PACKET: usize = 128;
/// Maximum number of connections that move in one morph.
pub const MAX_CONNECTIONS: usize = 10_000;
/// Maximum size of a connection table, in bytes: the buffered data of all connections together.
pub const MAX_TABLE_BYTES: u64 = 1 << 30;
