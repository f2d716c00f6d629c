//! Wiring: from the configuration to a serving agent, and its end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kmorph_launch::{AgentConfig, Listen, Role, StartMode};
use kmp_proto::auth::Key;
use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole, features};
use kmp_proto::wire::VERSION;
use kmp_transport::link::{Listener, UnixVsockListener};
use kmp_transport::speaker::Speaker;
use slog::{Logger, info, warn};
use tokio::signal::unix::{SignalKind, signal};

use crate::confine::{ConfineError, confine};
use crate::figures::{Sampler, Scope};
use crate::handover::{self, Handover};
use crate::init::{self, InitError};
use crate::interrupts;
use crate::logging::{self, Log};
use crate::morph::Morphs;
use crate::priority::Scheduling;
use crate::pulse::Pulses;
use crate::server::{self, Said, Served};
use crate::topology::Topology;
use crate::workload::{Memory, Plan, Workload};

/// Why the agent could not start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its process could not be confined to the instance's resources.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// The failed step.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The guest could not be made ready.
    #[error(transparent)]
    Init(#[from] InitError),
    /// Role init was given to a process that is not PID 1.
    #[error("role init is for PID 1, and this is process {0}; use role service")]
    NotInit(u32),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    let what = what.into();
    |source| RunError::System { what, source }
}

/// Runs the agent until it is told to end. `path` is where `config` came from; `inherited` are the
/// published listening sockets, in the order of its ports; in a guest the agent makes its own.
///
/// # Errors
/// When it cannot start. Once it serves, only the end of the process stops it.
pub fn run(config: AgentConfig, path: &Path, inherited: Vec<OwnedFd>) -> Result<(), RunError> {
    // The start writes its lines itself: nobody waits for heartbeats yet, and where a guest hangs, the last line on its
    // console is the last step done.
    let log = logging::logger(&config, io::stderr());
    info!(log, "agent starts"; "version" => env!("CARGO_PKG_VERSION"), "pid" => std::process::id(),
        "role" => ?config.role);
    let listeners = match config.role {
        Role::Child => {
            // A cgroup holds all processes of the workload together, to the memory that they really use.
            let by_cgroup = config.workload_cgroup.is_some();
            confine(
                &config.cpus,
                if by_cgroup { 0 } else { config.memory_bytes },
            )?;
            info!(log, "confined"; "cpus" => ?config.cpus, "memory_bytes" => config.memory_bytes,
                "memory_held_by" => if by_cgroup { "memory.max" } else { "RLIMIT_DATA" });
            inherited
        }
        Role::Service => init::listeners(&config.ports, config.vsock_option, &log)?,
        Role::Init if !init::is_init() => return Err(RunError::NotInit(std::process::id())),
        Role::Init => {
            init::prepare(&config, &log)?;
            init::listeners(&config.ports, config.vsock_option, &log)?
        }
    };
    match kmorph_launch::stay_resident() {
        Ok(true) => {}
        Ok(false) => info!(log, "not locked in memory: paging can delay heartbeats"),
        Err(error) => warn!(log, "not locked in memory"; "error" => %error),
    }
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    // A thread begins with the CPUs and the niceness of its parent: the log's thread goes first as well, and runs anywhere.
    let mut scheduling = Scheduling::default();
    if config.role != Role::Child {
        go_first(&mut scheduling, &log);
    }
    let rotated = (config.role == Role::Child).then(|| dir.join("agent.log.1"));
    let started = logging::standard_error().and_then(|out| logging::start(out, rotated));
    let (output, _written) = started.map_err(failed("starting the log's thread"))?;
    if config.role != Role::Child {
        stay_on_first_cpu(&mut scheduling, &log);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Of threads that wait for the kernel. One that stays on the first CPU is late at worst.
        .on_thread_start(move || drop(scheduling.restore_cpus()))
        .build()
        .map_err(failed("starting the runtime"))?;
    let started = Started {
        dir,
        listeners,
        scheduling,
        output,
    };
    runtime.block_on(serve(config, started))
}

/// The result of the start.
struct Started {
    /// Directory of the configuration.
    dir: PathBuf,
    /// The published listening sockets.
    listeners: Vec<OwnedFd>,
    /// How what is not the agent's own thread is scheduled.
    scheduling: Scheduling,
    output: Log,
}

async fn serve(config: AgentConfig, started: Started) -> Result<(), RunError> {
    let log = logging::logger(&config, started.output.clone());
    let mut ended = signal(SignalKind::terminate()).map_err(failed("watching SIGTERM"))?;
    // In a guest: Ctrl-Alt-Del, the host's request to shut down.
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed("watching SIGINT"))?;
    let mut children = signal(SignalKind::child()).map_err(failed("watching SIGCHLD"))?;
    let release = config.kernel_release.clone().unwrap_or_else(own_release);
    let names = config.ports.iter().map(|port| port.name.clone());
    let listeners: Vec<_> = names.zip(started.listeners).collect();
    let socket = match &config.handover {
        Some(path) => {
            let what = format!("creating the handover socket {}", path.display());
            Some(handover::open(path).map_err(failed(what))?)
        }
        None => None,
    };
    let (scheduling, output) = (started.scheduling, started.output);
    let workload = start_workload(&config, &release, &listeners, scheduling, output, &log)?;
    let morphs = Morphs::new(
        workload.clone(),
        config.generation,
        config.predecessor.clone(),
        log.clone(),
    );
    if let Some(socket) = socket {
        let morphs = morphs.clone();
        let shared = Handover { morphs, listeners };
        handover::serve(socket, shared, log.clone()).map_err(failed("handover socket"))?;
    }
    let key = Key::new(config.key.bytes());
    // The kernel may wait here until it has gathered randomness.
    let identity = Speaker::with_key(identity(&config, &release)?, key);
    info!(log, "boot id made");
    let report = {
        let log = log.clone();
        move |text: &str| warn!(log, "connection refused"; "reason" => text)
    };
    let connections = kmp_transport::server::serve(listen(&config, &log)?, identity, report);
    let served = Served {
        instance: config.instance.to_string(),
        workload: workload.clone(),
        morphs,
        said: Said::default(),
        topology: Topology::in_dir(started.dir),
        pulses: pulses(&config, &scheduling, &log),
        scheduling,
        log: log.clone(),
    };
    tokio::spawn(server::serve(connections, served, sampler(&config)));
    info!(log, "agent serves"; "kernel" => &release);
    loop {
        tokio::select! {
            _ = ended.recv() => break,
            _ = interrupted.recv() => break,
            _ = children.recv() => { crate::reap::orphans(workload.condition().pid); }
        }
    }
    info!(log, "agent ends");
    workload.stop().await;
    Ok(())
}

