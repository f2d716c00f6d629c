//! Published ports of a run. Their sockets are the system's: a run has an address of the loopback network to itself, so
//! that its ports are nobody else's.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The port that is held as long as the address is taken.
const HELD: u16 = 40_000;
/// The first of the published ones.
const FIRST: u16 = 40_001;
/// Addresses that are tried.
const TRIES: u32 = 1000;
/// A connection within one machine is there at once, or never.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An address that no other run has meanwhile, also of another process.
pub(crate) struct Loopback {
    address: IpAddr,
    _held: TcpListener,
}

impl Loopback {
    pub(crate) fn take() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..TRIES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            // Processes begin far apart; 127.0.0.x is for others.
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

/// The published port of the instance with this place among the names; the last one publishes none.
pub(crate) fn of(address: IpAddr, place: usize, names: usize) -> Option<SocketAddr> {
    let port = FIRST.checked_add(u16::try_from(place).ok()?)?;
    (place + 1 < names).then(|| SocketAddr::new(address, port))
}

/// Whether a client's connection is taken, or waits to be; `false` when it is refused.
pub(crate) fn takes_connections(port: SocketAddr) -> bool {
    match TcpStream::connect_timeout(&port, CONNECT_TIMEOUT) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
            false
        }
    }
}

/// Whether nobody has the port.
pub(crate) fn is_free(port: SocketAddr) -> bool {
    TcpListener::bind(port).is_ok()
}
