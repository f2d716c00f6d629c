//! The module in guests of real kernels: `make kmod-test`.
//!
//! Each guest is QEMU in software emulation with an ivshmem-doorbell device; the memory and the doorbells are
//! served by this process, which is also peer 0. What runs in a guest is `kerf-guest`, its init.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod beside;
mod guest;
mod host;
mod hostile;
mod image;
mod older;
mod reports;
mod sleep;
mod small;
mod spoiled;
mod suite;

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use guest::{Guest, Machine, SERIES, Series};
use hostile::{END_OF_MESSAGE, Header, Op, Raw, SEQPACKET, STREAM};
use kmorph_kerf_ring::{Geometry, Link, LinkEvent, Memory, PeerState};
use kmp_transport::kerf::{HOST, SharedMemory};

const VSOCK: [&str; 2] = ["load=vsock", "load=vmw_vsock_virtio_transport_common"];
const KERF: &str = "load=kerf-vsock:instance=test+generation=5";

fn commands<'a>(then: &[&'a str]) -> Vec<&'a str> {
    VSOCK.into_iter().chain(then.iter().copied()).collect()
}

/// The same cases over the kernel's own loopback transport, the reference, and over ours; beside each other
/// only one loads.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn loopback_is_like_the_kernels_own() {
    for series in SERIES {
        let machine = Machine::new(1);
        let mut guest = machine.alone(
            series,
            &commands(&[
                "services",
                "load=vsock_loopback",
                "cases=1",
                "refused=kerf-vsock:backend=loopback",
                "unload=vsock_loopback",
                "load=kerf-vsock:backend=loopback+instance=test+generation=5",
                "cases=1",
                "heartbeat=1",
                "busy=1",
                "unload=kerf-vsock",
                "complaints",
            ]),
        );
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// Every pair of kernels: the cases, heartbeats by the other kernel, and the own CID over the rings.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn guests_talk_to_each_other() {
    for (a, b) in Series::pairs() {
        let machine = Machine::new(4);
        let mut server = machine.guest(
            1,
            a,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "link=2",
                "cases=1",
                "cases=3",
                "say=alone",
                "forever",
            ]),
        );
        server.wait_for("KERF said serving");
        let mut client = machine.guest(
            2,
            b,
            &commands(&[
                KERF,
                "link=1",
                "cases=3",
                "heartbeat=3",
                "busy=3",
                "peers",
                "unload=kerf-vsock",
                "complaints",
            ]),
        );
        client.wait_for("KERF done");
        server.wait_for("KERF said alone");
        assert_eq!(client.failures(), Vec::<String>::new(), "{b} to {a}");
        assert_eq!(server.failures(), Vec::<String>::new(), "{a}");
        // It left properly.
        assert_eq!(machine.region().peer(2).state, PeerState::Left);
        assert_eq!(machine.region().peer(1).state, PeerState::Ready);
    }
}

#[test]
#[ignore = "boots guests: make kmod-test"]
fn the_module_goes_under_load() {
    for series in SERIES {
        let machine = Machine::new(4);
        let mut server = machine.guest(
            1,
            "6.12",
            &commands(&[KERF, "services", "say=serving", "forever"]),
        );
        server.wait_for("KERF said serving");
        let mut client = machine.guest(
            2,
            series,
            &commands(&[
                "load=kerf-vsock",
                "link=1",
                "unload_under_load=3",
                "peers",
                "unload=kerf-vsock",
                "complaints",
            ]),
        );
        client.wait_for("KERF done");
        assert_eq!(client.failures(), Vec::<String>::new(), "{series}");
        assert_eq!(server.failures(), Vec::<String>::new());
    }
}