/// The host schedules a process of its own as it likes; in a guest the agent has a say.
fn go_first(scheduling: &mut Scheduling, log: &Logger) {
    if let Err(error) = scheduling.go_first() {
        info!(log, "a busy workload can delay heartbeats"; "error" => %error);
    }
}

fn stay_on_first_cpu(scheduling: &mut Scheduling, log: &Logger) {
    let directed = scheduling.stay_on_first_cpu().and_then(|cpu| {
        let (sysfs, procfs) = (Path::new("/sys"), Path::new("/proc"));
        interrupts::direct_vsock_to(cpu, sysfs, procfs).map(|count| (cpu, count))
    });
    match directed {
        Ok((cpu, count)) => {
            info!(log, "answers on one CPU"; "cpu" => cpu, "interrupts_directed" => count);
        }
        Err(error) => {
            warn!(log, "any CPU that hangs can silence the agent"; "error" => %error);
        }
    }
}

fn start_workload(
    config: &AgentConfig,
    release: &str,
    listeners: &[(String, OwnedFd)],
    scheduling: Scheduling,
    output: Log,
    log: &Logger,
) -> Result<Workload, RunError> {
    let Some(spec) = config.workload.clone() else {
        return Ok(Workload::none());
    };
    let mut own = Vec::with_capacity(listeners.len());
    for (name, socket) in listeners {
        let socket = socket
            .try_clone()
            .map_err(failed("duplicating a listening socket"))?;
        own.push((name.clone(), socket));
    }
    let child = config.role == Role::Child;
    let plan = Plan {
        spec,
        instance: config.instance.to_string(),
        generation: config.generation,
        kernel_release: release.to_owned(),
        listeners: own,
        standby: matches!(config.start, StartMode::AwaitState { .. }),
        // By reference they come with the state.
        standby_listeners: config.predecessor.is_none(),
        memory: match child {
            true => Memory::of_process(config.memory_bytes, config.workload_cgroup.clone()),
            false => Memory::of_kernel(),
        },
        scheduling,
        output,
    };
    Ok(Workload::start(plan, log.clone()))
}

/// The CPUs of a guest give pulses; those of a process are the host's.
fn pulses(config: &AgentConfig, scheduling: &Scheduling, log: &Logger) -> Pulses {
    let started = match config.role {
        Role::Child => Ok(Pulses::none()),
        Role::Init | Role::Service => Pulses::start(scheduling),
    };
    started.unwrap_or_else(|error| {
        warn!(log, "a CPU that hangs is not noticed"; "error" => %error);
        Pulses::none()
    })
}

fn sampler(config: &AgentConfig) -> Sampler {
    let scope = match config.role {
        Role::Child => Scope::Processes {
            memory_limit_kib: config.memory_bytes / 1024,
        },
        Role::Init | Role::Service => Scope::System,
    };
    Sampler::new(scope, config.cpus.len())
}

fn listen(config: &AgentConfig, log: &Logger) -> Result<Listener, RunError> {
    match &config.listen {
        Listen::Unix { path, port } => {
            let what = format!("listening at {}", path.display());
            let listener = UnixVsockListener::bind(path, *port).map_err(failed(what))?;
            info!(log, "agent listens"; "path" => %path.display(), "port" => port);
            Ok(Listener::Unix(listener))
        }
        Listen::Vsock { port } => {
            let what = format!("listening at vsock port {port}");
            let listener = Listener::vsock(*port, config.vsock_option).map_err(failed(what))?;
            info!(log, "agent listens"; "vsock_cid" => init::cid(), "vsock_port" => port);
            Ok(listener)
        }
    }
}

fn identity(config: &AgentConfig, release: &str) -> Result<Hello, RunError> {
    let mut boot_id = [0; 16];
    getrandom::fill(&mut boot_id)
        .map_err(|e| failed("making a boot id")(io::Error::other(e.to_string())))?;
    // Another kernel's memory cannot be mapped from inside a guest, unless it was lent.
    let of_role = match config.role {
        Role::Child => features::BY_REFERENCE,
        Role::Init | Role::Service => features::READS_LENT_MEMORY,
    };
    Ok(Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role: PeerRole::Instance,
            channel: Channel::Control,
            flags: 0,
            generation: config.generation,
            boot_id,
            features: features::MORPHS | of_role,
            session: 0,
            incarnation: 0,
        },
        instance: config.instance.to_string(),
        kernel_release: release.to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        nonce: None,
        proof: None,
    })
}

fn own_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}
