//! The OpenAPI description: the schemas of `kmorph-control-api` and the paths served here.

use actix_web::{HttpResponse, web};
use kmorph_control_api as api;
use serde_json::{Value, json};
use utoipa::OpenApi;

pub(super) fn routes(config: &mut web::ServiceConfig) {
    config.route("/v1/openapi.json", web::get().to(openapi));
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "kmorph control API",
        description = "HTTP and JSON over kmorphd's Unix socket."
    ),
    components(schemas(
        api::ApiError,
        api::CaptureReport,
        api::CaptureRequest,
        api::Check,
        api::CommitRequest,
        api::DaemonStatus,
        api::DowntimeSteps,
        api::ErrorCode,
        api::Event,
        api::EventKind,
        api::HealthReport,
        api::HeartbeatStatus,
        api::InstanceState,
        api::InstanceStatus,
        api::InstanceSummary,
        api::Metrics,
        api::MorphPhase,
        api::MorphRequest,
        api::MorphStatus,
        api::Operation,
        api::OperationKind,
        api::OperationState,
        api::PingReport,
        api::Policy,
        api::PolicyPatch,
        api::PolicySet,
        api::VmcorePolicy,
        api::PoolUsage,
        api::Progress,
        api::PublishRequest,
        api::PublishedAddress,
        api::RecoveryOutcome,
        api::RecoveryRecord,
        api::VmcoreRecord,
        api::ReloadReport,
        api::SpawnRequest,
        api::StopRequest,
        api::WorkloadRequest,
    ))
)]
struct Schemas;

/// Method, path, summary, request body, answer.
type Path = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

const PATHS: &[Path] = &[
    (
        "get",
        "/v1/daemon",
        "The daemon's status",
        "",
        "DaemonStatus",
    ),
    (
        "post",
        "/v1/daemon/reload",
        "Read the configuration again",
        "",
        "ReloadReport",
    ),
    (
        "post",
        "/v1/daemon/stop",
        "Stop the daemon; instances run on",
        "StopRequest",
        "DaemonStatus",
    ),
    (
        "get",
        "/v1/instances",
        "All instances",
        "",
        "[InstanceSummary]",
    ),
    (
        "post",
        "/v1/instances",
        "Spawn an instance",
        "SpawnRequest",
        "Operation",
    ),
    (
        "get",
        "/v1/instances/{name}",
        "One instance",
        "",
        "InstanceStatus",
    ),
    (
        "delete",
        "/v1/instances/{name}",
        "Terminate an instance",
        "",
        "Operation",
    ),
    (
        "get",
        "/v1/instances/{name}/heartbeat",
        "Its heartbeats",
        "",
        "HeartbeatStatus",
    ),
    (
        "get",
        "/v1/instances/{name}/health",
        "Its health",
        "",
        "HealthReport",
    ),
    (
        "post",
        "/v1/instances/{name}/ping",
        "One heartbeat now",
        "",
        "PingReport",
    ),
    (
        "post",
        "/v1/instances/{name}/recover",
        "Heal it now",
        "",
        "Operation",
    ),
    (
        "get",
        "/v1/instances/{name}/morph",
        "The morph under way",
        "",
        "MorphStatus",
    ),
    (
        "post",
        "/v1/instances/{name}/morph",
        "Begin a morph",
        "MorphRequest",
        "Operation",
    ),
    (
        "post",
        "/v1/instances/{name}/morph/validate",
        "Validate it",
        "",
        "Operation",
    ),
    (
        "post",
        "/v1/instances/{name}/morph/commit",
        "Commit it",
        "CommitRequest",
        "Operation",
    ),
    (
        "post",
        "/v1/instances/{name}/morph/rollback",
        "Roll it back",
        "",
        "Operation",
    ),
    (
        "post",
        "/v1/instances/{name}/vmcore",
        "Capture its memory",
        "CaptureRequest",
        "Operation",
    ),
    (
        "get",
        "/v1/instances/{name}/policy",
        "Its policy",
        "",
        "Policy",
    ),
    (
        "patch",
        "/v1/instances/{name}/policy",
        "Change its policy",
        "PolicyPatch",
        "Policy",
    ),
    ("get", "/v1/policies", "All policies", "", "PolicySet"),
    (
        "put",
        "/v1/policies",
        "Apply policies, all or none",
        "PolicySet",
        "PolicySet",
    ),
    (
        "get",
        "/v1/recoveries",
        "Recoveries",
        "",
        "[RecoveryRecord]",
    ),
    ("get", "/v1/operations", "Operations", "", "[Operation]"),
    (
        "get",
        "/v1/operations/{id}",
        "One operation; waits for news",
        "",
        "Operation",
    ),
    (
        "post",
        "/v1/operations/{id}/cancel",
        "Undo an operation",
        "",
        "Operation",
    ),
    ("get", "/v1/events", "Events as a stream", "", "Event"),
];

fn reference(name: &str) -> Value {
    match name.strip_prefix('[').and_then(|n| n.strip_suffix(']')) {
        Some(item) => json!({ "type": "array", "items": reference(item) }),
        None => json!({ "$ref": format!("#/components/schemas/{name}") }),
    }
}

fn describe(path: &Path) -> Value {
    let (_, route, summary, body, result) = path;
    let media = if *route == "/v1/events" {
        "text/event-stream"
    } else {
        "application/json"
    };
    let mut operation = json!({
        "summary": summary,
        "responses": {
            "200": { "description": "done", "content": { media: { "schema": reference(result) } } },
            "default": {
                "description": "refused",
                "content": { "application/json": { "schema": reference("ApiError") } },
            },
        },
    });
    if !body.is_empty() {
        operation["requestBody"] =
            json!({ "content": { "application/json": { "schema": reference(body) } } });
    }
    for parameter in ["name", "id"] {
        if route.contains(&format!("{{{parameter}}}")) {
            operation["parameters"] = json!([{
                "name": parameter, "in": "path", "required": true, "schema": { "type": "string" },
            }]);
        }
    }
    operation
}

fn document() -> Value {
    let mut document = serde_json::to_value(Schemas::openapi()).unwrap_or_default();
    for path in PATHS {
        document["paths"][path.1][path.0] = describe(path);
    }
    document
}

async fn openapi() -> HttpResponse {
    HttpResponse::Ok().json(document())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schema_referred_to_is_described() {
        let document = document();
        let text = document.to_string();
        for piece in text.split("#/components/schemas/").skip(1) {
            let name: String = piece.chars().take_while(|c| c.is_alphanumeric()).collect();
            assert!(
                document["components"]["schemas"].get(&name).is_some(),
                "{name}"
            );
        }
        assert_eq!(
            document["paths"]["/v1/instances"]
                .as_object()
                .map(|p| p.len()),
            Some(2)
        );
    }
}
