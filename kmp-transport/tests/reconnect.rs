//! Reconnection of a lost channel.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod hello;

use std::sync::Arc;
use std::time::Duration;

use hello::hello;
use kmp_proto::message::{
    Channel, Message, PeerRole, RecoverComplete, RecoverCompleteFixed, RecoveryOutcome,
    TopologyEntry,
};
use kmp_transport::connection::welcome;
use kmp_transport::link::{Address, KMP_PORT, Listener, UnixVsockListener, accept_line};
use kmp_transport::peer::{Peer, PeerEvent};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_peer_that_breaks_off_after_every_hello_is_met_ever_more_slowly() {
    // Two channels, 8 connections each: the waits in between are at least half of 5, 10, 20 … 320 ms.
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

/// Returns a RECOVER_COMPLETE with this number of instances.
fn complete(instances: usize) -> Message {
    let entry = TopologyEntry {
        name: "db".to_owned(),
        generation: 1,
        cid: 3,
        memory_kib: 1,
        cpus: Vec::new(),
    };
    Message::RecoverComplete(RecoverComplete {
        fixed: RecoverCompleteFixed {
            recovery: 1,
            failed_generation: 1,
            new_generation: 2,
            outcome: RecoveryOutcome::Recovered,
            part: 0,
            flags: 0,
        },
        instance: "db".to_owned(),
        topology: vec![entry; instances],
    })
}

#[tokio::test]
async fn a_message_that_fits_into_no_frame_costs_the_channel_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = Listener::Unix(UnixVsockListener::bind(&path, KMP_PORT).unwrap());
    let (told, mut events) = mpsc::unbounded_channel();
    let sink = Arc::new(move |event| drop(told.send(event)));
    let peer = Peer::start(Address::Unix(path), hello(PeerRole::Daemon), 1, sink);
    let mut control = loop {
        let link = accept_line(listener.accept().await.unwrap()).await.unwrap();
        let connection = welcome(link, &hello(PeerRole::Instance)).await.unwrap();
        if connection.hello.fixed.channel == Channel::Control {
            break connection;
        }
    };
    while !matches!(
        events.recv().await.unwrap(),
        PeerEvent::Up(Channel::Control, _)
    ) {}
    peer.send(Channel::Control, 7, complete(2049)).unwrap();
    peer.send(Channel::Control, 8, complete(1)).unwrap();
    let refused = async {
        loop {
            match events.recv().await.unwrap() {
                PeerEvent::Unsendable { token, .. } => break token,
                PeerEvent::Down(Channel::Control, why) => panic!("the channel went down: {why}"),
                _ => {}
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, refused).await;
    assert_eq!(refused.unwrap(), 7);
    let frame = control.reader.next().await.unwrap();
    assert_eq!(frame.message, complete(1));
}
