//! The kernel's files, `/sys/fs/multikernel`: what it says of pool and instances, and overlays as
//! transactions; and the calls that load, boot and halt.
//!
//! The kernel's own word for a change is not taken: an overlay counts as applied when what is read
//! back is what it was to make.

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
