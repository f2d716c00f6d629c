//! Authentication: both ends prove the key of the generation, and an older daemon is refused. Each test names its rule
//! of `docs/kmp.md`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod hello;

use hello::hello;
use kmp_proto::auth::Key;
use kmp_proto::codec::{Decoder, Frame, encode};
use kmp_proto::message::*;
use kmp_proto::wire::ErrorCode;
use kmp_transport::connection::{Connection, ConnectionError, greet, welcome};
use kmp_transport::link::{BoxedLink, KMP_PORT, Listener, UnixVsockListener, memory};
use kmp_transport::server::serve;
use kmp_transport::speaker::Speaker;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const RIGHT: [u8; 32] = [7; 32];
const WRONG: [u8; 32] = [8; 32];

fn speaker(role: PeerRole, key: [u8; 32], incarnation: u64) -> Speaker {
    let mut hello = hello(role);
    hello.fixed.incarnation = incarnation;
    Speaker::with_key(hello, Key::new(key))
}

fn daemon(incarnation: u64) -> Speaker {
    speaker(PeerRole::Daemon, RIGHT, incarnation)
}

fn instance() -> Speaker {
    speaker(PeerRole::Instance, RIGHT, 0)
}

type Met = Result<Connection, ConnectionError>;

async fn meet(daemon: impl Into<Speaker>, instance: impl Into<Speaker>) -> (Met, Met) {
    let (near, far) = memory();
    tokio::join!(greet(near, daemon), welcome(far, instance))
}

