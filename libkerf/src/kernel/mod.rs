//! The kernel's files, `/sys/fs/multikernel`: pool, instances, and overlays as transactions; and
//! the calls that load, boot and halt.
//!
//! The kernel's report of success is not trusted: an overlay counts as applied only when the state
//! that is read back is the planned one.

mod boot;
mod calls;
mod creation;
mod files;
mod load;
mod lock;
mod transaction;

pub use boot::{BootError, CONSOLE, Parked};
pub use calls::{Calls, Command, SystemCalls};
pub use creation::Creation;
pub use files::{Kernel, KernelError};
pub use load::{Files, LoadError};
pub use lock::{KERF_LOCK, Lock, LockError};
pub use transaction::{Applied, ApplyError, TransactionStatus};

/// Path where the kernel's files are mounted.
pub const ROOT: &str = "/sys/fs/multikernel";
