//! The self-test of capturing.

use serde::{Deserialize, Serialize};

/// How a self-test ended: the result of its operation, and what the daemon remembers of the last one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// When it ended, RFC 3339.
    pub ended_at: String,
    /// Whether all of it went as it should.
    pub passed: bool,
    /// What did not.
    pub reason: Option<String>,
    /// The kernel that was tested with: its image.
    pub kernel_path: String,
    /// The release that its vmcore names.
    pub kernel_release: Option<String>,
    /// What the kernel's log said of its end.
    pub panic: Option<String>,
    /// Length of the vmcore, bytes.
    pub vmcore_bytes: Option<u64>,
    /// CPUs whose registers the vmcore has.
    pub cpus: Option<u32>,
    /// Milliseconds from the verdict to the kernel's log.
    pub log_ms: Option<f64>,
    /// Milliseconds from the verdict to the verified vmcore.
    pub captured_ms: Option<f64>,
    /// Milliseconds from the verdict to a healthy successor.
    pub recovered_ms: Option<f64>,
}
