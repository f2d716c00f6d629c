//! Handovers between real processes, with clients that notice every lost or repeated request.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use kmorph_workload::handover::PacketSocket;
use kmorph_workload::handover::message::{FailureCode, Mode, Phase, Reply, Request, Role};
use support::{Client, Server, activate, freeze, listener, morph, prepare_by_reference, serve};

/// Clients that increment one counter without a pause, each over one connection.
struct Hammer {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<u64>>,
}

impl Hammer {
    fn start(address: SocketAddr, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let clients = (0..clients)
            .map(|depth| {
                let (stop, answered) = (stop.clone(), answered.clone());
                std::thread::spawn(move || increments(address, depth % 3 * 5 + 1, &stop, &answered))
            })
            .collect();
        Self {
            stop,
            answered,
            clients,
        }
    }

    /// Waits until `more` further answers have come.
    fn progress(&self, more: u64) {
        let goal = self.answered.load(Ordering::Relaxed) + more;
        let begin = std::time::Instant::now();
        while self.answered.load(Ordering::Relaxed) < goal {
            assert!(
                begin.elapsed() < support::DEADLINE,
                "clients get no answers"
            );
            std::thread::yield_now();
        }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().map(|c| c.join().unwrap()).sum()
    }
}

/// Sends INCR `depth` at a time; every answer is larger than the one before. Returns the answers.
fn increments(address: SocketAddr, depth: usize, stop: &AtomicBool, answered: &AtomicU64) -> u64 {
    let mut client = Client::connect(address);
    let batch = "*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n".repeat(depth);
    let (mut last, mut count) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        client.write(batch.as_bytes());
        for _ in 0..depth {
            let line = client.line();
            let value: u64 = line.strip_prefix(':').unwrap_or_default().parse().unwrap();
            assert!(value > last, "{value} after {last}");
            last = value;
            count += 1;
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
    count
}

fn counter(address: SocketAddr) -> u64 {
    let mut client = Client::connect(address);
    client.write(b"GET counter\r\n");
    String::from_utf8(client.bulk()).unwrap().parse().unwrap()
}

#[test]
fn twenty_handovers_lose_and_repeat_no_increment() {
    let (socket, address) = listener();
    let mut server = Server::start(&socket, Role::Serve, &[]);
    let hammer = Hammer::start(address, 5);
    for round in 0..20 {
        hammer.progress(200);
        let mut next = Server::start(&socket, Role::Standby, &[]);
        if round % 4 == 1 {
            // A morph that is taken back while the target waits for its connections.
            prepare_by_reference(&mut server, &mut next);
            freeze(&mut server);
            assert_eq!(server.request(&Request::Resume), Reply::Resumed);
            next.kill();
            hammer.progress(200);
            next = Server::start(&socket, Role::Standby, &[]);
        }
        morph(server, &mut next);
        server = next;
    }
    hammer.progress(200);
    let answered = hammer.finish();
    assert_eq!(counter(address), answered);
    let mut client = Client::connect(address);
    client.write(b"INFO\r\n");
    let info = String::from_utf8(client.bulk()).unwrap();
    assert!(info.contains("kmorph_state_epoch:21\r\n"), "{info}");
    assert!(info.contains("kmorph_instance:web\r\n"), "{info}");
    assert!(info.contains("kmorph_generation:7\r\n"), "{info}");
    assert!(
        info.contains("kmorph_kernel_release:6.12.0-test\r\n"),
        "{info}"
    );
}

#[test]
fn a_new_side_killed_before_it_serves_leaves_the_old_one_serving() {
    let (socket, address) = listener();
    let mut old = Server::start(&socket, Role::Serve, &[]);
    let hammer = Hammer::start(address, 3);
    for _ in 0..5 {
        hammer.progress(200);
        let mut new = Server::start(&socket, Role::Standby, &[]);
        prepare_by_reference(&mut old, &mut new);
        let frozen = freeze(&mut old);
        assert_eq!(activate(&mut new), frozen);
        new.kill();
        assert_eq!(old.request(&Request::Resume), Reply::Resumed);
    }
    hammer.progress(200);
    let answered = hammer.finish();
    assert_eq!(counter(address), answered);
}

#[test]
fn only_one_of_resume_and_serve_wins() {
    let (socket, address) = listener();
    // Resume first: the target may not serve, and ends.
    let mut old = Server::start(&socket, Role::Serve, &[]);
    assert_eq!(Client::connect(address).ask("SET k old"), "+OK");
    let mut new = Server::start(&socket, Role::Standby, &[]);
    prepare_by_reference(&mut old, &mut new);
    freeze(&mut old);
    activate(&mut new);
    assert_eq!(old.request(&Request::Resume), Reply::Resumed);
    assert_eq!(new.refused(&Request::Serve), FailureCode::Fenced);
    assert_eq!(new.exit_status().code(), Some(75));
    assert_eq!(Client::connect(address).ask("SET k still"), "+OK");
    // Serve first: the source may not resume, and ends.
    let mut new = Server::start(&socket, Role::Standby, &[]);
    prepare_by_reference(&mut old, &mut new);
    freeze(&mut old);
    activate(&mut new);
    serve(&mut new);
    assert_eq!(old.refused(&Request::Resume), FailureCode::Fenced);
    assert_eq!(old.exit_status().code(), Some(75));
    let mut client = Client::connect(address);
    client.write(b"GET k\r\n");
    assert_eq!(client.bulk(), b"still");
}

#[test]
fn half_a_command_and_an_unread_reply_move_with_their_connections() {
    let (socket, address) = listener();
    let mut old = Server::start(&socket, Role::Serve, &[]);
    let mut half = Client::connect(address);
    assert_eq!(half.ask("CLIENT SETNAME half"), "+OK");
    half.write(b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$10\r\n01234");
    // More than the socket buffers hold: the rest waits in the server.
    let value: Vec<u8> = (0..24u32 << 20).map(|n| n.to_le_bytes()[0]).collect();
    let mut slow = Client::connect(address);
    slow.write(format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n${}\r\n", value.len()).as_bytes());
    slow.write(&value);
    slow.write(b"\r\n");
    assert_eq!(slow.line(), "+OK");
    slow.write(b"GET big\r\nINCR after\r\n");
    // The server has run it once the next client of the same loop is answered.
    while !Client::connect(address).ask("STRLEN big").starts_with(':') {}
    let mut leaving = Client::connect(address);
    leaving.write(b"GET big\r\nQUIT\r\n");
    for _ in 0..2 {
        let mut new = Server::start(&socket, Role::Standby, &[]);
        morph(old, &mut new);
        old = new;
    }
    half.write(b"56789\r\n");
    assert_eq!(half.line(), "+OK");
    half.write(b"GET half\r\nCLIENT GETNAME\r\n");
    assert_eq!(half.bulk(), b"0123456789");
    assert_eq!(half.bulk(), b"half");
    assert!(slow.bulk() == value, "the unread reply was damaged");
    assert_eq!(slow.line(), ":1");
    assert!(leaving.bulk() == value, "the unread reply was damaged");
    assert_eq!(leaving.line(), "+OK");
    leaving.expect_end();
}

#[test]
fn many_connections_move_at_once() {
    let (socket, address) = listener();
    let old = Server::start(&socket, Role::Serve, &[]);
    let mut clients: Vec<Client> = (0..400).map(|_| Client::connect(address)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.ask(&format!("SET k{n} {n}")), "+OK");
    }
    let mut new = Server::start(&socket, Role::Standby, &[]);
    morph(old, &mut new);
    for (n, client) in clients.iter_mut().enumerate() {
        client.write(format!("GET k{n}\r\n").as_bytes());
        assert_eq!(client.bulk(), n.to_string().as_bytes());
    }
    match new.request(&Request::Query) {
        Reply::Status(status) => {
            assert_eq!((status.phase, status.connections), (Phase::Serving, 400));
            assert_eq!(status.items, 400);
        }
        other => panic!("{other:?}"),
    }
}

/// Copies until nothing is dirty; returns the bytes copied.
fn copy(old: &mut Server, new: &mut Server) -> u64 {
    let mut copied = 0;
    loop {
        let max_bytes = 64 * 1024;
        let chunk = old.exchange(&Request::ReadDirty { max_bytes }, &[], &[]);
        let Reply::Chunk {
            section, offset, ..
        } = chunk.message
        else {
            panic!("{chunk:?}");
        };
        if chunk.data.is_empty() {
            return copied;
        }
        copied += chunk.data.len() as u64;
        let apply = Request::Apply { section, offset };
        assert_eq!(
            new.exchange(&apply, &chunk.data, &[]).message,
            Reply::Applied
        );
    }
}

#[test]
fn memory_copied_in_rounds_under_writes_is_the_same_memory() {
    let (socket, address) = listener();
    let (other_socket, other) = listener();
    let mut old = Server::start(&socket, Role::Serve, &["--max-memory=64mb"]);
    let mut client = Client::connect(address);
    for n in 1..2000 {
        assert_eq!(client.ask(&format!("SET key:{n} {}", "x".repeat(n))), "+OK");
    }
    let mut new = Server::start(&other_socket, Role::Standby, &[]);
    let mode = Mode::Rounds;
    let prepared = old.request(&Request::PrepareExport { mode });
    let Reply::Prepared { total_len, .. } = prepared else {
        panic!("{prepared:?}");
    };
    assert_eq!(total_len, 64 << 20);
    let import = Request::PrepareImport { mode, total_len };
    let ready = new.request(&import);
    assert!(matches!(ready, Reply::ImportReady { .. }), "{ready:?}");
    // How much a round copies is known only of so many writes, not of a time in which others write.
    let first = copy(&mut old, &mut new);
    for _ in 0..100 {
        client.ask("INCR own");
    }
    let second = copy(&mut old, &mut new);
    assert!(second < first / 4, "{second} of {first} bytes again");
    let hammer = Hammer::start(address, 2);
    hammer.progress(100);
    copy(&mut old, &mut new);
    hammer.progress(100);
    let budget_us = 10_000_000;
    let early = new.refused(&Request::Activate {
        nonce: 1,
        budget_us,
    });
    assert_eq!(early, FailureCode::BadState);
    let frozen = freeze(&mut old);
    copy(&mut old, &mut new);
    match new.request(&Request::Validate { budget_us }) {
        Reply::Validated { passed, checks } => {
            assert!(passed, "{checks:?}");
            assert!(checks.iter().any(|c| c.name == "arena content"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(activate(&mut new), frozen);
    serve(&mut new);
    let mut client = Client::connect(other);
    for n in 1..2000 {
        client.write(format!("GET key:{n}\r\n").as_bytes());
        assert_eq!(client.bulk(), "x".repeat(n).as_bytes());
    }
    let copied = counter(other);
    // The source answers nobody any more: what clients were told is what was copied.
    let told = hammer.answered.load(Ordering::Relaxed);
    assert!(copied >= told, "{copied} copied, {told} told");
    assert_eq!(old.request(&Request::Resume), Reply::Resumed);
    hammer.progress(10);
    hammer.finish();
}

#[test]
fn requests_out_of_their_phase_change_nothing() {
    let (socket, address) = listener();
    let mut old = Server::start(&socket, Role::Serve, &[]);
    let mode = Mode::Rounds;
    for request in [
        Request::Freeze,
        Request::Serve,
        Request::ReadDirty { max_bytes: 1 },
        Request::PrepareImport { mode, total_len: 0 },
        Request::Apply {
            section: 0,
            offset: 0,
        },
        Request::Activate {
            nonce: 0,
            budget_us: 0,
        },
    ] {
        assert_eq!(
            old.refused(&request),
            FailureCode::WrongPhase,
            "{request:?}"
        );
    }
    let by_reference = Request::PrepareExport {
        mode: Mode::ByReference,
    };
    assert_eq!(old.refused(&by_reference), FailureCode::BadRequest);
    assert_eq!(Client::connect(address).ask("PING"), "+PONG");
    let mut new = Server::start(&socket, Role::Standby, &[]);
    assert_eq!(new.refused(&Request::Serve), FailureCode::WrongPhase);
    let total_len = 12345;
    let odd = new.refused(&Request::PrepareImport { mode, total_len });
    assert_eq!(odd, FailureCode::BadState);
}

#[test]
fn a_peer_that_sends_garbage_or_vanishes_fails_the_import_and_no_more() {
    use std::os::fd::AsFd;
    let (socket, _) = listener();
    let mut new = Server::start(&socket, Role::Standby, &[]);
    for garbage in [true, false] {
        let (from, to) = PacketSocket::pair().unwrap();
        let import = Request::PrepareImport {
            mode: Mode::ByReference,
            total_len: 0,
        };
        new.send(&import, &[], &[to.as_fd()]);
        if garbage {
            nix::unistd::write(&from, b"\x05\x00\x00\x00{oops").unwrap();
        } else {
            drop(from);
        }
        let reply = new.receive().message;
        assert!(
            matches!(
                reply,
                Reply::Failed {
                    code: FailureCode::Peer,
                    ..
                }
            ),
            "{reply:?}"
        );
    }
    new.retire();
}

#[test]
fn without_its_agent_a_server_ends_even_while_frozen() {
    let (socket, _) = listener();
    let mut serving = Server::start(&socket, Role::Serve, &[]);
    serving.abandon();
    assert_eq!(serving.exit_status().code(), Some(75));
    let mut frozen = Server::start(&socket, Role::Serve, &[]);
    let mode = Mode::Rounds;
    frozen.request(&Request::PrepareExport { mode });
    freeze(&mut frozen);
    frozen.abandon();
    assert_eq!(frozen.exit_status().code(), Some(75));
}
