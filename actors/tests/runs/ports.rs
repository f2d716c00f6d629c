//! Published ports of a run. The sockets are real: each run has a loopback address of its own, so that its ports
//! collide with no other run's.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The port that is held as long as the address is in use.
const HELD: u16 = 40_000;
/// The first published port.
const FIRST: u16 = 40_001;
/// Maximum number of addresses to try.
const TRIES: u32 = 1000;
/// Timeout of a connection; within one machine, it is established at once or never.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A loopback address that no other run uses meanwhile, in this or another process.
pub(crate) struct Loopback {
    address: IpAddr,
    _held: TcpListener,
}

impl Loopback {
    pub(crate) fn take() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..TRIES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            // The numbers of processes are far apart; 127.0.0.x is left to others.
            let number = std::process::id().wrapping_mul(65_537).wrapping_add(number);
            let [_, a, b, c] = (number | 0x0080_0000).to_be_bytes();
            let address = IpAddr::from(Ipv4Addr::new(127, a, b, c));
            if let Ok(held) = TcpListener::bind((address, HELD)) {
                return Self {
                    address,
                    _held: held,
                };
            }
        }
        panic!("no address of the loopback network is free");
    }

    pub(crate) fn address(&self) -> IpAddr {
        self.address
    }
}

/// Returns the published port of the instance at `place` among the names; the last instance publishes none.
pub(crate) fn of(address: IpAddr, place: usize, names: usize) -> Option<SocketAddr> {
    let port = FIRST.checked_add(u16::try_from(place).ok()?)?;
    (place + 1 < names).then(|| SocketAddr::new(address, port))
}

/// Returns true if the port accepts a client's connection or queues it, and `false` if it refuses.
pub(crate) fn takes_connections(port: SocketAddr) -> bool {
    match TcpStream::connect_timeout(&port, CONNECT_TIMEOUT) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
            false
        }
    }
}

/// Returns true if the port is free.
pub(crate) fn is_free(port: SocketAddr) -> bool {
    TcpListener::bind(port).is_ok()
}
