//! Requests that look.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, web};
use kmorph_control_api::{OPERATION_WAIT_MAX_MS, Operation, PolicySet, RecoveryRecord};
use serde::Deserialize;

use super::Api;
use super::answers::{actor_gone, answer};
use crate::instance::{GetHealth, GetHeartbeat, GetMorphStatus, GetStatus};
use crate::supervisor::{Addresses, GetDaemon, GetRecoveries, List};

pub(super) fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/v1/daemon", web::get().to(daemon))
        .route("/v1/instances", web::get().to(list))
        .route("/v1/instances/{name}", web::get().to(status))
        .route("/v1/instances/{name}/heartbeat", web::get().to(heartbeat))
        .route("/v1/instances/{name}/health", web::get().to(health))
        .route("/v1/instances/{name}/morph", web::get().to(morph))
        .route("/v1/instances/{name}/policy", web::get().to(policy))
        .route("/v1/policies", web::get().to(policies))
        .route("/v1/recoveries", web::get().to(recoveries))
        .route("/v1/operations", web::get().to(operations))
        .route("/v1/operations/{id}", web::get().to(operation));
}

async fn daemon(api: web::Data<Api>) -> HttpResponse {
    answer(api.supervisor.send(GetDaemon).await.map_err(actor_gone))
}

async fn list(api: web::Data<Api>) -> HttpResponse {
    answer(api.supervisor.send(List).await.map_err(actor_gone))
}

/// In place of the value of an environment variable, for those who may only look.
const HIDDEN: &str = "(hidden)";

async fn status(
    request: HttpRequest,
    api: web::Data<Api>,
    name: web::Path<String>,
) -> HttpResponse {
    let asked = async {
        let mut status = api.status(&name).await?;
        // Environments hold passwords, whatever their users are told; /proc hides them as well.
        if let (Err(_), Some(workload)) = (api.admit(&request), &mut status.workload) {
            workload.env.values_mut().for_each(|v| HIDDEN.clone_into(v));
        }
        Ok(status)
    };
    answer(asked.await)
}

async fn heartbeat(api: web::Data<Api>, name: web::Path<String>) -> HttpResponse {
    let asked = async {
        let instance = api.find(&name).await?;
        instance.send(GetHeartbeat).await.map_err(actor_gone)
    };
    answer(asked.await)
}

async fn health(api: web::Data<Api>, name: web::Path<String>) -> HttpResponse {
    let asked = async {
        let instance = api.find(&name).await?;
        instance.send(GetHealth).await.map_err(actor_gone)
    };
    answer(asked.await)
}

async fn morph(api: web::Data<Api>, name: web::Path<String>) -> HttpResponse {
    let asked = async {
        let instance = api.find(&name).await?;
        instance.send(GetMorphStatus).await.map_err(actor_gone)?
    };
    answer(asked.await)
}

async fn policy(api: web::Data<Api>, name: web::Path<String>) -> HttpResponse {
    answer(api.status(&name).await.map(|status| status.policy))
}

async fn policies(api: web::Data<Api>) -> HttpResponse {
    let asked = async {
        let mut set = PolicySet::default();
        for (name, instance) in api.supervisor.send(Addresses).await.map_err(actor_gone)? {
            if let Ok(status) = instance.send(GetStatus).await {
                set.instance.insert(name, status.policy);
            }
        }
        Ok(set)
    };
    answer(asked.await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecoveryQuery {
    instance: Option<String>,
    since: Option<String>,
}

async fn recoveries(api: web::Data<Api>, query: web::Query<RecoveryQuery>) -> HttpResponse {
    let all = api.supervisor.send(GetRecoveries).await.map_err(actor_gone);
    // Times are RFC 3339 in UTC with the same precision: their order is the order of their text.
    let wanted = |r: &RecoveryRecord| {
        query
            .instance
            .as_ref()
            .is_none_or(|name| *name == r.instance)
            && query
                .since
                .as_ref()
                .is_none_or(|since| r.started_at >= *since)
    };
    answer(all.map(|all| all.into_iter().filter(wanted).collect::<Vec<_>>()))
}

async fn operations(api: web::Data<Api>) -> HttpResponse {
    HttpResponse::Ok().json(api.operations.list())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    wait_ms: Option<u64>,
    seen: Option<u64>,
}

async fn operation(
    api: web::Data<Api>,
    id: web::Path<String>,
    query: web::Query<WaitQuery>,
) -> HttpResponse {
    let wait = Duration::from_millis(query.wait_ms.unwrap_or(0).min(OPERATION_WAIT_MAX_MS));
    let news = |o: &Operation| o.is_over() || query.seen.is_none_or(|seen| o.revision > seen);
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
    match tokio::time::timeout(wait, wait_for_news).await {
        Ok(result) => answer(result),
        Err(_) => answer(api.operations.get(&id)),
    }
}
