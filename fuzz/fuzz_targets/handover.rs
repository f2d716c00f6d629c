//! What an agent and a workload read from each other: packets of the handover sockets, and the table
//! of connections. The first byte says which.

#![no_main]

use std::cell::RefCell;
use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kmorph_launch::handover as launch;
use kmorph_workload::handover::message::{PeerMessage, Reply, Request};
use kmorph_workload::handover::{MAX_CHUNK_BYTES, PacketSocket, table};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A connected pair of sockets: bytes go in at one end, messages come out at the other.
struct Ends {
    raw: UnixStream,
    packets: PacketSocket,
}

thread_local! {
    static ENDS: RefCell<Ends> = RefCell::new(ends());
}

fn ends() -> Ends {
    let (near, far) = PacketSocket::pair().expect("descriptors are left");
    let packets = PacketSocket::new(far).expect("the descriptor is open");
    let raw = near.into();
    Ends { raw, packets }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((which, packet)) = data.split_first() else {
        return;
    };
    // An empty packet is how a closed socket looks.
    if packet.is_empty() || packet.len() > MAX_CHUNK_BYTES {
        return;
    }
    ENDS.with_borrow_mut(|ends| match which % 6 {
        0 => exchange::<Request>(ends, packet),
        1 => exchange::<Reply>(ends, packet),
        2 => exchange::<PeerMessage>(ends, packet),
        3 => ask::<launch::Request>(ends, packet),
        4 => ask::<launch::Answer>(ends, packet),
        _ => connection_table(packet),
    });
});

/// What is read is sent and read again alike.
fn exchange<T: DeserializeOwned + Serialize + PartialEq + Debug>(ends: &mut Ends, packet: &[u8]) {
    ends.raw.write_all(packet).expect("the other end is open");
    let Ok(first) = ends.packets.receive::<T>() else {
        return;
    };
    let (near, far) = PacketSocket::pair().expect("descriptors are left");
    let sender = PacketSocket::new(near).expect("the descriptor is open");
    let mut receiver = PacketSocket::new(far).expect("the descriptor is open");
    sender
        .send(first.id, &first.message, &first.data, &[])
        .expect("what was read can be sent");
    let second = receiver.receive::<T>().expect("what was sent is read");
    assert_eq!((second.id, second.message), (first.id, first.message));
    assert_eq!(second.data, first.data);
}

fn ask<T: DeserializeOwned + Serialize + PartialEq + Debug>(ends: &Ends, packet: &[u8]) {
    (&ends.raw)
        .write_all(packet)
        .expect("the other end is open");
    if let Ok((message, _)) = launch::receive::<T>(ends.packets.as_fd()) {
        launch::send(ends.raw.as_fd(), &message, &[]).expect("what was read can be sent");
        let (again, _) = launch::receive::<T>(ends.packets.as_fd()).expect("it is read again");
        assert_eq!(again, message);
    }
}

fn connection_table(bytes: &[u8]) {
    let (count, bytes) = (bytes[0], &bytes[1..]);
    let memory = |bytes: &[u8]| {
        let mut file = File::from(
            memfd_create(c"table", MFdFlags::MFD_CLOEXEC).expect("descriptors are left"),
        );
        file.write_all(bytes).expect("memory is left");
        OwnedFd::from(file)
    };
    let Ok(entries) = table::read(memory(bytes), count.into(), bytes.len() as u64) else {
        return;
    };
    let parts = entries
        .iter()
        .map(|one| (&one.state[..], &one.input[..], &one.output[..]));
    if let Ok((written, len)) = table::write(parts) {
        assert_eq!(len, bytes.len() as u64);
        let again = table::read(written, count.into(), len).expect("it is read again");
        assert_eq!(again, entries);
    }
}
