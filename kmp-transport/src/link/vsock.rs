//! AF_VSOCK sockets whose transport must be selected.
//!
//! A multikernel kernel has its own transport between kernels besides the usual ones. A socket option selects it,
//! before the socket is bound or connected; without the option, the socket uses a virtual machine's transport.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, getsockopt, listen,
    socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio_vsock::{VsockListener, VsockStream};

/// The context ids of the host: of a virtual machine's (`VMADDR_CID_HOST`), and, between the kernels of a
/// multikernel machine, of the kernel that starts the others. No guest has either.
const HOST_CIDS: [u32; 2] = [2, 0];

/// The objection to a peer with this context id, if any: only the host may connect.
pub(super) fn stranger(cid: u32) -> Option<String> {
    (!HOST_CIDS.contains(&cid))
        .then(|| format!("the connection comes from context id {cid}, not from the host"))
}

/// The highest id that a kernel instance can have; the lowest ones are given first.
const UNUSED_CID: u32 = 2047;
/// A port that nothing listens on; a connection that reaches a kernel is refused.
const UNUSED_PORT: u32 = 1;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Sets the option that chooses a socket's transport to 1.
///
/// # Errors
/// The system's: `ENOPROTOOPT` says that this kernel has no such transport.
#[allow(unsafe_code, reason = "no wrapper knows this option")]
pub fn choose(socket: &impl AsFd, option: i32) -> io::Result<()> {
    let (on, length) = (1_i32, libc::socklen_t::from(4_u8));
    // SAFETY: the value is four bytes that live until the call returns.
    let set = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::AF_VSOCK,
            option,
            (&raw const on).cast(),
            length,
        )
    };
    match Errno::result(set) {
        Ok(_) => Ok(()),
        Err(Errno::ENOPROTOOPT) => {
            let text = format!(
                "this kernel's vsock has no option {option}, so it has no multikernel transport"
            );
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
        Err(errno) => Err(errno.into()),
    }
}

/// A socket whose calls do not wait.
fn made(option: Option<i32>) -> io::Result<OwnedFd> {
    with(SockFlag::SOCK_NONBLOCK, option)
}

fn with(flags: SockFlag, option: Option<i32>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | flags;
    let made = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    if let Some(option) = option {
        choose(&made, option)?;
    }
    Ok(made)
}

/// Whether anything carries connections that choose their transport by `option`: a kernel may know the option and have
/// no module behind it. Tries to connect to a context id that hardly anybody has, and does not wait.
///
/// # Errors
/// As [`choose`]'s, and `Unsupported` when nothing does.
pub fn carries(option: i32) -> io::Result<()> {
    let made = made(Some(option))?;
    let tried = connect(made.as_raw_fd(), &VsockAddr::new(UNUSED_CID, UNUSED_PORT));
    carried(tried, option)
}

/// Whether an attempt to connect found a transport: only ENODEV means that there is none.
fn carried(tried: Result<(), Errno>, option: i32) -> io::Result<()> {
    match tried {
        Err(Errno::ENODEV) => {
            let text = format!(
                "this kernel's vsock has option {option}, but no transport for it ({})",
                Errno::ENODEV.desc()
            );
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
        _ => Ok(()),
    }
}

/// Listens on a port, any context id. Whoever accepts from the socket waits: it is for a program that knows nothing
/// of it but its number.
///
/// # Errors
/// The system's, for instance without a vsock device, and [`choose`]'s.
pub fn listening(port: u32, option: Option<i32>) -> io::Result<OwnedFd> {
    let made = with(SockFlag::empty(), option)?;
    listen_on(&made, port)?;
    Ok(made)
}

fn listen_on(made: &OwnedFd, port: u32) -> io::Result<()> {
    let any = VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, port);
    bind(made.as_raw_fd(), &any)?;
    Ok(listen(made, Backlog::new(BACKLOG)?)?)
}

/// Listens on a port, any context id.
pub(super) fn listener(port: u32, option: Option<i32>) -> io::Result<VsockListener> {
    let made = made(option)?;
    listen_on(&made, port)?;
    // Panics where the reactor takes no more descriptors; it has just been made, and is that of an agent.
    Ok(made.into())
}

