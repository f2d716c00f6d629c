//! KMP for these agents: blocking, one frame at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use kmorph_launch::AgentConfig;
use kmp_proto::auth::Key;
use kmp_proto::codec::{Decoder, Frame, encode};
use kmp_proto::message::{
    Authenticated, Health, HeartbeatReq, HeartbeatRsp, HeartbeatRspFixed, Hello, Message,
    PRESSURE_ABSENT, PeerRole, WorkloadState,
};
use kmp_proto::wire::HEADER_BYTES;

/// Reads the line `CONNECT <port>` and answers the line.
pub(crate) fn connect(stream: &mut UnixStream) -> io::Result<()> {
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    stream.write_all(b"OK 9000\n")
}

pub(crate) fn next(stream: &mut UnixStream, decoder: &mut Decoder) -> io::Result<Frame> {
    let mut byte = [0];
    loop {
        // One byte at a time, so that the bytes after the frame remain for the next reader.
        stream.read_exact(&mut byte)?;
        let frame = decoder
            .feed(&mut &byte[..])
            .map_err(|e| io::Error::other(e.to_string()))?;
        if let Some(frame) = frame {
            return Ok(frame);
        }
    }
}

/// Returns the daemon's HELLO and its sequence number.
pub(crate) fn hello(stream: &mut UnixStream) -> io::Result<(Hello, u32)> {
    let frame = next(stream, &mut Decoder::new())?;
    match frame.message {
        Message::Hello(asked) => Ok((asked, frame.header.sequence)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Returns the reply to a HELLO. Its generation is `behind` by this number, or `reborn`: of another boot.
pub(crate) fn agree(
    asked: Hello,
    sequence: u32,
    config: &AgentConfig,
    behind: u64,
    reborn: bool,
) -> io::Result<Vec<u8>> {
    let mut reply = Hello {
        instance: config.instance.to_string(),
        nonce: Some([0x5A; 32]),
        ..asked.clone()
    };
    reply.fixed.role = PeerRole::Instance;
    reply.fixed.generation = config.generation - behind;
    if reborn {
        reply.fixed.boot_id = [9; 16];
    }
    let key = Key::new(config.key.bytes());
    reply.proof = Some(key.proof(PeerRole::Instance, &asked, &reply));
    bytes(&Message::HelloReply(reply), sequence)
}

/// Accepts the daemon's proof without a check.
pub(crate) fn believe(stream: &mut UnixStream) -> io::Result<()> {
    let frame = next(stream, &mut Decoder::new())?;
    let reply = Message::AuthenticateReply(Authenticated { incarnation: 0 });
    stream.write_all(&bytes(&reply, frame.header.sequence)?)
}

/// Returns the answer to a heartbeat, with this health and this CPU pressure.
pub(crate) fn beat(
    asked: HeartbeatReq,
    sequence: u32,
    health: Health,
    pressure_cpu: u16,
) -> io::Result<Vec<u8>> {
    let answer = HeartbeatRsp::from(HeartbeatRspFixed {
        probe: asked.probe,
        health,
        workload: WorkloadState::Running,
        cpu_count: 1,
        cpu_busy_permille: 0,
        pressure_cpu,
        pressure_memory: PRESSURE_ABSENT,
        pressure_io: PRESSURE_ABSENT,
        memory_total_kib: 0,
        memory_available_kib: 0,
        io_read_bytes: 0,
        io_write_bytes: 0,
    });
    bytes(&Message::HeartbeatRsp(answer), sequence)
}

pub(crate) fn bytes(message: &Message, sequence: u32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    encode(message, sequence, 0, &mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}