/// A peer is killed while connections to it are in every state, and comes back with the same number.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_peer_dies_and_comes_back() {
    for series in SERIES {
        let machine = Machine::new(4);
        let serve = commands(&[KERF, "services", "say=serving", "forever"]);
        let mut server = machine.guest(1, "6.1", &serve);
        server.wait_for("KERF said serving");
        let mut client = machine.guest(
            2,
            series,
            &commands(&[KERF, "link=1", "victims=3", "complaints"]),
        );
        client.wait_for("KERF said victims-ready");
        server.stop();
        client.wait_for("KERF said victims-connecting");
        let before = machine.region().peer(1);
        server.kill();
        client.wait_for("KERF said victims-told");
        assert_eq!(machine.region().peer(1).state, PeerState::Left, "buried");
        let mut again = machine.guest(1, "6.12", &serve);
        client.wait_for("KERF done");
        assert_eq!(client.failures(), Vec::<String>::new(), "{series}");
        let after = machine.region().peer(1);
        assert_eq!(after.generation, before.generation + 1);
        again.kill();
    }
}

/// One suspend for each boot: the second would find no ACPI ports (see `CLOCK` in guest.rs), and its kernel would
/// believe that it had slept.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn the_device_survives_a_suspend() {
    for series in SERIES {
        let machine = Machine::new(4);
        let serve = [KERF, "services", "say=serving", "forever"];
        let mut server = machine.guest(1, "6.1", &commands(&serve));
        server.wait_for("KERF said serving");
        let then = [KERF, "link=1", "suspend=3", "complaints"];
        let mut client = machine.guest(2, series, &commands(&then));
        client.wait_for("KERF done");
        assert_eq!(client.failures(), Vec::<String>::new(), "{series}");
        assert_eq!(server.failures(), Vec::<String>::new());
        assert_eq!(client.sleeps(), 1, "{series}: QEMU has seen it sleep");
        assert_eq!(machine.region().peer(2).generation, 2);
    }
}

#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_panic_is_told_with_its_reason() {
    for series in SERIES {
        let machine = Machine::new(4);
        let mut witness = machine.guest(
            2,
            "6.1",
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "link=1",
                "say=linked",
                "forever",
            ]),
        );
        witness.wait_for("KERF said serving");
        let mut guest = machine.guest(1, series, &commands(&[KERF, "link=2", "crash"]));
        witness.wait_for("KERF said linked");
        let start = Instant::now();
        while machine.region().peer(1).state != PeerState::Panicked {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            machine.region().reason(1),
            b"sysrq triggered crash",
            "{series}"
        );
        guest.kill();
    }
}

/// This process is peer 0 and breaks the rules, floods with doorbells and begins anew without end. The guest
/// that it does it to goes on talking to another guest all the while.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_hostile_peer_costs_its_own_link_only() {
    for series in SERIES {
        let machine = Machine::new(4);
        let region = machine.region();
        let mut other = machine.guest(
            1,
            "6.12",
            &commands(&[KERF, "services", "say=serving", "forever"]),
        );
        other.wait_for("KERF said serving");
        let mut guest = machine.guest(
            2,
            series,
            &commands(&[
                KERF,
                "services",
                "link=1",
                "say=begin",
                "bystander=3",
                "say=end",
                "peers",
                "complaints",
            ]),
        );
        guest.wait_for("KERF said begin");
        let (mut quarantines, mut begun) = (0, 0u64);
        let mut random = 1u64;
        while !guest.has_said("KERF said end") {
            // Up, then garbage in one word after the other until the guest has had enough.
            let mut link = Link::new(HOST, 2, region.attach(HOST, 1));
            begun += 1;
            let start = Instant::now();
            let mut garbage = false;
            while start.elapsed() < Duration::from_millis(300) && !guest.has_said("KERF said end") {
                machine.ring(2);
                match link.poll(region, start.elapsed()) {
                    LinkEvent::Lost => {
                        quarantines += u32::from(garbage);
                        break;
                    }
                    LinkEvent::Up => {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(99);
                        machine.scribble(HOST, 2, random);
                        garbage = true;
                    }
                    _ => {}
                }
            }
        }
        println!("{series}: {quarantines} quarantines in {begun} generations");
        assert!(quarantines > 3, "{quarantines} of {begun}");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
        assert_eq!(other.failures(), Vec::<String>::new());
        // And it is still a good peer to one that behaves.
        assert_eq!(
            region.memory().load32(0, Relaxed),
            u32::from_le_bytes(*b"KERF")
        );
    }
}

