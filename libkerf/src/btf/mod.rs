//! The memory that kernels share with each other, and whether two kernels agree on its layout.
//!
//! A multikernel host and the kernels beside it write into the same memory: rings of messages, the page in which CPUs are
//! handed over, messages themselves. Neither checks the other's version. Both say how they lay that memory out: a kernel
//! built with CONFIG_DEBUG_INFO_BTF has the types of its C source in its section `.BTF`, and the running one shows its
//! own in `/sys/kernel/btf/vmlinux`.
//!
//! Source of the format: Linux, Documentation/bpf/btf.rst.

mod elf;
mod layout;
mod read;
mod shared;

pub use layout::Member;
pub use read::{BtfError, Types};
pub use shared::{Difference, Disagreement, Host, SHARED, agree};

/// The file with the types of the running kernel.
pub const RUNNING: &str = "/sys/kernel/btf/vmlinux";
/// The largest description of types that is read, bytes. That of Linux 7.3 has 5 MB.
pub const MAX_BTF_BYTES: u64 = 64 << 20;
