mod requests;

use std::path::Path;

use kmp_proto::message::{
    FailureCause, HelloFixed, PeerRole, RecoverComplete, RecoverCompleteFixed, RecoverFixed,
    RecoverNotice, RecoverReply, RecoveryOutcome, RetryAfter,
};
use kmp_proto::wire::{ErrorCode, VERSION};
use kmp_transport::connection::Connection;
use kmp_transport::link::{KMP_PORT, Listener, SystemNetwork, UnixVsockListener};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::handle::retry_wait;
use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// Receives the events of the peer's channels.
struct Owner;

impl Actor for Owner {
    type Context = Context<Self>;
}

impl Handler<PeerUpdate> for Owner {
    type Result = ();

    fn handle(&mut self, _: PeerUpdate, _: &mut Self::Context) {}
}

fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Control,
            flags: 0,
            generation: 1,
            boot_id: [1; 16],
            features: 0,
            session: 0,
            incarnation: 0,
        },
        instance: "web".to_owned(),
        kernel_release: String::new(),
        agent_version: String::new(),
        nonce: None,
        proof: None,
    }
}

fn notice() -> Kmp {
    Kmp::RecoverPrepare(RecoverNotice {
        fixed: RecoverFixed {
            recovery: 7,
            failed_generation: 3,
            cause: FailureCause::KernelDead,
        },
        instance: "db".to_owned(),
        text: String::new(),
    })
}

fn topology(recovery: u64) -> Topology {
    Topology(RecoverComplete {
        fixed: RecoverCompleteFixed {
            recovery,
            failed_generation: 3,
            new_generation: 4,
            outcome: RecoveryOutcome::Recovered,
            part: 0,
            flags: 0,
        },
        instance: "db".to_owned(),
        topology: Vec::new(),
    })
}

fn put_off(frame: &Frame) -> Kmp {
    Kmp::Retry(RetryAfter {
        retry_after_ms: 1,
        reason: ErrorCode::Busy,
        offending_type: frame.header.msg_type as u16,
        offending_sequence: frame.header.sequence,
    })
}

const DONE: RecoverReply = done(7);

const fn done(recovery: u64) -> RecoverReply {
    RecoverReply {
        recovery,
        elapsed_ms: 0,
    }
}

fn listen(path: &Path) -> mpsc::Receiver<Connection> {
    let listener = Listener::Unix(UnixVsockListener::bind(path, KMP_PORT).unwrap());
    kmp_transport::server::serve(listener, hello(PeerRole::Instance), |_: &str| ())
}

/// Runs an instance that defers each request `put_offs` times before it answers.
fn serve(path: &Path, put_offs: usize) {
    let mut connections = listen(path);
    actix::spawn(async move {
        while let Some(mut connection) = connections.recv().await {
            actix::spawn(async move {
                let mut asked = 0;
                while let Ok(frame) = connection.reader.next().await {
                    let sequence = frame.header.sequence;
                    asked += 1;
                    let answer = if asked <= put_offs {
                        put_off(&frame)
                    } else {
                        Kmp::RecoverPrepareReply(DONE)
                    };
                    connection.writer.reply(&answer, sequence).await.unwrap();
                }
            });
        }
    });
}

