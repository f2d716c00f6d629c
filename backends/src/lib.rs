//! Where instances run: one contract ([`contract`]) and its implementations.
//!
//! This crate starts, observes, fences and ends instances. It decides nothing, speaks no KMP and
//! knows no actor. A fence certificate comes from a backend that saw the end of a generation, and
//! from nowhere else.

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
