//! What the daemon shows of itself and of its instances.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kmorph_backends::contract::BackendKind;
use kmp_proto::instance::Condition;
use kmp_proto::message::HeartbeatRsp;

use super::rows::KernelChoice;
use super::{DoctorReport, Policy, Workload};

/// What a published port does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortState {
    /// It accepts connections.
    Open,
    /// It is bound and refuses connections: the instance does not serve, and none is on its way to.
    Refusing,
    /// Another program has the port, for this reason; kmorphd keeps trying to get it.
    Missing(String),
}

/// A published port in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortView {
    /// Host address and port.
    pub listen: SocketAddr,
    /// The workload's port.
    pub port: u16,
    /// What it does.
    pub state: PortState,
}

/// CPUs and memory that instances may be given, and what of it is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Host CPUs in the pool.
    pub cpus: Vec<u16>,
    /// Those not given to any instance.
    pub cpus_free: Vec<u16>,
    /// True when several instances may be given the same CPU.
    pub cpus_shared: bool,
    /// Memory in the pool, in bytes.
    pub memory_bytes: u64,
    /// Of it not given to any instance, in bytes. What a kernel keeps for its bookkeeping counts as given.
    pub memory_free_bytes: u64,
    /// CPUs in the pool that others than this daemon hold. They are not free.
    pub cpus_besides: Vec<u16>,
    /// Memory in the pool that others hold, in bytes.
    pub memory_besides_bytes: u64,
}

/// A generation that has ended, and holds CPUs and memory still because they could not be given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptGeneration {
    /// The instance.
    pub instance: String,
    /// Its number.
    pub generation: u64,
    /// CPUs it holds.
    pub cpus: Vec<u16>,
    /// Memory it holds, in bytes.
    pub memory_bytes: u64,
    /// Why the last try failed.
    pub reason: String,
    /// When the first try failed, as this daemon knows, RFC 3339.
    pub since: String,
    /// Tries that failed since then.
    pub tries: u32,
}

/// An instance in a list.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceSummary {
    /// Its name.
    pub name: String,
    /// Its state.
    pub condition: Condition,
    /// Its incarnation.
    pub generation: u64,
    /// Release of the kernel that runs, as its agent reports it; empty until it did.
    pub kernel_release: String,
    /// Backend.
    pub backend: BackendKind,
    /// CPUs given to it.
    pub cpus: Vec<u16>,
    /// Memory given to it, in bytes.
    pub memory_bytes: u64,
    /// Time since the last heartbeat answer.
    pub since_answer: Option<Duration>,
    /// Seconds since this generation was spawned.
    pub uptime_s: Option<u64>,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Failures of its program so far that its agents mended by starting it again.
    pub workload_failures: u64,
    /// Published ports.
    pub published: Vec<PortView>,
}

/// Everything about an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceView {
    /// What a list shows.
    pub summary: InstanceSummary,
    /// Why it is in its state, with the evidence.
    pub reason: Option<String>,
    /// The kernel it was started with.
    pub kernel: KernelChoice,
    /// Its vsock context id.
    pub cid: u32,
    /// Pids on the host, by role.
    pub processes: BTreeMap<String, i32>,
    /// Its program, if any.
    pub workload: Option<Workload>,
    /// State of its program, as the agent reports it.
    pub workload_state: &'static str,
    /// Its policy.
    pub policy: Policy,
    /// When the instance was first spawned, RFC 3339.
    pub created_at: String,
    /// The operation under way.
    pub operation: Option<String>,
    /// Its runtime directory.
    pub run_dir: PathBuf,
    /// Its ended generations that could not give their CPUs and memory back yet.
    pub kept: Vec<KeptGeneration>,
}

/// The state of an instance's heartbeats.
#[derive(Clone, Debug, PartialEq)]
pub struct HeartbeatView {
    /// Its name.
    pub name: String,
    /// False when it was spawned without monitoring.
    pub monitored: bool,
    /// State of the detector.
    pub detector: &'static str,
    /// Timeout in force; zero when nothing watches.
    pub timeout: Duration,
    /// Interval in force; zero when nothing watches.
    pub interval: Duration,
    /// Heartbeats sent to this generation.
    pub sent: u64,
    /// Answers received.
    pub answered: u64,
    /// Heartbeats not answered in a row, now.
    pub missed_in_a_row: u32,
    /// Suspicions that went away by themselves.
    pub transient_failures: u64,
    /// Time since the last answer.
    pub since_answer: Option<Duration>,
    /// Last round trip.
    pub rtt: Option<Duration>,
    /// Smoothed round trip.
    pub smoothed_rtt: Option<Duration>,
}

/// The health of an instance.
#[derive(Clone, Debug)]
pub struct HealthView {
    /// Its name.
    pub name: String,
    /// Its state.
    pub condition: Condition,
    /// Time since the last answer.
    pub since_answer: Option<Duration>,
    /// The last answer of its agent.
    pub last: Option<HeartbeatRsp>,
    /// Why it is not healthy.
    pub reason: Option<String>,
}

/// One heartbeat that was sent now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PingView {
    /// The instance.
    pub name: String,
    /// The generation that answered.
    pub generation: u64,
    /// Round trip.
    pub rtt: Duration,
}

/// What the daemon says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct DaemonView {
    /// Version of kmorphd.
    pub version: &'static str,
    /// Its pid.
    pub pid: u32,
    /// When it started, RFC 3339.
    pub started_at: String,
    /// Seconds since then.
    pub uptime_s: u64,
    /// The backend.
    pub backend: BackendKind,
    /// What the backend found on this machine.
    pub backend_detail: String,
    /// Its configuration file, if one was read.
    pub config_path: Option<PathBuf>,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its runtime directory.
    pub run_dir: PathBuf,
    /// Number of instances.
    pub instances: usize,
    /// Operations under way.
    pub operations_running: usize,
    /// The pool.
    pub pool: PoolUsage,
    /// Ended generations, of all instances, that could not give their CPUs and memory back yet.
    pub kept: Vec<KeptGeneration>,
    /// Why the journal cannot be written, when it cannot.
    pub journal_error: Option<String>,
    /// Actors that panicked and were replaced since the start.
    pub actor_restarts: u64,
    /// Longest time that the daemon was late in the last minute.
    pub self_lag: Duration,
    /// True once it was asked to stop.
    pub stopping: bool,
    /// Whether there is anything to test: its backend captures the memory of what fails.
    pub can_self_test: bool,
    /// The last self-test.
    pub last_doctor: Option<DoctorReport>,
}
