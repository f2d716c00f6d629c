//! `kmorphctl events`: follows the daemon's server-sent events.

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

/// Longest line of the stream, bytes.
const LINE_MAX_BYTES: usize = 1 << 20;

pub(super) async fn follow(
    client: &Client,
    out: &mut Output,
    instance: Option<String>,
    since_id: Option<u64>,
    count: Option<u64>,
) -> Result<Exit, Failure> {
    let since = since_id.map(|id| id.to_string());
    let address = path(&["events"]) + &query(&[("instance", instance), ("since_id", since)]);
    let mut stream = client.stream(&address).await?;
    let mut lines = Lines::default();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let chunk = tokio::select! {
            chunk = next_chunk(client, &mut stream) => chunk?,
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
        };
        for line in lines.push(&chunk).map_err(|why| client.broken(why))? {
            let Some(data) = line.strip_prefix("data:").map(str::trim_start) else {
                continue;
            };
            show(client, out, data)?;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    Ok(Exit::Ok)
}

async fn next_chunk(client: &Client, stream: &mut Incoming) -> Result<Vec<u8>, Failure> {
    match stream.frame().await {
        Some(Ok(frame)) => Ok(frame
            .into_data()
            .map(|data| data.to_vec())
            .unwrap_or_default()),
        Some(Err(error)) => Err(client.broken(error)),
        None => Err(client.broken("the stream of events ended")),
    }
}

fn show(client: &Client, out: &mut Output, data: &str) -> Result<(), Failure> {
    let garbled =
        |error: serde_json::Error| client.broken(format!("an event makes no sense: {error}"));
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

/// Cuts a byte stream into lines.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that end in `chunk`.
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
    fn lines_are_whole_however_they_arrive() {
        let mut lines = Lines::default();
        assert!(lines.push(b"id: 1\nda").unwrap() == ["id: 1"]);
        assert!(lines.push(b"ta: {}").unwrap().is_empty());
        assert_eq!(lines.push(b"\r\n\n").unwrap(), ["data: {}", ""]);
        assert!(lines.push(&vec![b'x'; LINE_MAX_BYTES + 1]).is_err());
    }
}
