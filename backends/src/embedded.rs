//! The embedded backend: an instance is a child process running the agent. No root, no download.
//!
//! ```text
//! <run dir>/placement.json  location of the generation, in case the daemon dies before it records the start
//!          /agent.birth     the agent's identity, recorded by itself
//!          /agent.json      the agent's configuration
//!          /agent.key       the key with which agent and daemon authenticate
//!          /agent.log       output of the agent and its workload
//!          /vsock.sock      the daemon connects here (CONNECT 9000)
//!          /handover.sock   descriptors are passed here
//! ```
//!
//! The agent becomes the leader of its own session, so it survives the daemon and its terminal. It is started in its
//! generation's cgroup, if cgroups are available.
//!
//! A child process has no kernel: the image is checked as for any backend, and its release is reported as running.
//! The agent applies the CPUs as affinity before it starts anything. A cgroup limits the workload to the instance's
//! memory if the memory controller is available; otherwise the agent limits the private memory of each process
//! (RLIMIT_DATA).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use async_trait::async_trait;
use kmorph_files::{OwnDir, PRIVATE_DIR};
use kmorph_launch::{
    AgentConfig, FIRST_OTHER, InstanceName, LISTENERS_ENV, Listen, Role, Secret,
    close_on_exec_from, descriptor_limit,
};
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use kmp_transport::link::KMP_PORT;
use rustix::process::Signal;

use crate::birth::{self, Unborn};
use crate::cgroup::{self, Cgroup, Cgroups, Divided, NoCgroups};
use crate::contract::{
    Backend, BackendError, BackendKind, Containment, Endpoint, ExitCause, FenceUnconfirmed, Fenced,
    HANDOVER_SOCKET, MemoryRange, Observation, Placement, ProcessId, SpawnError, SpawnSpec,
    ThreadTime,
};
pub use crate::fencing::FENCE_TIMEOUT;
pub use crate::marks::FENCE_ENV;
use crate::process::{self, Exits, Stat};
use crate::{fencing, finding, key, scheduling};

/// The only process that the backend starts; processes that the agent starts are found by descent.
const AGENT_ROLE: &str = "agent";

/// Name of the agent's configuration in the run directory.
const AGENT_CONFIG: &str = "agent.json";

/// Configuration of the backend.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// The `kmorph-agent` program.
    pub agent: PathBuf,
    /// The cgroups of its generations, or why there are none.
    pub cgroups: Arc<Result<Cgroups, NoCgroups>>,
}

/// See the module's documentation.
pub struct EmbeddedBackend {
    config: EmbeddedConfig,
    host_boot_id: String,
    exits: Exits,
}

impl EmbeddedBackend {
    /// Creates a backend that starts the agent named in `config`.
    ///
    /// # Errors
    /// If the host's boot id cannot be read.
    pub fn new(config: EmbeddedConfig) -> io::Result<Self> {
        Ok(Self {
            config,
            host_boot_id: kmorph_launch::boot_id()?,
            exits: Exits::default(),
        })
    }

