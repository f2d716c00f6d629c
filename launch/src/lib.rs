//! The interface between a backend and the agent that it starts.
//!
//! It consists of [`AgentConfig`], which the backend writes as JSON and the agent reads once at startup, and
//! [`handover`], the local socket on which the agent of the embedded backend passes file descriptors. [`birth`] is
//! the first code that a started process runs. Daemon and agent also share [`stay_resident`], [`descriptor_limit`],
//! [`niceness`], [`boot_id`], and [`close_on_exec_from`] for the programs they execute. This crate implements no protocol, starts no process and
//! knows no actor. Everything read from a file or a socket is parsed into a type that cannot hold an invalid value.

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
