//! The commands of a guest's arguments, each `name` or `name=value`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::MsgFlags;

use crate::cases::ALL;
use crate::machine::{
    bind, complaints, crash, field, load, peers, said_of_devices, suspend, unbind, unload,
    unload_soon, wait_for, wait_for_link,
};
use crate::services::{
    ECHO, MESSAGES, RELEASE, RELEASE_MESSAGES, RESOLVE, SINK, STALLED, STALLED_MESSAGES,
};
use crate::vsock::{Socket, Type};

pub(crate) fn run(command: &str) {
    let (name, value) = command.split_once('=').unwrap_or((command, ""));
    let number = || value.parse::<u32>().expect("a number");
    match name {
        // Modules, in order: name, or name:parameters with + for spaces.
        "load" => report(command, || load_one(value)),
        // One that must not load here.
        "refused" => report(command, || refuse_one(value)),
        "talk" => report(command, || talk(number())),
        "unload" => report(command, || unload_soon(value)),
        "services" => report(command, crate::services::start),
        "network" => report(command, || crate::suite::network(number())),
        // mode.CID
        "vsock_test" => report(command, || {
            let (mode, cid) = value.split_once('.').expect("mode.CID");
            crate::suite::run(mode, cid.parse().unwrap());
        }),
        "cases" => cases(value, number()),
        "link" => report(command, || wait_for_link(number(), "up")),
        "links" => report(command, || {
            for peer in 1..=number() {
                wait_for_link(peer, "up");
            }
        }),
        "waiting" => report(command, || wait_for_link(number(), "waiting")),
        "peers" => print!("{}", indent(&peers())),
        "until" => report(command, || {
            let (peer, name, least) = counter(value);
            wait_for(value, || count(peer, name) >= least);
        }),
        "more" => report(command, || {
            let (peer, name, more) = counter(value);
            let before = count(peer, name);
            wait_for(value, || count(peer, name) >= before + more);
        }),
        "most" => report(command, || {
            let (peer, name, most) = counter(value);
            let now = count(peer, name);
            assert!(now <= most, "{now}");
        }),
        "never" => report(command, || {
            const WINDOW: Duration = Duration::from_secs(5);
            let (peer, name, most) = counter(value);
            let (start, mut highest) = (std::time::Instant::now(), 0);
            while start.elapsed() < WINDOW && highest <= most {
                highest = highest.max(count(peer, name));
                thread::sleep(Duration::from_millis(20));
            }
            println!("KERF info {name} of peer {peer} was {highest} at most");
            assert!(highest <= most, "{highest}");
        }),
        "share" => report(command, || share(number())),
        "write_and_close" => report(command, || write_and_close(number())),
        "metered" => report(command, || metered(number())),
        "release" => report(command, || tell(OWN_CID, RELEASE)),
        "resolve" => report(command, || tell(OWN_CID, RESOLVE)),
        "busy" => report(command, || module_in_use(number())),
        "unload_under_load" => report(command, || unload_under_load(number())),
        "bystander" => report(command, || bystander(number())),
        "heartbeat" => report(command, || heartbeat::ask(number())),
        "suspend" => report(command, || survive_suspend(number())),
        "victims" => report(command, || victims(number())),
        "complaints" => report(command, || assert_eq!(complaints(), Vec::<String>::new())),
        "unnoticed" => report(command, || {
            assert_eq!(said_of_devices(), Vec::<String>::new());
        }),
        "say" => println!("KERF said {value}"),
        "sleep" => thread::sleep(Duration::from_secs(number().into())),
        "forever" => loop {
            thread::park();
        },
        "crash" => crash(),
        _ => println!("KERF failed {command}: no such command"),
    }
}

/// CID of a guest for itself.
const OWN_CID: u32 = 1;

/// A byte to a service.
fn tell(cid: u32, port: u32) {
    let socket = Socket::stream(cid, port);
    assert_eq!(socket.send(b"x", MsgFlags::empty()), Ok(1));
}

/// `peer.field.number`
fn counter(value: &str) -> (u32, &str, u64) {
    let mut parts = value.split('.');
    let mut next = || parts.next().expect("peer.field.number");
    let (peer, name, number) = (next(), next(), next());
    (peer.parse().unwrap(), name, number.parse().unwrap())
}

