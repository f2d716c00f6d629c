//! What the daemon keeps of instances, generations, recoveries and morphs: a struct for each table of the journal.

use std::path::PathBuf;

use crate::model::{MorphRecord, Policy, RecoveryRecord, Workload};
use kmorph_backends::contract::{BackendKind, Placement};
use kmp_proto::instance::Desired;
use kmp_proto::morph::CommitRecord;
use serde::{Deserialize, Serialize};

/// What the user asked for, with everything optional filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The kernel that the next generation is started with; a committed morph changes it.
    pub kernel: KernelChoice,
    /// CPUs.
    pub cpus: u16,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Its program.
    pub workload: Option<Workload>,
    /// Published ports; the host port is the one in use, never 0.
    pub publish: Vec<PublishedPortSpec>,
    /// Whether heartbeats watch it.
    pub monitor: bool,
    /// Which backend runs it.
    pub backend: BackendKind,
    /// It belongs to a self-test, and goes with it: a daemon that finds it ends it.
    #[serde(default)]
    pub throw_away: bool,
}

/// A kernel with what is passed to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelChoice {
    /// Path of the image on the host.
    pub path: PathBuf,
    /// Release, from the image's own header.
    pub release: String,
    /// SHA-256 of the image, hexadecimal: a file that changed meanwhile is refused.
    pub sha256: String,
    /// Added to the command line.
    pub cmdline: String,
    /// Used instead of the built initramfs.
    pub initramfs: Option<PathBuf>,
}

/// A published port in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPortSpec {
    /// Host address.
    pub address: std::net::IpAddr,
    /// Host port.
    pub host_port: u16,
    /// The workload's port.
    pub port: u16,
}

/// Table `instance`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceRow {
    /// Its name.
    pub name: String,
    /// What was asked for.
    pub spec: InstanceSpec,
    /// Its policy.
    pub policy: Policy,
    /// What is wanted of it.
    #[serde(with = "desired")]
    pub desired: Desired,
    /// Why it rests or needs an operator.
    pub reason: Option<String>,
    /// When it was created, RFC 3339.
    pub created_at: String,
    /// The generation that serves; the others are on their way in or out.
    pub active_generation: u64,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Failures of its program so far that its agents mended by starting it again.
    #[serde(default)]
    pub workload_failures: u64,
    /// The last of them that is counted.
    #[serde(default)]
    pub workload_restarts: WorkloadRestarts,
}

/// A [`Desired`] by its name.
mod desired {
    use kmp_proto::instance::Desired;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        desired: &Desired,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(desired.as_str())
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(
        deserializer: D,
    ) -> Result<Desired, D::Error> {
        let name = String::deserialize(deserializer)?;
        Desired::parse(&name).ok_or_else(|| D::Error::custom(format!("unknown wish {name:?}")))
    }
}

/// How often an agent has started its program again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadRestarts {
    /// Whose agent.
    pub generation: u64,
    /// How often, since that agent began.
    pub restarts: u32,
    /// Whether it starts the program no more.
    #[serde(default)]
    pub given_up: bool,
}

/// How far the life of a generation is known to be.
///
/// ```text
/// Intended ──▶ Placed ──▶ Fencing ──▶ Fenced ──▶ Released (row removed)
///     └────────────────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GenerationPhase {
    /// Its number is taken; a spawn may or may not have happened.
    Intended,
    /// It was started.
    Placed,
    /// Its end was decided; it may or may not still run.
    Fencing,
    /// Its end is confirmed: the certificate is in the row.
    Fenced,
}

/// Table `generation`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationRow {
    /// The instance.
    pub instance: String,
    /// Its number.
    pub generation: u64,
    /// How far it is.
    pub phase: GenerationPhase,
    /// Its kernel.
    pub kernel: KernelChoice,
    /// Its vsock context id.
    pub cid: u32,
    /// CPUs it holds.
    pub cpus: Vec<u16>,
    /// Memory it holds, in bytes.
    pub memory_bytes: u64,
    /// Its runtime directory.
    pub run_dir: PathBuf,
    /// Set once it was started.
    pub placement: Option<Placement>,
    /// Set once it is fenced.
    pub certificate: Option<CertificateRow>,
    /// When it was intended, RFC 3339.
    pub spawned_at: String,
    /// It was, or was about to be, frozen for a capture of its memory: who finds this resumes it.
    #[serde(default)]
    pub frozen: bool,
    /// The boot id of its first HELLO. The journal keeps what [`Change::Booted`](crate::platform::journal::Change::Booted) wrote: no other change of the row
    /// touches it.
    #[serde(default)]
    pub boot_id: Option<[u8; 16]>,
}

/// A fence certificate at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRow {
    /// How it was stopped: a name of `kmp_proto::fence::FenceMethod`.
    pub method: String,
    /// How that was confirmed: a name of `kmp_proto::fence::Confirmation`.
    pub confirmation: String,
    /// When, nanoseconds since the Unix epoch.
    pub fenced_at_unix_ns: u64,
    /// What the confirmation rests on: a name of `kmorph_backends::contract::Proof`. `None` when nothing had to be
    /// asked, because it was never started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

/// Table `recovery`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryRow {
    /// What is shown of it; its id is the key.
    pub record: RecoveryRecord,
    /// The engine's stable phase name; `done` when it is over.
    pub phase: String,
}

/// Table `morph`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MorphRow {
    /// What is shown of it; its session is the key.
    pub status: MorphRecord,
    /// The engine's stable phase name; `done` when it is over.
    pub phase: String,
    /// The commit record: once true and durable, the target generation is the instance.
    pub committed: bool,
    /// The kernel that is gone to.
    pub kernel: KernelChoice,
    /// What was estimated for the part of the downtime that can be measured beforehand, microseconds.
    #[serde(default)]
    pub estimate_without_overhead_us: Option<u64>,
}

impl MorphRow {
    /// The commit record, if an earlier daemon wrote it.
    pub fn commit_record(&self) -> Option<CommitRecord> {
        let (source, target) = (self.status.from_generation, self.status.to_generation);
        self.committed
            .then(|| CommitRecord::restore_from_journal(source, target))
    }
}
