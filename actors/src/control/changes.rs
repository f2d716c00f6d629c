//! Requests that change something: each checks who is calling first.

use std::collections::BTreeMap;
use std::path::PathBuf;

use actix_web::{HttpRequest, HttpResponse, web};
use kmorph_control_api::{
    ApiError, CaptureRequest, CommitRequest, ErrorCode, MorphRequest, Operation, OperationKind,
    Policy, PolicyPatch, PolicySet, ReloadReport, SpawnRequest, StopRequest,
};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::answers::{actor_gone, answer};
use super::{Api, DaemonRequest};
use crate::instance::{
    CaptureVmcore, CommandKind, MorphControl, PingInstance, Recover, Terminate,
};
use crate::supervisor::{BeginMorph, ChangePolicies, GetDaemon, Spawn};
use crate::vmcore::by_hand::check_output;

pub(super) fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/v1/daemon/reload", web::post().to(reload))
        .route("/v1/daemon/stop", web::post().to(stop))
        .route("/v1/instances", web::post().to(spawn))
        .route("/v1/instances/{name}", web::delete().to(terminate))
        .route("/v1/instances/{name}/ping", web::post().to(ping))
        .route("/v1/instances/{name}/recover", web::post().to(recover))
        .route("/v1/instances/{name}/morph", web::post().to(morph))
        .route(
            "/v1/instances/{name}/morph/validate",
            web::post().to(validate),
        )
        .route("/v1/instances/{name}/morph/commit", web::post().to(commit))
        .route(
            "/v1/instances/{name}/morph/rollback",
            web::post().to(rollback),
        )
        .route("/v1/instances/{name}/vmcore", web::post().to(capture))
        .route("/v1/instances/{name}/policy", web::patch().to(patch_policy))
        .route("/v1/policies", web::put().to(import_policies))
        .route("/v1/operations/{id}/cancel", web::post().to(cancel));
}

impl Api {
    /// The operation as it is now; what began meanwhile may already have failed.
    fn begun(&self, id: &str) -> Result<Operation, ApiError> {
        self.operations.get(id)
    }
}

async fn reload(request: HttpRequest, api: web::Data<Api>) -> HttpResponse {
    let work = async {
        api.admit(&request)?;
        let (sender, receiver) = oneshot::channel();
        let busy = || ApiError::new(ErrorCode::Busy, "the daemon is busy reloading or stopping");
        api.daemon
            .try_send(DaemonRequest::Reload(sender))
            .map_err(|_| busy())?;
        receiver.await.unwrap_or_else(|_| Err(busy()))
    };
    answer::<ReloadReport>(work.await)
}

async fn stop(
    request: HttpRequest,
    api: web::Data<Api>,
    body: web::Json<StopRequest>,
) -> HttpResponse {
    let work = async {
        api.admit(&request)?;
        let graceful = body.graceful;
        let stopping = DaemonRequest::Stop { graceful };
        let busy = |_| ApiError::new(ErrorCode::Busy, "the daemon is stopping already");
        let status = api.supervisor.send(GetDaemon).await.map_err(actor_gone)?;
        api.daemon.try_send(stopping).map_err(busy)?;
        Ok(status)
    };
    answer(work.await)
}

async fn spawn(
    request: HttpRequest,
    api: web::Data<Api>,
    body: web::Json<SpawnRequest>,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let spawn = Spawn {
            request: body.into_inner(),
            uid,
        };
        let id = api.supervisor.send(spawn).await.map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TerminateQuery {
    #[serde(default)]
    force: bool,
}

async fn terminate(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    query: web::Query<TerminateQuery>,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let instance = api.find(&name).await?;
        let operation = api.operations.begin(OperationKind::Terminate, &name, uid)?;
        let id = operation.id();
        let force = query.force;
        instance
            .send(Terminate { force, operation })
            .await
            .map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

async fn ping(api: web::Data<Api>, name: web::Path<String>) -> HttpResponse {
    let work = async {
        api.find(&name)
            .await?
            .send(PingInstance)
            .await
            .map_err(actor_gone)?
    };
    answer(work.await)
}

async fn recover(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let instance = api.find(&name).await?;
        let operation = api.operations.begin(OperationKind::Recover, &name, uid)?;
        let id = operation.id();
        instance
            .send(Recover(operation))
            .await
            .map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

async fn morph(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    body: web::Json<MorphRequest>,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let begin = BeginMorph {
            name: name.into_inner(),
            request: body.into_inner(),
            uid,
        };
        let id = api.supervisor.send(begin).await.map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

async fn control_morph(
    request: &HttpRequest,
    api: &Api,
    name: &str,
    kind: CommandKind,
    operation: OperationKind,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(request)?);
        let instance = api.find(name).await?;
        let operation = api.operations.begin(operation, name, uid)?;
        let id = operation.id();
        instance
            .send(MorphControl { kind, operation })
            .await
            .map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

async fn validate(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> HttpResponse {
    let kind = CommandKind::Validate;
    control_morph(&request, &api, &name, kind, OperationKind::MorphValidate).await
}

async fn commit(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    body: web::Json<CommitRequest>,
) -> HttpResponse {
    let kind = CommandKind::Commit { force: body.force };
    control_morph(&request, &api, &name, kind, OperationKind::MorphCommit).await
}

async fn rollback(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> HttpResponse {
    let kind = CommandKind::Rollback;
    control_morph(&request, &api, &name, kind, OperationKind::MorphRollback).await
}

async fn capture(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    body: web::Json<CaptureRequest>,
) -> HttpResponse {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let instance = api.find(&name).await?;
        let output = PathBuf::from(body.into_inner().output);
        check_output(&output).await?;
        let operation = api
            .operations
            .begin(OperationKind::VmcoreCapture, &name, uid)?;
        let id = operation.id();
        instance
            .send(CaptureVmcore { output, operation })
            .await
            .map_err(actor_gone)??;
        api.begun(&id)
    };
    answer(work.await)
}

async fn patch_policy(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    body: web::Json<PolicyPatch>,
) -> HttpResponse {
    let work = async {
        api.admit(&request)?;
        let change = ChangePolicies([(name.clone(), body.into_inner())].into());
        let mut changed = api.supervisor.send(change).await.map_err(actor_gone)??;
        let gone = || ApiError::new(ErrorCode::NotFound, "it is gone");
        changed.remove(name.as_str()).ok_or_else(gone)
    };
    answer::<Policy>(work.await)
}

/// All of the policies, or none.
async fn import_policies(
    request: HttpRequest,
    api: web::Data<Api>,
    body: web::Json<PolicySet>,
) -> HttpResponse {
    let work = async {
        api.admit(&request)?;
        let mut patches = BTreeMap::new();
        for (name, policy) in body.into_inner().instance {
            if let Some((key, fault)) = policy.fault() {
                let text = format!("instance.{name}.{key}: {fault}");
                return Err(ApiError::new(ErrorCode::InvalidRequest, text)
                    .hint("nothing was changed; correct the file and import it again"));
            }
            patches.insert(name, PolicyPatch::from(policy));
        }
        let change = ChangePolicies(patches);
        let instance = api.supervisor.send(change).await.map_err(actor_gone)??;
        Ok(PolicySet { instance })
    };
    answer(work.await)
}

async fn cancel(request: HttpRequest, api: web::Data<Api>, id: web::Path<String>) -> HttpResponse {
    let work = async {
        api.admit(&request)?;
        api.operations.cancel(&id)
    };
    answer(work.await)
}
