//! Captures of memory that somebody asks for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A capture that was asked for and has succeeded: the result of its operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// The instance.
    pub name: String,
    /// The generation whose memory it is.
    pub generation: u64,
    /// The file: complete and verified.
    pub path: String,
    /// Its length, bytes.
    pub bytes: u64,
    /// Why pages are in it that should have been left out.
    pub not_filtered: Option<String>,
    /// Bytes of its memory that survivors have read, by name; the daemon has read the rest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_by: BTreeMap<String, u64>,
    /// What the kernel's log says of its end; absent when it says of none, as of one that lives.
    pub panic: Option<String>,
    /// Why the kernel's log could not be read.
    pub log_error: Option<String>,
    /// Milliseconds for which the instance was frozen; absent when it executed nothing anyway.
    pub frozen_ms: Option<f64>,
    /// Milliseconds from the request to the verified file.
    pub total_ms: f64,
}
