//! The latest topology from the daemon, as `topology.json` for programs of the instance.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kmp_proto::message::RecoverComplete;
use serde::Serialize;
use tokio::sync::Mutex;

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

/// The file in a directory. Another thread writes it, because its disk may block, in the order of the daemon's
/// messages.
#[derive(Clone, Debug)]
pub struct Topology {
    dir: Arc<PathBuf>,
    turn: Arc<Mutex<()>>,
}

impl Topology {
    /// The file [`FILE_NAME`] in `dir`.
    pub fn in_dir(dir: PathBuf) -> Self {
        Self {
            dir: Arc::new(dir),
            turn: Arc::default(),
        }
    }

    /// Replaces the file. Readers see the old one or the new one, whole.
    ///
    /// # Errors
    /// The system's.
    pub async fn write(&self, told: RecoverComplete) -> io::Result<()> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let dir = Arc::clone(&self.dir);
        let written = tokio::task::spawn_blocking(move || {
            let written = write(&dir, &told);
            drop(turn);
            written
        });
        let written = written.await.map_err(io::Error::other)?;
        let told_where = |error: io::Error| {
            let text = format!("writing the topology in {:?}: {error}", self.dir);
            io::Error::new(error.kind(), text)
        };
        written.map_err(told_where)
    }
}

fn write(dir: &Path, told: &RecoverComplete) -> io::Result<()> {
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
    std::fs::rename(&temporary, &path)
}
