//! A refused request is answered, but an answer never is: otherwise, two peers would refuse each other forever.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod hello;

use hello::hello;
use kmp_proto::codec::Frame;
use kmp_proto::message::*;
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, greet, welcome};

/// Returns the connected ends of the daemon and of the instance.
async fn pair() -> (Connection, Connection) {
    let (near, far) = tokio::io::duplex(4096);
    let (daemon, instance) = (hello(PeerRole::Daemon), hello(PeerRole::Instance));
    let (ours, theirs) = tokio::join!(
        greet(Box::new(near), daemon),
        welcome(Box::new(far), &instance)
    );
    (ours.unwrap(), theirs.unwrap())
}

/// Sends `message`, makes the instance refuse it, and returns the first frame that comes back.
async fn refuse(message: Message) -> Frame {
    let (mut daemon, mut instance) = pair().await;
    daemon.writer.send(&message).await.unwrap();
    let frame = instance.reader.next().await.unwrap();
    let code = ErrorCode::UnexpectedInState;
    instance.writer.refuse(code, &frame, "no".to_owned()).await;
    let last = Message::HeartbeatReq(HeartbeatReq {
        probe: 99,
        flags: 0,
        self_lag_us: 0,
    });
    instance.writer.send(&last).await.unwrap();
    daemon.reader.next().await.unwrap()
}

#[tokio::test]
async fn a_request_is_told_that_it_is_refused() {
    let request = Message::MorphValidate(MorphValidate {
        session: 1,
        round: 1,
        flags: 0,
        state_bytes: 0,
    });
    let answer = refuse(request).await.message;
    assert!(matches!(answer, Message::Error(error) if error.offending_type == 0x0304));
}

#[tokio::test]
async fn an_answer_is_not_answered() {
    let error = ErrorInfo {
        code: ErrorCode::Busy,
        offending_type: 0,
        offending_sequence: 0,
        text: String::new(),
    };
    let retry = RetryAfter {
        retry_after_ms: 1,
        reason: ErrorCode::Busy,
        offending_type: 0,
        offending_sequence: 0,
    };
    for answer in [
        Message::Error(error),
        Message::Retry(retry),
        Message::HelloReply(hello(PeerRole::Daemon)),
        Message::MorphPrepareReply(SessionReply { session: 1 }),
    ] {
        let next = refuse(answer).await.message;
        assert!(matches!(next, Message::HeartbeatReq(_)), "{next:?}");
    }
}
