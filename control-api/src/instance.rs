//! Instances: spawning, status, health.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{
    AnyOfBuilder, ArrayBuilder, KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type,
};

/// The state of an instance, in the words shown to people (upper case there).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Spawned, no healthy heartbeat yet.
    Starting,
    /// Answers heartbeats.
    Running,
    /// Answers, but its agent reports trouble or overload.
    Degraded,
    /// Does not answer; no verdict yet.
    Unresponsive,
    /// A verdict was reached: it has failed, and is not being healed (auto-heal off).
    Failed,
    /// Being healed.
    Recovering,
    /// A morph is under way; it serves.
    Morphing,
    /// Being ended by request.
    Terminating,
    /// Failed too often in a row; `recover` starts it again.
    Quarantined,
    /// Its fence could not be confirmed; it keeps its resources.
    OperatorActionNeeded,
}

/// A program for the instance to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadRequest {
    /// Absolute path; in `qemu` a path in the guest. `kmorph-kv` alone names the reference server.
    #[schema(pattern = "^(/[^\\x00]*[^\\x00/]|kmorph-kv)$")]
    pub program: String,
    /// Arguments: at most 4,096, each of at most 131,071 bytes without a NUL.
    #[schema(schema_with = arguments)]
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment added: at most 4,096 variables, each of at most 131,071 bytes without a NUL. Names are not empty and
    /// have no `=`.
    #[schema(schema_with = environment)]
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Absolute path of a file with more environment, `NAME=VALUE` in each line, which the daemon reads at each start. It
    /// must be root's or the daemon's user's, and nobody else's to read or write.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_file: Option<String>,
}

/// A string that a program can be given: without a NUL.
fn text() -> ObjectBuilder {
    let text = ObjectBuilder::new().schema_type(Type::String);
    text.pattern(Some("^[^\\x00]*$"))
}

/// An address that can be listened on.
fn ip_address() -> Schema {
    let of = |format| {
        let text = ObjectBuilder::new().schema_type(Type::String);
        text.format(Some(SchemaFormat::KnownFormat(format)))
    };
    let any = AnyOfBuilder::new()
        .item(of(KnownFormat::Ipv4))
        .item(of(KnownFormat::Ipv6))
        .build();
    Schema::AnyOf(any)
}

fn arguments() -> ArrayBuilder {
    ArrayBuilder::new().items(text())
}

fn environment() -> ObjectBuilder {
    let name = ObjectBuilder::new().schema_type(Type::String);
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(name.pattern(Some("^[^=\\x00]+$"))))
        .additional_properties(Some(text()))
}

/// `--publish ADDRESS:HOST_PORT:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// Host address, IPv4 or IPv6.
    #[schema(schema_with = ip_address)]
    pub address: String,
    /// Host port; 0 lets the system choose, the answer names it.
    #[schema(maximum = 65535)]
    pub host_port: u16,
    /// The workload's port.
    #[schema(maximum = 65535)]
    pub port: u16,
}

/// A published port in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedAddress {
    /// Host address and port, as `127.0.0.1:6379`.
    pub listen: String,
    /// The workload's port.
    pub port: u16,
    /// What the port does now.
    pub state: PortState,
    /// Why the port is missing; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a published port does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// It accepts connections.
    Open,
    /// It is bound and refuses connections: the instance does not serve, and none is on its way to.
    Refusing,
    /// Another program has the port; kmorphd keeps trying to get it.
    Missing,
}

impl PortState {
    /// The name in API, CLI and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Refusing => "refusing",
            Self::Missing => "missing",
        }
    }
}

/// A request for a new instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SpawnRequest {
    /// Its name: 1 to 63 of `a-z 0-9 . _ -`, beginning with a letter or digit.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    pub name: String,
    /// Absolute path of the kernel image on the host.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    pub kernel: String,
    /// Added to the kernel command line.
    #[serde(default)]
    pub kernel_cmdline: String,
    /// Absolute path of an initramfs used instead of the built one.
    #[serde(default)]
    pub initramfs: Option<String>,
    /// CPUs (default: 1).
    #[schema(minimum = 1, maximum = 65535)]
    #[serde(default = "one")]
    pub cpus: u16,
    /// Memory in bytes (default: the configuration's).
    #[schema(minimum = 16777216)]
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// The program; none runs just the agent.
    #[serde(default)]
    pub workload: Option<WorkloadRequest>,
    /// Published ports.
    #[serde(default)]
    pub publish: Vec<PublishRequest>,
    /// Watch it with heartbeats.
    #[serde(default = "yes")]
    pub monitor: bool,
    /// Heartbeat timeout in seconds, may have a fraction (default: the configuration's).
    #[schema(minimum = 0.1, maximum = 3600)]
    #[serde(default)]
    pub heartbeat_timeout_s: Option<f64>,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

