//! The agent's configuration: one JSON document, written by the backend and read once by the agent.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{InstanceName, Secret};

/// Largest agent configuration, in bytes, that the agent reads.
pub const AGENT_CONFIG_MAX_BYTES: u64 = 256 * 1024;

/// The role of an agent in its instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// PID 1 of a small guest: mounts, loads modules, reaps.
    Init,
    /// A service in a larger guest that has an init of its own.
    Service,
    /// A child process on the host: the embedded backend.
    Child,
}

/// The agent's address for the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Listen {
    /// A real AF_VSOCK port, any CID.
    Vsock {
        /// Port number; KMP's own is 9000.
        port: u32,
    },
    /// A Unix stream socket that takes `CONNECT <port>\n` and answers `OK <port>\n`, the form in
    /// which vhost-device-vsock and Firecracker show a guest's vsock ports on the host.
    Unix {
        /// Path of the socket; the agent creates it.
        path: PathBuf,
        /// The one port that is answered.
        port: u32,
    },
}

/// A port of the workload that the host publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Port of the workload, as its user names it: the third part of `--publish A:H:P`.
    pub port: u16,
    /// Name under which the workload finds the listener (`LISTEN_FDNAMES`).
    pub name: String,
}

/// The agent's reaction when the workload ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadRestart {
    /// Restart it, with back-off, while the instance lives.
    #[default]
    OnFailure,
    /// Report it and leave it ended.
    Never,
}

/// The program that an instance runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Absolute path: on the host in `embedded`, in the guest in `qemu`.
    pub program: PathBuf,
    /// Arguments after the program's name.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment added to the agent's own.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The reaction when it ends by itself.
    #[serde(default)]
    pub restart: WorkloadRestart,
}

/// How an instance begins its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum StartMode {
    /// Start the workload and serve.
    #[default]
    Fresh,
    /// The target of a morph: start the workload with nothing to serve and wait for its state.
    AwaitState {
        /// The morph's session, non-zero.
        session: u64,
    },
}

/// The complete configuration of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The instance it speaks for.
    pub instance: InstanceName,
    /// The incarnation it speaks for; a HELLO with an older one is refused.
    pub generation: u64,
    /// The key that agent and daemon prove to each other: of this generation, made at its spawn.
    pub key: Secret,
    /// Its role in its instance.
    pub role: Role,
    /// Its address for the daemon.
    pub listen: Listen,
    /// The kernel release to report. `None`: what uname(2) says. Set by the embedded backend, whose
    /// instances have no kernel of their own.
    #[serde(default)]
    pub kernel_release: Option<String>,
    /// Host CPUs (embedded) or none (a guest sees its own).
    #[serde(default)]
    pub cpus: Vec<u16>,
    /// Memory of the instance in bytes; 0 when the kernel's own figure holds.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Directory of the cgroup in which the agent starts the workload, and which holds it to `memory_bytes`. `None`:
    /// the agent limits the private memory of each process instead (embedded only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_cgroup: Option<PathBuf>,
    /// The workload; `None` runs just the agent.
    #[serde(default)]
    pub workload: Option<WorkloadSpec>,
    /// Ports of the workload. In `embedded` the listening sockets are inherited in this order from
    /// descriptor 3 on; in a guest the agent opens one AF_VSOCK listener for each.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
    /// How it begins.
    #[serde(default)]
    pub start: StartMode,
    /// Path of the socket that serves [`crate::handover`] (embedded only).
    #[serde(default)]
    pub handover: Option<PathBuf>,
    /// The handover socket of the generation it takes over from (embedded morph only).
    #[serde(default)]
    pub predecessor: Option<PathBuf>,
    /// Kernel modules to load, in order, as paths in the guest (role init only).
    #[serde(default)]
    pub modules: Vec<PathBuf>,
    /// The socket option that chooses the transport of AF_VSOCK sockets, where that has to be chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_option: Option<i32>,
}

/// Why an agent configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("reading the agent configuration {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is larger than [`AGENT_CONFIG_MAX_BYTES`].
    #[error("the agent configuration {path:?} is larger than {AGENT_CONFIG_MAX_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not the expected JSON document.
    #[error("the agent configuration {path:?} is not valid: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
}

impl AgentConfig {
    /// Reads and parses the configuration at `path`.
    ///
    /// # Errors
    /// If it cannot be read, is too large, or is not the document expected.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let file = std::fs::File::open(path).map_err(read)?;
        let mut text = Vec::new();
        file.take(AGENT_CONFIG_MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        if text.len() as u64 > AGENT_CONFIG_MAX_BYTES {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
            });
        }
        serde_json::from_slice(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })
    }

    /// The configuration as the JSON document that [`AgentConfig::load`] reads.
    ///
    /// # Errors
    /// Only when a path is not UTF-8: JSON cannot carry it.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> AgentConfig {
        AgentConfig {
            instance: "web".parse().unwrap(),
            generation: 7,
            key: Secret::new([5; 32]),
            role: Role::Child,
            listen: Listen::Unix {
                path: "/run/x/vsock.sock".into(),
                port: 9000,
            },
            kernel_release: Some("6.1.0".into()),
            cpus: vec![0, 1],
            memory_bytes: 64 << 20,
            workload_cgroup: None,
            workload: None,
            ports: vec![PublishedPort {
                port: 6379,
                name: "p6379".into(),
            }],
            start: StartMode::AwaitState { session: 3 },
            handover: None,
            predecessor: None,
            modules: vec![],
            vsock_option: None,
        }
    }

    #[test]
    fn what_the_backend_writes_the_agent_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.json");
        std::fs::write(&path, sample().to_json().unwrap()).unwrap();
        assert_eq!(AgentConfig::load(&path).unwrap(), sample());
    }

    #[test]
    fn an_unknown_key_a_bad_name_and_an_oversized_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.json");
        let good = String::from_utf8(sample().to_json().unwrap()).unwrap();
        for bad in [
            good.replacen('{', "{\"wat\": 1,", 1),
            good.replace("\"web\"", "\"../web\""),
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(
                AgentConfig::load(&path),
                Err(ConfigError::Parse { .. })
            ));
        }
        std::fs::File::create(&path)
            .unwrap()
            .set_len(AGENT_CONFIG_MAX_BYTES + 1)
            .unwrap();
        assert!(matches!(
            AgentConfig::load(&path),
            Err(ConfigError::TooLarge { .. })
        ));
    }
}
