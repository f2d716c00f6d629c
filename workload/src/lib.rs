//! The library that a movable workload links against, and the protocol between it and its agent.
//!
//! This crate may open sockets, map shared memory and describe its process to its agent. It may not speak KMP, know a
//! backend, start a thread, or decide to morph: it does what its agent asks and refuses requests that its phase does
//! not allow.
//!
//! - [`handover`]: the messages between an agent, its workload and the other side's workload;
//! - [`provider`]: the trait a workload implements;
//! - [`session`]: speaks the protocol and calls the provider;
//! - [`activation`]: the listening sockets that a workload inherits;
//! - [`arena`] and [`store`]: memory that two processes can serve from, one after the other.
//!
//! The reference workload is the binary `kmorph-kv`.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("kmorph-workload maps large memory by 64-bit offsets: build for a 64-bit target");

pub mod activation;
pub mod arena;
pub mod handover;
pub mod provider;
pub mod session;
pub mod store;

/// The environment variable in which a program is told how many bytes of memory it may use; 0 when that is not limited.
pub const MEMORY_ENV: &str = "KMORPH_MEMORY_BYTES";
