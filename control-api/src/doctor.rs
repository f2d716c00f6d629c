//! The self-test of captures.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request for a self-test: a throwaway instance panics and is recovered, and its vmcore is analysed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DoctorRequest {
    /// Absolute path of the kernel image to test with, on the host. The default is the image of the first instance
    /// or, without instances, the host's own in `/boot`.
    #[serde(default)]
    pub kernel: Option<String>,
}

/// The result of a self-test: the result of its operation, and the daemon's record of the last test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// When it ended, RFC 3339.
    pub ended_at: String,
    /// Whether the whole test succeeded.
    pub passed: bool,
    /// What failed.
    pub reason: Option<String>,
    /// Path of the tested kernel image.
    pub kernel_path: String,
    /// The kernel release named in the vmcore.
    pub kernel_release: Option<String>,
    /// The panic message in the kernel log.
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
