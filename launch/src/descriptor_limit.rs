//! The limit of open descriptors: the daemon raises its own, and starts programs with the original limit.
//!
//! A program that uses select(2) breaks on a descriptor above 1023, and one that closes all possibly inherited
//! descriptors takes long under a high limit: both rely on the low soft limit that systems start with.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Environment variable that tells an agent the soft limit that was there before its daemon raised it.
pub const SOFT_LIMIT_ENV: &str = "KMORPH_SOFT_DESCRIPTORS";

/// The soft limit before it was raised.
static BEFORE: OnceLock<u64> = OnceLock::new();

/// Raises the soft limit of this process to the hard one, and remembers what it was. Returns the limit now in force.
///
/// # Errors
/// If the system refuses.
pub fn raise() -> io::Result<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // No limit is the highest one.
    let (soft, hard) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
    if soft < hard {
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        setrlimit(Resource::Nofile, raised)?;
        BEFORE.get_or_init(|| soft);
    }
    Ok(hard)
}

/// The soft limit for what this process starts; `None` when it was not raised.
pub fn before() -> Option<u64> {
    BEFORE.get().copied()
}

/// Takes the soft limit that [`SOFT_LIMIT_ENV`] names, if it is there and lower than the one in force.
///
/// # Errors
/// If the system refuses.
pub fn take_told() -> io::Result<()> {
    let told = std::env::var(SOFT_LIMIT_ENV).ok();
    let Some(told) = told.and_then(|text| text.parse().ok()) else {
        return Ok(());
    };
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|soft| told < soft) {
        let lowered = Rlimit {
            current: Some(told),
            maximum,
        };
        setrlimit(Resource::Nofile, lowered)?;
    }
    Ok(())
}
