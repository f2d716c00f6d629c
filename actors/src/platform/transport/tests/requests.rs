//! Rules of `docs/kmp.md` for the daemon's requests on a control channel: the number under way, the effect of
//! answers, and one-time notices to survivors. Each test names its rule.

use kmp_proto::message::ErrorInfo;

use super::*;

/// Returns the instance's end of the control channel; keeps the other channels open.
async fn control(
    connections: &mut mpsc::Receiver<Connection>,
    others: &mut Vec<Connection>,
) -> Connection {
    loop {
        let connection = tokio::time::timeout(PATIENCE, connections.recv()).await;
        let connection = connection.unwrap().unwrap();
        if connection.hello.fixed.channel == Channel::Control {
            return connection;
        }
        others.push(connection);
    }
}

/// A daemon, and the instance's end of its control channel, on which a first request was answered.
struct Pair {
    transport: TransportHandle,
    key: PeerKey,
    instance: Connection,
    connections: mpsc::Receiver<Connection>,
    others: Vec<Connection>,
    _dir: tempfile::TempDir,
}

impl Pair {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let mut connections = listen(&path);
        let (transport, key) = attach(&path);
        let mut others = Vec::new();
        let instance = control(&mut connections, &mut others).await;
        let mut pair = Self {
            transport,
            key,
            instance,
            connections,
            others,
            _dir: dir,
        };
        let first = pair.ask_soon(PATIENCE);
        let frame = pair.next().await;
        pair.reply(&Kmp::RecoverPrepareReply(DONE), frame.header.sequence)
            .await;
        first.await.unwrap().unwrap();
        pair
    }

    fn ask_soon(&self, timeout: Duration) -> tokio::task::JoinHandle<Result<Kmp, RequestError>> {
        let (transport, key) = (self.transport.clone(), self.key.clone());
        actix::spawn(async move { ask(&transport, &key, timeout).await })
    }

    async fn next(&mut self) -> Frame {
        let next = tokio::time::timeout(PATIENCE, self.instance.reader.next());
        next.await.unwrap().unwrap()
    }

    async fn reply(&mut self, message: &Kmp, sequence: u32) {
        self.instance.writer.reply(message, sequence).await.unwrap();
    }

    /// Sends a request and answers it, to show that the channel still works.
    async fn goes_on(&mut self) {
        let asked = self.ask_soon(PATIENCE);
        let frame = self.next().await;
        self.reply(&Kmp::RecoverPrepareReply(DONE), frame.header.sequence)
            .await;
        asked.await.unwrap().unwrap();
    }
}

#[actix::test]
async fn sixteen_requests_are_under_way_at_most() {
    let mut pair = Pair::start().await;
    let asked: Vec<_> = (0..REQUESTS_MAX).map(|_| pair.ask_soon(PATIENCE)).collect();
    let mut sequences = Vec::new();
    for _ in 0..REQUESTS_MAX {
        sequences.push(pair.next().await.header.sequence);
    }
    let more = ask(&pair.transport, &pair.key, PATIENCE).await;
    assert_eq!(more, Err(RequestError::Busy));
    for sequence in sequences {
        pair.reply(&Kmp::RecoverPrepareReply(DONE), sequence).await;
    }
    for answered in asked {
        answered.await.unwrap().unwrap();
    }
    pair.goes_on().await;
}

#[actix::test]
async fn an_answer_that_comes_too_late_is_ignored() {
    let mut pair = Pair::start().await;
    for answer in [
        Kmp::RecoverPrepareReply(DONE),
        // This answer matches no request either, and is ignored too.
        Kmp::RecoverPrepareReply(done(99)),
    ] {
        let little = Duration::from_millis(20);
        let asked = pair.ask_soon(little);
        let late = pair.next().await.header.sequence;
        assert_eq!(asked.await.unwrap(), Err(RequestError::TimedOut(little)));
        pair.reply(&answer, late).await;
        pair.goes_on().await;
    }
}

#[actix::test]
async fn a_request_without_an_answer_fails_with_its_connection() {
    let mut pair = Pair::start().await;
    let request = Request {
        key: pair.key.clone(),
        message: notice(),
        timeout: PATIENCE,
    };
    let transport = pair.transport.clone();
    let asked = actix::spawn(async move { transport.ask(request).await });
    pair.next().await;
    let Pair {
        instance,
        mut connections,
        mut others,
        ..
    } = pair;
    drop(instance);
    assert_eq!(asked.await.unwrap(), Err(RequestError::NotConnected));
    // The daemon reconnects, and repeats no request by itself.
    let mut instance = control(&mut connections, &mut others).await;
    let again = ask(&pair.transport, &pair.key, Duration::from_millis(20));
    let (again, frame) = tokio::join!(again, instance.reader.next());
    assert!(matches!(again, Err(RequestError::TimedOut(_))), "{again:?}");
    assert_eq!(frame.unwrap().message, notice());
}