pub(super) async fn dial(cid: u32, port: u32, option: Option<i32>) -> io::Result<VsockStream> {
    let made = made(option)?;
    match connect(made.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) => return VsockStream::new(vsock::VsockStream::from(made)),
        Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    // SAFETY: the descriptor is owned by the AsyncFd, which takes it off the reactor before it is given back.
    let waiting = unsafe { AsyncFd::register(made) }.map_err(io::Error::from)?;
    let _ = waiting.writable().await?;
    let made = waiting.into_inner();
    match getsockopt(&made, sockopt::SocketError)? {
        0 => VsockStream::new(vsock::VsockStream::from(made)),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The multikernel transport's own, which no kernel at hand has.
    const OPTION: i32 = 9;

    #[test]
    fn of_context_ids_only_the_hosts_may_connect() {
        assert_eq!((stranger(2), stranger(0)), (None, None));
        for cid in [1, 3, 1000, u32::MAX] {
            assert!(stranger(cid).is_some_and(|why| why.contains(&cid.to_string())));
        }
    }

    #[test]
    fn an_option_without_a_transport_behind_it_is_told_from_a_peer_that_is_not_there() {
        let said = carried(Err(Errno::ENODEV), OPTION).unwrap_err();
        assert_eq!(said.kind(), io::ErrorKind::Unsupported);
        assert!(said.to_string().contains("but no transport for it"));
        carried(Ok(()), OPTION).unwrap();
        for errno in [Errno::EINPROGRESS, Errno::ECONNRESET, Errno::EINVAL] {
            carried(Err(errno), OPTION).unwrap();
        }
    }

    #[test]
    fn a_socket_that_no_transport_carries_is_answered_as_the_check_expects() {
        let Ok(made) = made(None) else {
            return eprintln!("SKIPPED: this machine has no AF_VSOCK");
        };
        // Where no hypervisor's module is loaded, nothing carries it; where one is, it says something else.
        let tried = connect(made.as_raw_fd(), &VsockAddr::new(UNUSED_CID, UNUSED_PORT));
        let modules = std::fs::read_to_string("/proc/modules").unwrap_or_default();
        let loaded = modules.lines().any(|line| {
            let transports = ["vhost_vsock", "vmw_vsock", "hv_sock", "vsock_loopback"];
            transports.iter().any(|name| line.starts_with(name))
        });
        if tried == Err(Errno::ENODEV) {
            assert!(carried(tried, OPTION).is_err());
        } else {
            assert!(carried(tried, OPTION).is_ok());
            eprintln!("a transport answers here (as a module: {loaded}): {tried:?}");
        }
    }

    #[tokio::test]
    async fn a_kernel_without_the_transport_says_so() {
        let Ok(plain) = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        ) else {
            return eprintln!("SKIPPED: this machine has no AF_VSOCK");
        };
        if choose(&plain, OPTION).is_ok() {
            return eprintln!("SKIPPED: this machine is a multikernel");
        }
        let refused = dial(1, 9000, Some(OPTION)).await.unwrap_err();
        assert!(refused.to_string().contains("multikernel"), "{refused}");
        assert!(listener(9000, Some(OPTION)).is_err());
    }

    #[test]
    fn what_listens_for_another_program_blocks() {
        let port = 20_000 + std::process::id() % 20_000;
        let Ok(made) = listening(port, None) else {
            return eprintln!("SKIPPED: this machine has no AF_VSOCK");
        };
        let flags = nix::fcntl::fcntl(&made, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        let flags = nix::fcntl::OFlag::from_bits_retain(flags);
        assert!(!flags.contains(nix::fcntl::OFlag::O_NONBLOCK), "{flags:?}");
        assert!(listening(port, None).is_err(), "the port is taken");
    }

    #[tokio::test]
    async fn what_listens_is_reached_and_what_does_not_is_refused() {
        const LOOPBACK: u32 = 1;
        let port = 40_000 + std::process::id() % 20_000;
        let Ok(listener) = listener(port, None) else {
            return eprintln!("SKIPPED: this machine has no AF_VSOCK");
        };
        match dial(LOOPBACK, port, None).await {
            Ok(_) => {}
            Err(error) => return eprintln!("SKIPPED: no vsock_loopback here ({error})"),
        }
        listener.accept().await.unwrap();
        let refused = dial(LOOPBACK, port + 1, None).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionReset, "{refused}");
    }
}
