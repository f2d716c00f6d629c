//! What a workload links against to be moved by kmorph, and how its agent talks to it.
//!
//! This crate may open sockets, map shared memory and describe its own process to its agent. It
//! may not speak KMP, know a backend, start a thread, or decide that a morph happens: it does what
//! its agent asks and refuses what is not allowed in its phase.
//!
//! - [`handover`]: what is said between an agent, its workload and the workload on the other side;
//! - [`provider`]: the trait a workload implements;
//! - [`session`]: speaks the protocol and calls the provider;
//! - [`activation`]: the listening sockets a workload is started with;
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