/// Runs a survivor that defers the first message, and hangs up on demand. Sends the recovery of
/// each message and the number of its connection to the test.
async fn survive(
    path: std::path::PathBuf,
    heard: mpsc::UnboundedSender<(usize, u64)>,
    hang_up: Arc<Notify>,
) {
    let mut connections = listen(&path);
    let mut count = 0;
    let mut others = Vec::new();
    while let Some(mut connection) = connections.recv().await {
        if connection.hello.fixed.channel != Channel::Control {
            others.push(connection);
            continue;
        }
        count += 1;
        let mut put_offs = usize::from(count == 1);
        loop {
            let frame = tokio::select! {
                frame = connection.reader.next() => frame.unwrap(),
                () = hang_up.notified() => break,
            };
            let (recovery, mut reply) = match &frame.message {
                Kmp::RecoverPrepare(m) => {
                    let recovery = m.fixed.recovery;
                    (recovery, Kmp::RecoverPrepareReply(done(recovery)))
                }
                Kmp::RecoverComplete(m) => {
                    let recovery = m.fixed.recovery;
                    (recovery, Kmp::RecoverCompleteReply(done(recovery)))
                }
                other => panic!("{other:?}"),
            };
            heard.send((count, recovery)).unwrap();
            if put_offs > 0 {
                put_offs -= 1;
                reply = put_off(&frame);
            }
            let sequence = frame.header.sequence;
            connection.writer.reply(&reply, sequence).await.unwrap();
        }
    }
}

fn attach(path: &Path) -> (TransportHandle, PeerKey) {
    let transport = TransportHandle::start(
        &Logger::root(slog::Discard, slog::o!()),
        Arc::new(SystemNetwork),
    );
    let key = PeerKey {
        instance: "web".to_owned(),
        generation: 1,
    };
    let id = transport.new_attachment();
    transport.address().do_send(Attach {
        id,
        key: key.clone(),
        endpoint: Endpoint::Unix {
            path: path.to_owned(),
        },
        speaker: hello(PeerRole::Daemon).into(),
        owner: Owner.start().recipient(),
    });
    (transport, key)
}

async fn asked(put_offs: usize, timeout: Duration) -> Result<Kmp, RequestError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    serve(&path, put_offs);
    let (transport, key) = attach(&path);
    ask(&transport, &key, timeout).await
}

/// Sends a request as soon as the peer is connected.
async fn ask(
    transport: &TransportHandle,
    key: &PeerKey,
    timeout: Duration,
) -> Result<Kmp, RequestError> {
    let begun = Instant::now();
    loop {
        let request = Request {
            key: key.clone(),
            message: notice(),
            timeout,
        };
        match transport.ask(request).await {
            Err(RequestError::NotConnected) if begun.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            answered => return answered,
        }
    }
}

#[actix::test]
async fn a_request_that_is_put_off_is_asked_again_until_its_time_is_over() {
    let answered = asked(3, PATIENCE).await;
    assert!(
        matches!(answered, Ok(Kmp::RecoverPrepareReply(_))),
        "{answered:?}"
    );
    let little = Duration::from_millis(50);
    let given_up = asked(usize::MAX, little).await;
    assert_eq!(given_up, Err(RequestError::TimedOut(little)));
}

#[actix::test]
async fn a_survivor_is_owed_the_newest_topology_until_it_has_answered_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let (transport, key) = attach(&path);
    transport.address().send(topology(1)).await.unwrap();
    let broadcast = Broadcast {
        except: "db".to_owned(),
        message: notice(),
    };
    transport.address().send(broadcast).await.unwrap();
    transport.address().send(topology(2)).await.unwrap();
    // The peer is reachable only from here on.
    let (sender, mut heard) = mpsc::unbounded_channel();
    let hang_up = Arc::new(Notify::new());
    actix::spawn(survive(path, sender, hang_up.clone()));
    let next = async |heard: &mut mpsc::UnboundedReceiver<_>| {
        tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap()
    };
    assert_eq!(next(&mut heard).await, Some((1, 2)));
    assert_eq!(next(&mut heard).await, Some((1, 2)), "it was put off");
    // No message is under way on this connection, and this is the first message on the next one.
    for connection in [1, 2] {
        let answered = ask(&transport, &key, PATIENCE).await;
        let reply = matches!(answered, Ok(Kmp::RecoverPrepareReply(_)));
        assert!(reply, "{answered:?}");
        assert_eq!(next(&mut heard).await, Some((connection, 7)));
        hang_up.notify_one();
    }
}