#[actix::test]
async fn a_code_that_nobody_knows_fails_the_request_that_it_names_alone() {
    let mut pair = Pair::start().await;
    let (failing, other) = (pair.ask_soon(PATIENCE), pair.ask_soon(PATIENCE));
    let first = pair.next().await.header.sequence;
    let second = pair.next().await.header.sequence;
    let error = ErrorInfo {
        code: ErrorCode::Other(999),
        offending_type: 0x0201,
        offending_sequence: first,
        text: "of a later version".to_owned(),
    };
    pair.reply(&Kmp::Error(error.clone()), first).await;
    pair.reply(&Kmp::RecoverPrepareReply(DONE), second).await;
    assert_eq!(failing.await.unwrap(), Err(RequestError::Refused(error)));
    other.await.unwrap().unwrap();
    pair.goes_on().await;
}

#[actix::test]
async fn after_retry_the_request_comes_again_as_a_new_frame_with_a_new_sequence() {
    let mut pair = Pair::start().await;
    let asked = pair.ask_soon(PATIENCE);
    let mut sequences = Vec::new();
    for _ in 0..3 {
        let frame = pair.next().await;
        assert_eq!(frame.message, notice());
        sequences.push(frame.header.sequence);
        pair.reply(&put_off(&frame), frame.header.sequence).await;
    }
    let frame = pair.next().await;
    sequences.push(frame.header.sequence);
    assert!(sequences.is_sorted_by(|a, b| a < b), "{sequences:?}");
    pair.reply(&Kmp::RecoverPrepareReply(DONE), frame.header.sequence)
        .await;
    asked.await.unwrap().unwrap();
}

#[actix::test]
async fn what_survivors_are_told_early_is_told_once_also_when_it_is_put_off() {
    let mut pair = Pair::start().await;
    let broadcast = Broadcast {
        except: "db".to_owned(),
        message: notice(),
    };
    pair.transport.address().send(broadcast).await.unwrap();
    let frame = pair.next().await;
    assert_eq!(frame.message, notice());
    pair.reply(&put_off(&frame), frame.header.sequence).await;
    // A deferred topology is sent again after the same time: no other message precedes it.
    pair.transport.address().send(topology(8)).await.unwrap();
    for _ in 0..3 {
        let frame = pair.next().await;
        assert!(
            matches!(frame.message, Kmp::RecoverComplete(_)),
            "{frame:?}"
        );
        pair.reply(&put_off(&frame), frame.header.sequence).await;
    }
}

#[actix::test]
async fn a_topology_that_was_refused_is_owed_no_more() {
    let mut pair = Pair::start().await;
    for recovery in [8, 9] {
        pair.transport
            .address()
            .send(topology(recovery))
            .await
            .unwrap();
        let frame = pair.next().await;
        let Kmp::RecoverComplete(complete) = &frame.message else {
            panic!("{frame:?}");
        };
        assert_eq!(
            complete.fixed.recovery, recovery,
            "the one before is not told again"
        );
        let refusal = ErrorInfo {
            code: ErrorCode::RefusedByPolicy,
            offending_type: 0x0203,
            offending_sequence: frame.header.sequence,
            text: "not today".to_owned(),
        };
        pair.reply(&Kmp::Error(refusal), frame.header.sequence)
            .await;
    }
    // If the topology were still owed, it would arrive before the request that is deferred for ten turns.
    let asked = pair.ask_soon(PATIENCE);
    let frame = pair.next().await;
    let Kmp::Retry(mut later) = put_off(&frame) else {
        panic!("{frame:?}");
    };
    let turn = u32::try_from(TOPOLOGY_PORTION.as_millis()).unwrap();
    later.retry_after_ms = 10 * turn;
    pair.reply(&Kmp::Retry(later), frame.header.sequence).await;
    let frame = pair.next().await;
    assert_eq!(frame.message, notice());
    let sequence = frame.header.sequence;
    pair.reply(&Kmp::RecoverPrepareReply(DONE), sequence).await;
    asked.await.unwrap().unwrap();
}

#[test]
fn the_bounds_on_the_page_are_those_in_force() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md");
    let page = std::fs::read_to_string(path).unwrap();
    let page: Vec<_> = page.split_whitespace().collect();
    let page = page.join(" ");
    let thousands = |count: u32| format!("{},{:03}", count / 1000, count % 1000);
    let (calm, most) = (
        crate::supervisor::TOPOLOGY_CALM,
        crate::supervisor::TOPOLOGY_DELAY_MAX,
    );
    for sentence in [
        format!("The daemon has at most {REQUESTS_MAX} requests under way"),
        format!("at most {NOTICES_MAX} of them unanswered"),
        format!("beyond {} messages at once", thousands(EARLY_BURST)),
        format!("and {EARLY_PER_S} a second;"),
        format!(
            "{} entries a second to all survivors",
            thousands(TOPOLOGY_ENTRIES_PER_S)
        ),
        format!("it is sent {} ms after that", calm.as_millis()),
        format!("{} s after the first at the latest", most.as_secs()),
        format!("{} s at most, and gives up", RETRY_MAX.as_secs()),
    ] {
        assert!(page.contains(&sentence), "{sentence}");
    }
}