/// One line of `list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceSummary {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: InstanceState,
    /// Its incarnation.
    pub generation: u64,
    /// Release of the kernel that runs, as its agent reports it; empty until it did.
    pub kernel_release: String,
    /// Backend.
    pub backend: String,
    /// CPUs given to it.
    pub cpus: Vec<u16>,
    /// Memory given to it, in bytes.
    pub memory_bytes: u64,
    /// Milliseconds since the last heartbeat answer.
    pub last_heartbeat_ms: Option<u64>,
    /// Seconds since this generation was spawned.
    pub uptime_s: Option<u64>,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Failures of its program so far that its agents mended by starting it again.
    #[serde(default)]
    pub workload_failures: u64,
    /// Published ports.
    pub published: Vec<PublishedAddress>,
}

/// Everything about one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// What `list` shows.
    #[serde(flatten)]
    pub summary: InstanceSummary,
    /// Why it is in its state, with the evidence.
    pub reason: Option<String>,
    /// Kernel image it was started with.
    pub kernel_path: String,
    /// SHA-256 of that image, hexadecimal.
    pub kernel_sha256: String,
    /// Its kernel command line.
    pub kernel_cmdline: String,
    /// Its vsock context id.
    pub cid: u32,
    /// Pids on the host, by role.
    pub processes: BTreeMap<String, i32>,
    /// Its program, if any.
    pub workload: Option<WorkloadRequest>,
    /// State of its program, as the agent reports it.
    pub workload_state: String,
    /// Its policy.
    pub policy: crate::Policy,
    /// When the instance was first spawned.
    pub created_at: String,
    /// The operation under way.
    pub operation: Option<String>,
    /// Its runtime directory (console log, sockets).
    pub run_dir: String,
    /// Its ended generations that could not give their CPUs and memory back yet.
    #[serde(default)]
    pub kept: Vec<KeptGeneration>,
}

/// A generation that has ended, and holds CPUs and memory still because they could not be given back. It is tried again
/// until they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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

/// The state of an instance's heartbeats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeartbeatStatus {
    /// Its name.
    pub name: String,
    /// False when it was spawned without monitoring.
    pub monitored: bool,
    /// State of the detector: `starting`, `monitoring`, `detecting_failure`, `failed`.
    pub detector: String,
    /// Timeout in force, ms.
    pub timeout_ms: u64,
    /// Interval in force, ms.
    pub interval_ms: u64,
    /// Heartbeats sent to this generation.
    pub sent: u64,
    /// Answers received.
    pub answered: u64,
    /// Heartbeats not answered in a row, now.
    pub missed_in_a_row: u32,
    /// Suspicions that went away by themselves.
    pub transient_failures: u64,
    /// Milliseconds since the last answer.
    pub last_answer_ms: Option<u64>,
    /// Last round trip, microseconds.
    pub last_rtt_us: Option<u64>,
    /// Smoothed round trip, microseconds.
    pub smoothed_rtt_us: Option<u64>,
}

/// Figures an agent reports. Absent where its kernel does not have them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// CPUs it sees.
    pub cpu_count: u16,
    /// Share of CPU time spent busy since the last heartbeat, 0 to 100.
    pub cpu_busy_percent: f64,
    /// PSI `some avg10` for CPU, percent.
    pub cpu_pressure_percent: Option<f64>,
    /// Memory, bytes.
    pub memory_total_bytes: u64,
    /// Memory available, bytes.
    pub memory_available_bytes: u64,
    /// PSI `some avg10` for memory, percent.
    pub memory_pressure_percent: Option<f64>,
    /// Bytes read by block devices (guest) or by its processes (embedded).
    pub io_read_bytes: u64,
    /// Bytes written.
    pub io_write_bytes: u64,
    /// PSI `some avg10` for I/O, percent.
    pub io_pressure_percent: Option<f64>,
}

/// The health of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HealthReport {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: InstanceState,
    /// What its agent says: `healthy`, `degraded`, `unhealthy`, `unknown`.
    pub health: String,
    /// State of its program.
    pub workload_state: String,
    /// Age of the figures, ms.
    pub age_ms: Option<u64>,
    /// The figures.
    pub metrics: Option<Metrics>,
    /// Why it is not healthy.
    pub reason: Option<String>,
}

/// The answer to a ping: one heartbeat sent now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PingReport {
    /// Its name.
    pub name: String,
    /// Generation that answered.
    pub generation: u64,
    /// Round trip, microseconds.
    pub rtt_us: u64,
}
