//! The host as a peer of a guest's kernel.

use std::io;
use std::time::{Duration, Instant};

use kmp_proto::codec::{Decoder, encode};
use kmp_proto::message::{Channel, HeartbeatReq, Hello, HelloFixed, Message, PeerRole};
use kmp_transport::kerf::{Host, HostStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::guest::{Guest, Machine};

/// Ports of the services in the guest, and of its kernel.
const ECHO: u32 = 7007;
const SINK: u32 = 7009;
const CLOSED: u32 = 7999;
const HEARTBEAT: u32 = 9001;
const PATIENCE: Duration = Duration::from_secs(120);

impl Machine {
    /// This process as peer 0, linked with the guest 1.
    pub(crate) async fn host(&self) -> Host {
        let host = Host::new(self.server()).unwrap();
        let start = Instant::now();
        while !host.is_linked(1) {
            assert!(start.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        host
    }

    pub(crate) fn host_cases(&self, guest: &mut Guest) {
        guest.wait_for("KERF said serving");
        self.runtime().block_on(async {
            let host = self.host().await;
            let refused = host.connect(1, CLOSED).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionReset);
            echo(&host).await;
            sink(&host).await;
            heartbeats(&host).await;
            // The guest dies while it is waited for.
            let mut waiting = host.connect(1, ECHO).await.unwrap();
            guest.kill();
            let mut buffer = [0; 8];
            let ended = tokio::time::timeout(PATIENCE, waiting.read(&mut buffer));
            let error = ended.await.unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        });
    }
}

/// Every length around the slots, both ways at once.
async fn echo(host: &Host) {
    let stream = host.connect(1, ECHO).await.unwrap();
    let (mut from, mut to) = tokio::io::split(stream);
    let lengths = (1..=260).chain(32_200..32_220).chain([100_000, 300_000]);
    let total: usize = lengths.clone().sum();
    let byte = |at: usize| u8::try_from((at * 31 + (at >> 8)) & 0xff).unwrap();
    let sending = tokio::spawn(async move {
        let mut at = 0;
        for len in lengths {
            let bytes: Vec<u8> = (at..at + len).map(byte).collect();
            to.write_all(&bytes).await.unwrap();
            at += len;
        }
        to.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    from.read_to_end(&mut back).await.unwrap();
    sending.await.unwrap();
    assert_eq!(back.len(), total);
    assert!(back.iter().enumerate().all(|(at, b)| *b == byte(at)));
}

/// Half closed, the answer still comes.
async fn sink(host: &Host) {
    let mut stream = host.connect(1, SINK).await.unwrap();
    let bytes = vec![3; 1 << 20];
    let start = Instant::now();
    for _ in 0..8 {
        stream.write_all(&bytes).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, format!("{} {}", 8 << 20, 24 << 20));
    println!("KERF info 8 MiB to the guest in {:?}", start.elapsed());
}

/// A heartbeat channel to the guest's kernel, without its user space.
pub(crate) struct Heartbeats {
    stream: HostStream,
    probe: u32,
}

impl Heartbeats {
    pub(crate) async fn new(host: &Host, peer: u32) -> Self {
        let stream = host.connect(peer, HEARTBEAT).await.unwrap();
        let mut heartbeats = Self { stream, probe: 0 };
        let hello = Message::Hello(Hello {
            fixed: HelloFixed {
                version_min: 1,
                version_max: 1,
                role: PeerRole::Daemon,
                channel: Channel::Heartbeat,
                flags: 0,
                generation: 5,
                boot_id: [1; 16],
                features: 0,
                session: 0,
                incarnation: 0,
            },
            instance: "test".to_owned(),
            kernel_release: String::new(),
            agent_version: String::new(),
            nonce: None,
            proof: None,
        });
        let reply = heartbeats.ask(&hello).await;
        assert!(matches!(reply, Message::HelloReply(hello) if hello.instance == "test"));
        heartbeats
    }

    async fn ask(&mut self, message: &Message) -> Message {
        let mut bytes = Vec::new();
        encode(message, 1, 1, &mut bytes).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
        let (mut decoder, mut buffer) = (Decoder::new(), [0; 512]);
        loop {
            let len = self.stream.read(&mut buffer).await.unwrap();
            assert_ne!(len, 0);
            if let Some(frame) = decoder.feed(&mut &buffer[..len]).unwrap() {
                return frame.message;
            }
        }
    }

    /// One heartbeat: how long its answer takes.
    pub(crate) async fn beat(&mut self) -> Duration {
        self.probe += 1;
        let request = Message::HeartbeatReq(HeartbeatReq {
            probe: self.probe,
            flags: 0,
            self_lag_us: 0,
        });
        let start = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, self.ask(&request)).await;
        let answer = answer.expect("a heartbeat was lost");
        assert!(matches!(answer, Message::HeartbeatRsp(r) if r.fixed.probe == self.probe));
        start.elapsed()
    }
}

async fn heartbeats(host: &Host) {
    let mut heartbeats = Heartbeats::new(host, 1).await;
    for _ in 0..100 {
        heartbeats.beat().await;
    }
}
