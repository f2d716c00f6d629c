//! A benign agent: appends each notice of another instance's failure, as a line of JSON, to `told` in the directory of
//! its second argument. While a file `deaf` exists there, the agent closes its control channel on a notice, and accepts
//! no other channel until the file is removed. While a file `refuse` exists, the agent answers ERROR.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use kmp_proto::codec::Decoder;
use kmp_proto::message::{ErrorInfo, Message, RecoverReply};
use kmp_proto::wire::ErrorCode;
use serde_json::{Value, json};

use crate::wire::{bytes, next};

/// Serves a control channel.
pub(crate) fn attend(stream: &mut UnixStream, dir: &Path) -> io::Result<()> {
    let mut decoder = Decoder::new();
    while !dir.join("deaf").exists() {
        let frame = next(stream, &mut decoder)?;
        let Some((line, recovery)) = line(&frame.message) else {
            continue;
        };
        if dir.join("deaf").exists() {
            return Ok(());
        }
        let mut told = std::fs::OpenOptions::new();
        let mut told = told.create(true).append(true).open(dir.join("told"))?;
        told.write_all(format!("{line}\n").as_bytes())?;
        let answer = if dir.join("refuse").exists() {
            Message::Error(ErrorInfo {
                code: ErrorCode::RefusedByPolicy,
                offending_type: frame.header.msg_type as u16,
                offending_sequence: frame.header.sequence,
                text: "not today".to_owned(),
            })
        } else {
            let reply = RecoverReply {
                recovery,
                elapsed_ms: 0,
            };
            match frame.message {
                Message::RecoverPrepare(_) => Message::RecoverPrepareReply(reply),
                Message::RecoverReclaim(_) => Message::RecoverReclaimReply(reply),
                _ => Message::RecoverCompleteReply(reply),
            }
        };
        stream.write_all(&bytes(&answer, frame.header.sequence)?)?;
    }
    Ok(())
}

fn line(message: &Message) -> Option<(Value, u64)> {
    let kind = message.msg_type().name();
    Some(match message {
        Message::RecoverPrepare(m) => {
            let f = m.fixed;
            let line = json!({ "type": kind, "recovery": f.recovery, "instance": m.instance,
                "failed_generation": f.failed_generation, "cause": f.cause.as_str(), "text": m.text });
            (line, f.recovery)
        }
        Message::RecoverReclaim(m) => {
            let f = m.fixed;
            let line = json!({ "type": kind, "recovery": f.recovery, "instance": m.instance,
                "failed_generation": f.failed_generation, "cause": f.cause.as_str(),
                "fenced_generation": m.fence.generation, "method": m.fence.method,
                "confirmation": m.fence.confirmation });
            (line, f.recovery)
        }
        Message::RecoverComplete(m) => {
            let f = m.fixed;
            let one = |e: &kmp_proto::message::TopologyEntry| json!([e.name, e.generation]);
            let topology: Vec<Value> = m.topology.iter().map(one).collect();
            let line = json!({ "type": kind, "recovery": f.recovery, "instance": m.instance,
                "failed_generation": f.failed_generation, "new_generation": f.new_generation,
                "outcome": f.outcome.as_str(), "topology": topology });
            (line, f.recovery)
        }
        _ => return None,
    })
}
