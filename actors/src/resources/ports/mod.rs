//! Published ports: the listening sockets on the host.
//!
//! ```text
//!            bind, or a running agent's duplicate
//!  [Missing] ────────────────────────────────▶ [Open] ⇄ [Refusing]
//! ```
//!
//! The daemon binds a port once and keeps it for the instance's whole life. Every generation receives a duplicate, so
//! connections made during a replacement wait in the backlog instead of being refused. A restarted daemon asks the
//! running agents for their duplicates (see [`regain`]), since a second bind would fail while they are open. If an
//! instance will not serve, its port stays bound, so that no other program can take it, and refuses connections.

mod regain;
mod served;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::model::requests::PortRequest;
use crate::model::shown::{PortState, PortView};
use crate::model::{Failure, FailureKind};
use kmorph_backends::contract::HostListener;
use kmorph_launch::PublishedPort;
use nix::sys::socket::sockopt::ReuseAddr;
use nix::sys::socket::{Backlog, Shutdown, listen, setsockopt, shutdown};

use crate::model::rows::PublishedPortSpec;

pub use regain::{PORT_RETRY, Regained};
pub use served::Ports;

/// Maximum number of published ports of one instance.
pub const PORTS_MAX: usize = 16;

/// Maximum number of attempts when the kernel chooses a port.
const CHOICES_MAX: u32 = 16;

/// The sockets, by instance.
#[derive(Debug, Default)]
pub struct Publisher {
    instances: BTreeMap<String, Published>,
}

#[derive(Debug, Default)]
struct Published {
    ports: Vec<Port>,
    /// A generation has the sockets and was not abandoned since.
    given: bool,
}

#[derive(Debug)]
struct Port {
    spec: PublishedPortSpec,
    holding: Holding,
}

#[derive(Debug)]
enum Holding {
    Open(TcpListener),
    /// Bound and shut down: connections are refused.
    Refusing(TcpListener),
    /// Why the daemon does not have the socket.
    Missing(String),
}

impl Port {
    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.spec.address, self.spec.host_port)
    }

    /// Changes the state of the socket; a missing socket stays missing.
    fn turn(&mut self, change: impl FnOnce(TcpListener) -> Holding) {
        let taken = std::mem::replace(&mut self.holding, Holding::Missing(String::new()));
        self.holding = match taken {
            Holding::Open(socket) | Holding::Refusing(socket) => change(socket),
            missing @ Holding::Missing(_) => missing,
        };
    }

    fn listen(&mut self) {
        if let Holding::Refusing(_) = self.holding {
            self.turn(|socket| {
                // Connections of earlier generations may linger at the port: std's listeners set this option too.
                let listens = setsockopt(&socket, ReuseAddr, &true)
                    .and_then(|()| listen(&socket, Backlog::MAXCONN));
                match listens {
                    Ok(()) => Holding::Open(socket),
                    Err(error) => Holding::Missing(error.to_string()),
                }
            });
        }
    }

    fn refuse(&mut self) {
        if let Holding::Open(_) = self.holding {
            self.turn(|socket| {
                // On Linux this returns a listening socket to its state before listen(2): its backlog is reset and the
                // port stays bound (net/ipv4/af_inet.c, inet_shutdown). Without the option, no other socket can bind
                // the port meanwhile (net/ipv4/inet_connection_sock.c, inet_csk_bind_conflict).
                let refuses = setsockopt(&socket, ReuseAddr, &false)
                    .and_then(|()| shutdown(socket.as_raw_fd(), Shutdown::Read));
                match refuses {
                    Ok(()) => Holding::Refusing(socket),
                    Err(_) => Holding::Open(socket),
                }
            });
        }
    }
}

