//! The workload of an instance.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A program for an instance to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Absolute path; with `qemu`, a path in the guest. `kmorph-kv` without a path names the reference server.
    pub program: String,
    /// Arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Additional environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Absolute path of a file with more variables, one `NAME=VALUE` per line, read at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_file: Option<String>,
}
