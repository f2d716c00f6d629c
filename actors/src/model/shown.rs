//! Views of the daemon and of its instances.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kmorph_backends::contract::BackendKind;
use kmp_proto::instance::Condition;
use kmp_proto::message::HeartbeatRsp;

use super::rows::KernelChoice;
use super::{DoctorReport, Policy, Workload};

/// The state of a published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortState {
    /// The port accepts connections.
    Open,
    /// The port is bound and refuses connections: the instance does not serve, and no successor is starting.
    Refusing,
    /// Another program holds the port, with the reason; kmorphd keeps retrying.
    Missing(String),
}

/// A published port in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortView {
    /// Host address and port.
    pub listen: SocketAddr,
    /// The workload's port.
    pub port: u16,
    /// Its state.
    pub state: PortState,
}

/// CPUs and memory in the pool, and how much of them is allocated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Host CPUs in the pool.
    pub cpus: Vec<u16>,
    /// CPUs that no instance holds.
    pub cpus_free: Vec<u16>,
    /// True if several instances may share a CPU.
    pub cpus_shared: bool,
    /// Memory in the pool, in bytes.
    pub memory_bytes: u64,
    /// Memory that no instance holds, in bytes. A kernel's bookkeeping memory counts as allocated.
    pub memory_free_bytes: u64,
    /// CPUs in the pool that are held by others than this daemon. They are not free.
    pub cpus_besides: Vec<u16>,
    /// Memory in the pool that is held by others, in bytes.
    pub memory_besides_bytes: u64,
}

/// An ended generation that still holds CPUs and memory because they could not be released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptGeneration {
    /// The instance.
    pub instance: String,
    /// Its generation number.
    pub generation: u64,
    /// CPUs it holds.
    pub cpus: Vec<u16>,
    /// Memory it holds, in bytes.
    pub memory_bytes: u64,
    /// Why the last attempt failed.
    pub reason: String,
    /// When the first attempt failed, as far as this daemon knows, RFC 3339.
    pub since: String,
    /// Failed attempts since then.
    pub tries: u32,
}

/// An instance in a list.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceSummary {
    /// Its name.
    pub name: String,
    /// Its state.
    pub condition: Condition,
    /// Its generation.
    pub generation: u64,
    /// Release of the running kernel, as the agent reports it; empty until then.
    pub kernel_release: String,
    /// Backend.
    pub backend: BackendKind,
    /// CPUs allocated to it.
    pub cpus: Vec<u16>,
    /// Memory allocated to it, in bytes.
    pub memory_bytes: u64,
    /// Time since the last heartbeat answer.
    pub since_answer: Option<Duration>,
    /// Seconds since this generation was spawned.
    pub uptime_s: Option<u64>,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Workload failures so far that an agent fixed by a restart of the workload.
    pub workload_failures: u64,
    /// Published ports.
    pub published: Vec<PortView>,
}

/// All details of an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceView {
    /// Its entry in a list.
    pub summary: InstanceSummary,
    /// Why it is in its state, with the evidence.
    pub reason: Option<String>,
    /// The kernel of its current generation.
    pub kernel: KernelChoice,
    /// Its vsock context id.
    pub cid: u32,
    /// Pids on the host, by role.
    pub processes: BTreeMap<String, i32>,
    /// Its workload, if any.
    pub workload: Option<Workload>,
    /// State of its workload, as the agent reports it.
    pub workload_state: &'static str,
    /// Its policy.
    pub policy: Policy,
    /// When the instance was first spawned, RFC 3339.
    pub created_at: String,
    /// The operation under way.
    pub operation: Option<String>,
    /// Its runtime directory.
    pub run_dir: PathBuf,
    /// Its ended generations that could not release their CPUs and memory yet.
    pub kept: Vec<KeptGeneration>,
}

/// The state of an instance's heartbeats.
#[derive(Clone, Debug, PartialEq)]
pub struct HeartbeatView {
    /// Its name.
    pub name: String,
    /// False if it was spawned without monitoring.
    pub monitored: bool,
    /// State of the failure detector.
    pub detector: &'static str,
    /// Current timeout; zero if no watch runs.
    pub timeout: Duration,
    /// Current interval; zero if no watch runs.
    pub interval: Duration,
    /// Heartbeats sent to this generation.
    pub sent: u64,
    /// Answers received.
    pub answered: u64,
    /// Consecutive heartbeats without an answer.
    pub missed_in_a_row: u32,
    /// Suspicions that cleared by themselves.
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
    /// The last answer of the agent.
    pub last: Option<HeartbeatRsp>,
    /// Why it is not healthy.
    pub reason: Option<String>,
}

/// The answer to a single heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PingView {
    /// The instance.
    pub name: String,
    /// The generation that answered.
    pub generation: u64,
    /// Round trip.
    pub rtt: Duration,
}

/// The daemon's status.
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
    /// The backend's findings on this machine.
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
    /// Ended generations, of all instances, that could not release their CPUs and memory yet.
    pub kept: Vec<KeptGeneration>,
    /// Why the journal cannot be written; `None` if it can.
    pub journal_error: Option<String>,
    /// Actors that panicked and were replaced since the daemon started.
    pub actor_restarts: u64,
    /// Maximum delay of the daemon's own timers in the last minute.
    pub self_lag: Duration,
    /// True once the daemon is stopping.
    pub stopping: bool,
    /// Whether a self-test is possible: the backend captures the memory of failed instances.
    pub can_self_test: bool,
    /// The result of the last self-test.
    pub last_doctor: Option<DoctorReport>,
}
