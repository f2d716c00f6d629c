//! AF_VSOCK sockets, as plain as the system calls.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, VsockAddr, accept4, bind,
    connect, getsockopt, listen, recv, send, setsockopt, shutdown, socket, sockopt,
};
use nix::sys::time::TimeVal;

pub(crate) use nix::sys::socket::SockType as Type;

const ANY: u32 = 0xffff_ffff;
/// Longest wait of a call that blocks.
const PATIENCE: i64 = 60;

#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(kind: SockType) -> Self {
        let family = AddressFamily::Vsock;
        let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let socket = Self(fd);
        let patience = TimeVal::new(PATIENCE, 0);
        setsockopt(&socket.0, sockopt::ReceiveTimeout, &patience).unwrap();
        setsockopt(&socket.0, sockopt::SendTimeout, &patience).unwrap();
        socket
    }

    pub(crate) fn listen(kind: SockType, port: u32, backlog: i32) -> Self {
        let socket = Self::new(kind);
        bind(socket.0.as_raw_fd(), &VsockAddr::new(ANY, port)).unwrap();
        listen(&socket.0, Backlog::new(backlog).unwrap()).unwrap();
        socket
    }

    pub(crate) fn accept(&self) -> Result<Self, Errno> {
        let fd = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: it is ours, just made.
        let socket = Self(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
        Ok(socket)
    }

    pub(crate) fn dial(&self, cid: u32, port: u32) -> Result<(), Errno> {
        connect(self.0.as_raw_fd(), &VsockAddr::new(cid, port))
    }

    pub(crate) fn connect(kind: SockType, cid: u32, port: u32) -> Result<Self, Errno> {
        let socket = Self::new(kind);
        socket.dial(cid, port)?;
        Ok(socket)
    }

    pub(crate) fn stream(cid: u32, port: u32) -> Self {
        Self::connect(SockType::Stream, cid, port).unwrap()
    }

    pub(crate) fn nonblocking(&self, on: bool) {
        let mut flags = nix::fcntl::OFlag::O_RDWR;
        flags.set(nix::fcntl::OFlag::O_NONBLOCK, on);
        nix::fcntl::fcntl(&self.0, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    }

    /// What is there of `wanted`, after at most `wait`.
    pub(crate) fn poll(&self, wanted: PollFlags, wait: Duration) -> PollFlags {
        let mut fds = [PollFd::new(self.0.as_fd(), wanted)];
        poll(&mut fds, PollTimeout::try_from(wait).unwrap()).unwrap();
        fds[0].revents().unwrap()
    }

    pub(crate) fn error(&self) -> i32 {
        getsockopt(&self.0, sockopt::SocketError).unwrap()
    }

    pub(crate) fn bind(&self, cid: u32) -> Result<(), Errno> {
        bind(self.0.as_raw_fd(), &VsockAddr::new(cid, ANY))
    }

    pub(crate) fn end_writing(&self) {
        shutdown(self.0.as_raw_fd(), Shutdown::Write).unwrap();
    }

    pub(crate) fn end_reading(&self) {
        shutdown(self.0.as_raw_fd(), Shutdown::Read).unwrap();
    }

    pub(crate) fn send(&self, bytes: &[u8], flags: MsgFlags) -> Result<usize, Errno> {
        send(self.0.as_raw_fd(), bytes, flags | MsgFlags::MSG_NOSIGNAL)
    }

    pub(crate) fn recv(&self, bytes: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
        recv(self.0.as_raw_fd(), bytes, flags)
    }

    pub(crate) fn raw(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }

    /// From now on `MSG_ZEROCOPY` means something.
    pub(crate) fn ask_for_zerocopy(&self) -> Result<(), Errno> {
        let one: nix::libc::c_int = 1;
        let len = nix::libc::socklen_t::try_from(size_of_val(&one)).unwrap();
        let (level, name) = (nix::libc::SOL_SOCKET, nix::libc::SO_ZEROCOPY);
        // SAFETY: it reads the integer, whose length it is given.
        let result =
            unsafe { nix::libc::setsockopt(self.raw(), level, name, (&raw const one).cast(), len) };
        Errno::result(result).map(drop)
    }

    pub(crate) fn duplicate(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv(buffer, MsgFlags::empty())?)
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.send(bytes, MsgFlags::empty())?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
