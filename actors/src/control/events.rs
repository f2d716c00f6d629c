//! The event stream as server-sent events. `id:` is the value from which a client resumes, by `Last-Event-ID`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use actix_web::body::BoxBody;
use actix_web::dev::Payload;
use actix_web::error::Error;
use actix_web::web::Bytes;
use actix_web::{FromRequest, HttpRequest, HttpResponse, Responder, web};
use futures_util::future::{Ready, ready};
use futures_util::stream;
use kmorph_control_api::{ApiError, ErrorCode, Event};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use utoipa::IntoParams;

use super::Api;
use super::answers::{refuse, response};
use super::connections::Streaming;
use super::endpoint::{Endpoint, Gives, Schemas, Taken, Takes, get, media, reference};
use super::seats::Seat;
use crate::model::EventKind;
use crate::platform::events::{Encoded, EventLog};

/// Maximum number of events read from the log at once.
const BATCH: usize = 64;
/// Silence after which a comment is sent, so that both ends notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![get("/v1/events", "Events as a stream", stream_events)]
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct Query {
    /// Only events of this instance.
    instance: Option<String>,
    /// Only events after the event with this id (default: `Last-Event-ID`, else only new events).
    since_id: Option<u64>,
    /// Whether the stream continues with new events (default: true). With false it ends after the newest event, and
    /// begins after `since_id` (default: with the oldest stored event).
    follow: Option<bool>,
}

const LAST_EVENT_ID: &str = "Last-Event-ID";

/// The header from which a client resumes.
struct LastEventId(Option<u64>);

impl FromRequest for LastEventId {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let Some(header) = request.headers().get(LAST_EVENT_ID) else {
            return ready(Ok(Self(None)));
        };
        let number = header.to_str().ok().and_then(|text| text.parse().ok());
        let refusal = || {
            let text = format!("{LAST_EVENT_ID}: {header:?} is not an event id");
            refuse(ApiError::new(ErrorCode::InvalidRequest, text))
        };
        ready(number.map(|id| Self(Some(id))).ok_or_else(refusal))
    }
}

impl Takes for LastEventId {
    fn describe(taken: &mut Taken, _: &mut Schemas) {
        let text = "Those after the event with this id; goes before `since_id`.";
        let schema = json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX });
        taken.header(LAST_EVENT_ID, text, schema);
    }
}

/// The stream or the refusal.
struct Stream(HttpResponse);

impl Responder for Stream {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        self.0
    }
}

impl Gives for Stream {
    fn describe(schemas: &mut Schemas) -> Value {
        let event = reference::<Event>(schemas);
        media(
            "text/event-stream",
            json!({
                "type": "object",
                "description": "one event of the stream",
                "required": ["id", "data"],
                "properties": {
                    "id": { "type": "string" },
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": event,
                    },
                },
            }),
        )
    }
}

struct Reader {
    log: EventLog,
    newest: watch::Receiver<u64>,
    after: u64,
    follow: bool,
    instance: Option<String>,
    ready: VecDeque<Encoded>,
    _seat: Seat,
}

async fn stream_events(
    request: HttpRequest,
    LastEventId(last): LastEventId,
    api: web::Data<Api>,
    query: web::Query<Query>,
) -> Stream {
    let follow = query.follow.unwrap_or(true);
    // A client that follows may wait for an instance that does not exist yet.
    if !follow && let Err(refusal) = api.know(query.instance.as_deref()).await {
        return Stream(response(&refusal));
    }
    let Some(seat) = api.stream(&request) else {
        let text = "there are too many event streams already, of this user or of all";
        let refusal = ApiError::new(ErrorCode::Busy, text).hint("end one, or try again later");
        return Stream(response(&refusal));
    };
    if let Some(streaming) = request.conn_data::<Streaming>() {
        streaming.begin();
    }
    let newest = api.events.watch();
    let beginning = if follow { *newest.borrow() } else { 0 };
    let after = last.or(query.since_id).unwrap_or(beginning);
    let reader = Reader {
        log: api.events.clone(),
        newest,
        after,
        follow,
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

/// Returns an event in the API's format.
fn shown(event: &Encoded) -> Option<String> {
    let event = Event::from(event.decode().ok()?);
    serde_json::to_string(&event).ok()
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                // This daemon cannot show an event that it cannot decode.
                let Some(json) = shown(&event) else { continue };
                return Some(Bytes::from(format!("id: {}\ndata: {json}\n\n", event.id)));
            }
            self.newest.borrow_and_update();
            let found = self.log.after(self.after, BATCH).await;
            if let Some(last) = found.last() {
                self.after = last.id;
                self.ready = found.into_iter().filter(|e| self.wanted(e)).collect();
                continue;
            }
            if !self.follow {
                return None;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.newest.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) => return Some(Bytes::from_static(b": still here\n\n")),
            }
        }
    }

    fn wanted(&self, event: &Encoded) -> bool {
        let all = event.kind == EventKind::Gap || self.instance.is_none();
        all || self.instance.as_deref() == event.instance.as_deref()
    }
}
