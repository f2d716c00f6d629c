//! The self-test of capturing.

use serde::{Deserialize, Serialize};

/// The result of a self-test: the result of its operation. The daemon also keeps the last one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// When it ended, RFC 3339.
    pub ended_at: String,
    /// Whether every step passed.
    pub passed: bool,
    /// Why the test failed.
    pub reason: Option<String>,
    /// Image of the tested kernel.
    pub kernel_path: String,
    /// The kernel release in the vmcore.
    pub kernel_release: Option<String>,
    /// How the kernel ended, as its log says.
    pub panic: Option<String>,
    /// Length of the vmcore, bytes.
    pub vmcore_bytes: Option<u64>,
    /// Number of CPUs whose registers the vmcore contains.
    pub cpus: Option<u32>,
    /// Milliseconds from the verdict to the kernel's log.
    pub log_ms: Option<f64>,
    /// Milliseconds from the verdict to the verified vmcore.
    pub captured_ms: Option<f64>,
    /// Milliseconds from the verdict to a healthy successor.
    pub recovered_ms: Option<f64>,
}
