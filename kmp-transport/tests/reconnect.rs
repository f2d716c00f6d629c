//! How a lost channel is connected again.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;
use std::time::Duration;

use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole};
use kmp_proto::wire::VERSION;
use kmp_transport::connection::welcome;
use kmp_transport::link::{Address, KMP_PORT, Listener, UnixVsockListener, accept_line};
use kmp_transport::peer::Peer;

fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Control,
            flags: 0,
            generation: 1,
            boot_id: [7; 16],
            features: 0,
            session: 0,
        },
        instance: "web".to_owned(),
        kernel_release: String::new(),
        agent_version: String::new(),
    }
}

#[tokio::test]
async fn a_peer_that_breaks_off_after_every_hello_is_met_ever_more_slowly() {
    // Two channels, each 8 times: the waits between are at least half of 5, 10, 20 … 320 ms.
    const CONNECTIONS: usize = 16;
    const LEAST: Duration = Duration::from_millis(300);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = Listener::Unix(UnixVsockListener::bind(&path, KMP_PORT).unwrap());
    let daemon = hello(PeerRole::Daemon);
    let peer = Peer::start(Address::Unix(path), &daemon, 1, Arc::new(|_| {}));
    let begun = tokio::time::Instant::now();
    for _ in 0..CONNECTIONS {
        let link = accept_line(listener.accept().await.unwrap()).await.unwrap();
        drop(welcome(link, &hello(PeerRole::Instance)).await.unwrap());
    }
    assert!(begun.elapsed() >= LEAST, "{:?}", begun.elapsed());
    drop(peer);
}
