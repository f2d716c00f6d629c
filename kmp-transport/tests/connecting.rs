//! Rules of `docs/kmp.md` for connecting and reconnecting: the line of the Unix socket, the limit of pending
//! connections, and the waits after a loss. Each test names its rule. Waits use virtual time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod hello;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hello::hello;
use kmp_proto::message::{Channel, FailureCause, Message, PeerRole, RecoverFixed, RecoverNotice};
use kmp_transport::connection::{Connection, HELLO_TIMEOUT, welcome};
use kmp_transport::link::{
    Address, BoxedLink, ConnectError, KMP_PORT, Listener, UnixVsockListener, connect, memory,
};
use kmp_transport::peer::{Connecting, Peer, PeerEvent, RECONNECT_FIRST, RECONNECT_MAX};
use kmp_transport::server::{PENDING_MAX, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Maximum length of a line, without its end.
const LINE_MAX: usize = 32;
/// Tolerance for a late timer.
const TIMER: Duration = Duration::from_millis(2);

/// Starts an instance behind the socket at `path`.
fn instance(path: &Path) -> mpsc::Receiver<Connection> {
    let listener = UnixVsockListener::bind(path, KMP_PORT).unwrap();
    serve(
        Listener::Unix(listener),
        hello(PeerRole::Instance),
        |_: &str| (),
    )
}

/// Sends these bytes as the first of a connection, and returns the instance's answer up to its close.
async fn answer_to(path: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // The instance may close with unread bytes, in which case the connection ends with a reset.
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

#[tokio::test(start_paused = true)]
async fn what_is_no_connect_line_for_its_port_is_closed_without_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let _connections = instance(&path);
    let long = [b'x'; LINE_MAX + 1];
    for line in [
        b"CONNECT 9001\n".as_slice(),
        b"CONNECT\n",
        b"CONNECT 9000 please\n",
        b"connect 9000\n",
        b"GET / HTTP/1.1\n",
        b"\xff\xfe\n",
        b"\n",
        &long,
    ] {
        let begun = Instant::now();
        let answer = answer_to(&path, line).await;
        assert!(answer.is_empty(), "{line:?}: {answer:?}");
        // The refusal does not wait for the timeout.
        assert!(begun.elapsed() < HELLO_TIMEOUT, "{line:?}");
    }
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"CONNECT 9000\n").await.unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"OK 9000\n");
}

#[tokio::test(start_paused = true)]
async fn a_line_of_32_bytes_is_waited_for_and_a_longer_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let _connections = instance(&path);
    for (bytes, waits) in [(LINE_MAX, true), (LINE_MAX + 1, false)] {
        let begun = Instant::now();
        assert!(answer_to(&path, &vec![b'x'; bytes]).await.is_empty());
        assert_eq!(begun.elapsed() >= HELLO_TIMEOUT, waits, "{bytes} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn the_line_and_hello_have_two_seconds_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let _connections = instance(&path);
    let begun = Instant::now();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    tokio::time::sleep(HELLO_TIMEOUT * 3 / 4).await;
    stream.write_all(b"CONNECT 9000\n").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"OK 9000\n");
    let took = begun.elapsed();
    assert!(
        took >= HELLO_TIMEOUT && took < HELLO_TIMEOUT * 5 / 4,
        "{took:?}"
    );
}

/// Connects to a device that answers the daemon's line with these bytes, and returns the result.
async fn answered(answer: &[u8]) -> Result<BoxedLink, ConnectError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let device = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 9000\n");
        stream.write_all(answer).await.unwrap();
        stream
    };
    let address = Address::Unix(path);
    let (link, _held) = tokio::join!(connect(&address, KMP_PORT), device);
    link
}

#[tokio::test(start_paused = true)]
async fn a_daemon_asks_for_port_9000_and_takes_any_number_for_an_answer() {
    for answer in [b"OK 9000\n".as_slice(), b"OK 1073741824\n", b"OK 0\n"] {
        answered(answer).await.unwrap();
    }
    let longest = ["OK ", &"7".repeat(LINE_MAX - 3), "\n"].concat();
    answered(longest.as_bytes()).await.unwrap();
    let too_long = ["OK ", &"7".repeat(LINE_MAX - 2), "\n"].concat();
    for answer in [b"NO\n".as_slice(), b"OK\n", too_long.as_bytes()] {
        // The answer does not come from the kernel.
        let refused = answered(answer).await.err();
        assert!(
            matches!(refused, Some(ConnectError::Unreachable { .. })),
            "{refused:?}"
        );
    }
    let begun = Instant::now();
    let silent = answered(b"").await.err();
    assert!(
        matches!(silent, Some(ConnectError::TimedOut { .. })),
        "{silent:?}"
    );
    assert_eq!(begun.elapsed().as_secs(), HELLO_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn of_65_connections_that_say_nothing_the_oldest_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let _connections = instance(&path);
    assert_eq!(PENDING_MAX, 64);
    let begun = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..=PENDING_MAX {
        silent.push(UnixStream::connect(&path).await.unwrap());
    }
    assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0);
    assert!(
        begun.elapsed() < HELLO_TIMEOUT,
        "it gave way, and was not late"
    );
    for stream in &silent[1..] {
        let held = stream.try_read(&mut [0]).unwrap_err();
        assert_eq!(held.kind(), std::io::ErrorKind::WouldBlock);
    }
}

