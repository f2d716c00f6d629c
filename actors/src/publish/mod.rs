//! Published ports: the listening sockets on the host.
//!
//! The daemon binds a port once and keeps it for the instance's whole life. Every generation is
//! given a duplicate, so connections made while one is being replaced wait in the backlog instead of
//! being refused. A daemon that was restarted asks a running agent for its duplicates, since a second
//! bind would fail while they are open.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use kmorph_backends::contract::HostListener;
use kmorph_control_api::{ApiError, ErrorCode, PublishRequest};
use kmorph_launch::PublishedPort;

use crate::journal::PublishedPortSpec;

/// Most published ports of one instance.
pub const PORTS_MAX: usize = 16;

/// The sockets, by instance.
#[derive(Debug, Default)]
pub struct Publisher {
    sockets: BTreeMap<String, Vec<(PublishedPortSpec, TcpListener)>>,
}

/// The name under which a workload finds the listener of `port`.
pub fn listener_name(port: u16) -> String {
    format!("port-{port}")
}

impl Publisher {
    /// Binds what a spawn asks for.
    ///
    /// # Errors
    /// When an address does not parse or a port cannot be bound; nothing stays bound then.
    pub fn bind(
        &mut self,
        instance: &str,
        requests: &[PublishRequest],
    ) -> Result<Vec<PublishedPortSpec>, ApiError> {
        if requests.len() > PORTS_MAX {
            let text = format!(
                "{} ports are to be published, at most {PORTS_MAX} can be",
                requests.len()
            );
            return Err(ApiError::new(ErrorCode::InvalidRequest, text));
        }
        let mut bound = Vec::new();
        for request in requests {
            let address: IpAddr = request.address.parse().map_err(|_| {
                let text = format!("{:?} is no IP address to publish on", request.address);
                ApiError::new(ErrorCode::InvalidRequest, text).hint("use 127.0.0.1:6379:6379")
            })?;
            let wanted = SocketAddr::new(address, request.host_port);
            let refuse = |error: io::Error| {
                let text = format!("publishing {wanted}: {error}");
                ApiError::new(ErrorCode::InsufficientResources, text)
                    .hint("choose a free port, or 0 to have one chosen")
            };
            let listener = TcpListener::bind(wanted).map_err(refuse)?;
            let host_port = listener.local_addr().map_err(refuse)?.port();
            bound.push((
                PublishedPortSpec {
                    address,
                    host_port,
                    port: request.port,
                },
                listener,
            ));
        }
        let specs = bound.iter().map(|(spec, _)| spec.clone()).collect();
        if !bound.is_empty() {
            self.sockets.insert(instance.to_owned(), bound);
        }
        Ok(specs)
    }

    /// Holds sockets that were bound by an earlier daemon.
    ///
    /// # Errors
    /// When one of them is no TCP listener.
    pub fn adopt(&mut self, instance: &str, sockets: Vec<(PublishedPortSpec, OwnedFd)>) {
        let listeners = sockets
            .into_iter()
            .map(|(spec, fd)| (spec, TcpListener::from(fd)));
        self.sockets
            .insert(instance.to_owned(), listeners.collect());
    }

    /// Binds the ports of an instance again, when no generation of it runs.
    ///
    /// # Errors
    /// The system's.
    pub fn rebind(&mut self, instance: &str, specs: &[PublishedPortSpec]) -> io::Result<()> {
        let mut bound = Vec::new();
        for spec in specs {
            let listener = TcpListener::bind(SocketAddr::new(spec.address, spec.host_port))?;
            bound.push((spec.clone(), listener));
        }
        self.sockets.insert(instance.to_owned(), bound);
        Ok(())
    }

    /// Duplicates for a new generation.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn duplicates(&self, instance: &str) -> io::Result<Vec<HostListener>> {
        let held = self.sockets.get(instance).map_or(&[][..], Vec::as_slice);
        held.iter()
            .map(|(spec, listener)| {
                let port = PublishedPort {
                    port: spec.port,
                    name: listener_name(spec.port),
                };
                Ok(HostListener {
                    port,
                    socket: listener.try_clone()?.into(),
                })
            })
            .collect()
    }

    /// Closes the ports of an instance that is gone.
    pub fn close(&mut self, instance: &str) {
        self.sockets.remove(instance);
    }
}
