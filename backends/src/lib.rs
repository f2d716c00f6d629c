//! The backends that run instances: one contract ([`contract`]) and its implementations.
//!
//! This crate starts, observes, fences and ends instances. It makes no decisions, does not speak KMP and does not
//! depend on the actors. Only a backend that observed the end of a generation creates its fence certificate.

mod birth;
pub mod cgroup;
pub mod contract;
pub mod embedded;
mod fencing;
mod finding;
mod guest;
pub mod kernel_image;
pub mod key;
mod looks;
mod marks;
pub mod multikernel;
mod process;
pub mod qemu;
mod scheduling;

pub use guest::MEMORY_MIN_MIB;
