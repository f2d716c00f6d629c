//! The API socket: authorises, admits, asks the actors, streams events.
//!
//! HTTP runs on a thread of its own and reaches the actors by message. Whoever can open the socket
//! may look; root, the daemon's own user and the members of the control group may change things. The
//! kernel vouches for who is calling (SO_PEERCRED), read once for each connection.

mod access;
mod answers;
mod body;
mod changes;
mod endpoint;
mod events;
mod metrics;
mod openapi;
mod reads;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use actix_web::dev::{Extensions, ServerHandle, Service};
use actix_web::{App, HttpMessage, HttpRequest, HttpServer, web};
use futures_util::future::{Either, ready};
use kmorph_control_api::{ApiError, ErrorCode, InstanceStatus, REQUEST_BODY_MAX_BYTES};
use tokio::sync::mpsc;

pub use access::Access;
use access::Caller;
use answers::actor_gone;

use crate::events::EventLog;
use crate::instance::{GetStatus, Instance};
use crate::operations::Operations;
use crate::supervisor::{Find, Supervisor};

/// Connections to the API at once.
pub const CONNECTIONS_MAX: usize = 256;
/// Event streams at once.
pub const STREAMS_MAX: usize = 64;
/// Longest time for a client to send its request's head.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a client to send its request's body, and for the answer to be found.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time that open requests have when the daemon stops.
const SHUTDOWN_TIMEOUT_S: u64 = 1;

/// What a caller asks of the daemon itself; `kmorphd` does it.
#[derive(Debug)]
pub enum DaemonRequest {
    /// Read the configuration again.
    Reload(tokio::sync::oneshot::Sender<Result<kmorph_control_api::ReloadReport, ApiError>>),
    /// Stop.
    Stop {
        /// Finish what is under way first.
        graceful: bool,
    },
}

/// What the handlers share.
#[derive(Clone)]
pub struct Api {
    /// The tree of actors.
    pub supervisor: Addr<Supervisor>,
    /// Long work.
    pub operations: Operations,
    /// The event stream.
    pub events: EventLog,
    /// Who may change things.
    pub access: Arc<Access>,
    /// The daemon itself.
    pub daemon: mpsc::Sender<DaemonRequest>,
    streams: Arc<tokio::sync::Semaphore>,
}

impl Api {
    /// The API of one daemon.
    pub fn new(
        supervisor: Addr<Supervisor>,
        operations: Operations,
        events: EventLog,
        access: Access,
        daemon: mpsc::Sender<DaemonRequest>,
    ) -> Self {
        let streams = Arc::new(tokio::sync::Semaphore::new(STREAMS_MAX));
        Self {
            supervisor,
            operations,
            events,
            access: Arc::new(access),
            daemon,
            streams,
        }
    }

    /// Who is calling, if they may change things.
    fn admit(&self, request: &HttpRequest) -> Result<u32, ApiError> {
        self.access.check(request.conn_data::<Caller>())
    }

    async fn find(&self, name: &str) -> Result<Addr<Instance>, ApiError> {
        self.supervisor
            .send(Find(name.to_owned()))
            .await
            .map_err(actor_gone)?
    }

    async fn status(&self, name: &str) -> Result<InstanceStatus, ApiError> {
        let instance = self.find(name).await?;
        instance.send(GetStatus).await.map_err(actor_gone)
    }
}

/// Everything that is served.
fn endpoints() -> Vec<endpoint::Endpoint> {
    let modules = [
        reads::endpoints(),
        changes::endpoints(),
        events::endpoints(),
        metrics::endpoints(),
        openapi::endpoints(),
    ];
    modules.into_iter().flatten().collect()
}

fn routes(config: &mut web::ServiceConfig) {
    let mut by_path = BTreeMap::<_, Vec<_>>::new();
    for endpoint in endpoints() {
        let methods = by_path.entry(endpoint.path).or_default();
        methods.push((endpoint.method, endpoint.route));
    }
    for (path, methods) in by_path {
        let names: Vec<_> = methods
            .iter()
            .map(|(method, _)| method.to_uppercase())
            .collect();
        let allowed = names.join(", ");
        let other = move |request: HttpRequest| {
            let refusal = answers::no_such_method(&request, &allowed);
            async move { refusal }
        };
        let resource = web::resource(path).default_service(web::to(other));
        let resource = methods
            .into_iter()
            .fold(resource, |r, (_, route)| r.route(route));
        config.service(resource);
    }
}

/// Serves the API on a Unix socket at `path`, which must not be in use. Anyone may connect; what they
/// may do is decided by who they are.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(
    path: &Path,
    api: Api,
) -> std::io::Result<(
    ServerHandle,
    impl Future<Output = std::io::Result<()>> + use<>,
)> {
    let data = web::Data::new(api);
    let server = HttpServer::new(move || {
        App::new()
            .app_data(data.clone())
            .app_data(web::PayloadConfig::new(REQUEST_BODY_MAX_BYTES))
            .app_data(web::QueryConfig::default().error_handler(|error, _| {
                answers::refuse(ApiError::new(ErrorCode::InvalidRequest, error.to_string()))
            }))
            .configure(routes)
            .default_service(web::to(answers::no_such_path))
            .wrap_fn(|request, service| {
                if request.chunked().unwrap_or(false) {
                    return Either::Left(ready(Ok(answers::without_length(request))));
                }
                // Whoever sends half a body must not keep a connection from others.
                let answer = tokio::time::timeout(ANSWER_TIMEOUT, service.call(request));
                Either::Right(
                    async move { answer.await.unwrap_or_else(|_| Err(answers::too_slow())) },
                )
            })
    })
    .on_connect(|connection, extensions: &mut Extensions| {
        if let Some(stream) = connection.downcast_ref::<tokio::net::UnixStream>()
            && let Ok(peer) = stream.peer_cred()
        {
            extensions.insert(Caller {
                uid: peer.uid(),
                gid: peer.gid(),
            });
        }
    })
    .workers(1)
    .max_connections(CONNECTIONS_MAX)
    .client_request_timeout(REQUEST_TIMEOUT)
    .shutdown_timeout(SHUTDOWN_TIMEOUT_S)
    .disable_signals()
    .listen_uds(std::os::unix::net::UnixListener::bind(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    let server = server.run();
    Ok((server.handle(), server))
}