/// Runs a survivor that passes each message to the test, and answers when the test allows it.
async fn listen_slowly(
    path: std::path::PathBuf,
    heard: mpsc::UnboundedSender<u64>,
    answer: Arc<Notify>,
) {
    let mut connections = listen(&path);
    let mut others = Vec::new();
    while let Some(mut connection) = connections.recv().await {
        if connection.hello.fixed.channel != Channel::Control {
            others.push(connection);
            continue;
        }
        loop {
            let frame = connection.reader.next().await.unwrap();
            let (recovery, reply) = match &frame.message {
                Kmp::RecoverPrepare(m) => {
                    let recovery = m.fixed.recovery;
                    (recovery, Kmp::RecoverPrepareReply(done(recovery)))
                }
                Kmp::RecoverComplete(m) => {
                    let recovery = m.fixed.recovery;
                    (recovery, Kmp::RecoverCompleteReply(done(recovery)))
                }
                other => panic!("{other:?}"),
            };
            heard.send(recovery).unwrap();
            answer.notified().await;
            let sequence = frame.header.sequence;
            connection.writer.reply(&reply, sequence).await.unwrap();
        }
    }
}

#[actix::test]
async fn one_topology_at_a_time_is_under_way_to_a_survivor_and_the_newest_follows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let (transport, _) = attach(&path);
    transport.address().send(topology(1)).await.unwrap();
    let (sender, mut heard) = mpsc::unbounded_channel();
    let answer = Arc::new(Notify::new());
    actix::spawn(listen_slowly(path, sender, answer.clone()));
    let next = async |heard: &mut mpsc::UnboundedReceiver<_>| {
        tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap()
    };
    assert_eq!(next(&mut heard).await, Some(1));
    for recovery in 2..100 {
        transport.address().send(topology(recovery)).await.unwrap();
    }
    answer.notify_one();
    assert_eq!(
        next(&mut heard).await,
        Some(99),
        "and none of those between"
    );
    answer.notify_one();
    transport.address().send(topology(100)).await.unwrap();
    assert_eq!(next(&mut heard).await, Some(100));
}

#[actix::test]
async fn a_survivor_that_answers_nothing_is_sent_only_so_much() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let (transport, key) = attach(&path);
    let (sender, mut heard) = mpsc::unbounded_channel();
    let answer = Arc::new(Notify::new());
    actix::spawn(listen_slowly(path, sender, answer.clone()));
    // The peer is connected: it has received a request and not answered it.
    let little = Duration::from_millis(1);
    let asked = ask(&transport, &key, little).await;
    assert_eq!(asked, Err(RequestError::TimedOut(little)));
    for _ in 0..3 * NOTICES_MAX {
        let broadcast = Broadcast {
            except: "db".to_owned(),
            message: notice(),
        };
        transport.address().send(broadcast).await.unwrap();
    }
    transport.address().send(topology(8)).await.unwrap();
    let mut notices = 0;
    loop {
        answer.notify_one();
        match tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap() {
            Some(8) => break,
            _ => notices += 1,
        }
    }
    // One of the notices may be the request.
    assert!(
        (NOTICES_MAX..=NOTICES_MAX + 1).contains(&notices),
        "{notices}"
    );
}

#[test]
fn each_wait_is_what_was_asked_for_and_a_part_that_doubles() {
    let ms = Duration::from_millis;
    assert_eq!(retry_wait(ms(100), 1, 0), ms(100));
    assert_eq!(retry_wait(ms(100), 1, 512), ms(150));
    assert_eq!(retry_wait(ms(100), 3, 512), ms(300));
    assert_eq!(retry_wait(ms(100), u32::MAX, 1023), RETRY_MAX);
    assert_eq!(retry_wait(Duration::MAX, 1, 1023), RETRY_MAX);
}

/// Runs an instance that gives this answer to each request on its control channel.
fn answer_all(path: &Path, answer: Kmp) {
    let mut connections = listen(path);
    actix::spawn(async move {
        while let Some(mut connection) = connections.recv().await {
            let answer = answer.clone();
            actix::spawn(async move {
                while let Ok(frame) = connection.reader.next().await {
                    let sequence = frame.header.sequence;
                    connection.writer.reply(&answer, sequence).await.unwrap();
                }
            });
        }
    });
}

