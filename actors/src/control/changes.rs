//! Requests that change something: each checks the caller's permission first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use actix_web::{HttpRequest, web};
use kmorph_control_api::{
    ApiError, CaptureRequest, CommitRequest, DaemonStatus, DoctorRequest, ErrorCode, MorphRequest,
    Operation, PingReport, Policy, PolicyPatch, PolicySet, ReloadReport, SpawnRequest, StopRequest,
};
use kmp_proto::morph::CommitLimit;
use serde::Deserialize;
use tokio::sync::oneshot;
use utoipa::IntoParams;

use super::answers::{Answer, Begun, actor_gone, answer};
use super::body::Body;
use super::endpoint::{Endpoint, delete, patch, post, put};
use super::{Api, DaemonRequest};
use crate::capture::by_hand::check_output;
use crate::instance::{
    BeginMorph, CaptureVmcore, CommandKind, MorphControl, PingInstance, Recover, Terminate,
};
use crate::model::OperationKind;
use crate::supervisor::{BeginDoctor, ChangePolicies, GetDaemon, Spawn};

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![
        post(
            "/v1/daemon/reload",
            "Read the configuration again",
            reload_daemon,
        ),
        post(
            "/v1/daemon/stop",
            "Stop the daemon; instances run on",
            stop_daemon,
        ),
        post("/v1/instances", "Spawn an instance", spawn_instance),
        delete(
            "/v1/instances/{name}",
            "Terminate an instance",
            terminate_instance,
        ),
        post(
            "/v1/instances/{name}/ping",
            "One heartbeat now",
            ping_instance,
        ),
        post(
            "/v1/instances/{name}/recover",
            "Heal it now",
            recover_instance,
        ),
        post("/v1/instances/{name}/morph", "Begin a morph", begin_morph),
        post(
            "/v1/instances/{name}/morph/validate",
            "Validate it",
            validate_morph,
        ),
        post(
            "/v1/instances/{name}/morph/commit",
            "Commit it",
            commit_morph,
        ),
        post(
            "/v1/instances/{name}/morph/rollback",
            "Roll it back",
            roll_back_morph,
        ),
        post(
            "/v1/doctor",
            "Test that a failed instance is captured",
            begin_doctor,
        ),
        post(
            "/v1/instances/{name}/vmcore",
            "Capture its memory",
            capture_vmcore,
        ),
        patch(
            "/v1/instances/{name}/policy",
            "Change its policy",
            change_policy,
        ),
        put(
            "/v1/policies",
            "Apply policies, all or none",
            import_policies,
        ),
        post(
            "/v1/operations/{id}/cancel",
            "Undo an operation",
            cancel_operation,
        ),
    ]
}

impl Api {
    /// Returns the current state of the operation, which may already have failed.
    fn begun(&self, id: &str) -> Result<Operation, ApiError> {
        Ok(self.operations.get(id)?.into())
    }
}

async fn reload_daemon(request: HttpRequest, api: web::Data<Api>) -> Answer<ReloadReport> {
    let work = async {
        api.admit(&request)?;
        let (sender, receiver) = oneshot::channel();
        let busy = || ApiError::new(ErrorCode::Busy, "the daemon is busy reloading or stopping");
        api.daemon
            .try_send(DaemonRequest::Reload(sender))
            .map_err(|_| busy())?;
        receiver.await.unwrap_or_else(|_| Err(busy()))
    };
    answer(work.await)
}

async fn stop_daemon(
    request: HttpRequest,
    api: web::Data<Api>,
    Body(body): Body<StopRequest>,
) -> Answer<DaemonStatus> {
    let work = async {
        api.admit(&request)?;
        let graceful = body.graceful;
        let stopping = DaemonRequest::Stop { graceful };
        let busy = |_| ApiError::new(ErrorCode::Busy, "the daemon is stopping already");
        let status = api.supervisor.send(GetDaemon).await.map_err(actor_gone)?;
        api.daemon.try_send(stopping).map_err(busy)?;
        Ok(status.into())
    };
    answer(work.await)
}

async fn spawn_instance(
    request: HttpRequest,
    api: web::Data<Api>,
    Body(body): Body<SpawnRequest>,
) -> Begun {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let spawn = Spawn {
            request: body.try_into()?,
            uid,
            throw_away: false,
        };
        let id = api.supervisor.send(spawn).await.map_err(actor_gone)??;
        api.begun(&id)
    };
    Begun(work.await)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct TerminateQuery {
    /// Skip the clean shutdown.
    #[serde(default)]
    force: bool,
}

