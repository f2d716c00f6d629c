//! The kernel's own `vsock_test`, which the image has as `/vsock_test`. Each of its tests is a process of its own on both
//! sides, so that one that fails does not keep the others from running.
//!
//! ```text
//! KERF suite <mode> <number> passed <name>
//! KERF suite <mode> <number> failed <name>: <last words>
//! ```

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::{self, ifreq, sockaddr};

const PROGRAM: &str = "/vsock_test";
/// Longest run of one test, and longest wait of a client for its server: software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// The TCP port over which the two sides of the first test keep step; each test has one of its own.
const CONTROL_PORT: usize = 5000;
/// CID of a guest for itself.
const OWN_CID: u32 = 1;
/// CID of peer 0.
const CID_BASE: u32 = 2;

/// Brings up the loopback interface and, in a guest with a network card, that of the peer's number.
pub(crate) fn network(peer: u32) {
    configure("lo", Ipv4Addr::LOCALHOST).unwrap();
    if peer != 0 {
        configure("eth0", address(peer)).unwrap();
    }
}

fn address(peer: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, u8::try_from(peer).unwrap())
}

fn configure(interface: &str, address: Ipv4Addr) -> nix::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    // SAFETY: it is made of numbers, for which zero is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = byte.cast_signed();
    }
    let set = |operation, request: &ifreq| {
        // SAFETY: these operations read one `ifreq`.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), operation, request) };
        Errno::result(result).map(drop)
    };
    request.ifr_ifru.ifru_addr = socket_address(address);
    set(libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_addr = socket_address(Ipv4Addr::new(255, 255, 255, 0));
    set(libc::SIOCSIFNETMASK, &request)?;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    set(libc::SIOCSIFFLAGS, &request)
}

/// A `sockaddr_in` with port 0, in the form that an `ifreq` has.
fn socket_address(address: Ipv4Addr) -> sockaddr {
    let mut data = [0; 14];
    for (to, byte) in data[2..6].iter_mut().zip(address.octets()) {
        *to = byte.cast_signed();
    }
    sockaddr {
        sa_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap(),
        sa_data: data,
    }
}

/// `mode` is `server`, `client`, or `both` for the two sides in this guest; `cid` is the other side's.
pub(crate) fn run(mode: &str, cid: u32) {
    let names = names();
    if mode == "both" {
        assert_eq!(cid, OWN_CID);
        thread::scope(|scope| {
            scope.spawn(|| run_all("server", cid, &names));
            run_all("client", cid, &names);
        });
    } else {
        run_all(mode, cid, &names);
    }
}

/// The names of the program's tests, by number.
fn names() -> Vec<String> {
    let listed = Command::new(PROGRAM).arg("--list").output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let rows = text.lines().filter_map(|line| line.split_once('\t'));
    let tests = rows.filter(|(number, _)| number.parse::<usize>().is_ok());
    tests.map(|(_, name)| name.to_owned()).collect()
}

fn run_all(mode: &str, cid: u32, names: &[String]) {
    for (number, name) in names.iter().enumerate() {
        let start = Instant::now();
        let outcome = loop {
            let (ended, said) = run_one(mode, cid, number, names.len());
            // The server of this test may not be listening yet.
            let early = mode == "client" && said.contains("Control socket initialization failed");
            if !early || start.elapsed() > PATIENCE {
                break match ended {
                    Some(status) if status.success() => Ok(()),
                    Some(status) => Err(format!("{status}: {}", last_words(&said))),
                    None => Err(format!("not done in {PATIENCE:?}: {}", last_words(&said))),
                };
            }
            thread::sleep(Duration::from_millis(50));
        };
        match outcome {
            Ok(()) => println!("KERF suite {mode} {number} passed {name}"),
            Err(why) => println!("KERF suite {mode} {number} failed {name}: {why}"),
        }
    }
}

fn last_words(said: &str) -> String {
    said.lines().rev().take(2).collect::<Vec<_>>().join(" / ")
}

/// How one test ended, `None` when it was killed, and what it said.
fn run_one(mode: &str, cid: u32, number: usize, all: usize) -> (Option<ExitStatus>, String) {
    let path = format!("/said-{mode}");
    let said = File::create(&path).unwrap();
    let mut command = Command::new(PROGRAM);
    command
        .arg(format!("--mode={mode}"))
        .arg(format!("--peer-cid={cid}"))
        .arg(format!("--control-port={}", CONTROL_PORT + number))
        .args(
            (0..all)
                .filter(|n| *n != number)
                .map(|n| format!("--skip={n}")),
        )
        .stdout(said.try_clone().unwrap())
        .stderr(said);
    if mode == "client" {
        let host = match cid {
            OWN_CID => Ipv4Addr::LOCALHOST,
            peer => address(peer - CID_BASE),
        };
        command.arg(format!("--control-host={host}"));
    }
    let mut child = command.spawn().unwrap();
    let ended = wait(&mut child);
    (
        ended,
        String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned(),
    )
}

fn wait(child: &mut Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}