/// Ports of the services in a guest.
const ECHO: u32 = 7007;
const SINK: u32 = 7009;
const MESSAGES: u32 = 7014;
/// Where the guest connects to this process.
const HERE: &str = "7100";

/// A peer takes nothing, and whatever it makes the guest's kernel answer is bounded there: requests for credit, bytes
/// that a program reads one by one, and messages that a program sends back.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_peer_that_takes_nothing_fills_no_memory() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                // One update for the one socket, and what else may just be on its way.
                "more=0.rx_packets.6000",
                "most=0.backlog.8",
                "say=first",
                "more=0.rx_packets.6000",
                // What the backlog has room for, in packets of a byte.
                "never=0.backlog.4096",
                "say=second",
                "complaints",
            ]),
        );
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, 1);
        raw.connect(STREAM, SINK);
        let byte = Header::new(STREAM, Op::Data, SINK);
        let request = Header::new(STREAM, Op::CreditRequest, SINK);
        let sent = raw.flood(&mut guest, "KERF said first", u64::MAX, |n| match n % 4 {
            0 => (byte, b"x"),
            _ => (request, b""),
        });
        println!("{series}: {sent} requests for credit and bytes");
        let mut raw = Raw::new(&machine, 1);
        raw.connect(SEQPACKET, MESSAGES);
        let mut message = Header::new(SEQPACKET, Op::Data, MESSAGES);
        message.flags = END_OF_MESSAGE;
        let sent = raw.flood(&mut guest, "KERF said second", 20_000, |_| (message, b"x"));
        println!("{series}: {sent} messages");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// A peer stands still for longer than the vsock core waits for the end of a connection that a program has closed. What
/// the program had written is there when the peer goes on, whole, before the reset.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_reset_comes_behind_its_own_data() {
    for series in SERIES {
        let machine = Machine::new(2);
        let dial = format!("write_and_close={HERE}");
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[KERF, "link=0", &dial, "say=reset", "complaints"]),
        );
        let mut raw = Raw::new(&machine, 1);
        let asked = raw.take();
        assert_eq!(asked.op, Op::Request as u16);
        let here = HERE.parse().unwrap();
        raw.answer(here, asked.port);
        guest.wait_for("KERF said reset");
        let (mut bytes, mut at_reset) = (0, None);
        while at_reset.is_none() {
            let packet = raw.take();
            bytes += packet.payload.len();
            if packet.op == Op::Reset as u16 {
                at_reset = Some(bytes);
            }
        }
        assert_eq!(at_reset, Some(250_000), "{series}");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// The vsock core of Linux 6.1 queues a message without bytes for which nobody has paid. No sender sends one.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_message_without_bytes_is_refused() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "until=0.rx_dropped.30",
                "say=dropped",
                "complaints",
                "until=0.tx_bytes.4",
            ]),
        );
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, 1);
        raw.connect(SEQPACKET, MESSAGES);
        let mut message = Header::new(SEQPACKET, Op::Data, MESSAGES);
        message.flags = END_OF_MESSAGE;
        for _ in 0..30 {
            raw.send(&message, b"");
        }
        guest.wait_for("KERF said dropped");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
        // The connection is as it was.
        raw.send(&message, b"more");
        let back = raw.take_data();
        assert_eq!(back, b"more", "{series}");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// What a guest sends to itself is in its own memory: a peer that writes where it would lie in the shared one ends
