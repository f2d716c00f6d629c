//! Captures of memory on request.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request to capture the memory of an instance, in any state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Absolute path of the output file, on the host. It must not exist. It belongs to the daemon's user, and no one
    /// else may read it.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    pub output: String,
}

/// A successful capture on request: the result of its operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CaptureReport {
    /// The instance.
    pub name: String,
    /// The captured generation.
    pub generation: u64,
    /// Path of the vmcore, complete and verified.
    pub path: String,
    /// Its length, bytes.
    pub bytes: u64,
    /// Why pages that should have been left out are included.
    pub not_filtered: Option<String>,
    /// Bytes of the memory read by each survivor, by name; the daemon read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// The panic message in the kernel log; absent if there is none, as with a live instance.
    pub panic: Option<String>,
    /// Why the kernel's log could not be read.
    pub log_error: Option<String>,
    /// Time, in milliseconds, that the instance was frozen; absent if it was not executing anyway.
    pub frozen_ms: Option<f64>,
    /// Time, in milliseconds, from the request to the verified file.
    pub total_ms: f64,
}