/// A figure of a peer that is or was there.
fn count(peer: u32, name: &str) -> u64 {
    field(peer, name).map_or(0, |value| value.parse().unwrap())
}

/// A program that does not wait gets at least this share of the CPU, percent. How fast the machine is that emulates
/// this one does not matter.
fn share(least: u32) {
    const WINDOW: Duration = Duration::from_secs(3);
    let cpu = || {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        Duration::from(now)
    };
    let (start, used) = (std::time::Instant::now(), cpu());
    while start.elapsed() < WINDOW {}
    let (took, used) = (start.elapsed(), cpu() - used);
    let percent = used.as_millis() * 100 / took.as_millis();
    println!("KERF info a program got {percent} % of the CPU");
    assert!(percent >= least.into(), "{percent} %");
}

/// Writes to the host as much as it says that it takes, closes, and waits until the vsock core gives the connection up.
fn write_and_close(port: u32) {
    let socket = Socket::stream(2, port);
    let sent = socket.send(&vec![7; 250_000], MsgFlags::empty());
    assert_eq!(sent, Ok(250_000));
    drop(socket);
    // Packets that have gone or wait: the core says at once that both directions are shut, and resets seconds later.
    let packets = || count(0, "tx_packets") + count(0, "backlog");
    let before = packets();
    wait_for("the reset", || packets() > before);
}

/// Messages to a program that reads none for a while: their sender stops before they cost the connection, and goes on when the
/// program reads.
fn metered(cid: u32) {
    /// What a buffer of 256 KiB, the default, has room for.
    const MOST: u64 = 256;
    const LATER: u64 = 1000;
    const PATIENCE: Duration = Duration::from_secs(60);
    for len in [1, 200] {
        let socket = Socket::connect(Type::SeqPacket, cid, STALLED_MESSAGES).unwrap();
        socket.nonblocking(true);
        let message = vec![1; len];
        let (mut sent, mut bytes) = (0, 0);
        let refused = loop {
            match socket.send(&message, MsgFlags::empty()) {
                Ok(_) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused, Errno::EAGAIN, "after {sent} of {len} bytes");
        assert_eq!(sent, MOST, "{len}");
        let room = socket.poll(PollFlags::POLLOUT, Duration::from_millis(300));
        assert_eq!(room, PollFlags::empty(), "{len}");
        tell(cid, RELEASE_MESSAGES);
        let room = socket.poll(PollFlags::POLLOUT, PATIENCE);
        assert_eq!(room, PollFlags::POLLOUT, "{len}");
        socket.nonblocking(false);
        for _ in 0..LATER {
            assert_eq!(socket.send(&message, MsgFlags::empty()), Ok(len));
        }
        // One that needs nearly all of the credit, behind small ones that have it.
        bytes += (sent + LATER) * len as u64;
        let large = vec![1; 250_000];
        assert_eq!(socket.send(&large, MsgFlags::empty()), Ok(large.len()));
        bytes += large.len() as u64;
        socket.end_writing();
        let mut text = [0; 64];
        let got = socket.recv(&mut text, MsgFlags::empty()).unwrap();
        let expected = format!("{} {bytes}", sent + LATER + 1);
        assert_eq!(String::from_utf8_lossy(&text[..got]), expected);
        println!("KERF info {sent} messages of {len} bytes wait");
    }
}

fn report(what: &str, run: impl FnOnce()) {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(()) => println!("KERF ok {what}"),
        Err(reason) => {
            let text = reason.downcast_ref::<String>().map(String::as_str);
            let text = text.or(reason.downcast_ref::<&str>().copied());
            println!(
                "KERF failed {what}: {}",
                text.unwrap_or("?").replace('\n', " ")
            );
        }
    }
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("KERF info {line}\n"))
        .collect()
}

fn load_one(module: &str) {
    let (name, parameters) = module.split_once(':').unwrap_or((module, ""));
    let parameters = parameters.replace('+', " ");
    load(name, &parameters).unwrap_or_else(|error| panic!("{error}"));
}