/// Binds `wanted` so that the socket keeps its port while it refuses connections. When a socket stops listening, Linux
/// releases a port that the kernel chose and keeps a port that was bound by number (SOCK_BINDPORT_LOCK).
fn bind_by_number(wanted: SocketAddr) -> io::Result<TcpListener> {
    if wanted.port() != 0 {
        return TcpListener::bind(wanted);
    }
    let mut tries = 1;
    loop {
        let chosen = TcpListener::bind(wanted)?.local_addr()?;
        // Another program may take the port in between.
        match TcpListener::bind(chosen) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < CHOICES_MAX => {
                tries += 1;
            }
            bound => return bound,
        }
    }
}

/// Returns the name by which a workload finds the listener of `port`.
pub fn listener_name(port: u16) -> String {
    format!("port-{port}")
}

/// Returns why a port cannot be published, with the next step.
fn refused(wanted: SocketAddr, error: &io::Error) -> Failure {
    let text = format!("publishing {wanted}: {error}");
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => Failure::new(FailureKind::InvalidRequest, text)
            .hint("this machine does not have that address: give one that it has, 127.0.0.1 or 0.0.0.0"),
        io::ErrorKind::PermissionDenied => Failure::new(FailureKind::Unavailable, text).hint(
            "kmorphd's user may not bind that port: choose one from 1024 up, or give kmorphd CAP_NET_BIND_SERVICE",
        ),
        io::ErrorKind::AddrInUse => Failure::new(FailureKind::InsufficientResources, text)
            .hint("choose a free port, or 0 to have one chosen"),
        _ => Failure::new(FailureKind::InsufficientResources, text),
    }
}

/// Refuses a request that maps one host port to two workload ports.
fn refuse_twice(requests: &[PortRequest]) -> Result<(), Failure> {
    let same = |a: &PortRequest, b: &PortRequest| {
        let anywhere = a.address.is_unspecified() || b.address.is_unspecified();
        a.host_port != 0 && a.host_port == b.host_port && (a.address == b.address || anywhere)
    };
    for (index, second) in requests.iter().enumerate() {
        if requests[..index].iter().any(|first| same(first, second)) {
            let wanted = SocketAddr::new(second.address, second.host_port);
            let text = format!("port {wanted} of the host is to be published twice");
            return Err(Failure::new(FailureKind::InvalidRequest, text)
                .hint("give each published port a host port of its own, or 0 to have one chosen"));
        }
    }
    Ok(())
}

impl Publisher {
    /// Binds the ports of a spawn request.
    ///
    /// # Errors
    /// When a port cannot be bound; nothing stays bound then.
    pub fn bind(
        &mut self,
        instance: &str,
        requests: &[PortRequest],
    ) -> Result<Vec<PublishedPortSpec>, Failure> {
        if requests.len() > PORTS_MAX {
            let text = format!(
                "{} ports are to be published, at most {PORTS_MAX} can be",
                requests.len()
            );
            return Err(Failure::new(FailureKind::InvalidRequest, text));
        }
        refuse_twice(requests)?;
        let mut ports = Vec::new();
        for request in requests {
            let wanted = SocketAddr::new(request.address, request.host_port);
            let refuse = |error: io::Error| refused(wanted, &error);
            let listener = bind_by_number(wanted).map_err(refuse)?;
            let host_port = listener.local_addr().map_err(refuse)?.port();
            let spec = PublishedPortSpec {
                address: request.address,
                host_port,
                port: request.port,
            };
            let holding = Holding::Open(listener);
            ports.push(Port { spec, holding });
        }
        let specs = ports.iter().map(|port| port.spec.clone()).collect();
        if !ports.is_empty() {
            let published = Published {
                ports,
                given: false,
            };
            self.instances.insert(instance.to_owned(), published);
        }
        Ok(specs)
    }

    /// Records the ports that an earlier daemon published for an instance. They are missing until they are regained.
    /// Does nothing if this daemon already knows them.
    pub fn expect(&mut self, instance: &str, specs: &[PublishedPortSpec]) {
        if specs.is_empty() || self.instances.contains_key(instance) {
            return;
        }
        let missing = |spec: &PublishedPortSpec| Port {
            spec: spec.clone(),
            holding: Holding::Missing("kmorphd has just started".to_owned()),
        };
        let published = Published {
            ports: specs.iter().map(missing).collect(),
            given: true,
        };
        self.instances.insert(instance.to_owned(), published);
    }

