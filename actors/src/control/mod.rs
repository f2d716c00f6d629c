//! The API socket: authorises and admits requests, queries the actors, streams events.
//!
//! HTTP runs on a separate thread, with one request per connection, and sends messages to the actors. Every client that
//! can open the socket may read. Only root, the daemon's own user and the members of the control group may change
//! things. The kernel identifies the caller (SO_PEERCRED, read once per connection).

mod access;
mod answers;
mod body;
mod changes;
mod connections;
mod endpoint;
mod events;
mod metrics;
mod openapi;
mod reads;
mod seats;
mod translate;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use actix_service::{Service, ServiceFactory};
use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::{App, HttpMessage, HttpRequest, web};
use futures_util::future::{Either, ready};
use kmorph_control_api::{ApiError, ErrorCode, InstanceStatus, REQUEST_BODY_MAX_BYTES};
use tokio::sync::mpsc;

pub use access::Access;
use access::Caller;
use answers::actor_gone;
pub use connections::Handle;
use seats::{Limits, Rank, Seat, Seats};

use crate::instance::{GetStatus, Instance};
use crate::platform::events::EventLog;
use crate::platform::operations::Operations;
use crate::supervisor::{Find, FindForNewWork, Know, Supervisor};

/// Maximum number of concurrent connections to the API.
pub const CONNECTIONS_MAX: usize = 256;
/// Maximum number of concurrent event streams.
pub const STREAMS_MAX: usize = 64;
/// Maximum time for a client to send the head of its request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time for a client to send the body of its request, together with the time to find the response.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Limits on event streams, by rank of the caller.
const STREAM_LIMITS: Limits = Limits {
    total: STREAMS_MAX,
    reserved: 8,
    of_a_member: 16,
    of_lookers: 32,
    of_a_looker: 8,
};

/// Requests to the daemon itself; `kmorphd` handles them.
#[derive(Debug)]
pub enum DaemonRequest {
    /// Reload the configuration.
    Reload(tokio::sync::oneshot::Sender<Result<kmorph_control_api::ReloadReport, ApiError>>),
    /// Stop.
    Stop {
        /// Finish the work under way first.
        graceful: bool,
    },
}

/// Shared state of the handlers.
#[derive(Clone)]
pub struct Api {
    /// The supervisor: finds instances and manages the daemon.
    pub supervisor: Addr<Supervisor>,
    /// Operations under way.
    pub operations: Operations,
    /// The event stream.
    pub events: EventLog,
    /// Access control.
    pub access: Arc<Access>,
    /// Sends requests to the daemon itself.
    pub daemon: mpsc::Sender<DaemonRequest>,
    streams: Seats,
}

impl Api {
    /// Creates the API of one daemon.
    pub fn new(
        supervisor: Addr<Supervisor>,
        operations: Operations,
        events: EventLog,
        access: Access,
        daemon: mpsc::Sender<DaemonRequest>,
    ) -> Self {
        Self {
            supervisor,
            operations,
            events,
            access: Arc::new(access),
            daemon,
            streams: Seats::new(STREAM_LIMITS),
        }
    }

    /// Returns the caller's uid if the caller may change things.
    fn admit(&self, request: &HttpRequest) -> Result<u32, ApiError> {
        self.access.check(request.conn_data::<Caller>())
    }

    /// Takes a seat for an event stream of the caller.
    fn stream(&self, request: &HttpRequest) -> Option<Seat> {
        let caller = request.conn_data::<Caller>()?;
        let (uid, streams) = (caller.uid, &self.streams);
        if self.access.is_owner(caller) {
            return streams.take(uid, Rank::Owner);
        }
        let as_member = || {
            let is_member = self.access.is_member(caller);
            is_member.then(|| streams.take(uid, Rank::Member))?
        };
        streams.take(uid, Rank::Looker).or_else(as_member)
    }

    async fn find(&self, name: &str) -> Result<Addr<Instance>, ApiError> {
        let found = self.supervisor.send(Find(name.to_owned())).await;
        Ok(found.map_err(actor_gone)??)
    }

    /// Finds an instance for new work; refuses while the daemon stops.
    async fn find_for_new_work(&self, name: &str) -> Result<Addr<Instance>, ApiError> {
        let find = FindForNewWork(name.to_owned());
        Ok(self.supervisor.send(find).await.map_err(actor_gone)??)
    }

    /// Refuses an unknown name: no instance has it or had it.
    async fn know(&self, instance: Option<&str>) -> Result<(), ApiError> {
        let Some(name) = instance else { return Ok(()) };
        let known = self.supervisor.send(Know(name.to_owned())).await;
        Ok(known.map_err(actor_gone)??)
    }

    async fn status(&self, name: &str) -> Result<InstanceStatus, ApiError> {
        let instance = self.find(name).await?;
        let shown = instance.send(GetStatus).await.map_err(actor_gone)?;
        Ok(shown.into())
    }
}

/// Returns all endpoints.
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

/// Returns the application for one connection.
fn application(
    api: Api,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<impl MessageBody + 'static>,
        Error = actix_web::Error,
        InitError = (),
    >,
> {
    App::new()
        .app_data(web::Data::new(api))
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
            // A client that sends half a body must not block a connection for others.
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, service.call(request));
            Either::Right(async move { answer.await.unwrap_or_else(|_| Err(answers::too_slow())) })
        })
}

/// Serves the API on a Unix socket at `path`, which must not be in use. Every user may connect; the user's identity
/// determines the permissions.
///
/// # Errors
/// When the socket cannot be created.
pub fn serve(path: &Path, api: Api) -> std::io::Result<Handle> {
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    connections::serve(listener, api)
}