#[actix::test]
async fn a_reply_that_does_not_answer_its_request_ends_what_asked_and_nothing_else() {
    let other_recovery = Kmp::RecoverPrepareReply(RecoverReply {
        recovery: 99,
        elapsed_ms: 0,
    });
    let other_type = Kmp::RecoverReclaimReply(DONE);
    for answer in [other_recovery, other_type] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        answer_all(&path, answer);
        let (transport, key) = attach(&path);
        for _ in 0..2 {
            let refused = ask(&transport, &key, PATIENCE).await;
            assert!(
                matches!(refused, Err(RequestError::WrongReply(_))),
                "{refused:?}"
            );
        }
    }
}

#[actix::test]
async fn what_needs_a_feature_that_not_both_have_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    serve(&path, 0);
    let (transport, key) = attach(&path);
    ask(&transport, &key, PATIENCE).await.unwrap();
    let message = Kmp::MorphPrepare(kmp_proto::message::MorphPrepare {
        session: 1,
        from_generation: 1,
        to_generation: 2,
        downtime_budget_us: 1,
        phase_timeout_ms: 1,
        side: kmp_proto::message::Side::Source,
    });
    let timeout = PATIENCE;
    let request = Request {
        key,
        message,
        timeout,
    };
    let refused = transport.ask(request).await;
    assert_eq!(refused, Err(RequestError::NoFeature(1)));
}

#[actix::test]
async fn a_topology_goes_in_parts_each_after_the_answer_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let (transport, _) = attach(&path);
    let Topology(mut whole) = topology(9);
    let entry = kmp_proto::message::TopologyEntry {
        name: "db".to_owned(),
        generation: 4,
        memory_kib: 1,
        cid: 3,
        cpus: (0..1024).collect(),
    };
    whole.topology = vec![entry; 400];
    let count = whole.clone().into_parts().len();
    assert!(count > 3, "{count}");
    transport
        .address()
        .send(Topology(whole.clone()))
        .await
        .unwrap();
    let mut connections = listen(&path);
    let mut others = Vec::new();
    let mut control = async || loop {
        let connection = connections.recv().await.unwrap();
        if connection.hello.fixed.channel == Channel::Control {
            return connection;
        }
        others.push(connection);
    };
    let told = async |connection: &mut Connection| {
        let frame = connection.reader.next().await.unwrap();
        match frame.message.clone() {
            Kmp::RecoverComplete(part) => (frame, part),
            other => panic!("{other:?}"),
        }
    };
    let reply = Kmp::RecoverCompleteReply(RecoverReply {
        recovery: 9,
        elapsed_ms: 0,
    });
    let all = async {
        // The peer hangs up after the second part: on the next connection, all parts arrive.
        let mut first = control().await;
        for n in 0..2 {
            let (frame, part) = told(&mut first).await;
            assert_eq!(part.fixed.part, n);
            let sequence = frame.header.sequence;
            first.writer.reply(&reply, sequence).await.unwrap();
        }
        drop(first);
        let mut second = control().await;
        let mut parts = kmp_proto::message::TopologyParts::default();
        let mut put_off_once = true;
        loop {
            let (frame, part) = told(&mut second).await;
            let sequence = frame.header.sequence;
            if part.fixed.part == 1 && std::mem::take(&mut put_off_once) {
                let later = put_off(&frame);
                second.writer.reply(&later, sequence).await.unwrap();
                continue;
            }
            let taken = parts.take(part).unwrap();
            second.writer.reply(&reply, sequence).await.unwrap();
            if let Some(found) = taken {
                return found;
            }
        }
    };
    let found = tokio::time::timeout(PATIENCE, all).await.unwrap();
    assert_eq!(found, whole);
}
