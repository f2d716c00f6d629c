//! The proofs of HELLO, checked against another implementation of HMAC-SHA-256 and against a peer that replays a proof.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod samples;

use kmp_proto::auth::Key;
use kmp_proto::message::{Hello, Message, PeerRole};

/// Returns the golden HELLO and its reply.
fn exchange() -> (Hello, Hello) {
    let mut samples = samples::samples().into_iter().map(|sample| sample.3);
    let (Some(Message::Hello(hello)), Some(Message::HelloReply(reply))) =
        (samples.next(), samples.next())
    else {
        panic!("other messages");
    };
    (hello, reply)
}

fn key() -> Key {
    Key::new(std::array::from_fn(|n| u8::try_from(n).unwrap()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_proofs_are_those_on_the_page() {
    let (hello, reply) = exchange();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kmp.md");
    let page = std::fs::read_to_string(path).unwrap();
    for side in [PeerRole::Instance, PeerRole::Daemon] {
        let proof = hex(&key().proof(side, &hello, &reply));
        assert!(page.contains(&proof), "{} {proof}", side.as_str());
    }
}

#[test]
fn a_proof_holds_for_its_key_side_and_connection_only() {
    let (hello, reply) = exchange();
    let proof = key().proof(PeerRole::Daemon, &hello, &reply);
    let holds =
        |key: &Key, side, hello: &Hello, reply: &Hello| key.proves(&proof, side, hello, reply);
    assert!(holds(&key(), PeerRole::Daemon, &hello, &reply));
    assert!(!holds(&key(), PeerRole::Instance, &hello, &reply));
    assert!(!holds(&Key::new([7; 32]), PeerRole::Daemon, &hello, &reply));
    // A proof replayed from another connection: one of the nonces differs.
    let changes: [fn(&mut Hello); 6] = [
        |h| h.nonce = Some([1; 32]),
        |h| h.fixed.incarnation += 1,
        |h| h.fixed.generation += 1,
        |h| h.fixed.session += 1,
        |h| h.fixed.features ^= 1,
        |h| h.fixed.boot_id[0] ^= 1,
    ];
    for change in changes {
        let (mut asked, mut answered) = (hello.clone(), reply.clone());
        change(&mut asked);
        change(&mut answered);
        assert!(!holds(&key(), PeerRole::Daemon, &asked, &reply));
        assert!(!holds(&key(), PeerRole::Daemon, &hello, &answered));
    }
    let mut other = hello.clone();
    other.instance.push('x');
    assert!(!holds(&key(), PeerRole::Daemon, &other, &reply));
}

#[test]
fn a_key_is_not_printed() {
    assert_eq!(format!("{:?}", key()), "Key(..)");
}
