//! The embedded backend: an instance is a child process running the agent. No root, no download.
//!
//! ```text
//! <run dir>/agent.json      what the agent is told
//!          /agent.key       the key that it and the daemon prove to each other
//!          /agent.log       what it and its workload print
//!          /vsock.sock      where the daemon connects (CONNECT 9000)
//!          /handover.sock   where descriptors move
//! ```
//!
//! The agent makes itself the leader of a session of its own, so it survives the daemon and its
//! terminal.
//!
//! A child process has no kernel: the image given is checked as for any backend, and its release is
//! reported as running. CPUs are applied as affinity, memory as a limit on private memory
//! (RLIMIT_DATA), both by the agent before it starts anything.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use async_trait::async_trait;
use kmorph_launch::{AgentConfig, InstanceName, Listen, Role, Secret};
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use kmp_transport::link::KMP_PORT;
use rustix::process::Signal;

use crate::contract::{
    Backend, BackendError, BackendKind, Endpoint, ExitCause, FenceUnconfirmed, HANDOVER_SOCKET,
    MemoryRange, Observation, Placement, ProcessId, SpawnError, SpawnSpec,
};
use crate::fencing;
pub use crate::fencing::{FENCE_ENV, FENCE_TIMEOUT};
use crate::key;
use crate::process::{self, Exits, Stat};

/// Environment variable with the numbers of the inherited listening sockets, joined by `:`.
pub const LISTENERS_ENV: &str = "KMORPH_LISTENERS";
/// What the backend needs to know.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// The `kmorph-agent` program.
    pub agent: PathBuf,
}

/// See the module.
pub struct EmbeddedBackend {
    config: EmbeddedConfig,
    host_boot_id: String,
    exits: Exits,
}

impl EmbeddedBackend {
    /// A backend that starts the agent named in `config`.
    ///
    /// # Errors
    /// When the host's boot id cannot be read.
    pub fn new(config: EmbeddedConfig) -> io::Result<Self> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let host_boot_id = boot_id.trim().to_owned();
        Ok(Self {
            config,
            host_boot_id,
            exits: Exits::default(),
        })
    }

    fn start(&self, spec: &SpawnSpec) -> Result<ProcessId, SpawnError> {
        let fail = |what: &str, source| SpawnError::System {
            what: format!("{what} for {} generation {}", spec.name, spec.generation),
            source,
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.run_dir)
            .map_err(|e| fail("making the run directory", e))?;
        let config_path = config_path(&spec.run_dir);
        let key = key::make().map_err(|e| fail("making the agent's key", e))?;
        key::keep(&spec.run_dir, &key).map_err(|e| fail("keeping the agent's key", e))?;
        let json = agent_config(spec, key)
            .to_json()
            .map_err(|e| fail("writing the agent's configuration", e.into()))?;
        key::write_private(&config_path, &json)
            .map_err(|e| fail("writing the agent's configuration", e))?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(spec.run_dir.join("agent.log"))
            .map_err(|e| fail("opening the agent's log", e))?;
        let errors = log
            .try_clone()
            .map_err(|e| fail("opening the agent's log", e))?;
        // Inherited by clearing close-on-exec on duplicates for the moment of the spawn. Only this
        // thread starts processes, and the standard library then uses posix_spawn: no copy of this
        // process's memory is made.
        let listeners = inheritable(spec).map_err(|e| fail("passing listening sockets", e))?;
        let numbers: Vec<_> = listeners
            .iter()
            .map(|fd| fd.as_raw_fd().to_string())
            .collect();
        let mut child = Command::new(&self.config.agent)
            .arg("--config")
            .arg(&config_path)
            .env(FENCE_ENV, &spec.run_dir)
            .env(LISTENERS_ENV, numbers.join(":"))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .current_dir("/")
            .spawn()
            .map_err(|e| fail(&format!("starting {:?}", self.config.agent), e))?;
        let known = identify(child.id());
        if known.is_err() {
            // Nothing is left of a spawn that failed.
            let _ = child.kill();
            let _ = child.wait();
        }
        known.map_err(|error| fail("reading its pid and start time", error))
    }
}

/// Our own child stays until it is reaped: there is always something to read.
fn identify(pid: u32) -> io::Result<ProcessId> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
    let stat = Stat::read(pid)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(ProcessId {
        role: "agent".to_owned(),
        pid,
        start_ticks: stat.start_ticks,
    })
}

fn main_process(placement: &Placement) -> Option<&ProcessId> {
    placement.processes.first()
}

fn config_path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.json")
}

fn agent_config(spec: &SpawnSpec, key: Secret) -> AgentConfig {
    AgentConfig {
        instance: spec.name.clone(),
        generation: spec.generation,
        key,
        role: Role::Child,
        listen: Listen::Unix {
            path: spec.run_dir.join("vsock.sock"),
            port: KMP_PORT,
        },
        kernel_release: Some(spec.kernel.release().to_owned()),
        cpus: spec.cpus.clone(),
        memory_bytes: spec.memory_bytes,
        workload: spec.workload.clone(),
        ports: spec.ports.clone(),
        start: spec.start,
        handover: Some(spec.run_dir.join(HANDOVER_SOCKET)),
        predecessor: spec
            .predecessor
            .as_ref()
            .map(|p| p.run_dir.join(HANDOVER_SOCKET)),
        modules: Vec::new(),
        vsock_option: None,
    }
}

fn inheritable(spec: &SpawnSpec) -> io::Result<Vec<OwnedFd>> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    spec.listeners
        .iter()
        .map(|listener| {
            let fd = listener.socket.try_clone()?;
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(fd)
        })
        .collect()
}

fn failed(what: String) -> impl FnOnce(io::Error) -> BackendError {
    move |source| BackendError { what, source }
}