    /// Takes over sockets from a running agent. Returns whether there was one. Closes a socket that matches no missing
    /// port of the instance.
    fn give(&mut self, instance: &str, sockets: Vec<OwnedFd>) -> bool {
        let Some(published) = self.instances.get_mut(instance) else {
            return false;
        };
        let mut taken = false;
        for socket in sockets.into_iter().map(TcpListener::from) {
            let Ok(bound) = socket.local_addr() else {
                continue;
            };
            let missing = |port: &&mut Port| {
                port.address() == bound && matches!(port.holding, Holding::Missing(_))
            };
            if let Some(port) = published.ports.iter_mut().find(missing) {
                port.holding = Holding::Open(socket);
                taken = true;
            }
        }
        taken
    }

    /// Binds the missing ports, as far as possible.
    fn bind_missing(&mut self, instance: &str) {
        let published = self.instances.get_mut(instance);
        for port in published.into_iter().flat_map(|p| &mut p.ports) {
            let address = port.address();
            if let Holding::Missing(why) = &mut port.holding {
                match TcpListener::bind(address) {
                    Ok(socket) => port.holding = Holding::Open(socket),
                    Err(error) => *why = error.to_string(),
                }
            }
        }
    }

    /// Returns the missing ports, with the reasons; `None` if there are none.
    pub fn missing(&self, instance: &str) -> Option<String> {
        let ports = self.instances.get(instance).map(|p| &p.ports[..])?;
        let missing = ports.iter().filter_map(|port| match &port.holding {
            Holding::Missing(why) => Some(format!("{}: {why}", port.address())),
            Holding::Open(_) | Holding::Refusing(_) => None,
        });
        let missing: Vec<_> = missing.collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    /// Returns listening duplicates for a new generation.
    ///
    /// # Errors
    /// When a port is missing, or descriptors run out: a generation needs all its sockets.
    pub fn duplicates(&mut self, instance: &str) -> io::Result<Vec<HostListener>> {
        let Some(published) = self.instances.get_mut(instance) else {
            return Ok(Vec::new());
        };
        published.given = true;
        let duplicate = |port: &mut Port| {
            port.listen();
            match &port.holding {
                Holding::Open(socket) | Holding::Refusing(socket) => Ok(HostListener {
                    port: PublishedPort {
                        port: port.spec.port,
                        name: listener_name(port.spec.port),
                    },
                    socket: socket.try_clone()?.into(),
                }),
                Holding::Missing(why) => {
                    Err(io::Error::other(format!("{}: {why}", port.address())))
                }
            }
        };
        published.ports.iter_mut().map(duplicate).collect()
    }

    /// Marks the sockets as abandoned: until another generation receives them, no program accepts connections.
    pub fn abandon(&mut self, instance: &str) {
        if let Some(published) = self.instances.get_mut(instance) {
            published.given = false;
        }
    }

    /// Returns whether no generation has the sockets, or will have them before the next [`Publisher::duplicates`].
    pub fn is_abandoned(&self, instance: &str) -> bool {
        self.instances.get(instance).is_some_and(|p| !p.given)
    }

    /// Makes the ports of an instance refuse connections.
    pub fn refuse(&mut self, instance: &str) {
        let published = self.instances.get_mut(instance);
        for port in published.into_iter().flat_map(|p| &mut p.ports) {
            port.refuse();
        }
    }

    /// Returns the ports of an instance, for its status.
    pub fn shown(&self, instance: &str) -> Vec<PortView> {
        let ports = self.instances.get(instance).map_or(&[][..], |p| &p.ports);
        let show = |port: &Port| {
            let state = match &port.holding {
                Holding::Open(_) => PortState::Open,
                Holding::Refusing(_) => PortState::Refusing,
                Holding::Missing(why) => PortState::Missing(why.clone()),
            };
            PortView {
                listen: port.address(),
                port: port.spec.port,
                state,
            }
        };
        ports.iter().map(show).collect()
    }

    /// Closes the ports of an instance that has ended.
    pub fn close(&mut self, instance: &str) {
        self.instances.remove(instance);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpStream;

    fn published(publisher: &mut Publisher) -> PublishedPortSpec {
        let request = PortRequest {
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            host_port: 0,
            port: 6379,
        };
        publisher.bind("web", &[request]).unwrap().remove(0)
    }

    fn state(publisher: &Publisher) -> PortState {
        publisher.shown("web")[0].state.clone()
    }

    #[test]
    fn what_cannot_be_published_is_refused_for_what_is_wrong_with_it() {
        let request = |address: &str, host_port| PortRequest {
            address: address.parse().unwrap(),
            host_port,
            port: 6379,
        };
        let mut publisher = Publisher::default();
        let mut refuse = |requests: &[PortRequest]| {
            let failure = publisher.bind("web", requests).unwrap_err();
            (failure.kind, format!("{failure}; {:?}", failure.next_step))
        };
        // TEST-NET-1: no machine has this address.
        let (kind, text) = refuse(&[request("192.0.2.1", 8080)]);
        assert_eq!(kind, FailureKind::InvalidRequest, "{text}");
        assert!(text.contains("does not have that address"), "{text}");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let (kind, text) = refuse(&[request("127.0.0.1", port)]);
        assert_eq!(kind, FailureKind::InsufficientResources, "{text}");
        assert!(text.contains("choose a free port"), "{text}");
        drop(taken);
        for first in ["127.0.0.1", "0.0.0.0"] {
            let twice = [request(first, port), request("127.0.0.1", port)];
            let (kind, text) = refuse(&twice);
            assert_eq!(kind, FailureKind::InvalidRequest, "{text}");
            assert!(text.contains("twice"), "{text}");
        }
        let denied = io::Error::from(ErrorKind::PermissionDenied);
        let failure = refused("127.0.0.1:80".parse().unwrap(), &denied);
        assert_eq!(failure.kind, FailureKind::Unavailable);
        let any = [request("127.0.0.1", 0), request("127.0.0.1", 0)];
        assert_eq!(publisher.bind("web", &any).unwrap().len(), 2);
    }

    #[test]
    fn a_port_that_refuses_stays_bound_and_serves_again() {
        let mut publisher = Publisher::default();
        let spec = published(&mut publisher);
        let address = SocketAddr::new(spec.address, spec.host_port);
        let mut waiting = TcpStream::connect(address).unwrap();
        publisher.refuse("web");
        assert_eq!(state(&publisher), PortState::Refusing);
        let error = waiting.read(&mut [0]).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionReset,
            "what waited is told"
        );
        let error = TcpStream::connect(address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let error = TcpListener::bind(address).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::AddrInUse,
            "nobody else gets the port"
        );
        let given = publisher.duplicates("web").unwrap().remove(0);
        assert_eq!(state(&publisher), PortState::Open);
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"x").unwrap();
        let (mut served, _) = TcpListener::from(given.socket).accept().unwrap();
        let mut byte = [0];
        served.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn no_generation_is_given_less_than_all_its_sockets() {
        let mut first = Publisher::default();
        let spec = published(&mut first);
        let mut next = Publisher::default();
        next.expect("web", std::slice::from_ref(&spec));
        next.bind_missing("web");
        let missing = next.missing("web").unwrap();
        assert!(missing.contains("in use"), "{missing}");
        assert!(next.duplicates("web").is_err());
        let held = first.duplicates("web").unwrap().remove(0);
        next.give("web", vec![held.socket]);
        assert_eq!(next.missing("web"), None);
        assert_eq!(next.duplicates("web").unwrap().len(), 1);
    }
}
