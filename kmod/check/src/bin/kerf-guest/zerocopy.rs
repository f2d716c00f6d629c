//! MSG_ZEROCOPY: programs send pages and are told when the kernel is done with them.

use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::MsgFlags;

use crate::services::{ECHO, MESSAGES, fill};
use crate::vsock::{Socket, Type};

/// Of `linux/errqueue.h`.
const ORIGIN_ZEROCOPY: u8 = 5;
const CODE_COPIED: u8 = 1;
/// Of `linux/vm_sockets.h`.
const SOL_VSOCK: libc::c_int = 287;
const VSOCK_RECVERR: libc::c_int = 1;
const SOON: Duration = Duration::from_secs(60);

/// `struct sock_extended_err`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct ExtendedError {
    errno: u32,
    origin: u8,
    kind: u8,
    code: u8,
    pad: u8,
    first: u32,
    last: u32,
}

/// The vsock core has it since Linux 6.7.
fn kernel_has_it() -> bool {
    let release = nix::sys::utsname::uname().unwrap();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 7)
}

/// Streams and messages of pages: what is sent arrives, and each is told once, as sent without a copy to the kernel.
pub(crate) fn case(cid: u32) {
    let mut bytes = vec![0; 100_000 + 4096];
    let start = bytes.as_ptr().align_offset(4096);
    let bytes = &mut bytes[start..start + 100_000];
    fill(bytes, 11);
    for (kind, port) in [(Type::Stream, ECHO), (Type::SeqPacket, MESSAGES)] {
        let socket = Socket::connect(kind, cid, port).unwrap();
        let asked = socket.ask_for_zerocopy();
        if !kernel_has_it() {
            assert!(asked.is_err(), "{asked:?}");
            return;
        }
        assert_eq!(asked, Ok(()));
        let lengths = [4096, 40_000, 100_000];
        for (number, len) in (0..).zip(lengths) {
            let flags = MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY);
            assert_eq!(socket.send(&bytes[..len], flags), Ok(len));
            let mut back = vec![0; len];
            let got = socket.recv(&mut back, MsgFlags::MSG_WAITALL);
            assert_eq!(got, Ok(len));
            assert!(back == bytes[..len], "{len} bytes came back wrong");
            let told = completion(&socket);
            assert_eq!((told.errno, told.origin), (0, ORIGIN_ZEROCOPY), "{told:?}");
            assert_eq!((told.first, told.last), (number, number), "{told:?}");
            assert_ne!(told.code, CODE_COPIED, "{told:?}");
        }
        // Nobody has asked for more.
        assert_eq!(completion_now(&socket).err(), Some(Errno::EAGAIN));
    }
}

fn completion(socket: &Socket) -> ExtendedError {
    let told = socket.poll(PollFlags::empty(), SOON);
    assert!(told.contains(PollFlags::POLLERR), "{told:?}");
    completion_now(socket).unwrap()
}

fn completion_now(socket: &Socket) -> Result<ExtendedError, Errno> {
    #[repr(C, align(8))]
    struct Control([u8; 128]);
    let mut control = Control([0; 128]);
    // SAFETY: zeros are a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len() as _;
    // SAFETY: the header names the control buffer and its length, and no other memory.
    let result = unsafe { libc::recvmsg(socket.raw(), &raw mut header, libc::MSG_ERRQUEUE) };
    Errno::result(result)?;
    // SAFETY: the kernel has filled the header, and the control buffer lives.
    let message = unsafe { libc::CMSG_FIRSTHDR(&raw const header).as_ref() }.expect("a message");
    assert_eq!(
        (message.cmsg_level, message.cmsg_type),
        (SOL_VSOCK, VSOCK_RECVERR)
    );
    assert!(message.cmsg_len as usize >= size_of::<libc::cmsghdr>() + size_of::<ExtendedError>());
    // SAFETY: the message has at least as many bytes of data, as just checked; any bytes are a valid value.
    Ok(unsafe {
        libc::CMSG_DATA(message)
            .cast::<ExtendedError>()
            .read_unaligned()
    })
}