async fn terminate_instance(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    query: web::Query<TerminateQuery>,
) -> Begun {
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
    Begun(work.await)
}

async fn ping_instance(api: web::Data<Api>, name: web::Path<String>) -> Answer<PingReport> {
    let work = async {
        let instance = api.find(&name).await?;
        let answered = instance.send(PingInstance).await.map_err(actor_gone)??;
        Ok(answered.into())
    };
    answer(work.await)
}

async fn recover_instance(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> Begun {
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
    Begun(work.await)
}

async fn begin_morph(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    Body(body): Body<MorphRequest>,
) -> Begun {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let instance = api.find_for_new_work(&name).await?;
        let request = body.into();
        let begin = BeginMorph { request, uid };
        let id = instance.send(begin).await.map_err(actor_gone)??;
        api.begun(&id)
    };
    Begun(work.await)
}

async fn control_morph(
    request: &HttpRequest,
    api: &Api,
    name: &str,
    kind: CommandKind,
    operation: OperationKind,
) -> Begun {
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
    Begun(work.await)
}

async fn validate_morph(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> Begun {
    let kind = CommandKind::Validate;
    control_morph(&request, &api, &name, kind, OperationKind::MorphValidate).await
}

async fn commit_morph(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    Body(body): Body<CommitRequest>,
) -> Begun {
    let limit = match (body.force, body.downtime_budget_us) {
        (true, _) => CommitLimit::None,
        (false, Some(us)) => CommitLimit::Within(Duration::from_micros(us.into())),
        (false, None) => CommitLimit::Planned,
    };
    let kind = CommandKind::Commit { limit };
    control_morph(&request, &api, &name, kind, OperationKind::MorphCommit).await
}

async fn roll_back_morph(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> Begun {
    let kind = CommandKind::Rollback;
    control_morph(&request, &api, &name, kind, OperationKind::MorphRollback).await
}

async fn capture_vmcore(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    Body(body): Body<CaptureRequest>,
) -> Begun {
    let work = async {
        let uid = Some(api.admit(&request)?);
        let instance = api.find(&name).await?;
        let output = PathBuf::from(body.output);
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
    Begun(work.await)
}

async fn begin_doctor(
    request: HttpRequest,
    api: web::Data<Api>,
    Body(body): Body<DoctorRequest>,
) -> Begun {
    let work = async {
        let begin = BeginDoctor {
            uid: Some(api.admit(&request)?),
            kernel: body.kernel.map(Into::into),
        };
        let id = api.supervisor.send(begin).await.map_err(actor_gone)??;
        api.begun(&id)
    };
    Begun(work.await)
}

async fn change_policy(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
    Body(body): Body<PolicyPatch>,
) -> Answer<Policy> {
    let work = async {
        api.admit(&request)?;
        let change = ChangePolicies([(name.clone(), body.into())].into());
        let mut changed = api.supervisor.send(change).await.map_err(actor_gone)??;
        let gone = || ApiError::new(ErrorCode::NotFound, "it is gone");
        changed
            .remove(name.as_str())
            .map(Into::into)
            .ok_or_else(gone)
    };
    answer(work.await)
}

/// Imports all of the policies, or none.
async fn import_policies(
    request: HttpRequest,
    api: web::Data<Api>,
    Body(body): Body<PolicySet>,
) -> Answer<PolicySet> {
    let work = async {
        api.admit(&request)?;
        let mut patches = BTreeMap::new();
        for (name, policy) in body.instance {
            if let Some((key, fault)) = policy.fault() {
                let text = format!("instance.{name}.{key}: {fault}");
                return Err(ApiError::new(ErrorCode::InvalidRequest, text)
                    .hint("nothing was changed; correct the file and import it again"));
            }
            patches.insert(name, PolicyPatch::from(policy).into());
        }
        let change = ChangePolicies(patches);
        let changed = api.supervisor.send(change).await.map_err(actor_gone)??;
        let policies = changed
            .into_iter()
            .map(|(name, policy)| (name, policy.into()));
        Ok(PolicySet {
            instance: policies.collect(),
        })
    };
    answer(work.await)
}

async fn cancel_operation(
    request: HttpRequest,
    api: web::Data<Api>,
    id: web::Path<String>,
) -> Begun {
    let work = async {
        api.admit(&request)?;
        Ok(api.operations.cancel(&id)?.into())
    };
    Begun(work.await)
}
