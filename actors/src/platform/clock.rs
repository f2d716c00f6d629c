//! The engines' clock.

use std::sync::OnceLock;

use kmp_proto::time::Instant;

static ORIGIN: OnceLock<tokio::time::Instant> = OnceLock::new();

/// Returns the current time on tokio's clock, which a test may pause.
pub fn now() -> Instant {
    let now = tokio::time::Instant::now();
    let origin = crate::platform::ambient::origin().unwrap_or_else(|| *ORIGIN.get_or_init(|| now));
    let since = now.saturating_duration_since(origin);
    // One second after the origin, so that no time is ever zero.
    Instant::from_nanos(
        u64::try_from(since.as_nanos())
            .unwrap_or(u64::MAX)
            .saturating_add(1 << 30),
    )
}