#[async_trait]
impl Backend for EmbeddedBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::Embedded
    }

    fn passes_sockets(&self) -> bool {
        true
    }

    async fn probe(&self) -> Result<String, SpawnError> {
        let agent = &self.config.agent;
        let output = Command::new(agent)
            .arg("--version")
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let version = String::from_utf8_lossy(&output.stdout);
                Ok(format!(
                    "embedded ({})",
                    version.trim().chars().take(80).collect::<String>()
                ))
            }
            Ok(output) => Err(SpawnError::Unavailable(format!(
                "{agent:?} --version ended with {}; name the right program with paths.agent",
                output.status
            ))),
            Err(error) => Err(SpawnError::Unavailable(format!(
                "the agent {agent:?} cannot be started: {error}; name it with paths.agent"
            ))),
        }
    }

    async fn spawn(&self, spec: SpawnSpec) -> Result<Placement, SpawnError> {
        if let Some(workload) = &spec.workload
            && !workload.program.is_absolute()
        {
            let text = format!(
                "the workload {:?} is not an absolute path",
                workload.program
            );
            return Err(SpawnError::Refused(text));
        }
        if let Some(workload) = &spec.workload
            && !workload.program.is_file()
        {
            let text = format!("the workload {:?} does not exist", workload.program);
            return Err(SpawnError::Refused(text));
        }
        let process = self.start(&spec)?;
        Ok(Placement {
            backend: BackendKind::Embedded,
            name: spec.name,
            generation: spec.generation,
            processes: vec![process],
            endpoint: Endpoint::Unix {
                path: spec.run_dir.join("vsock.sock"),
            },
            run_dir: spec.run_dir,
            cpus: spec.cpus,
            memory_bytes: spec.memory_bytes,
            kernel_release: spec.kernel.release().to_owned(),
            host_boot_id: self.host_boot_id.clone(),
            kernel_instance: None,
        })
    }

    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &Path,
    ) -> Result<Option<Placement>, BackendError> {
        let what = || failed(format!("looking for {name} generation {generation}"));
        let path = config_path(run_dir);
        let Ok(config) = AgentConfig::load(&path) else {
            return Ok(None);
        };
        if config.generation != generation || config.instance != *name {
            return Ok(None);
        }
        let wanted = path.as_os_str().as_encoded_bytes();
        for stat in process::all().map_err(what())? {
            let Ok(line) = std::fs::read(format!("/proc/{}/cmdline", stat.pid)) else {
                continue;
            };
            let arguments: Vec<&[u8]> = line.split(|b| *b == 0).collect();
            let is_agent = arguments.get(1..3) == Some(&[&b"--config"[..], wanted][..]);
            if !is_agent || stat.is_over() {
                continue;
            }
            return Ok(Some(Placement {
                backend: BackendKind::Embedded,
                name: name.clone(),
                generation,
                processes: vec![ProcessId {
                    role: "agent".to_owned(),
                    pid: stat.pid,
                    start_ticks: stat.start_ticks,
                }],
                endpoint: Endpoint::Unix {
                    path: run_dir.join("vsock.sock"),
                },
                run_dir: run_dir.to_owned(),
                cpus: config.cpus,
                memory_bytes: config.memory_bytes,
                kernel_release: config.kernel_release.unwrap_or_default(),
                host_boot_id: self.host_boot_id.clone(),
                kernel_instance: None,
            }));
        }
        Ok(None)
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        let Some(process) = main_process(placement) else {
            return Ok(Observation::Ended(ExitCause::Exited { status: None }));
        };
        let what = || failed(format!("looking at process {}", process.pid));
        let stat = Stat::read(process.pid).map_err(what())?;
        match stat.filter(|s| s.start_ticks == process.start_ticks) {
            Some(stat) if stat.is_over() => {
                let fd = process::open(process).map_err(what())?;
                let cause = fd.map_or(ExitCause::Exited { status: None }, |fd| {
                    self.exits.reap(process, &fd)
                });
                Ok(Observation::Ended(cause))
            }
            Some(stat) if matches!(stat.state, b'T' | b't') => Ok(Observation::Stopped),
            Some(_) => Ok(Observation::Running),
            None => {
                let cause = self.exits.wait(process).await.map_err(what())?;
                Ok(Observation::Ended(cause))
            }
        }
    }

    async fn ended(&self, placement: &Placement) -> ExitCause {
        let Some(process) = main_process(placement) else {
            return ExitCause::Exited { status: None };
        };
        match self.exits.wait(process).await {
            Ok(cause) => cause,
            // Without a pidfd its end cannot be seen here; silence will tell.
            Err(_) => std::future::pending().await,
        }
    }

    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError> {
        let Some(process) = main_process(placement) else {
            return Ok(());
        };
        let what = || failed(format!("asking process {} to end", process.pid));
        match process::open(process).map_err(what())? {
            Some(fd) => process::send(&fd, Signal::TERM).map_err(what()),
            None => Ok(()),
        }
    }

    async fn fence(
        &self,
        placement: &Placement,
        order: FenceOrder,
    ) -> Result<FenceCertificate, FenceUnconfirmed> {
        fencing::fence(placement, &self.exits, order).await
    }

    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError> {
        fencing::check_proof(placement, proof)?;
        if let Some(process) = main_process(placement) {
            self.exits.forget(process);
        }
        for name in ["vsock.sock", HANDOVER_SOCKET, "agent.json", key::KEY_FILE] {
            let path = placement.run_dir.join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("removing {path:?}"))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn memory_map(&self, _: &Placement) -> Result<Vec<MemoryRange>, BackendError> {
        // A process has no memory of its own machine to map.
        Ok(Vec::new())
    }
}
