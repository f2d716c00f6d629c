//! Captures of memory on request.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The result of the operation of a successful capture on request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// The instance.
    pub name: String,
    /// The captured generation.
    pub generation: u64,
    /// The file: complete and verified.
    pub path: String,
    /// Its length, bytes.
    pub bytes: u64,
    /// Why the file contains pages that the filter should have left out.
    pub not_filtered: Option<String>,
    /// Bytes of memory read by each survivor, by name; the daemon has read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// How the kernel ended, as its log says; absent when the log reports no end, for example of a live kernel.
    pub panic: Option<String>,
    /// Why the kernel's log could not be read.
    pub log_error: Option<String>,
    /// Milliseconds for which the instance was frozen; absent when it was not executing.
    pub frozen_ms: Option<f64>,
    /// Milliseconds from the request to the verified file.
    pub total_ms: f64,
}