fn refused(met: &Met) -> Option<ErrorCode> {
    match met {
        Ok(_) => None,
        Err(ConnectionError::Refused { code, .. }) => Some(*code),
        Err(ConnectionError::Hello(error)) => Some(error.code()),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn both_have_the_key_and_believe_each_other() {
    let (ours, theirs) = meet(daemon(5), instance()).await;
    assert_eq!(ours.unwrap().hello.fixed.incarnation, 0);
    assert_eq!(theirs.unwrap().hello.fixed.incarnation, 5);
}

#[tokio::test]
async fn a_daemon_without_the_key_is_refused_and_so_is_an_instance() {
    let none = meet(hello(PeerRole::Daemon), instance()).await;
    assert_eq!(refused(&none.0), Some(ErrorCode::NotAuthentic));
    assert_eq!(refused(&none.1), Some(ErrorCode::NotAuthentic));
    let wrong = speaker(PeerRole::Daemon, WRONG, 5);
    // The daemon rejects the instance's proof before it sends its own.
    let (ours, _) = meet(wrong, instance()).await;
    assert_eq!(refused(&ours), Some(ErrorCode::NotAuthentic));
    for impostor in [
        speaker(PeerRole::Instance, WRONG, 0),
        hello(PeerRole::Instance).into(),
    ] {
        let (ours, _) = meet(daemon(5), impostor).await;
        assert_eq!(refused(&ours), Some(ErrorCode::NotAuthentic));
    }
}

#[tokio::test]
async fn an_older_daemon_is_refused_once_a_newer_one_has_proved_itself() {
    let instance = instance();
    for (incarnation, code) in [
        (5, None),
        (5, None),
        (4, Some(ErrorCode::OlderDaemon)),
        (6, None),
        (5, Some(ErrorCode::OlderDaemon)),
    ] {
        let (ours, theirs) = meet(daemon(incarnation), &instance).await;
        assert_eq!(
            (refused(&ours), refused(&theirs)),
            (code, code),
            "{incarnation}"
        );
    }
}

/// One end of a link, byte by byte.
struct Raw(BoxedLink, Decoder);

impl Raw {
    async fn send(&mut self, message: &Message, sequence: u32) {
        let mut bytes = Vec::new();
        encode(message, sequence, 1, &mut bytes).unwrap();
        self.0.write_all(&bytes).await.unwrap();
    }

    async fn next(&mut self) -> Option<Frame> {
        let mut byte = [0];
        while self.0.read(&mut byte).await.unwrap() != 0 {
            if let Some(frame) = self.1.feed(&mut &byte[..]).unwrap() {
                return Some(frame);
            }
        }
        None
    }

    async fn error(&mut self) -> ErrorCode {
        match self.next().await.map(|frame| frame.message) {
            Some(Message::Error(error)) => error.code,
            other => panic!("{other:?}"),
        }
    }
}

/// Connects with a `proof` computed from the reply; returns the error code of the answer, if any.
async fn prove(
    instance: &Speaker,
    asked: &Hello,
    proof: impl FnOnce(&Hello) -> [u8; 32],
) -> Option<ErrorCode> {
    let (near, far) = memory();
    let mut raw = Raw(near, Decoder::new());
    let dialogue = async {
        raw.send(&Message::Hello(asked.clone()), 1).await;
        let Some(Message::HelloReply(reply)) = raw.next().await.map(|frame| frame.message) else {
            panic!("no reply");
        };
        let proof = proof(&reply);
        raw.send(&Message::Authenticate(Authenticate { proof }), 2)
            .await;
        match raw.next().await.unwrap().message {
            Message::AuthenticateReply(_) => None,
            Message::Error(error) => Some(error.code),
            other => panic!("{other:?}"),
        }
    };
    tokio::join!(dialogue, welcome(far, instance)).0
}

#[tokio::test]
async fn a_proof_that_was_overheard_proves_nothing_on_another_connection() {
    let (instance, key) = (instance(), Key::new(RIGHT));
    let mut asked = hello(PeerRole::Daemon);
    asked.nonce = Some([1; 32]);
    let mut overheard = [0; 32];
    let first = prove(&instance, &asked, |reply| {
        overheard = key.proof(PeerRole::Daemon, &asked, reply);
        overheard
    });
    assert_eq!(first.await, None);
    // The same HELLO with the same nonce, but with a new nonce of the instance.
    let again = prove(&instance, &asked, |_| overheard).await;
    assert_eq!(again, Some(ErrorCode::NotAuthentic));
    // The instance's proof is not valid as the daemon's proof.
    let mirrored = prove(&instance, &asked, |reply| reply.proof.unwrap()).await;
    assert_eq!(mirrored, Some(ErrorCode::NotAuthentic));
}

#[tokio::test]
async fn a_newer_daemon_counts_only_once_it_has_proved_itself() {
    let instance = instance();
    let mut liar = hello(PeerRole::Daemon);
    liar.nonce = Some([1; 32]);
    liar.fixed.incarnation = u64::MAX;
    let refused = prove(&instance, &liar, |_| [0; 32]).await;
    assert_eq!(refused, Some(ErrorCode::NotAuthentic));
    let (ours, _) = meet(daemon(5), &instance).await;
    ours.unwrap();
}

#[tokio::test]
async fn nothing_is_served_before_the_proof() {
    let (near, far) = memory();
    let mut raw = Raw(near, Decoder::new());
    let (instance, key) = (instance(), Key::new(RIGHT));
    let mut asked = hello(PeerRole::Daemon);
    asked.nonce = Some([1; 32]);
    let dialogue = async {
        raw.send(&Message::Hello(asked.clone()), 1).await;
        let Some(Message::HelloReply(reply)) = raw.next().await.map(|frame| frame.message) else {
            panic!("no reply");
        };
        let rollback = Message::MorphRollback(MorphRollback {
            fixed: RollbackFixed {
                session: 1,
                side: Side::Source,
            },
            text: String::new(),
        });
        raw.send(&rollback, 2).await;
        assert_eq!(raw.error().await, ErrorCode::UnexpectedInState);
        let proof = key.proof(PeerRole::Daemon, &asked, &reply);
        raw.send(&Message::Authenticate(Authenticate { proof }), 3)
            .await;
        let answer = raw.next().await.unwrap();
        assert!(matches!(answer.message, Message::AuthenticateReply(_)));
        assert_eq!(answer.header.sequence, 3);
    };
    let ((), served) = tokio::join!(dialogue, welcome(far, &instance));
    served.unwrap();
}

/// Connects, requests the port, and prints the answer.
const STRANGER: &str = "
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
try:
    s.sendall(b'CONNECT 9000\\n')
    print(s.recv(100))
except OSError:
    print(b'')
";

#[tokio::test]
async fn of_other_users_only_root_is_answered_on_a_unix_socket() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: only root can be another user");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = UnixVsockListener::bind(&path, KMP_PORT).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&path, 0o777)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let (told, mut reasons) = tokio::sync::mpsc::unbounded_channel();
    let report = move |why: &str| drop(told.send(why.to_owned()));
    let _connections = serve(Listener::Unix(listener), instance(), report);
    let said = async |uid| {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", STRANGER]).arg(&path).uid(uid);
        let output = tokio::task::spawn_blocking(move || command.output());
        String::from_utf8(output.await.unwrap().unwrap().stdout).unwrap()
    };
    assert_eq!(said(0).await.trim(), "b'OK 9000\\n'");
    assert_eq!(said(NOBODY).await.trim(), "b''");
    let why = loop {
        let why = reasons.recv().await.unwrap();
        if why.contains("uid") {
            break why;
        }
    };
    assert!(why.contains("from uid 65534"), "{why}");
}
