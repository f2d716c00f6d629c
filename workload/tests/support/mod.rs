//! A server under the hands of a test, which plays its agent.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use kmorph_workload::handover::message::{
    FailureCode, Mode, PROTOCOL_VERSION, Reply, Request, Role, StateDigest,
};
use kmorph_workload::handover::{ActivatedListener, Incoming, PacketSocket, attach};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Nothing in these tests takes this long unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A running server and the agent's end of its handover socket.
pub struct Server {
    child: Child,
    agent: Option<PacketSocket>,
    next_id: u32,
}

/// A listening socket for servers, and its address.
pub fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

impl Server {
    /// Starts a server that is given `listener` and registers as `role`.
    pub fn start(listener: &TcpListener, role: Role, args: &[&str]) -> Self {
        Self::start_with_memory(listener, role, args, 0)
    }

    /// As [`Server::start`], told how many bytes of memory it may use, 0 for no limit.
    pub fn start_with_memory(
        listener: &TcpListener,
        role: Role,
        args: &[&str],
        bytes: u64,
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kmorph-kv"));
        command
            .args(args)
            .env("KMORPH_MEMORY_BYTES", bytes.to_string());
        let socket = listener.as_fd().try_clone_to_owned().unwrap();
        let name = "p1".to_owned();
        let agent = attach(&mut command, &[ActivatedListener { name, socket }]).unwrap();
        let child = command.spawn().unwrap();
        drop(command);
        let mut server = Self {
            child,
            agent: Some(PacketSocket::new(agent).unwrap()),
            next_id: 1,
        };
        let first = server.receive();
        assert!(matches!(first.message, Reply::Register { .. }), "{first:?}");
        server.send(
            &Request::Registered {
                protocol: PROTOCOL_VERSION,
                role,
                instance: "web".to_owned(),
                generation: 7,
                kernel_release: "6.12.0-test".to_owned(),
            },
            &[],
            &[],
        );
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn agent(&mut self) -> &mut PacketSocket {
        self.agent.as_mut().unwrap()
    }

    pub fn send(&mut self, request: &Request, data: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.agent().send(id, request, data, fds) {
                Ok(()) => return id,
                Err(error) if error.would_block() => {
                    ready(self.agent().as_fd(), PollFlags::POLLOUT, deadline);
                }
                Err(error) => panic!("{request:?}: {error}"),
            }
        }
    }

    pub fn receive(&mut self) -> Incoming<Reply> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.agent().receive() {
                Ok(incoming) => return incoming,
                Err(error) if error.would_block() => {
                    ready(self.agent().as_fd(), PollFlags::POLLIN, deadline);
                }
                Err(error) => panic!("receiving a reply: {error}"),
            }
        }
    }

    pub fn request(&mut self, request: &Request) -> Reply {
        self.exchange(request, &[], &[]).message
    }

    pub fn exchange(
        &mut self,
        request: &Request,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Incoming<Reply> {
        let id = self.send(request, data, fds);
        let reply = self.receive();
        assert_eq!(reply.id, id, "{request:?} got {reply:?}");
        reply
    }

    /// Asks for something and expects to be refused.
    pub fn refused(&mut self, request: &Request) -> FailureCode {
        match self.request(request) {
            Reply::Failed { code, .. } => code,
            other => panic!("{request:?} was not refused: {other:?}"),
        }
    }

    pub fn retire(mut self) {
        assert_eq!(self.request(&Request::Retire), Reply::Retired);
        assert!(self.exit_status().success());
    }

    /// Waits for the process to end.
    pub fn exit_status(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Ends the process as the machine would: without a chance to say anything.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Closes the agent's end.
    pub fn abandon(&mut self) {
        self.agent = None;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left).unwrap();
    let count = poll(&mut [PollFd::new(fd, flags)], left).unwrap();
    assert_eq!(count, 1, "no answer within {DEADLINE:?}");
}

/// Brings old and new to the point where the new one waits for the freeze.
pub fn prepare_by_reference(old: &mut Server, new: &mut Server) {
    let (from, to): (OwnedFd, OwnedFd) = PacketSocket::pair().unwrap();
    let mode = Mode::ByReference;
    let total_len = 0;
    let import = Request::PrepareImport { mode, total_len };
    let id = new.send(&import, &[], &[to.as_fd()]);
    drop(to);
    let export = Request::PrepareExport { mode };
    let prepared = old.exchange(&export, &[], &[from.as_fd()]);
    assert!(
        matches!(prepared.message, Reply::Prepared { .. }),
        "{prepared:?}"
    );
    let ready = new.receive();
    assert_eq!(ready.id, id);
    assert!(
        matches!(ready.message, Reply::ImportReady { .. }),
        "{ready:?}"
    );
}

pub fn freeze(old: &mut Server) -> StateDigest {
    match old.request(&Request::Freeze) {
        Reply::Frozen { state, .. } => state,
        other => panic!("not frozen: {other:?}"),
    }
}

pub fn activate(new: &mut Server) -> StateDigest {
    let nonce = 0x1234;
    let budget_us = 500;
    match new.request(&Request::Activate { nonce, budget_us }) {
        Reply::Activated {
            nonce: 0x1234,
            state,
            ..
        } => state,
        other => panic!("not activated: {other:?}"),
    }
}

pub fn serve(new: &mut Server) {
    let reply = new.request(&Request::Serve);
    assert!(matches!(reply, Reply::Serving { .. }), "{reply:?}");
}

/// Moves all from `old` to `new` and ends `old`.
pub fn morph(mut old: Server, new: &mut Server) {
    prepare_by_reference(&mut old, new);
    let frozen = freeze(&mut old);
    assert_eq!(activate(new), frozen);
    serve(new);
    old.retire();
}

/// A client that speaks RESP.
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).unwrap();
    }

    /// Reads exactly as many bytes as `expected` has.
    pub fn expect(&mut self, expected: &[u8]) {
        let mut got = vec![0; expected.len()];
        self.reader.read_exact(&mut got).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&got),
            String::from_utf8_lossy(expected)
        );
    }

    pub fn expect_end(&mut self) {
        let mut rest = Vec::new();
        self.reader.read_to_end(&mut rest).unwrap();
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }

    /// Sends an inline command and returns the first line of the reply.
    pub fn ask(&mut self, command: &str) -> String {
        self.write(format!("{command}\r\n").as_bytes());
        self.line()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads one bulk string.
    pub fn bulk(&mut self) -> Vec<u8> {
        let line = self.line();
        let len: usize = line.strip_prefix('$').unwrap().parse().unwrap();
        let mut bytes = vec![0; len + 2];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }
}
