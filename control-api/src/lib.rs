//! Types of the control API, as JSON over HTTP: kmorphd serves them and kmorphctl reads them.
//!
//! This crate contains only data and its (de)serialization: no I/O, no actor, no rendering. Requests with unknown
//! fields are refused; later versions may add fields to responses. Times are RFC 3339 in UTC, durations are integers
//! with their unit in the name.
//!
//! | method and path | request | answer |
//! |---|---|---|
//! | `GET /v1/daemon` | | [`DaemonStatus`] |
//! | `POST /v1/daemon/reload` | | [`ReloadReport`] |
//! | `POST /v1/daemon/stop` | [`StopRequest`] | [`DaemonStatus`] |
//! | `GET /v1/instances` | | [`InstanceSummary`] list |
//! | `POST /v1/instances` | [`SpawnRequest`] | [`Operation`] |
//! | `GET /v1/instances/{name}` | | [`InstanceStatus`] |
//! | `DELETE /v1/instances/{name}?force=` | | [`Operation`] |
//! | `GET /v1/instances/{name}/heartbeat` | | [`HeartbeatStatus`] |
//! | `GET /v1/instances/{name}/health` | | [`HealthReport`] |
//! | `POST /v1/instances/{name}/ping` | | [`PingReport`] |
//! | `POST /v1/instances/{name}/recover` | | [`Operation`] |
//! | `GET /v1/instances/{name}/morph` | | [`MorphStatus`] |
//! | `POST /v1/instances/{name}/morph` | [`MorphRequest`] | [`Operation`] |
//! | `POST /v1/instances/{name}/morph/validate` | | [`Operation`] |
//! | `POST /v1/instances/{name}/morph/commit` | [`CommitRequest`] | [`Operation`] |
//! | `POST /v1/instances/{name}/morph/rollback` | | [`Operation`] |
//! | `GET /v1/instances/{name}/policy` | | [`Policy`] |
//! | `PATCH /v1/instances/{name}/policy` | [`PolicyPatch`] | [`Policy`] |
//! | `POST /v1/instances/{name}/vmcore` | [`CaptureRequest`] | [`Operation`] |
//! | `POST /v1/doctor` | [`DoctorRequest`] | [`Operation`] |
//! | `GET /v1/policies` | | [`PolicySet`] |
//! | `PUT /v1/policies` | [`PolicySet`] | [`PolicySet`] |
//! | `GET /v1/recoveries?instance=&since=` | | [`RecoveryRecord`] list |
//! | `GET /v1/operations` | | [`Operation`] list |
//! | `GET /v1/operations/{id}?wait_ms=&seen=` | | [`Operation`] |
//! | `POST /v1/operations/{id}/cancel` | | [`Operation`] |
//! | `GET /v1/events?instance=&since_id=&follow=` | header `Last-Event-ID` | server-sent [`Event`]s |
//! | `GET /v1/openapi.json` | | the OpenAPI description |
//! | `GET /metrics` | | Prometheus text |
//!
//! A request that starts an operation is answered with 202 and the operation's address in `Location`. A failure is an
//! [`ApiError`] with the HTTP status of its [`ErrorCode`]. A request's body must have a length (Content-Length); a
//! chunked body is refused with 400.

#![forbid(unsafe_code)]

pub mod address;
mod daemon;
mod doctor;
mod error;
mod event;
mod instance;
mod morph;
mod operation;
pub mod paths;
mod policy;
mod recovery;
mod vmcore;

pub use daemon::{DaemonStatus, PoolUsage, ReloadReport, StopRequest};
pub use doctor::{DoctorReport, DoctorRequest};
pub use error::{ApiError, ErrorCode};
pub use event::{Event, EventKind};
pub use instance::{
    HealthReport, HeartbeatStatus, InstanceState, InstanceStatus, InstanceSummary, KeptGeneration,
    Metrics, PingReport, PortState, PublishRequest, PublishedAddress, SpawnRequest,
    WorkloadRequest,
};
pub use morph::{
    Check, CommitRequest, DowntimeSteps, MorphPhase, MorphRequest, MorphStatus, OtherProvider,
};
pub use operation::{Operation, OperationKind, OperationState, Progress};
pub use policy::{
    POLICY_MAX_TIMEOUT_S, POLICY_MIN_HEARTBEAT_S, Policy, PolicyPatch, PolicySet, StuckCpuPolicy,
    VmcorePolicy,
};
pub use recovery::{RecoveryOutcome, RecoveryRecord, VmcoreRecord};
pub use vmcore::{CaptureReport, CaptureRequest};

/// Maximum size of a request body, in bytes.
pub const REQUEST_BODY_MAX_BYTES: usize = 1024 * 1024;
/// Maximum `wait_ms` of one operation request; to wait longer, repeat the request.
pub const OPERATION_WAIT_MAX_MS: u64 = 30_000;
