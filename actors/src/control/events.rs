//! The event stream as server-sent events: `id:` is what to resume from, by `Last-Event-ID`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use kmorph_control_api::{ApiError, ErrorCode, Event, EventKind};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::Api;
use super::answers::response;
use crate::events::EventLog;

/// Events taken from the log at once.
const BATCH: usize = 64;
/// A comment is sent after this much silence, so that both ends notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) fn routes(config: &mut web::ServiceConfig) {
    config.route("/v1/events", web::get().to(events));
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Query {
    instance: Option<String>,
    since_id: Option<u64>,
}

struct Reader {
    log: EventLog,
    newest: watch::Receiver<u64>,
    after: u64,
    instance: Option<String>,
    ready: VecDeque<Event>,
    _permit: OwnedSemaphorePermit,
}

async fn events(
    request: HttpRequest,
    api: web::Data<Api>,
    query: web::Query<Query>,
) -> HttpResponse {
    let Ok(permit) = api.streams.clone().try_acquire_owned() else {
        let text = "there are too many event streams already";
        return response(&ApiError::new(ErrorCode::Busy, text).hint("try again later"));
    };
    let header = request.headers().get("Last-Event-ID");
    let last = header
        .and_then(|h| h.to_str().ok())
        .and_then(|t| t.parse().ok());
    let newest = api.events.watch();
    let after = last.or(query.since_id).unwrap_or_else(|| *newest.borrow());
    let reader = Reader {
        log: api.events.clone(),
        newest,
        after,
        instance: query.into_inner().instance,
        ready: VecDeque::new(),
        _permit: permit,
    };
    let body = stream::unfold(reader, |mut reader| async {
        let bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(bytes), reader))
    });
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("Cache-Control", "no-cache"))
        .streaming(body)
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
