//! Rows of the journal: one struct for each table (instances, generations, recoveries, morphs).

use std::path::PathBuf;

use crate::model::{MorphPhase, MorphRecord, Policy, RecoveryRecord, Workload};
use kmorph_backends::contract::{BackendKind, Placement};
use kmp_proto::instance::Desired;
use kmp_proto::morph::CommitRecord;
use serde::{Deserialize, Serialize};

/// The user's request, with defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The kernel for the next generation; a committed morph changes it.
    pub kernel: KernelChoice,
    /// Number of CPUs.
    pub cpus: u16,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Its program.
    pub workload: Option<Workload>,
    /// Published ports; the host port is the one in use, never 0.
    pub publish: Vec<PublishedPortSpec>,
    /// Whether heartbeats watch the instance.
    pub monitor: bool,
    /// The backend that runs it.
    pub backend: BackendKind,
    /// The instance belongs to a self-test and ends with it: the next daemon terminates it.
    #[serde(default)]
    pub throw_away: bool,
}

/// A kernel and its parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelChoice {
    /// Path of the image on the host.
    pub path: PathBuf,
    /// Release, from the image's header.
    pub release: String,
    /// SHA-256 of the image, hexadecimal: the daemon refuses a file that has changed.
    pub sha256: String,
    /// Text to append to the command line.
    pub cmdline: String,
    /// Initramfs to use instead of the built one.
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
    /// Its specification.
    pub spec: InstanceSpec,
    /// Its policy.
    pub policy: Policy,
    /// The desired state.
    #[serde(with = "desired")]
    pub desired: Desired,
    /// Why it is quarantined or needs an operator.
    pub reason: Option<String>,
    /// When it was created, RFC 3339.
    pub created_at: String,
    /// The generation that serves; other generations are starting or ending.
    pub active_generation: u64,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Workload failures so far that an agent fixed by a restart of the workload.
    #[serde(default)]
    pub workload_failures: u64,
    /// The last restart that is counted in `workload_failures`.
    #[serde(default)]
    pub workload_restarts: WorkloadRestarts,
}

/// Serializes a [`Desired`] by its name.
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

/// Restarts of the workload by one agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadRestarts {
    /// The agent's generation.
    pub generation: u64,
    /// Number of restarts since the agent started.
    pub restarts: u32,
    /// Whether the agent has given up on restarts.
    #[serde(default)]
    pub given_up: bool,
}

/// The known phase of a generation.
///
/// ```text
/// Intended ──▶ Placed ──▶ Fencing ──▶ Fenced ──▶ Released (row removed)
///     └────────────────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GenerationPhase {
    /// The generation number is taken; a spawn may or may not have happened.
    Intended,
    /// The backend has started it.
    Placed,
    /// The daemon has decided to end it; it may still run.
    Fencing,
    /// Its end is confirmed: the row contains the certificate.
    Fenced,
}

/// Table `generation`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationRow {
    /// The instance.
    pub instance: String,
    /// Its generation number.
    pub generation: u64,
    /// Its phase.
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
    /// Set once it has started.
    pub placement: Option<Placement>,
    /// Set once it is fenced.
    pub certificate: Option<CertificateRow>,
    /// When it was intended, RFC 3339.
    pub spawned_at: String,
    /// A capture of its memory froze it, or was about to. The next daemon resumes it.
    #[serde(default)]
    pub frozen: bool,
    /// The boot id of its first HELLO. The journal keeps the value that
    /// [`Change::Booted`](crate::platform::journal::Change::Booted) wrote: no other change of the row touches it.
    #[serde(default)]
    pub boot_id: Option<[u8; 16]>,
}

/// A fence certificate, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRow {
    /// How the generation was stopped: a name of `kmp_proto::fence::FenceMethod`.
    pub method: String,
    /// How the stop was confirmed: a name of `kmp_proto::fence::Confirmation`.
    pub confirmation: String,
    /// When it was fenced, nanoseconds since the Unix epoch.
    pub fenced_at_unix_ns: u64,
    /// The evidence of the fence: a name of `kmorph_backends::contract::Proof`. `None` if the generation never
    /// started, so that no query was needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

/// Table `recovery`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryRow {
    /// Its record; the id is the key.
    pub record: RecoveryRecord,
    /// The engine's stable phase name; `done` when the recovery is over.
    pub phase: String,
}

/// Table `morph`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MorphRow {
    /// Its record; the session is the key.
    pub status: MorphRecord,
    /// The engine's stable phase name; `done` when the morph is over.
    pub phase: String,
    /// The commit record: once it is true and durable, the target generation is the instance.
    pub committed: bool,
    /// The target kernel.
    pub kernel: KernelChoice,
    /// Estimate of the measurable part of the downtime, microseconds.
    #[serde(default)]
    pub estimate_without_overhead_us: Option<u64>,
}

impl MorphRow {
    /// Returns the commit record, if an earlier daemon wrote one.
    pub fn commit_record(&self) -> Option<CommitRecord> {
        let (source, target) = (self.status.from_generation, self.status.to_generation);
        self.committed
            .then(|| CommitRecord::restore_from_journal(source, target))
    }

    /// Whether the next daemon goes on with this morph; `runs`: the generation that is the instance now runs.
    ///
    /// A morph that ended with the failure of that generation counts too, as long as it runs: the last daemon ended
    /// before it began a recovery. The generation may be frozen, or never have been told to serve, and only its morph
    /// changes that.
    pub fn is_left(&self, runs: bool) -> bool {
        let failed = match self.status.phase {
            MorphPhase::Failed => true,
            MorphPhase::Committed => self.status.reason.is_some(),
            _ => false,
        };
        self.phase != "done" || (failed && runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A morph that is over.
    fn over(phase: &str, reason: Option<&str>) -> MorphRow {
        let row = serde_json::json!({
            "status": {
                "instance": "web", "session": 1, "operation": "op-1", "phase": phase,
                "from_generation": 1, "to_generation": 2, "from_kernel": "", "to_kernel": "",
                "mode": null, "state_bytes": 0, "sent_bytes": 0, "rounds": 1, "checks": [],
                "downtime_budget_us": 10_000, "estimated_downtime_us": null, "downtime": null,
                "reason": reason, "started_at": "", "ended_at": null,
            },
            "phase": "done",
            "committed": phase == "committed",
            "kernel": { "path": "/boot/vmlinuz", "release": "6.1", "sha256": "", "cmdline": "", "initramfs": null },
        });
        serde_json::from_value(row).unwrap()
    }

    #[test]
    fn a_failed_morph_is_left_to_the_next_daemon_while_its_generation_runs() {
        for failed in [
            over("failed", Some("it died")),
            over("committed", Some("it died")),
        ] {
            assert!(failed.is_left(true), "{failed:?}");
            assert!(!failed.is_left(false), "{failed:?}");
        }
        for good in [
            over("committed", None),
            over("rolled_back", Some("by request")),
        ] {
            assert!(!good.is_left(true), "{good:?}");
        }
        let under_way = MorphRow {
            phase: "committing".to_owned(),
            ..over("failed", None)
        };
        assert!(under_way.is_left(true) && under_way.is_left(false));
    }
}
