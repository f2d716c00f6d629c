//! What the cases talk to, each on a port of its own.

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::socket::MsgFlags;

use crate::fault::Page;
use crate::vsock::{Socket, Type};

/// Sends back what comes, until the end of it.
pub(crate) const ECHO: u32 = 7007;
/// Reads to the end, then says how many bytes there were and their sum, and closes.
pub(crate) const SINK: u32 = 7009;
/// Sends [`SOURCE_BYTES`], then closes.
pub(crate) const SOURCE: u32 = 7019;
/// Reads nothing until a byte comes on [`RELEASE`]; then as [`SINK`].
pub(crate) const STALLED: u32 = 7011;
pub(crate) const RELEASE: u32 = 7012;
/// Reads no message until a byte comes on [`RELEASE_MESSAGES`]; then says how many there were, and their sum.
pub(crate) const STALLED_MESSAGES: u32 = 7023;
pub(crate) const RELEASE_MESSAGES: u32 = 7024;
/// Closes what it accepts.
pub(crate) const CLOSER: u32 = 7013;
/// Messages back, as they came.
pub(crate) const MESSAGES: u32 = 7014;
/// Has a short queue, and accepts only now and then.
pub(crate) const DEAF: u32 = 7015;

/// Sends until its peer closes.
pub(crate) const FOUNTAIN: u32 = 7020;
/// Sends a page that is absent until a byte comes on [`RESOLVE`]; then as [`SINK`].
pub(crate) const STUCK: u32 = 7021;
pub(crate) const RESOLVE: u32 = 7022;

pub(crate) const SOURCE_BYTES: usize = 4 << 20;

/// The bytes of a stream from `at` on.
pub(crate) fn fill(buffer: &mut [u8], at: usize) {
    for (byte, at) in buffer.iter_mut().zip(at..) {
        *byte = u8::try_from((at * 31 + (at >> 8) * 7 + (at >> 16)) & 0xff).unwrap();
    }
}

/// Reads to the end and says how many bytes there were, and their sum.
pub(crate) fn drain(mut socket: &Socket) -> std::io::Result<(u64, u64)> {
    let mut buffer = vec![0; 65536];
    let (mut count, mut sum) = (0, 0u64);
    loop {
        let len = socket.read(&mut buffer)?;
        if len == 0 {
            return Ok((count, sum));
        }
        count += len as u64;
        sum = sum.wrapping_add(buffer[..len].iter().map(|b| u64::from(*b)).sum());
    }
}

pub(crate) fn start() {
    serve(ECHO, Type::Stream, |socket| {
        let (mut from, mut to) = (&socket, &socket);
        let mut buffer = vec![0; 65536];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
    });
    serve(SINK, Type::Stream, |socket| report(&socket));
    serve(SOURCE, Type::Stream, |socket| {
        let mut buffer = vec![0; 65536];
        for at in (0..SOURCE_BYTES).step_by(buffer.len()) {
            fill(&mut buffer, at);
            if (&socket).write_all(&buffer).is_err() {
                break;
            }
        }
    });
    serve(FOUNTAIN, Type::Stream, |socket| {
        let buffer = vec![0; 65536];
        while (&socket).write_all(&buffer).is_ok() {}
    });
    serve(CLOSER, Type::Stream, drop);
    serve(MESSAGES, Type::SeqPacket, |socket| {
        let mut buffer = vec![0; 300_000];
        while let Ok(len @ 1..) = socket.recv(&mut buffer, MsgFlags::empty()) {
            if socket.send(&buffer[..len], MsgFlags::MSG_EOR).is_err() {
                break;
            }
        }
    });
    let stalled = Socket::listen(Type::Stream, STALLED, 8);
    let release = Socket::listen(Type::Stream, RELEASE, 8);
    spawn("stalled", move || {
        loop {
            let socket = next(&stalled);
            let ready = next(&release);
            let _ = (&ready).read(&mut [0]);
            report(&socket);
        }
    });
    let stalled = Socket::listen(Type::SeqPacket, STALLED_MESSAGES, 8);
    let release = Socket::listen(Type::Stream, RELEASE_MESSAGES, 8);
    spawn("stalled messages", move || {
        loop {
            let socket = next(&stalled);
            let ready = next(&release);
            let _ = (&ready).read(&mut [0]);
            let mut buffer = vec![0; 300_000];
            let (mut count, mut sum) = (0, 0u64);
            while let Ok(len @ 1..) = socket.recv(&mut buffer, MsgFlags::empty()) {
                count += 1;
                sum += buffer[..len].iter().map(|b| u64::from(*b)).sum::<u64>();
            }
            let _ = socket.send(format!("{count} {sum}").as_bytes(), MsgFlags::empty());
        }
    });
    let stuck = Socket::listen(Type::Stream, STUCK, 8);
    let resolve = Socket::listen(Type::Stream, RESOLVE, 8);
    spawn("stuck", move || {
        loop {
            let socket = next(&stuck);
            let page = Arc::new(Page::absent().unwrap());
            let absent = Arc::clone(&page);
            let sender = thread::spawn(move || {
                (&socket).write_all(absent.bytes()).unwrap();
                report(&socket);
            });
            page.wait_for_fault().unwrap();
            println!("KERF said stuck");
            let ready = next(&resolve);
            let _ = (&ready).read(&mut [0]);
            page.resolve().unwrap();
            sender.join().unwrap();
        }
    });
    let deaf = Socket::listen(Type::Stream, DEAF, 1);
    deaf.nonblocking(true);
    spawn("deaf", move || {
        loop {
            thread::sleep(Duration::from_secs(3));
            while deaf.accept().is_ok() {}
        }
    });
}

fn report(socket: &Socket) {
    // Its peer may die: that is what some tests are about.
    let Ok((count, sum)) = drain(socket) else {
        return;
    };
    let (mut to, text) = (socket, format!("{count} {sum}"));
    let _ = to.write_all(text.as_bytes());
}

/// The next connection, however long it takes: the timeout of receiving is that of accepting too.
fn next(listener: &Socket) -> Socket {
    loop {
        match listener.accept() {
            Ok(socket) => return socket,
            Err(nix::errno::Errno::EAGAIN) => {}
            Err(error) => panic!("accepting: {error}"),
        }
    }
}

fn serve(port: u32, kind: Type, each: impl Fn(Socket) + Clone + Send + 'static) {
    let listener = Socket::listen(kind, port, 512);
    spawn("service", move || {
        loop {
            let socket = next(&listener);
            let each = each.clone();
            spawn("connection", move || each(socket));
        }
    });
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.stack_size(128 * 1024).spawn(run).unwrap();
}