/// nothing, and can put no packet there.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn the_way_to_oneself_is_private() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "talk=1",
                "talk=3",
                "say=begin",
                "bystander=1",
                "say=end",
                "until=0.rx_dropped.1",
                "complaints",
            ]),
        );
        guest.wait_for("KERF said begin");
        assert_eq!(machine.head(1, 1), 0, "{series}: nothing was sent there");
        let mut random = 1u64;
        while !guest.has_said("KERF said end") {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            machine.scribble(1, 1, random);
            machine.ring(1);
            std::thread::sleep(Duration::from_millis(1));
        }
        // Nor is a peer's packet taken for one of the guest itself.
        let mut raw = Raw::new(&machine, 1);
        raw.send_as(1, 1, &Header::new(STREAM, Op::Request, ECHO), b"");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// Floods of packets that break the rules, and of those that keep them and mean nothing, leave a guest of one CPU to its
/// programs. When the peer behaves again it is heard again.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn a_flood_leaves_the_cpu_to_programs() {
    for series in SERIES {
        let machine = Machine::new(2);
        let mut guest = machine.guest(
            1,
            series,
            &commands(&[
                KERF,
                "services",
                "say=serving",
                "until=0.rx_packets.2000",
                "share=25",
                "say=first",
                "until=0.rx_dropped.50",
                "share=60",
                "until=0.mutes.1",
                "say=second",
                "say=third",
                "complaints",
                // The answer: a guest that has done everything powers off.
                "until=0.tx_bytes.5",
                "peers",
            ]),
        );
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, 1);
        let reset = Header::new(STREAM, Op::Reset, 7998);
        let sent = raw.flood(&mut guest, "KERF said first", u64::MAX, |_| (reset, b""));
        println!("{series}: {sent} resets");
        let mut bad = Header::new(STREAM, Op::Data, ECHO);
        bad.excess = 1;
        let sent = raw.flood(&mut guest, "KERF said second", u64::MAX, |_| (bad, b""));
        println!("{series}: {sent} packets that break the rules");
        raw.connect(STREAM, ECHO);
        raw.send(&Header::new(STREAM, Op::Data, ECHO), b"again");
        assert_eq!(raw.take_data(), b"again", "{series}");
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// Memory of a dead kernel that was lent to this one may hold anything, a region of its own peers too. It is not
/// looked at, and nothing is said about it.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn memory_without_a_doorbell_is_left_alone() {
    let lent = SharedMemory::new(Geometry::new(4, 64, 128 * 1024).unwrap()).unwrap();
    for series in SERIES {
        let machine = Machine::new(1);
        let loaded = commands(&[KERF, "unnoticed", "complaints", "unload=kerf-vsock"]);
        let mut guest = machine.borrower(&lent, series, &loaded);
        guest.wait_for("KERF done");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// This process connects to ports of guests, of the kernel itself and of programs.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn the_host_talks_to_guests() {
    for series in SERIES {
        let machine = Machine::new(2);
        let serve = [KERF, "services", "say=serving", "forever"];
        let mut guest = machine.guest(1, series, &commands(&serve));
        machine.host_cases(&mut guest);
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// Guests as many as the memory has room for, all linked with all.
#[test]
#[ignore = "boots 24 guests: make kmod-test-24"]
fn twenty_four_at_once() {
    const GUESTS: u32 = 24;
    let machine = Machine::new(GUESTS + 1);
    let mut guests: Vec<Guest> = Vec::new();
    for n in 1..=GUESTS {
        let links = format!("links={}", n - 1);
        let mut all = commands(&["load=kerf-vsock", "services"]);
        all.push(&links);
        // Each talks to the one before it, and to the first.
        let echo = [format!("talk={}", n + 1), "talk=3".to_owned()];
        if n > 1 {
            all.extend(echo.iter().map(String::as_str));
        }
        all.extend(["say=ready", "forever"]);
        let mut guest = machine.guest(n, SERIES.nth(n as usize), &all);
        guest.wait_for("KERF said ready");
        assert_eq!(guest.failures(), Vec::<String>::new(), "guest {n}");
        guests.push(guest);
    }
    let ready = (1..=GUESTS).filter(|n| machine.region().peer(*n).state == PeerState::Ready);
    assert_eq!(ready.count(), 24);
}
