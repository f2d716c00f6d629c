//! The library that a movable workload links against, and the protocol between it and its agent.
//!
//! This crate may open sockets, map shared memory and describe its process to its agent. It must not speak KMP,
//! depend on a backend, start a thread, or decide to morph: it carries out its agent's requests, and refuses requests
//! that its phase does not permit.
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

/// Environment variable with the number of bytes of memory that a program may use; 0 if unlimited.
pub const MEMORY_ENV: &str = "KMORPH_MEMORY_BYTES";
