//! A whole agent whose log stands still: it is asked how it is, and answers.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kmp_proto::auth::Key;
use kmp_proto::message::{
    Channel, HeartbeatReq, Hello, HelloFixed, Message, PeerRole, WorkloadState, features,
};
use kmp_proto::wire::VERSION;
use kmp_transport::connection::{Connection, greet};
use kmp_transport::link::{self, Address};
use kmp_transport::speaker::Speaker;

const PORT: u32 = 9000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Ended with the test, and its workload with it.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(dir: &Path, log: OwnedFd) -> Ended {
    let config = serde_json::json!({
        "instance": "web", "generation": 7, "role": "child", "cpus": [0], "memory_bytes": 1 << 28, "ports": [],
        "key": "00".repeat(32), "start": { "kind": "fresh" },
        "listen": { "kind": "unix", "path": dir.join("vsock.sock"), "port": PORT },
        "workload": { "program": "/usr/bin/yes", "args": [], "env": {}, "restart": "on_failure" },
    });
    let path = dir.join("agent.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let agent = Command::new(env!("CARGO_BIN_EXE_kmorph-agent"))
        .arg("--config")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    Ended(agent.unwrap())
}

async fn heartbeats(path: &Path) -> Connection {
    let hello = Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role: PeerRole::Daemon,
            channel: Channel::Heartbeat,
            flags: 0,
            generation: 7,
            boot_id: [7; 16],
            features: features::MORPHS,
            session: 0,
            incarnation: 1,
        },
        instance: "web".to_owned(),
        kernel_release: "6.12.0".to_owned(),
        agent_version: "test".to_owned(),
        nonce: None,
        proof: None,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match link::connect(&Address::Unix(path.to_owned()), PORT).await {
            Ok(link) => {
                let speaker = Speaker::with_key(hello, Key::new([0; 32]));
                return greet(link, speaker).await.unwrap();
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_agent_whose_log_stands_still_answers_heartbeats() {
    let dir = tempfile::tempdir().unwrap();
    // Its reader never reads: the first lines fit, then every write waits.
    let (_unread, log) = std::io::pipe().unwrap();
    let _agent = start(dir.path(), log.into());
    let mut daemon = heartbeats(&dir.path().join("vsock.sock")).await;
    let mut ask = async |probe| {
        let request = HeartbeatReq {
            probe,
            flags: 0,
            self_lag_us: 0,
        };
        let request = Message::HeartbeatReq(request);
        daemon.writer.send(&request).await.unwrap();
        let answer = tokio::time::timeout(PATIENCE, daemon.reader.next());
        match answer.await.expect("an answer").unwrap().message {
            Message::HeartbeatRsp(answer) => answer.fixed.workload,
            other => panic!("{other:?}"),
        }
    };
    // `yes` fills the pipe within a moment; what it prints is the agent's to write until it is counted as running.
    let mut probe = 0;
    let settled = Instant::now();
    while ask(probe).await != WorkloadState::Running || settled.elapsed() < Duration::from_secs(2) {
        assert!(settled.elapsed() < PATIENCE, "it does not run");
        probe += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