/// Returns the times of a daemon's connection attempts, which are equal for both channels. From the attempt `welcomed`
/// on, the instance answers HELLO and hangs up `after` that.
async fn attempts(seed: u64, count: usize, welcomed: usize, after: Duration) -> Vec<Instant> {
    let (tell, mut told) = mpsc::unbounded_channel();
    let calls = Mutex::new(0);
    let connector = Arc::new(move || -> Connecting {
        let mut calls = calls.lock().unwrap();
        *calls += 1;
        // At the end, the receiver has been dropped.
        let _ = tell.send(Instant::now());
        if (*calls - 1) / 2 < welcomed {
            let address = Address::Vsock(3);
            let port = KMP_PORT;
            return Box::pin(async move { Err(ConnectError::TimedOut { address, port }) });
        }
        let (near, far) = memory();
        tokio::spawn(async move {
            let met = welcome(far, &hello(PeerRole::Instance)).await;
            tokio::time::sleep(after).await;
            drop(met);
        });
        Box::pin(async move { Ok(near) })
    });
    let _peer = Peer::over(connector, hello(PeerRole::Daemon), seed, Arc::new(|_| {}));
    let mut times = Vec::new();
    while times.len() < count {
        let first = told.recv().await.unwrap();
        assert!(
            told.recv().await.unwrap() - first <= TIMER,
            "the channels differ"
        );
        times.push(first);
    }
    times
}

#[tokio::test(start_paused = true)]
async fn each_wait_is_doubled_up_to_a_second_and_shortened_by_up_to_a_half() {
    assert_eq!(RECONNECT_FIRST.as_millis(), 5);
    assert_eq!(RECONNECT_MAX.as_secs(), 1);
    let mut firsts = Vec::new();
    for seed in 1..20 {
        let times = attempts(seed * 0x9E37_79B9, 14, usize::MAX, Duration::ZERO).await;
        let waits: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for (n, wait) in (0..).zip(&waits) {
            let most = (RECONNECT_FIRST * 2_u32.pow(n)).min(RECONNECT_MAX);
            assert!(
                *wait >= most / 2 && *wait <= most + TIMER,
                "{n}: {wait:?} of {most:?}"
            );
        }
        firsts.push(waits[7]);
    }
    firsts.sort_unstable();
    firsts.dedup();
    assert!(firsts.len() > 5, "a part of it is random: {firsts:?}");
}

#[tokio::test(start_paused = true)]
async fn after_a_connection_of_a_second_the_waits_begin_anew_and_after_a_shorter_one_not() {
    const FAILED: usize = 7;
    for (lasted, anew) in [(RECONNECT_MAX, true), (RECONNECT_MAX / 2, false)] {
        let times = attempts(12345, FAILED + 2, FAILED, lasted).await;
        let wait = times[FAILED + 1] - times[FAILED] - lasted;
        let due = RECONNECT_FIRST * 2_u32.pow(u32::try_from(FAILED).unwrap());
        if anew {
            assert!(wait <= RECONNECT_FIRST + TIMER, "{wait:?}");
        } else {
            assert!(
                wait >= due / 2 && wait <= due + TIMER,
                "{wait:?} of {due:?}"
            );
        }
    }
}

fn notice(recovery: u64) -> Message {
    Message::RecoverPrepare(RecoverNotice {
        fixed: RecoverFixed {
            recovery,
            failed_generation: 1,
            cause: FailureCause::KernelDead,
        },
        instance: "db".to_owned(),
        text: String::new(),
    })
}

#[tokio::test(start_paused = true)]
async fn what_was_queued_for_a_lost_connection_is_dropped() {
    let (links_in, mut links) = mpsc::unbounded_channel();
    let connector = Arc::new(move || -> Connecting {
        let (near, far) = memory();
        let _ = links_in.send(far);
        Box::pin(async move { Ok(near) })
    });
    let (told, mut events) = mpsc::unbounded_channel();
    let sink = Arc::new(move |event| drop(told.send(event)));
    let peer = Peer::over(connector, hello(PeerRole::Daemon), 1, sink);
    let mut others = Vec::new();
    let mut control = async || loop {
        let met = welcome(links.recv().await.unwrap(), &hello(PeerRole::Instance)).await;
        let connection = met.unwrap();
        if connection.hello.fixed.channel == Channel::Control {
            return connection;
        }
        others.push(connection);
    };
    drop(control().await);
    while !matches!(
        events.recv().await,
        Some(PeerEvent::Down(Channel::Control, _))
    ) {}
    // The channel is not reconnected yet, because a wait comes first.
    peer.send(Channel::Control, 7, notice(7)).unwrap();
    let mut second = control().await;
    while !matches!(
        events.recv().await,
        Some(PeerEvent::Up(Channel::Control, _))
    ) {}
    peer.send(Channel::Control, 8, notice(8)).unwrap();
    assert_eq!(second.reader.next().await.unwrap().message, notice(8));
}
