//! What a backend tells the agent it starts.
//!
//! The backend and the agent meet only here: in [`AgentConfig`], which the backend writes as JSON
//! and the agent reads once at start, and in [`handover`], the local socket on which the agent of
//! the embedded backend passes file descriptors. [`birth`] is what a started process does first. Daemon and agent also
//! share [`stay_resident`], [`descriptor_limit`], [`niceness`], [`boot_id`], and [`close_on_exec_from`] for what they
//! execute. This crate does no protocol work, starts no process and knows no actor.
//! Everything read from a file or a socket is parsed into a type that cannot hold an invalid value.

pub mod birth;
mod boot;
mod config;
pub mod descriptor_limit;
mod descriptors;
mod name;
pub mod niceness;
mod resident;
mod secret;

pub use boot::boot_id;
pub use config::{
    AGENT_CONFIG_MAX_BYTES, AgentConfig, ConfigError, Listen, PublishedPort, Role, StartMode,
    WorkloadRestart, WorkloadSpec,
};
pub use descriptors::{FIRST_OTHER, LISTENERS_ENV, close_all_but, close_on_exec_from};
pub use name::{INSTANCE_NAME_MAX_BYTES, InstanceName, InvalidInstanceName};
pub use resident::stay_resident;
pub use secret::Secret;
pub mod handover;
