//! The event stream as server-sent events: `id:` is what to resume from, by `Last-Event-ID`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use actix_web::body::BoxBody;
use actix_web::dev::Payload;
use actix_web::web::Bytes;
use actix_web::{FromRequest, HttpRequest, HttpResponse, Responder, web};
use futures_util::future::{Ready, ready};
use futures_util::stream;
use kmorph_control_api::{ApiError, ErrorCode, Event, EventKind};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use utoipa::IntoParams;

use super::Api;
use super::answers::response;
use super::connections::Streaming;
use super::endpoint::{Endpoint, Gives, Schemas, Taken, Takes, get, media, reference};
use super::seats::Seat;
use crate::events::EventLog;

/// Events taken from the log at once.
const BATCH: usize = 64;
/// A comment is sent after this much silence, so that both ends notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![get("/v1/events", "Events as a stream", events)]
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct Query {
    /// Of this instance alone.
    instance: Option<String>,
    /// Those after the event with this id. Without it, and without `Last-Event-ID`, what is new.
    since_id: Option<u64>,
}

const LAST_EVENT_ID: &str = "Last-Event-ID";

/// The header from which a client resumes. One that is no number is as none.
struct LastEventId(Option<u64>);

impl FromRequest for LastEventId {
    type Error = Infallible;
    type Future = Ready<Result<Self, Infallible>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let header = request.headers().get(LAST_EVENT_ID);
        let text = header.and_then(|h| h.to_str().ok());
        ready(Ok(Self(text.and_then(|t| t.parse().ok()))))
    }
}

impl Takes for LastEventId {
    fn describe(taken: &mut Taken, _: &mut Schemas) {
        let text = "Those after the event with this id; goes before `since_id`.";
        let schema = json!({ "type": "integer", "format": "int64", "minimum": 0 });
        taken.header(LAST_EVENT_ID, text, schema);
    }
}

/// The stream, or the refusal.
struct Stream(HttpResponse);

impl Responder for Stream {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        self.0
    }
}

impl Gives for Stream {
    fn describe(schemas: &mut Schemas) -> Value {
        media("text/event-stream", reference::<Event>(schemas))
    }
}

struct Reader {
    log: EventLog,
    newest: watch::Receiver<u64>,
    after: u64,
    instance: Option<String>,
    ready: VecDeque<Event>,
    _seat: Seat,
}

async fn events(
    request: HttpRequest,
    LastEventId(last): LastEventId,
    api: web::Data<Api>,
    query: web::Query<Query>,
) -> Stream {
    let Some(seat) = api.stream(&request) else {
        let text = "there are too many event streams already, of this user or of all";
        let refusal = ApiError::new(ErrorCode::Busy, text).hint("end one, or try again later");
        return Stream(response(&refusal));
    };
    if let Some(streaming) = request.conn_data::<Streaming>() {
        streaming.begin();
    }
    let newest = api.events.watch();
    let after = last.or(query.since_id).unwrap_or_else(|| *newest.borrow());
    let reader = Reader {
        log: api.events.clone(),
        newest,
        after,
        instance: query.into_inner().instance,
        ready: VecDeque::new(),
        _seat: seat,
    };
    let body = stream::unfold(reader, |mut reader| async {
        let bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(bytes), reader))
    });
    let stream = HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("Cache-Control", "no-cache"))
        .streaming(body);
    Stream(stream)
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                let json = serde_json::to_string(&event).ok()?;
                return Some(Bytes::from(format!("id: {}\ndata: {json}\n\n", event.id)));
            }
            self.newest.borrow_and_update();
            let found = self.log.after(self.after, BATCH);
            if let Some(last) = found.last() {
                self.after = last.id;
                self.ready = found.into_iter().filter(|e| self.wanted(e)).collect();
                continue;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.newest.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) => return Some(Bytes::from_static(b": still here\n\n")),
            }
        }
    }

    fn wanted(&self, event: &Event) -> bool {
        event.kind == EventKind::Gap || self.instance.is_none() || self.instance == event.instance
    }
}