    /// Starts the agent, in a cgroup that is created here; if the spawn fails, the caller removes the cgroup.
    fn start(&self, spec: &SpawnSpec, placement: &mut Placement) -> Result<Unborn, SpawnError> {
        let fail = |what: &str, source| failed_spawn(what, spec, source);
        let run_dir = OwnDir::make(&spec.run_dir, PRIVATE_DIR)
            .map_err(|e| fail("making the run directory", e.into()))?;
        let key = key::make().map_err(|e| fail("making the agent's key", e))?;
        key::keep(&run_dir, &key).map_err(|e| fail("keeping the agent's key", e))?;
        let cgroups = self.config.cgroups.as_ref().as_ref().ok();
        let (cgroup, containment) = finding::contain(cgroups, &spec.name, spec.generation)
            .map_err(|e| fail("making a cgroup", e))?;
        placement.containment = containment;
        let divided = limit(cgroups, cgroup.as_ref(), spec.memory_bytes);
        let held_by = divided.as_ref().map(|divided| divided.workload.clone());
        let json = agent_config(spec, key, held_by)
            .to_json()
            .map_err(|e| fail("writing the agent's configuration", e.into()))?;
        run_dir
            .write(AGENT_CONFIG, &json)
            .map_err(|e| fail("writing the agent's configuration", e.into()))?;
        let log = run_dir
            .append("agent.log")
            .map_err(|e| fail("opening the agent's log", e.into()))?;
        let errors = log
            .try_clone()
            .map_err(|e| fail("opening the agent's log", e))?;
        finding::announce(placement, &[AGENT_ROLE])
            .map_err(|e| fail("writing the placement", e))?;
        close_on_exec_from(FIRST_OTHER).map_err(|e| fail("sealing descriptors", e))?;
        // Clears close-on-exec on duplicates during the spawn, so that the process inherits them.
        // Only this thread starts processes.
        let listeners = inheritable(spec).map_err(|e| fail("passing listening sockets", e))?;
        let numbers: Vec<_> = listeners
            .iter()
            .map(|fd| fd.as_raw_fd().to_string())
            .collect();
        let (run_dir, held) = (&spec.run_dir, &placement.containment);
        let entered = match &divided {
            Some(divided) => Some(divided.agent.as_path()),
            None => cgroup.as_ref().map(Cgroup::path),
        };
        let birth = birth::prepare(run_dir, AGENT_ROLE, entered, held)
            .map_err(|e| fail("making the record of its birth", e))?;
        let mut command = Command::new(&self.config.agent);
        command
            .args(birth.words())
            .arg("--config")
            .arg(config_path(&spec.run_dir))
            .env(FENCE_ENV, &spec.run_dir)
            .env(LISTENERS_ENV, numbers.join(":"))
            .envs(
                descriptor_limit::before()
                    .map(|soft| (descriptor_limit::SOFT_LIMIT_ENV, soft.to_string())),
            )
            .stdout(log)
            .stderr(errors)
            .current_dir("/");
        let unborn = Unborn::start(command)
            .map_err(|e| fail(&format!("starting {:?}", self.config.agent), e))?;
        match identify(unborn.pid()) {
            Ok(known) => placement.processes.push(known),
            Err(error) => return Err(fail("reading its pid and start time", error)),
        }
        Ok(unborn)
    }

    /// Returns the placement of a spawn, before its process is started.
    fn placement(&self, spec: &SpawnSpec) -> Placement {
        Placement {
            backend: BackendKind::Embedded,
            name: spec.name.clone(),
            generation: spec.generation,
            processes: Vec::new(),
            endpoint: Endpoint::Unix {
                path: spec.run_dir.join("vsock.sock"),
            },
            run_dir: spec.run_dir.clone(),
            cpus: spec.cpus.clone(),
            memory_bytes: spec.memory_bytes,
            kernel_release: spec.kernel.release().to_owned(),
            host_boot_id: self.host_boot_id.clone(),
            containment: Containment::default(),
            kernel_instance: None,
        }
    }

    /// Returns the agent's process; `None` if it was never started, or in another boot of the host.
    fn main_process<'a>(&self, placement: &'a Placement) -> Option<&'a ProcessId> {
        let now = placement.host_boot_id == self.host_boot_id;
        placement.processes.first().filter(|_| now)
    }
}

fn failed_spawn(what: &str, spec: &SpawnSpec, source: io::Error) -> SpawnError {
    SpawnError::System {
        what: format!("{what} for {} generation {}", spec.name, spec.generation),
        source,
    }
}

/// Limits the workload to `bytes` with the cgroup of a new generation, 0 for no limit. Returns `None` if that is
/// impossible: the agent then limits each process, and its log shows which limit applies.
fn limit(cgroups: Option<&Cgroups>, cgroup: Option<&Cgroup>, bytes: u64) -> Option<Divided> {
    let (cgroups, cgroup) = (cgroups?, cgroup?);
    if bytes == 0 || cgroups.memory().is_err() {
        return None;
    }
    cgroups.divide(cgroup, bytes).ok()
}

/// Identifies a child, which stays in `/proc` until it is reaped, so that the read always succeeds.
fn identify(pid: u32) -> io::Result<ProcessId> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
    let stat = Stat::read(pid)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(ProcessId {
        role: AGENT_ROLE.to_owned(),
        pid,
        start_ticks: stat.start_ticks,
    })
}

fn config_path(run_dir: &Path) -> PathBuf {
    run_dir.join(AGENT_CONFIG)
}