/// Connections end with a suspend; after it the link comes up anew.
fn survive_suspend(cid: u32) {
    let socket = Socket::stream(cid, ECHO);
    suspend();
    wait_for("the reset", || socket.error() == Errno::ECONNRESET as i32);
    wait_for_link(cid - 2, "up");
    talk(cid);
}

/// A case that takes no time.
fn talk(cid: u32) {
    crate::cases::lengths(cid);
}

fn refuse_one(module: &str) {
    let (name, parameters) = module.split_once(':').unwrap_or((module, ""));
    assert_eq!(load(name, &parameters.replace('+', " ")), Err(Errno::EBUSY));
}

/// Every case; `cid` is where the services are.
fn cases(label: &str, cid: u32) {
    for (name, case) in ALL {
        report(&format!("case {label} {name}"), || case(cid));
    }
}

/// The module stays while a connection uses it, and the vsock core says so.
fn module_in_use(cid: u32) {
    let socket = Socket::stream(cid, ECHO);
    let refused = unload("kerf-vsock");
    assert!(
        matches!(refused, Err(Errno::EAGAIN | Errno::EBUSY)),
        "{refused:?}"
    );
    drop(socket);
}

/// The device goes while data flow both ways on many connections; programs see a reset, and then the module
/// can be unloaded, loaded and used again.
fn unload_under_load(cid: u32) {
    let workers: Vec<_> = (0..6)
        .map(|n| thread::spawn(move || load_until_reset(cid, n)))
        .collect();
    thread::sleep(Duration::from_secs(2));
    unbind();
    let mut bytes = 0;
    for worker in workers {
        bytes += worker.join().unwrap();
    }
    assert!(bytes > 0);
    let gone = Socket::connect(Type::Stream, cid, ECHO).err();
    assert_eq!(gone, Some(Errno::ENODEV));
    unload_soon("kerf-vsock");
    load("kerf-vsock", "").unwrap();
    wait_for_link(cid - 2, "up");
    crate::cases::half_close(cid);
    // And once more without the module: the device alone goes and comes back.
    unbind();
    bind();
    wait_for_link(cid - 2, "up");
    talk(cid);
    println!("KERF info {bytes} bytes before the device went");
}

/// Sends, or sends and reads, until the connection is reset.
fn load_until_reset(cid: u32, n: u32) -> u64 {
    let socket = Socket::stream(cid, if n.is_multiple_of(2) { SINK } else { ECHO });
    let reader = (!n.is_multiple_of(2)).then(|| {
        let socket = socket.duplicate();
        thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while socket
                .recv(&mut buffer, MsgFlags::empty())
                .is_ok_and(|len| len > 0)
            {}
        })
    });
    let (buffer, mut sent) = (vec![7; 20_000], 0);
    let error = loop {
        match socket.send(&buffer, MsgFlags::empty()) {
            Ok(len) => sent += len as u64,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN),
        "{error}"
    );
    drop(socket);
    if let Some(reader) = reader {
        reader.join().unwrap();
    }
    sent
}

/// Talks to `cid` for a while, whatever happens on other links.
fn bystander(cid: u32) {
    let start = std::time::Instant::now();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_secs(6) {
        talk(cid);
        rounds += 1;
    }
    println!("KERF info {rounds} rounds");
}

