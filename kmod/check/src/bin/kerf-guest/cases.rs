//! What vsock promises, over whichever transport leads to a CID at which the services run.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::MsgFlags;

use crate::machine;
use crate::services::{
    CLOSER, DEAF, ECHO, MESSAGES, RELEASE, SINK, SOURCE, SOURCE_BYTES, STALLED, drain, fill,
};
use crate::vsock::{Socket, Type};

/// A port on which nobody listens.
const CLOSED: u32 = 7999;
const SOON: Duration = Duration::from_secs(60);
const NOW: Duration = Duration::ZERO;

pub(crate) type Case = (&'static str, fn(u32));

pub(crate) const ALL: &[Case] = &[
    ("refused", refused),
    ("every_length_around_the_slots", lengths),
    ("large_write_and_half_close", half_close),
    ("large_read_to_the_end", large_read),
    ("both_ways_at_once", both_ways),
    ("poll", polled),
    ("back_pressure", back_pressure),
    ("messages_keep_their_bounds", messages),
    ("bound_to_the_own_cid", bound),
    ("closed_at_once", closed_at_once),
    ("peek", peek),
    ("shut_for_reading", shut_for_reading),
    ("queue_full", queue_full),
    ("many_sockets", many_sockets),
    ("connect_and_close", connect_and_close),
    ("zerocopy", crate::zerocopy::case),
];

fn refused(cid: u32) {
    let result = Socket::connect(Type::Stream, cid, CLOSED);
    assert_eq!(result.err(), Some(Errno::ECONNRESET));
    let result = Socket::connect(Type::SeqPacket, cid, CLOSED);
    assert_eq!(result.err(), Some(Errno::ECONNRESET));
    // The wrong kind of socket is not taken either.
    let result = Socket::connect(Type::SeqPacket, cid, ECHO);
    assert_eq!(result.err(), Some(Errno::ECONNRESET));
}

fn echo(socket: &Socket, bytes: &[u8]) {
    let (mut to, mut from) = (socket, socket);
    to.write_all(bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    from.read_exact(&mut back).unwrap();
    assert!(bytes == back, "{} bytes came back wrong", bytes.len());
}

pub(crate) fn lengths(cid: u32) {
    let socket = Socket::stream(cid, ECHO);
    let mut bytes = vec![0; 100_000];
    fill(&mut bytes, 3);
    let around = |n: usize| n - 3..=n + 3;
    let lengths = (1..=260)
        .chain(around(4096))
        .chain(around(32_212))
        .chain(around(65_536));
    for len in lengths {
        echo(&socket, &bytes[..len]);
    }
}

pub(crate) fn half_close(cid: u32) {
    let socket = Socket::stream(cid, SINK);
    let (mut buffer, mut sum, total) = (vec![0; 1 << 20], 0u64, 8 << 20);
    for at in (0..total).step_by(buffer.len()) {
        fill(&mut buffer, at);
        sum += buffer.iter().map(|b| u64::from(*b)).sum::<u64>();
        (&socket).write_all(&buffer).unwrap();
    }
    socket.end_writing();
    let sent = socket.send(b"x", MsgFlags::empty());
    assert_eq!(sent, Err(Errno::EPIPE));
    let mut text = String::new();
    (&socket).read_to_string(&mut text).unwrap();
    assert_eq!(text, format!("{total} {sum}"));
}

fn large_read(cid: u32) {
    let mut socket = &Socket::stream(cid, SOURCE);
    let (mut buffer, mut expected, mut at) = (vec![0; 50_000], vec![0; 50_000], 0);
    loop {
        let len = socket.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        fill(&mut expected[..len], at);
        assert!(buffer[..len] == expected[..len], "at {at}");
        at += len;
    }
    assert_eq!(at, SOURCE_BYTES);
}

fn both_ways(cid: u32) {
    let socket = Socket::stream(cid, ECHO);
    let writer = socket.duplicate();
    let total = 2 << 20;
    let sender = thread::spawn(move || {
        let mut buffer = vec![0; 40_000];
        let mut at = 0;
        while at < total {
            let len = buffer.len().min(total - at);
            fill(&mut buffer[..len], at);
            (&writer).write_all(&buffer[..len]).unwrap();
            at += len;
        }
        writer.end_writing();
    });
    let (count, _) = drain(&socket).unwrap();
    assert_eq!(count, total as u64);
    sender.join().unwrap();
}

fn polled(cid: u32) {
    let socket = Socket::new(Type::Stream);
    socket.nonblocking(true);
    assert_eq!(socket.dial(cid, ECHO), Err(Errno::EINPROGRESS));
    assert!(
        socket
            .poll(PollFlags::POLLOUT, SOON)
            .contains(PollFlags::POLLOUT)
    );
    assert_eq!(socket.error(), 0);
    assert_eq!(socket.poll(PollFlags::POLLIN, NOW), PollFlags::empty());
    let nothing = socket.recv(&mut [0], MsgFlags::empty());
    assert_eq!(nothing, Err(Errno::EAGAIN));
    assert_eq!(socket.send(b"ping", MsgFlags::empty()), Ok(4));
    assert!(
        socket
            .poll(PollFlags::POLLIN, SOON)
            .contains(PollFlags::POLLIN)
    );
    let mut back = [0; 8];
    assert_eq!(socket.recv(&mut back, MsgFlags::empty()), Ok(4));
    socket.end_writing();
    assert!(
        socket
            .poll(PollFlags::POLLIN, SOON)
            .contains(PollFlags::POLLIN)
    );
    assert_eq!(socket.recv(&mut back, MsgFlags::empty()), Ok(0));

    let refused = Socket::new(Type::Stream);
    refused.nonblocking(true);
    assert_eq!(refused.dial(cid, CLOSED), Err(Errno::EINPROGRESS));
    assert!(
        refused
            .poll(PollFlags::POLLOUT, SOON)
            .contains(PollFlags::POLLERR)
    );
    assert_eq!(refused.error(), Errno::ECONNRESET as i32);
}

/// A writer that nobody reads stands still, bounded; and goes on when somebody does.
fn back_pressure(cid: u32) {
    let socket = Socket::stream(cid, STALLED);
    let release = Socket::stream(cid, RELEASE);
    socket.nonblocking(true);
    let (buffer, mut sent) = (vec![1; 30_000], 0);
    loop {
        match socket.send(&buffer, MsgFlags::empty()) {
            Ok(len) => sent += len,
            Err(Errno::EAGAIN) => {
                let waited = socket.poll(PollFlags::POLLOUT, Duration::from_millis(300));
                if waited.is_empty() {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent <= 1 << 20, "{sent} bytes were taken and nobody reads");
    }
    assert!(sent >= 64 * 1024, "only {sent}");
    assert_eq!(release.send(b"x", MsgFlags::empty()), Ok(1));
    assert!(
        socket
            .poll(PollFlags::POLLOUT, SOON)
            .contains(PollFlags::POLLOUT)
    );
    socket.nonblocking(false);
    (&socket).write_all(&buffer).unwrap();
    socket.end_writing();
    let mut text = String::new();
    (&socket).read_to_string(&mut text).unwrap();
    let total = sent + buffer.len();
    assert_eq!(text, format!("{total} {total}"));
}

fn messages(cid: u32) {
    let socket = Socket::connect(Type::SeqPacket, cid, MESSAGES).unwrap();
    let mut bytes = vec![0; 200_000];
    fill(&mut bytes, 5);
    let lengths = [
        1, 2, 210, 211, 212, 213, 4096, 32_211, 32_212, 32_213, 65_536, 100_000, 200_000,
    ];
    let mut back = vec![0; 300_000];
    for len in lengths {
        assert_eq!(socket.send(&bytes[..len], MsgFlags::MSG_EOR), Ok(len));
        let got = socket.recv(&mut back, MsgFlags::empty());
        assert_eq!(got, Ok(len));
        assert!(back[..len] == bytes[..len], "{len}");
    }
    // Several on the way at once, small and large in turn: none runs into another.
    for len in [5, 50_000, 6, 60_000] {
        assert_eq!(socket.send(&bytes[..len], MsgFlags::empty()), Ok(len));
    }
    for len in [5, 50_000, 6, 60_000] {
        assert_eq!(socket.recv(&mut back, MsgFlags::empty()), Ok(len));
    }
    let long = socket.send(&vec![0; 300_000], MsgFlags::empty());
    // Linux 6.1 says the first, 6.12 the second, over whichever transport.
    assert!(
        matches!(long, Err(Errno::ENOMEM | Errno::EMSGSIZE)),
        "{long:?}"
    );
}

/// A socket can be bound to the own CID, and to no other.
fn bound(cid: u32) {
    // Who is addressed as CID 1 answers to CID 1.
    let own = if cid == 1 { 1 } else { machine::own_cid() };
    let socket = Socket::new(Type::Stream);
    assert_eq!(socket.bind(own + 70), Err(Errno::EADDRNOTAVAIL));
    socket.bind(own).unwrap();
    socket.dial(cid, ECHO).unwrap();
    echo(&socket, b"bound");
}

fn closed_at_once(cid: u32) {
    let mut socket = &Socket::stream(cid, CLOSER);
    assert_eq!(socket.read(&mut [0; 8]).unwrap(), 0);
}

fn peek(cid: u32) {
    let socket = Socket::stream(cid, ECHO);
    (&socket).write_all(b"0123456789").unwrap();
    let mut back = [0; 10];
    let all = MsgFlags::MSG_WAITALL;
    while socket.recv(&mut back, MsgFlags::MSG_PEEK) != Ok(10) {}
    assert_eq!(&back, b"0123456789");
    back.fill(0);
    assert_eq!(socket.recv(&mut back, all), Ok(10));
    assert_eq!(&back, b"0123456789");
}

fn shut_for_reading(cid: u32) {
    let socket = Socket::stream(cid, SINK);
    socket.end_reading();
    assert_eq!(socket.recv(&mut [0], MsgFlags::empty()), Ok(0));
    assert_eq!(socket.send(b"still", MsgFlags::empty()), Ok(5));
}

/// The queue of a listener that seldom accepts fills up, and then it refuses. Others may be filling it too.
fn queue_full(cid: u32) {
    let mut queued = Vec::new();
    let mut refused = 0;
    let start = Instant::now();
    while queued.is_empty() || refused == 0 {
        match Socket::connect(Type::Stream, cid, DEAF) {
            Ok(socket) => queued.push(socket),
            Err(error) => {
                assert_eq!(error, Errno::ECONNRESET);
                refused += 1;
                thread::sleep(Duration::from_millis(50));
            }
        }
        let took = start.elapsed();
        assert!(took < SOON, "{} taken, {refused} refused", queued.len());
    }
}

fn many_sockets(cid: u32) {
    let sockets: Vec<_> = (0..200).map(|_| Socket::stream(cid, ECHO)).collect();
    for (n, socket) in sockets.iter().enumerate() {
        (&*socket)
            .write_all(&vec![u8::try_from(n).unwrap(); n * 20 + 1])
            .unwrap();
    }
    for (n, socket) in sockets.iter().enumerate().rev() {
        let mut back = vec![0; n * 20 + 1];
        (&*socket).read_exact(&mut back).unwrap();
        assert!(back.iter().all(|b| usize::from(*b) == n), "{n}");
    }
}

/// Connections that come and go while another one is used.
fn connect_and_close(cid: u32) {
    let steady = Socket::stream(cid, ECHO);
    let start = Instant::now();
    for round in 0..200u32 {
        let socket = Socket::stream(cid, ECHO);
        if round % 2 == 0 {
            echo(&socket, b"a");
        }
        drop(socket);
        echo(&steady, &round.to_le_bytes());
    }
    println!("KERF info 200 connections in {:?}", start.elapsed());
}