fn agent_config(spec: &SpawnSpec, key: Secret, workload_cgroup: Option<PathBuf>) -> AgentConfig {
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
        workload_cgroup,
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
    use rustix::io::{FdFlags, fcntl_setfd};
    spec.listeners
        .iter()
        .map(|listener| {
            let fd = listener.socket.try_clone()?;
            fcntl_setfd(&fd, FdFlags::empty())?;
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
                let version: String = version.trim().chars().take(80).collect();
                Ok(format!(
                    "embedded ({version}; {})",
                    cgroup::told_with_memory(&self.config.cgroups)
                ))
            }
            Ok(output) => Err(SpawnError::Unavailable(format!(
                "{agent:?} --version ended with {}; set paths.agent to the right program",
                output.status
            ))),
            Err(error) => Err(SpawnError::Unavailable(format!(
                "the agent {agent:?} cannot be started: {error}; set paths.agent"
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
        let mut placement = self.placement(&spec);
        let born = match self.start(&spec, &mut placement) {
            Ok(unborn) => {
                let born = unborn.born().await;
                born.map_err(|e| failed_spawn("starting the agent", &spec, e))
            }
            Err(error) => Err(error),
        };
        if let Err(error) = born {
            // If the removal fails, the cgroup is empty, and the daemon's next start removes it.
            let _ = finding::remove_cgroup(&placement.containment);
            return Err(error);
        }
        Ok(placement)
    }

    async fn find(
        &self,
        name: &InstanceName,
        generation: u64,
        run_dir: &Path,
    ) -> Result<Option<Placement>, BackendError> {
        let (name, run_dir) = (name.clone(), run_dir.to_owned());
        let (kind, boot_id) = (self.kind(), self.host_boot_id.clone());
        let what = failed(format!("searching for {name} generation {generation}"));
        let look =
            move || finding::find(kind, &name, generation, &run_dir, &[AGENT_ROLE], &boot_id);
        let found = tokio::task::spawn_blocking(look).await;
        found.map_err(io::Error::other).flatten().map_err(what)
    }

    async fn observe(&self, placement: &Placement) -> Result<Observation, BackendError> {
        self.check_own(placement)?;
        let Some(process) = self.main_process(placement) else {
            return Ok(Observation::Ended(ExitCause::Exited { status: None }));
        };
        let what = || failed(format!("observing process {}", process.pid));
        let stat = Stat::read(process.pid).map_err(what())?;
        match stat.filter(|stat| stat.is(process)) {
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
        if self.check_own(placement).is_err() {
            return std::future::pending().await;
        }
        let Some(process) = self.main_process(placement) else {
            return ExitCause::Exited { status: None };
        };
        match self.exits.wait(process).await {
            Ok(cause) => cause,
            // Without a pidfd its end cannot be observed here; the heartbeats will detect it.
            Err(_) => std::future::pending().await,
        }
    }

    async fn request_shutdown(&self, placement: &Placement) -> Result<(), BackendError> {
        self.check_own(placement)?;
        let Some(process) = self.main_process(placement) else {
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
    ) -> Result<Fenced, FenceUnconfirmed> {
        if let Err(error) = self.check_own(placement) {
            let reason = error.to_string();
            return Err(FenceUnconfirmed { order, reason });
        }
        fencing::fence(placement, &self.exits, &self.host_boot_id, order).await
    }

    fn scheduled(&self, placement: &Placement) -> Vec<ThreadTime> {
        scheduling::accounts(&placement.processes)
    }

    async fn release(
        &self,
        placement: &Placement,
        proof: &FenceCertificate,
    ) -> Result<(), BackendError> {
        self.check_own(placement)?;
        fencing::check_proof(placement, proof)?;
        if let Some(process) = self.main_process(placement) {
            self.exits.forget(process);
        }
        let what = |what: &str| failed(format!("{what} of {}", placement.name));
        finding::remove_cgroup(&placement.containment).map_err(what("removing the cgroup"))?;
        birth::forget(&placement.run_dir, &[AGENT_ROLE]).map_err(what("removing the records"))?;
        let names = [
            "vsock.sock",
            HANDOVER_SOCKET,
            AGENT_CONFIG,
            key::KEY_FILE,
            finding::PLACEMENT,
        ];
        for name in names {
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
        // A process has no machine memory of its own to map.
        Ok(Vec::new())
    }
}
