//! Instances: spawning, status, health.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{
    AnyOfBuilder, ArrayBuilder, KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type,
};

/// The state of an instance; shown to people in upper case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Spawned, no healthy heartbeat yet.
    Starting,
    /// Answers heartbeats.
    Running,
    /// Answers, but its agent reports a problem or overload.
    Degraded,
    /// Does not answer; no verdict yet.
    Unresponsive,
    /// The instance has failed and is not being recovered (auto-heal is off).
    Failed,
    /// Being recovered.
    Recovering,
    /// A morph is in progress; the instance serves.
    Morphing,
    /// Being terminated on request.
    Terminating,
    /// Failed too often; `recover` restarts it.
    Quarantined,
    /// The fence could not be confirmed; the instance keeps its resources.
    OperatorActionNeeded,
}

/// A program for the instance to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadRequest {
    /// Absolute path of the program; in `qemu` a path in the guest. `kmorph-kv` alone selects the reference server.
    #[schema(pattern = "^(/[^\\x00]*[^\\x00/]|kmorph-kv)$")]
    pub program: String,
    /// Arguments: at most 4,096, each of at most 131,071 bytes without a NUL.
    #[schema(schema_with = arguments)]
    #[serde(default)]
    pub args: Vec<String>,
    /// Additional environment: at most 4,096 variables, each of at most 131,071 bytes without a NUL. Names must not
    /// be empty or contain `=`.
    #[schema(schema_with = environment)]
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Absolute path of a file with more environment variables, one `NAME=VALUE` per line, which the daemon reads at
    /// each start. The file must belong to root or the daemon's user, and no one else may read or write it.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_file: Option<String>,
}

/// Returns a string that can be passed to a program: without a NUL.
fn text() -> ObjectBuilder {
    let text = ObjectBuilder::new().schema_type(Type::String);
    text.pattern(Some("^[^\\x00]*$"))
}

/// Returns an address to listen on.
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
    /// Host port; with 0 the system chooses one, which the answer names.
    #[schema(maximum = 65535)]
    pub host_port: u16,
    /// The workload's port.
    #[schema(maximum = 65535)]
    pub port: u16,
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedAddress {
    /// Host address and port, such as `127.0.0.1:6379`.
    pub listen: String,
    /// The workload's port.
    pub port: u16,
    /// State of the port.
    pub state: PortState,
    /// Why the port is missing; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The state of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// The port accepts connections.
    Open,
    /// The port is bound and refuses connections: the instance does not serve, and no successor is being started.
    Refusing,
    /// Another program has the port; kmorphd keeps trying to bind it.
    Missing,
}

impl PortState {
    /// Returns the name of the state in API, CLI and logs.
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
    /// Name of the instance: 1 to 63 characters of `a-z 0-9 . _ -`, beginning with a letter or digit.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    pub name: String,
    /// Absolute path of the kernel image on the host.
    #[schema(pattern = "^/[^\\x00]*[^\\x00/]$")]
    pub kernel: String,
    /// Text to append to the kernel command line.
    #[serde(default)]
    pub kernel_cmdline: String,
    /// Absolute path of an initramfs to use instead of the built one.
    #[serde(default)]
    pub initramfs: Option<String>,
    /// CPUs (default: 1).
    #[schema(minimum = 1, maximum = 65535)]
    #[serde(default = "one")]
    pub cpus: u16,
    /// Memory in bytes (default: from the configuration).
    #[schema(minimum = 16777216)]
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// The program; without one, only the agent runs.
    #[serde(default)]
    pub workload: Option<WorkloadRequest>,
    /// Published ports.
    #[serde(default)]
    pub publish: Vec<PublishRequest>,
    /// Monitor the instance with heartbeats.
    #[serde(default = "yes")]
    pub monitor: bool,
    /// Heartbeat timeout in seconds; fractions are allowed (default: from the configuration).
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

/// The summary of an instance, as in `list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceSummary {
    /// Name of the instance.
    pub name: String,
    /// State of the instance.
    pub state: InstanceState,
    /// Current generation.
    pub generation: u64,
    /// Release of the running kernel, as reported by its agent; empty until reported.
    pub kernel_release: String,
    /// Backend.
    pub backend: String,
    /// CPUs of the instance.
    pub cpus: Vec<u16>,
    /// Memory of the instance, in bytes.
    pub memory_bytes: u64,
    /// Milliseconds since the last heartbeat answer.
    pub last_heartbeat_ms: Option<u64>,
    /// Seconds since this generation was spawned.
    pub uptime_s: Option<u64>,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Morphs committed so far.
    pub morphs: u64,
    /// Number of failures of the program after which its agent restarted it.
    #[serde(default)]
    pub workload_failures: u64,
    /// Published ports.
    pub published: Vec<PublishedAddress>,
}

/// The complete status of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// The summary, as in `list`.
    #[serde(flatten)]
    pub summary: InstanceSummary,
    /// Why the instance is in its state, with the evidence.
    pub reason: Option<String>,
    /// Path of its kernel image.
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
    /// The operation in progress.
    pub operation: Option<String>,
    /// Its runtime directory (console log, sockets).
    pub run_dir: String,
    /// Ended generations of this instance whose CPUs and memory could not be released yet.
    #[serde(default)]
    pub kept: Vec<KeptGeneration>,
}

/// A generation that has ended, but whose CPUs and memory could not be released yet. The daemon retries until they
/// are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptGeneration {
    /// The instance.
    pub instance: String,
    /// Number of the generation.
    pub generation: u64,
    /// CPUs it still holds.
    pub cpus: Vec<u16>,
    /// Memory it still holds, in bytes.
    pub memory_bytes: u64,
    /// Why the last attempt failed.
    pub reason: String,
    /// When the first attempt known to this daemon failed, RFC 3339.
    pub since: String,
    /// Failed attempts since then.
    pub tries: u32,
}

/// The state of an instance's heartbeats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeartbeatStatus {
    /// Name of the instance.
    pub name: String,
    /// Whether the instance is monitored with heartbeats.
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
    /// Current number of consecutive unanswered heartbeats.
    pub missed_in_a_row: u32,
    /// Suspicions that resolved by themselves.
    pub transient_failures: u64,
    /// Milliseconds since the last answer.
    pub last_answer_ms: Option<u64>,
    /// Last round trip, microseconds.
    pub last_rtt_us: Option<u64>,
    /// Smoothed round trip, microseconds.
    pub smoothed_rtt_us: Option<u64>,
}

/// Metrics reported by an agent. Metrics that its kernel does not support are absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// Number of CPUs of the instance.
    pub cpu_count: u16,
    /// Share of CPU time spent busy since the last heartbeat, 0 to 100.
    pub cpu_busy_percent: f64,
    /// PSI `some avg10` for CPU, percent.
    pub cpu_pressure_percent: Option<f64>,
    /// Total memory, bytes.
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
    /// Name of the instance.
    pub name: String,
    /// State of the instance.
    pub state: InstanceState,
    /// Health reported by its agent: `healthy`, `degraded`, `unhealthy`, `unknown`.
    pub health: String,
    /// State of its program.
    pub workload_state: String,
    /// Age of the metrics, ms.
    pub age_ms: Option<u64>,
    /// The metrics.
    pub metrics: Option<Metrics>,
    /// Why the instance is not healthy.
    pub reason: Option<String>,
}

/// The answer to a ping: one heartbeat sent now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PingReport {
    /// Name of the instance.
    pub name: String,
    /// Generation that answered.
    pub generation: u64,
    /// Round trip, microseconds.
    pub rtt_us: u64,
}
