//! Checks whether two kernels agree on the layout of the memory that they share.
//!
//! A multikernel host and the kernels beside it write into the same memory: message rings, the page for the handover of
//! CPUs, the messages themselves. Neither side checks the other's version, but both describe their layout: a kernel
//! built with CONFIG_DEBUG_INFO_BTF has the types of its C source in its section `.BTF`, and the running kernel shows
//! its own in `/sys/kernel/btf/vmlinux`.
//!
//! Source of the format: Linux, Documentation/bpf/btf.rst.

mod elf;
mod layout;
mod read;
mod shared;

pub use layout::Member;
pub use read::{BtfError, Types};
pub use shared::{Difference, Disagreement, Host, SHARED, agree};

/// Path of the running kernel's types.
pub const RUNNING: &str = "/sys/kernel/btf/vmlinux";
/// Maximum size of type information, bytes. Linux 7.3 has 5 MB.
pub const MAX_BTF_BYTES: u64 = 64 << 20;
