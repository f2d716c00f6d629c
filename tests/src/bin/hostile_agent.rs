//! An agent that means harm: stands in for `kmorph-agent` and does to its daemon what the first
//! argument of its workload says. Without one of these words it becomes the real agent beside it.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kmorph_launch::{AgentConfig, Listen};
use kmp_proto::codec::{Decoder, Frame, encode};
use kmp_proto::message::{
    Channel, Health, HealthStatus, HealthStatusFixed, HeartbeatRsp, Hello, Message,
    PRESSURE_ABSENT, PeerRole, WorkloadState,
};
use kmp_proto::wire::HEADER_BYTES;

/// Offset of the payload's length in a header.
const LENGTH_AT: usize = 12;
/// Changes of its mind of an agent that is moody; it ends with the last.
const MOODS: usize = 200_000;

fn main() -> io::Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|a| a == "--version") {
        println!("hostile-agent 0");
        return Ok(());
    }
    let config = args.get(1).map(PathBuf::from).unwrap_or_default();
    let hostile = AgentConfig::load(&config).ok().and_then(|config| {
        let word = config.workload.as_ref()?.args.first()?.clone();
        let Listen::Unix { path, .. } = &config.listen else {
            return None;
        };
        Some((word, path.clone(), config))
    });
    match hostile {
        Some((word, path, config)) => harm(&word, &path, &config),
        None => {
            let real = std::env::current_exe()?.with_file_name("kmorph-agent");
            Err(Command::new(real).args(args).exec())
        }
    }
}

fn harm(word: &str, path: &Path, config: &AgentConfig) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    for stream in listener.incoming() {
        let (word, config, stream) = (word.to_owned(), config.clone(), stream?);
        // The daemon hangs up when it has had enough: that is no failure of this program.
        std::thread::spawn(move || meet(&word, stream, &config));
    }
    Ok(())
}

fn meet(word: &str, mut stream: UnixStream, config: &AgentConfig) -> io::Result<()> {
    if word == "silent" {
        return io::copy(&mut stream, &mut io::sink()).map(drop);
    }
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    stream.write_all(b"OK 9000\n")?;
    let (asked, sequence) = hello(&mut stream)?;
    let channel = asked.fixed.channel;
    let mut answer = agree(asked, sequence, config, u64::from(word == "stale"))?;
    match word {
        "moody" => {
            stream.write_all(&answer)?;
            return match channel {
                Channel::Heartbeat => live(&mut stream),
                _ => sulk(&mut stream),
            };
        }
        "garbage" => loop {
            stream.write_all(&[0xA5; 4096])?;
        },
        "wrong-crc" => *answer.last_mut().ok_or(io::ErrorKind::InvalidData)? ^= 1,
        "oversized" => answer[LENGTH_AT..LENGTH_AT + 4].fill(0xFF),
        _ => {}
    }
    stream.write_all(&answer)?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

/// Says that it is well and not well by turns, as fast as it can, and ends.
fn sulk(stream: &mut UnixStream) -> io::Result<()> {
    let mut frames = Vec::new();
    for turn in 0..MOODS {
        let health = [Health::Degraded, Health::Healthy][turn % 2];
        let fixed = HealthStatusFixed {
            health,
            workload: WorkloadState::Running,
            flags: 0,
            exit_status: 0,
            restarts: 0,
        };
        let text = "a mood".to_owned();
        let status = Message::HealthStatus(HealthStatus { fixed, text });
        frames.extend(bytes(&status, 0)?);
    }
    stream.write_all(&frames)?;
    std::process::exit(0)
}

/// Answers heartbeats.
fn live(stream: &mut UnixStream) -> io::Result<()> {
    let mut decoder = Decoder::new();
    loop {
        let frame = next(stream, &mut decoder)?;
        if let Message::HeartbeatReq(asked) = frame.message {
            let answer = HeartbeatRsp {
                probe: asked.probe,
                health: Health::Healthy,
                workload: WorkloadState::Running,
                cpu_count: 1,
                cpu_busy_permille: 0,
                pressure_cpu: PRESSURE_ABSENT,
                pressure_memory: PRESSURE_ABSENT,
                pressure_io: PRESSURE_ABSENT,
                memory_total_kib: 0,
                memory_available_kib: 0,
                io_read_bytes: 0,
                io_write_bytes: 0,
            };
            let answer = Message::HeartbeatRsp(answer);
            stream.write_all(&bytes(&answer, frame.header.sequence)?)?;
        }
    }
}

fn next(stream: &mut UnixStream, decoder: &mut Decoder) -> io::Result<Frame> {
    let mut byte = [0];
    loop {
        // One byte at a time: what follows a frame is for whoever reads next.
        stream.read_exact(&mut byte)?;
        let frame = decoder
            .feed(&mut &byte[..])
            .map_err(|e| io::Error::other(e.to_string()))?;
        if let Some(frame) = frame {
            return Ok(frame);
        }
    }
}

/// The daemon's HELLO, and its sequence number.
fn hello(stream: &mut UnixStream) -> io::Result<(Hello, u32)> {
    let frame = next(stream, &mut Decoder::new())?;
    match frame.message {
        Message::Hello(asked) => Ok((asked, frame.header.sequence)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The reply to a HELLO, from a generation that is `behind` by so many.
fn agree(asked: Hello, sequence: u32, config: &AgentConfig, behind: u64) -> io::Result<Vec<u8>> {
    let mut reply = Hello {
        instance: config.instance.to_string(),
        ..asked
    };
    reply.fixed.role = PeerRole::Instance;
    reply.fixed.generation = config.generation - behind;
    bytes(&Message::HelloReply(reply), sequence)
}

fn bytes(message: &Message, sequence: u32) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    encode(message, sequence, 0, &mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}
