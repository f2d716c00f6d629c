//! The topology as the daemon last told it: `topology.json`, for programs of the instance.

use std::path::{Path, PathBuf};

use kmp_proto::message::RecoverComplete;
use serde::Serialize;

/// Name of the file.
pub const FILE_NAME: &str = "topology.json";

#[derive(Serialize)]
struct Document<'a> {
    recovery: u64,
    failed_instance: &'a str,
    failed_generation: u64,
    new_generation: u64,
    instances: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    name: &'a str,
    generation: u64,
    cid: u64,
    memory_kib: u64,
    cpus: &'a [u16],
}

/// Replaces the topology in `dir`. Readers see the old one or the new one, whole.
///
/// # Errors
/// The system's.
pub fn write(dir: &Path, told: &RecoverComplete) -> std::io::Result<PathBuf> {
    let document = Document {
        recovery: told.fixed.recovery,
        failed_instance: &told.instance,
        failed_generation: told.fixed.failed_generation,
        new_generation: told.fixed.new_generation,
        instances: told
            .topology
            .iter()
            .map(|entry| Entry {
                name: &entry.name,
                generation: entry.generation,
                cid: entry.cid,
                memory_kib: entry.memory_kib,
                cpus: &entry.cpus,
            })
            .collect(),
    };
    let path = dir.join(FILE_NAME);
    let temporary = dir.join("topology.json.new");
    // One write: a serializer that is given the file makes a system call of each word.
    let mut text = serde_json::to_vec_pretty(&document)?;
    text.push(b'\n');
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, &path)?;
    Ok(path)
}
