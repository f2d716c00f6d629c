//! A hostile agent: stands in for `kmorph-agent` and attacks its daemon in the way that the first argument of its
//! workload names. With the prefix `turns-`, the agent is well behaved until the file in the second argument exists. An
//! agent `late` sends nothing until that file exists, and an agent `unwell` answers no heartbeat until then. Without an
//! argument, this program executes the real agent in its directory.

mod survivor;
mod wire;

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kmorph_launch::birth::Birth;
use kmorph_launch::{AgentConfig, Listen, Secret};
use kmp_proto::codec::Decoder;
use kmp_proto::message::{
    Channel, ErrorInfo, Health, HealthStatus, HealthStatusFixed, Message, PRESSURE_ABSENT,
    WorkloadState,
};

use kmp_proto::wire::ErrorCode;

use crate::wire::{agree, beat, believe, bytes, connect, hello, next};

/// Offset of the payload length in a header.
const LENGTH_AT: usize = 12;
/// Number of health changes of a `moody` agent, which exits after the last.
const MOODS: usize = 200_000;

fn main() -> io::Result<()> {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(birth) = Birth::take(&mut args).map_err(io::Error::other)? {
        birth.be_born().map_err(io::Error::other)?;
    }
    if args.first().is_some_and(|a| a == "--version") {
        println!("hostile-agent 0");
        return Ok(());
    }
    let config = args.get(1).map(PathBuf::from).unwrap_or_default();
    let hostile = AgentConfig::load(&config).ok().and_then(|config| {
        let words = config.workload.as_ref()?.args.clone();
        words.first()?;
        let Listen::Unix { path, .. } = &config.listen else {
            return None;
        };
        Some((words, path.clone(), config))
    });
    match hostile {
        Some((words, path, config)) => harm(words, &path, &config),
        None => {
            let real = std::env::current_exe()?.with_file_name("kmorph-agent");
            Err(Command::new(real).args(args).exec())
        }
    }
}

fn harm(words: Vec<String>, path: &Path, config: &AgentConfig) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    for stream in listener.incoming() {
        let (words, config, stream) = (words.clone(), config.clone(), stream?);
        // An error is expected: the daemon hangs up on a misbehaving agent.
        std::thread::spawn(move || meet(&words, stream, &config));
    }
    Ok(())
}