/// Connections to a peer that is about to die, in each state; all are told.
fn victims(cid: u32) {
    let peer = cid - 2;
    let reading = Socket::stream(cid, ECHO);
    let writing = Socket::stream(cid, STALLED);
    // It waits in the queue of a service that does not accept now, with its own half closed.
    let half = Socket::stream(cid, STALLED);
    half.end_writing();
    let message = Socket::connect(Type::SeqPacket, cid, MESSAGES).unwrap();
    let idle = Socket::stream(cid, ECHO);
    let wait = |socket: Socket| thread::spawn(move || socket.recv(&mut [0; 64], MsgFlags::empty()));
    let (reading, half, message) = (wait(reading), wait(half), wait(message));
    let writing = thread::spawn(move || {
        let buffer = vec![0; 50_000];
        loop {
            if let Err(error) = writing.send(&buffer, MsgFlags::empty()) {
                return error;
            }
        }
    });
    println!("KERF said victims-ready");
    // By now the peer stands still.
    thread::sleep(Duration::from_secs(2));
    let connecting = Socket::new(Type::Stream);
    connecting.nonblocking(true);
    assert_eq!(connecting.dial(cid, ECHO), Err(Errno::EINPROGRESS));
    println!("KERF said victims-connecting");

    assert_eq!(reading.join().unwrap(), Err(Errno::ECONNRESET));
    assert_eq!(half.join().unwrap(), Err(Errno::ECONNRESET));
    // To one who waits for a message the vsock core says so, over every transport.
    assert_eq!(message.join().unwrap(), Ok(0));
    let error = writing.join().unwrap();
    let told = [Errno::ECONNRESET, Errno::EPIPE, Errno::ENOTCONN];
    assert!(told.contains(&error), "{error}");
    wait_for("the idle one to be told", || {
        idle.error() == Errno::ECONNRESET as i32
    });
    let patience = Duration::from_secs(60);
    let flags = connecting.poll(PollFlags::POLLOUT, patience);
    assert!(flags.contains(PollFlags::POLLERR), "{flags:?}");
    assert_eq!(connecting.error(), Errno::ETIMEDOUT as i32);
    // Nobody is there now, and that is said at once.
    wait_for_link(peer, "down");
    let gone = Socket::connect(Type::Stream, cid, ECHO).err();
    assert_eq!(gone, Some(Errno::EHOSTUNREACH));
    println!("KERF said victims-told");
    wait_for_link(peer, "up");
    wait_for("the services", || {
        Socket::connect(Type::Stream, cid, ECHO).is_ok()
    });
    talk(cid);
}

mod heartbeat {
    //! KMP heartbeats from the kernel of a peer.

    use std::io::{Read, Write};
    use std::time::Instant;

    use kmp_proto::codec::{Decoder, encode};
    use kmp_proto::message::{Channel, HeartbeatReq, Hello, HelloFixed, Message, PeerRole};

    use crate::vsock::Socket;

    const PORT: u32 = 9001;

    fn ask_one(
        socket: &Socket,
        decoder: &mut Decoder,
        message: &Message,
        sequence: u32,
    ) -> Message {
        let mut bytes = Vec::new();
        encode(message, sequence, 1, &mut bytes).unwrap();
        let (mut to, mut from) = (socket, socket);
        to.write_all(&bytes).unwrap();
        let mut buffer = [0; 512];
        loop {
            let len = from.read(&mut buffer).unwrap();
            assert_ne!(len, 0, "closed");
            if let Some(frame) = decoder.feed(&mut &buffer[..len]).unwrap() {
                assert_eq!(frame.header.sequence, sequence);
                return frame.message;
            }
        }
    }

    pub(super) fn ask(cid: u32) {
        let socket = Socket::stream(cid, PORT);
        let mut decoder = Decoder::new();
        let hello = Message::Hello(Hello {
            fixed: HelloFixed {
                version_min: 1,
                version_max: 1,
                role: PeerRole::Daemon,
                channel: Channel::Heartbeat,
                flags: 0,
                generation: 5,
                boot_id: [1; 16],
                features: 0,
                session: 0,
                incarnation: 0,
            },
            instance: "test".to_owned(),
            kernel_release: String::new(),
            agent_version: String::new(),
            nonce: None,
            proof: None,
        });
        let Message::HelloReply(reply) = ask_one(&socket, &mut decoder, &hello, 1) else {
            panic!("no HELLO");
        };
        assert_eq!(reply.instance, "test");
        println!("KERF info kernel {} answers", reply.kernel_release);
        let start = Instant::now();
        for probe in 0..300 {
            let request = Message::HeartbeatReq(HeartbeatReq {
                probe,
                flags: 0,
                self_lag_us: 0,
            });
            let answer = ask_one(&socket, &mut decoder, &request, probe + 2);
            // The other guest has as many.
            let cpus = u16::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
            assert!(
                matches!(answer, Message::HeartbeatRsp(r) if r.fixed.probe == probe && r.fixed.cpu_count == cpus)
            );
        }
        println!("KERF info 300 heartbeats in {:?}", start.elapsed());
    }
}
