//! `kmorphctl events`: the daemon's server-sent events, past and future.

use std::collections::VecDeque;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use kmorph_control_api::Event;
use kmorph_control_api::address::{path, query};
use serde_json::Value;

use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::local_time;
use crate::output::Output;

/// Maximum length of a line of the stream, bytes.
const LINE_MAX_BYTES: usize = 1 << 20;

/// The requested events.
pub(super) struct Wanted {
    /// Only events of this instance.
    pub(super) instance: Option<String>,
    /// Also new events.
    pub(super) follow: bool,
    /// Only events after the event with this id.
    pub(super) since_id: Option<u64>,
    /// Maximum number of events.
    pub(super) count: Option<u64>,
}

pub(super) async fn show(
    client: &Client,
    out: &mut Output,
    wanted: Wanted,
) -> Result<Exit, Failure> {
    let since = wanted.since_id.map(|id| id.to_string());
    let follow = (!wanted.follow).then(|| "false".to_owned());
    let query = query(&[
        ("instance", wanted.instance),
        ("since_id", since),
        ("follow", follow),
    ]);
    let mut stream = client.stream(&(path(&["events"]) + &query)).await?;
    let mut shown = Shown::new(wanted.count, !wanted.follow && wanted.since_id.is_none());
    let mut lines = Lines::default();
    loop {
        let chunk = tokio::select! {
            chunk = next_chunk(client, &mut stream) => chunk?,
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
        };
        let Some(chunk) = chunk else {
            if wanted.follow {
                return Err(client.broken("the stream of events ended"));
            }
            break;
        };
        for line in lines.push(&chunk).map_err(|why| client.broken(why))? {
            let Some(data) = line.strip_prefix("data:").map(str::trim_start) else {
                continue;
            };
            if let Some(data) = shown.next(data) {
                print(client, out, &data)?;
            }
            if shown.is_over() {
                return Ok(Exit::Ok);
            }
        }
    }
    for data in shown.newest {
        print(client, out, &data)?;
    }
    Ok(Exit::Ok)
}

/// Selects the events to show: the first ones at once, or the newest ones at the end.
struct Shown {
    left: u64,
    at_the_end: bool,
    newest: VecDeque<String>,
}

impl Shown {
    fn new(count: Option<u64>, newest: bool) -> Self {
        Self {
            left: count.unwrap_or(u64::MAX),
            at_the_end: newest && count.is_some(),
            newest: VecDeque::new(),
        }
    }

    /// Returns the event if it is to be shown now.
    fn next(&mut self, data: &str) -> Option<String> {
        if !self.at_the_end {
            self.left = self.left.saturating_sub(1);
            return Some(data.to_owned());
        }
        if self.newest.len() as u64 >= self.left {
            self.newest.pop_front();
        }
        self.newest.push_back(data.to_owned());
        None
    }

    fn is_over(&self) -> bool {
        !self.at_the_end && self.left == 0
    }
}

/// Returns the next bytes; `None` at the end.
async fn next_chunk(client: &Client, stream: &mut Incoming) -> Result<Option<Vec<u8>>, Failure> {
    match stream.frame().await {
        Some(Ok(frame)) => Ok(Some(
            frame
                .into_data()
                .map_or_else(|_| Vec::new(), |data| data.to_vec()),
        )),
        Some(Err(error)) => Err(client.broken(error)),
        None => Ok(None),
    }
}

fn print(client: &Client, out: &mut Output, data: &str) -> Result<(), Failure> {
    let garbled =
        |error: serde_json::Error| client.broken(format!("cannot parse an event: {error}"));
    let raw: Value = serde_json::from_str(data).map_err(garbled)?;
    if out.is_json() {
        return out.json_line(&raw);
    }
    let event: Event = serde_json::from_value(raw).map_err(garbled)?;
    let who = match (&event.instance, event.generation) {
        (Some(instance), Some(generation)) => format!("{instance}/{generation}: "),
        (Some(instance), None) => format!("{instance}: "),
        _ => String::new(),
    };
    out.line(&format!(
        "{}  {:>6}  {who}{}",
        local_time(&event.at),
        event.id,
        event.message
    ))?;
    out.flush()
}

/// Splits a byte stream into lines.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Returns the lines that end in `chunk`.
    fn push(&mut self, chunk: &[u8]) -> Result<Vec<String>, &'static str> {
        let mut lines = Vec::new();
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            if self.rest.len() + piece.len() > LINE_MAX_BYTES {
                return Err("a line of the stream is too long");
            }
            self.rest.extend_from_slice(piece);
            if self.rest.ends_with(b"\n") {
                let line = String::from_utf8_lossy(&self.rest);
                lines.push(line.trim_end_matches(['\r', '\n']).to_owned());
                self.rest.clear();
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_means_the_newest_of_what_is_kept_and_the_first_of_what_is_to_come() {
        let mut first = Shown::new(Some(2), false);
        let shown: Vec<_> = ["a", "b"].iter().filter_map(|e| first.next(e)).collect();
        assert_eq!(shown, ["a", "b"]);
        assert!(first.is_over());
        let mut newest = Shown::new(Some(2), true);
        assert!(["a", "b", "c"].iter().all(|e| newest.next(e).is_none()));
        assert!(!newest.is_over());
        assert_eq!(newest.newest, ["b", "c"]);
        let mut all = Shown::new(None, true);
        assert_eq!(all.next("a").as_deref(), Some("a"));
    }

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let mut lines = Lines::default();
        assert!(lines.push(b"id: 1\nda").unwrap() == ["id: 1"]);
        assert!(lines.push(b"ta: {}").unwrap().is_empty());
        assert_eq!(lines.push(b"\r\n\n").unwrap(), ["data: {}", ""]);
        assert!(lines.push(&vec![b'x'; LINE_MAX_BYTES + 1]).is_err());
    }
}