fn meet(words: &[String], mut stream: UnixStream, config: &AgentConfig) -> io::Result<()> {
    let second = Path::new(words.get(1).map_or("", String::as_str));
    let word = words[0].as_str();
    let turned = match word.strip_prefix("turns-") {
        Some(later) if second.exists() => Some(later),
        Some(_) => None,
        None => Some(word),
    };
    if word == "late" {
        // The daemon gives up a connection without answers, and connects again.
        wait_for(second);
    }
    if turned == Some("silent") {
        return io::copy(&mut stream, &mut io::sink()).map(drop);
    }
    connect(&mut stream)?;
    let (mut asked, sequence) = hello(&mut stream)?;
    if word == "spiteful" {
        asked.kernel_release = SPITE.to_owned();
        asked.agent_version = SPITE.to_owned();
    }
    let mut config = config.clone();
    if turned == Some("impostor") {
        config.key = Secret::new([0; 32]);
    }
    if turned == Some("versions") {
        (asked.fixed.version_min, asked.fixed.version_max) = (0, 0);
    }
    let channel = asked.fixed.channel;
    let behind = u64::from(turned == Some("stale"));
    let mut answer = agree(asked, sequence, &config, behind, turned == Some("reborn"))?;
    match turned {
        Some(
            "moody" | "strange" | "unwell" | "survivor" | "pressed" | "late" | "spiteful"
            | "reborn",
        )
        | None => {
            stream.write_all(&answer)?;
            believe(&mut stream)?;
            return match (channel, word) {
                (Channel::Heartbeat, _) => live(&mut stream, word, second),
                (_, "moody") => sulk(&mut stream),
                (_, "strange") => {
                    wait_for(second);
                    say(&mut stream, STRANGE, "neither well nor ill")
                }
                (_, "unwell") => say(&mut stream, Health::Degraded, "a fever"),
                (_, "spiteful") => revile(&mut stream),
                (_, "survivor") => survivor::attend(&mut stream, second),
                _ => io::copy(&mut stream, &mut io::sink()).map(drop),
            };
        }
        Some(word) => spoil(word, &mut stream, &mut answer)?,
    }
    stream.write_all(&answer)?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

/// Corrupts an answer as the word names.
fn spoil(word: &str, stream: &mut UnixStream, answer: &mut [u8]) -> io::Result<()> {
    match word {
        "garbage" => loop {
            stream.write_all(&[0xA5; 4096])?;
        },
        "wrong-crc" => *answer.last_mut().ok_or(io::ErrorKind::InvalidData)? ^= 1,
        "oversized" => answer[LENGTH_AT..LENGTH_AT + 4].fill(0xFF),
        _ => {}
    }
    Ok(())
}

/// Text that would forge a log line, clear a terminal and reverse the reading direction; sent in quantity.
const SPITE: &str = "\x1b[2J\x1b]0;owned\x07\nERRO forged\r\u{9b}31m\u{202e}txet\u{2066}";

/// Reports bad health, with a text that harms programs that print it; then refuses every request.
fn revile(stream: &mut UnixStream) -> io::Result<()> {
    let fixed = HealthStatusFixed {
        health: Health::Degraded,
        workload: WorkloadState::Running,
        flags: 0,
        exit_status: 0,
        restarts: 0,
    };
    let status = Message::HealthStatus(HealthStatus {
        fixed,
        text: SPITE.to_owned(),
    });
    stream.write_all(&bytes(&status, 0)?)?;
    let mut decoder = Decoder::new();
    loop {
        let frame = next(stream, &mut decoder)?;
        let refusal = Message::Error(ErrorInfo {
            code: ErrorCode::Busy,
            offending_type: 0,
            offending_sequence: frame.header.sequence,
            text: SPITE.repeat(8),
        });
        stream.write_all(&bytes(&refusal, frame.header.sequence)?)?;
    }
}

/// Reports good and bad health alternately, as fast as possible, and exits.
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

/// A health value that only a later version of the protocol defines.
const STRANGE: Health = Health::Other(77);

/// Reports this health, and nothing more.
fn say(stream: &mut UnixStream, health: Health, text: &str) -> io::Result<()> {
    let fixed = HealthStatusFixed {
        health,
        workload: WorkloadState::Running,
        flags: 0,
        exit_status: 0,
        restarts: 0,
    };
    let text = text.to_owned();
    let status = Message::HealthStatus(HealthStatus { fixed, text });
    stream.write_all(&bytes(&status, 1)?)?;
    io::copy(stream, &mut io::sink()).map(drop)
}

fn wait_for(file: &Path) {
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Answers heartbeats; for a word with `turns-`, misbehaves once the file `turn` exists.
fn live(stream: &mut UnixStream, word: &str, turn: &Path) -> io::Result<()> {
    if word == "unwell" {
        wait_for(turn);
    }
    let mut decoder = Decoder::new();
    let later = word.strip_prefix("turns-");
    loop {
        let frame = next(stream, &mut decoder)?;
        let Message::HeartbeatReq(asked) = frame.message else {
            continue;
        };
        let pressure = match word {
            "pressed" => 10_000,
            _ => PRESSURE_ABSENT,
        };
        let health = match word {
            "strange" => STRANGE,
            _ => Health::Healthy,
        };
        let mut answer = beat(asked, frame.header.sequence, health, pressure)?;
        match later.filter(|_| turn.exists()) {
            Some("silent") => continue,
            // Hangs up; on the next connection, the agent presents a different generation or boot.
            Some("stale" | "reborn") => return Ok(()),
            Some(word) => spoil(word, stream, &mut answer)?,
            None => {}
        }
        stream.write_all(&answer)?;
    }
}
