//! Intercepts system calls of other programs: a filter (seccomp_unotify(2)) stops each kexec_file_load and reboot,
//! and the emulated kernel reads the arguments and answers instead of the real kernel. All other calls pass. The
//! interception is invisible to the program, and no intercepted call reaches the kernel of this machine.

#![allow(
    clippy::cast_possible_truncation,
    reason = "registers hold narrower values, of which the kernel takes the lower part"
)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::machine::Machine;

/// The socket's name in the emulator's directory.
const SOCKET: &str = "calls.sock";

const UNLOAD: u64 = 1;
const NO_INITRAMFS: u64 = 4;
const MULTIKERNEL: u64 = 0x10;
const MAGIC_1: u32 = 0xfee1_dead;
const MAGIC_2: u32 = 672_274_793;
/// Maximum length of a command line, with its NUL, bytes.
const CMDLINE_MAX_BYTES: u64 = 2048;

const fn iowr<T>(number: libc::c_ulong) -> libc::c_ulong {
    (3 << 30) | ((size_of::<T>() as libc::c_ulong) << 16) | ((b'!' as libc::c_ulong) << 8) | number
}

/// Makes the emulated kernel in this directory answer the calls of this process and of the programs that it executes.
pub fn intercept(directory: &Path) {
    let socket = UnixStream::connect(directory.join(SOCKET)).unwrap();
    let listener = filter().expect("the kernel has seccomp_unotify(2)");
    let raw = [listener.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    let io = [IoSlice::new(b"f")];
    sendmsg::<()>(socket.as_raw_fd(), &io, &rights, MsgFlags::empty(), None).unwrap();
    // The emulated kernel answers once it serves the filter.
    let mut served = [0];
    std::io::Read::read_exact(&mut &socket, &mut served).unwrap();
}

/// Installs the filter on this thread; returns the descriptor that reports its calls.
#[allow(unsafe_code, reason = "seccomp(2) has no wrapper")]
fn filter() -> nix::Result<OwnedFd> {
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    let is = |k: i64, jt| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt,
        jf: 0,
        k: k as u32,
    };
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    // The data of a filter begins with the number of the call.
    let mut program = [
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0),
        is(libc::SYS_kexec_file_load, 2),
        is(libc::SYS_reboot, 1),
        statement(give, libc::SECCOMP_RET_ALLOW),
        statement(give, libc::SECCOMP_RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog {
        len: 5,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program has the stated number of instructions, and lives until the call returns.
    let fd = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let fd = i32::try_from(Errno::result(fd)?).unwrap();
    // SAFETY: the kernel has just created this descriptor, and no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Serves the filters that programs install.
pub(crate) fn serve(machine: &Arc<Machine>, directory: &Path) {
    let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
    let machine = Arc::clone(machine);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Some(calls) = receive(&stream) else {
                continue;
            };
            let machine = Arc::clone(&machine);
            std::thread::spawn(move || answer_all(&machine, &Arc::new(calls)));
            let _ = std::io::Write::write_all(&mut &stream, b"s");
        }
    });
}

#[allow(unsafe_code, reason = "descriptors come as numbers")]
fn receive(stream: &UnixStream) -> Option<OwnedFd> {
    let (mut byte, mut space) = ([0], cmsg_space!([i32; 1]));
    let mut io = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(stream.as_raw_fd(), &mut io, Some(&mut space), flags).ok()?;
    got.cmsgs().ok()?.find_map(|message| match message {
        // SAFETY: the kernel has just installed this descriptor for this process, and no other code knows it.
        ControlMessageOwned::ScmRights(fds) => Some(unsafe { OwnedFd::from_raw_fd(fds[0]) }),
        _ => None,
    })
}

/// Answers calls until the last process with the filter has ended.
#[allow(unsafe_code, reason = "seccomp_unotify(2) is ioctls")]
fn answer_all(machine: &Arc<Machine>, calls: &Arc<OwnedFd>) {
    loop {
        let mut poll = libc::pollfd {
            fd: calls.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, which lives until the call returns.
        let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
        if ready < 0 || poll.revents & libc::POLLIN == 0 {
            return;
        }
        // SAFETY: the kernel requires a zeroed structure, and fills in a structure of this type.
        let call = unsafe {
            let mut call: libc::seccomp_notif = std::mem::zeroed();
            let receive = iowr::<libc::seccomp_notif>(0);
            if libc::ioctl(calls.as_raw_fd(), receive, &raw mut call) < 0 {
                continue;
            }
            call
        };
        let (machine, calls) = (Arc::clone(machine), Arc::clone(calls));
        std::thread::spawn(move || answer(&machine, &calls, &call));
    }
}

#[allow(unsafe_code, reason = "seccomp_unotify(2) is ioctls")]
fn answer(machine: &Arc<Machine>, calls: &OwnedFd, call: &libc::seccomp_notif) {
    let error = carry_out(machine, call).err().unwrap_or(0);
    let mut answer = libc::seccomp_notif_resp {
        id: call.id,
        val: 0,
        error: -error,
        flags: 0,
    };
    let send = iowr::<libc::seccomp_notif_resp>(1);
    // SAFETY: the answer lives until the call returns. If the caller no longer waits, the error is ignored.
    unsafe { libc::ioctl(calls.as_raw_fd(), send, &raw mut answer) };
}

fn carry_out(machine: &Arc<Machine>, call: &libc::seccomp_notif) -> Result<(), i32> {
    let arguments = &call.data.args;
    let memory = |at: u64, length: u64| {
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| libc::EINVAL)?];
        let file = File::open(format!("/proc/{}/mem", call.pid)).map_err(|_| libc::EFAULT)?;
        file.read_exact_at(&mut bytes, at)
            .map_err(|_| libc::EFAULT)?;
        Ok::<_, i32>(bytes)
    };
    if i64::from(call.data.nr) == libc::SYS_reboot {
        let [magic_1, magic_2, command, argument, ..] = *arguments;
        if (magic_1 as u32, magic_2 as u32) != (MAGIC_1, MAGIC_2) {
            return Err(libc::EINVAL);
        }
        let id = memory(argument, 4)?;
        let id = u32::from_ne_bytes(id.try_into().map_err(|_| libc::EFAULT)?);
        return machine.reboot(command as u32, id);
    }
    let [image, initrd, length, cmdline, flags, _] = *arguments;
    let id = u32::try_from((flags & 0xffe0) >> 5).map_err(|_| libc::EINVAL)?;
    if flags & MULTIKERNEL == 0 || id == 0 {
        return Err(libc::EINVAL);
    }
    if flags & UNLOAD != 0 {
        return machine.unload(id);
    }
    let read = |fd: u64| {
        let path = format!("/proc/{}/fd/{}", call.pid, fd as i32);
        std::fs::read(path).map_err(|_| libc::EBADF)
    };
    let initrd = match flags & NO_INITRAMFS {
        0 => read(initrd)?,
        _ => Vec::new(),
    };
    let line = match length {
        0 => Vec::new(),
        1..=CMDLINE_MAX_BYTES => memory(cmdline, length)?,
        _ => return Err(libc::EINVAL),
    };
    let line = match line.split_last() {
        None => &[][..],
        Some((0, line)) => line,
        Some(_) => return Err(libc::EINVAL),
    };
    machine.load(id, &read(image)?, &initrd, &String::from_utf8_lossy(line))
}
