//! Read-only requests.

use std::time::Duration;

use actix_web::{HttpRequest, web};
use kmorph_control_api::{
    DaemonStatus, HealthReport, HeartbeatStatus, InstanceStatus, InstanceSummary, MorphStatus,
    OPERATION_WAIT_MAX_MS, Operation, Policy, PolicySet, RecoveryRecord,
};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Api;
use super::answers::{Answer, Listing, actor_gone, answer};
use super::endpoint::{Endpoint, get};
use super::translate::each;
use crate::instance::{GetHealth, GetHeartbeat, GetMorphStatus, GetStatus};
use crate::supervisor::{Addresses, GetDaemon, GetRecoveries, List};

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![
        get("/v1/daemon", "The daemon's status", show_daemon),
        get("/v1/instances", "All instances", list_instances),
        get("/v1/instances/{name}", "One instance", show_instance),
        get(
            "/v1/instances/{name}/heartbeat",
            "Its heartbeats",
            show_heartbeat,
        ),
        get("/v1/instances/{name}/health", "Its health", show_health),
        get(
            "/v1/instances/{name}/morph",
            "The morph under way",
            show_morph,
        ),
        get("/v1/instances/{name}/policy", "Its policy", show_policy),
        get("/v1/policies", "All policies", list_policies),
        get("/v1/recoveries", "Recoveries", list_recoveries),
        get("/v1/operations", "Operations", list_operations),
        get(
            "/v1/operations/{id}",
            "One operation; waits for news",
            show_operation,
        ),
    ]
}

async fn show_daemon(api: web::Data<Api>) -> Answer<DaemonStatus> {
    crate::platform::fault::point("control");
    let asked = api.supervisor.send(GetDaemon).await;
    answer(asked.map(Into::into).map_err(actor_gone))
}

async fn list_instances(api: web::Data<Api>) -> Listing<InstanceSummary> {
    let asked = api.supervisor.send(List).await;
    Listing(asked.map(each).map_err(actor_gone))
}

/// Replaces the value of an environment variable for callers that may only read.
const HIDDEN: &str = "(hidden)";

async fn show_instance(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> Answer<InstanceStatus> {
    let asked = async {
        let mut status = api.status(&name).await?;
        // Environments contain passwords, whatever the documentation says; /proc hides them too.
        if let (Err(_), Some(workload)) = (api.admit(&request), &mut status.workload) {
            workload.env.values_mut().for_each(|v| HIDDEN.clone_into(v));
        }
        Ok(status)
    };
    answer(asked.await)
}

async fn show_heartbeat(api: web::Data<Api>, name: web::Path<String>) -> Answer<HeartbeatStatus> {
    let asked = async {
        let instance = api.find(&name).await?;
        let shown = instance.send(GetHeartbeat).await.map_err(actor_gone)?;
        Ok(shown.into())
    };
    answer(asked.await)
}

async fn show_health(api: web::Data<Api>, name: web::Path<String>) -> Answer<HealthReport> {
    let asked = async {
        let instance = api.find(&name).await?;
        let shown = instance.send(GetHealth).await.map_err(actor_gone)?;
        Ok(shown.into())
    };
    answer(asked.await)
}

async fn show_morph(api: web::Data<Api>, name: web::Path<String>) -> Answer<MorphStatus> {
    let asked = async {
        let instance = api.find(&name).await?;
        let shown = instance.send(GetMorphStatus).await.map_err(actor_gone)??;
        Ok(shown.into())
    };
    answer(asked.await)
}

async fn show_policy(api: web::Data<Api>, name: web::Path<String>) -> Answer<Policy> {
    answer(api.status(&name).await.map(|status| status.policy))
}

async fn list_policies(api: web::Data<Api>) -> Answer<PolicySet> {
    let asked = async {
        let mut set = PolicySet::default();
        for (name, instance) in api.supervisor.send(Addresses).await.map_err(actor_gone)? {
            if let Ok(status) = instance.send(GetStatus).await {
                set.instance.insert(name, status.policy.into());
            }
        }
        Ok(set)
    };
    answer(asked.await)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct RecoveryQuery {
    /// Only recoveries of this instance.
    instance: Option<String>,
    /// Only recoveries that began at this time or later, RFC 3339 in UTC.
    since: Option<String>,
}

async fn list_recoveries(
    api: web::Data<Api>,
    query: web::Query<RecoveryQuery>,
) -> Listing<RecoveryRecord> {
    let asked = async {
        api.know(query.instance.as_deref()).await?;
        api.supervisor.send(GetRecoveries).await.map_err(actor_gone)
    };
    let all = asked.await;
    // The times are RFC 3339 in UTC with equal precision, so their text sorts by time.
    let wanted = |r: &crate::model::RecoveryRecord| {
        query
            .instance
            .as_ref()
            .is_none_or(|name| *name == r.instance)
            && query
                .since
                .as_ref()
                .is_none_or(|since| r.started_at >= *since)
    };
    Listing(all.map(|all| each(all.into_iter().filter(wanted))))
}

async fn list_operations(api: web::Data<Api>) -> Listing<Operation> {
    Listing(Ok(each(api.operations.list())))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    /// Maximum wait for a change, in milliseconds; values above 30000 count as 30000.
    wait_ms: Option<u64>,
    /// The last known revision: the response waits for a newer one. Without it the response is immediate.
    seen: Option<u64>,
}

async fn show_operation(
    api: web::Data<Api>,
    id: web::Path<String>,
    query: web::Query<WaitQuery>,
) -> Answer<Operation> {
    let wait = Duration::from_millis(query.wait_ms.unwrap_or(0).min(OPERATION_WAIT_MAX_MS));
    let news = |o: &crate::model::Operation| {
        o.is_over() || query.seen.is_none_or(|seen| o.revision > seen)
    };
    let mut changes = api.operations.watch();
    let wait_for_news = async {
        loop {
            match api.operations.get(&id) {
                Ok(operation) if !news(&operation) => {}
                other => return other,
            }
            if changes.changed().await.is_err() {
                return api.operations.get(&id);
            }
        }
    };
    let shown = match tokio::time::timeout(wait, wait_for_news).await {
        Ok(shown) => shown,
        Err(_) => api.operations.get(&id),
    };
    answer(shown.map(Into::into).map_err(Into::into))
}
