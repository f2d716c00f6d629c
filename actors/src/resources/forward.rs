//! Forwards published ports on the host, for instances that cannot inherit the listening socket.
//!
//! ```text
//!  client ─▶ [listening socket] ─ target? ─▶ accept ─▶ connect to the active generation ─▶ copy
//!                                   │
//!                                   └ none: connections wait in the socket's backlog
//! ```
//!
//! Invariants: a client's connection goes to one generation for its whole life, so no request reaches two kernels.
//! While there is no target (an instance heals, or a morph is in its downtime), connections are neither accepted nor
//! refused. When a generation is left, its connections are reset, so that the clients notice.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::time::Duration;

use kmorph_backends::contract::Endpoint;
use kmp_transport::link::{Address, connect};
use slog::{Logger, debug, o, warn};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// Maximum number of concurrent connections of one published port; further ones wait in its backlog.
pub const CONNECTIONS_MAX: usize = 1024;
/// Pause after accept failed because no descriptors were left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The destination of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The generation that serves.
    pub generation: u64,
    /// Its address.
    pub endpoint: Endpoint,
}

struct Forwarded {
    target: watch::Sender<Option<Target>>,
    tasks: Vec<JoinHandle<()>>,
}

/// All forwarded ports, by instance.
#[derive(Default)]
pub struct Forwarder {
    instances: BTreeMap<String, Forwarded>,
}

impl Forwarder {
    /// Forwards the `listeners` of `instance`, each to a port of its workload. There is no target at first.
    ///
    /// # Errors
    /// When a socket cannot be watched.
    pub fn open(
        &mut self,
        instance: &str,
        listeners: Vec<(u16, TcpListener)>,
        log: &Logger,
    ) -> io::Result<()> {
        let (target, _) = watch::channel(None);
        let mut tasks = Vec::new();
        for (port, listener) in listeners {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let log = log.new(o!("instance" => instance.to_owned(), "port" => port));
            let serve = serve(listener, port, target.subscribe(), log);
            tasks.push(actix_rt::spawn(serve));
        }
        self.instances
            .insert(instance.to_owned(), Forwarded { target, tasks });
        Ok(())
    }

    /// Returns whether `instance` has forwarded ports.
    pub fn has(&self, instance: &str) -> bool {
        self.instances.contains_key(instance)
    }

    /// Sets the target of new connections; without one they wait.
    pub fn aim(&self, instance: &str, target: Option<Target>) {
        if let Some(forwarded) = self.instances.get(instance) {
            forwarded.target.send_replace(target);
        }
    }

    /// Stops forwarding for `instance` and resets its connections.
    pub fn close(&mut self, instance: &str) {
        if let Some(forwarded) = self.instances.remove(instance) {
            for task in forwarded.tasks {
                task.abort();
            }
        }
    }
}

async fn serve(
    listener: tokio::net::TcpListener,
    port: u16,
    mut target: watch::Receiver<Option<Target>>,
    log: Logger,
) {
    let slots = Rc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = slots.acquire().await else {
            return;
        };
        if target.wait_for(Option::is_some).await.is_err() {
            return;
        }
        // The target may go away while no client connects: the loop must not accept after that.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = target.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let client = match accepted {
            Ok((client, _)) => client,
            Err(error) => {
                let generation = target.borrow().as_ref().map(|t| t.generation);
                warn!(log, "accepting on a published port"; "generation" => generation,
                    "error" => %error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        drop(slot);
        let (target, slots, log) = (target.clone(), slots.clone(), log.clone());
        actix_rt::spawn(async move {
            let _slot = slots.acquire().await;
            if let Err((generation, reason)) = forward(client, port, target).await {
                debug!(log, "a forwarded connection ended"; "generation" => generation,
                    "reason" => &reason);
            }
        });
    }
}

/// Forwards one connection from its client to the current target. Returns why the connection broke, and its
/// generation.
async fn forward(
    mut client: TcpStream,
    port: u16,
    mut target: watch::Receiver<Option<Target>>,
) -> Result<(), (Option<u64>, String)> {
    let aimed = target.wait_for(Option::is_some).await.ok();
    let aimed = aimed.and_then(|found| found.clone());
    let Some(Target {
        generation,
        endpoint,
    }) = aimed
    else {
        return reset(client, None, "the port is no longer published".to_owned());
    };
    let to = Some(generation);
    let mut link = match connect(&Address::from(endpoint), u32::from(port)).await {
        Ok(link) => link,
        Err(error) => return reset(client, to, error.to_string()),
    };
    let _ = client.set_nodelay(true);
    let left = async {
        let gone = |now: &Option<Target>| now.as_ref().is_some_and(|t| t.generation != generation);
        let _ = target.wait_for(gone).await;
    };
    let ended = tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut client, &mut link) => copied,
        () = left => return reset(client, to, format!("generation {generation} was left")),
    };
    match ended {
        Ok(_) => Ok(()),
        Err(error) => reset(client, to, error.to_string()),
    }
}

/// Closes with a reset, so that the client sees an error.
fn reset(
    client: TcpStream,
    generation: Option<u64>,
    reason: String,
) -> Result<(), (Option<u64>, String)> {
    let _ = client.set_zero_linger();
    drop(client);
    Err((generation, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp_transport::link::{Listener, UnixVsockListener, accept_line};
    use std::path::PathBuf;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const PORT: u16 = 6379;

    /// Returns a generation that answers each byte with its number.
    fn generation(number: u8, dir: &std::path::Path) -> Target {
        let path: PathBuf = dir.join(format!("{number}.sock"));
        let bound = UnixVsockListener::bind(&path, u32::from(PORT)).unwrap();
        let listener = Listener::Unix(bound);
        actix_rt::spawn(async move {
            while let Ok(accepted) = listener.accept().await {
                actix_rt::spawn(async move {
                    let mut link = accept_line(accepted).await.unwrap();
                    while link.read_u8().await.is_ok() {
                        link.write_all(&[number]).await.unwrap();
                    }
                });
            }
        });
        Target {
            generation: u64::from(number),
            endpoint: Endpoint::Unix { path },
        }
    }

    async fn ask(client: &mut TcpStream) -> io::Result<u8> {
        client.write_all(b"?").await?;
        client.read_u8().await
    }

    #[actix_rt::test]
    async fn connections_wait_for_a_target_stay_with_it_and_are_reset_when_it_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut forwarder = Forwarder::default();
        let log = Logger::root(slog::Discard, slog::o!());
        forwarder.open("web", vec![(PORT, listener)], &log).unwrap();
        let mut early = TcpStream::connect(address).await.unwrap();
        let waiting = actix_rt::spawn(async move { (ask(&mut early).await, early) });
        let (old, new) = (generation(1, dir.path()), generation(2, dir.path()));
        forwarder.aim("web", Some(old));
        let (answer, mut early) = waiting.await.unwrap();
        assert_eq!(answer.unwrap(), 1);
        forwarder.aim("web", None);
        // Established connections stay during the switch.
        assert_eq!(ask(&mut early).await.unwrap(), 1);
        let mut late = TcpStream::connect(address).await.unwrap();
        forwarder.aim("web", Some(new));
        assert_eq!(ask(&mut late).await.unwrap(), 2);
        let error = ask(&mut early).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        forwarder.close("web");
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[actix_rt::test]
    async fn a_generation_that_does_not_listen_resets_its_clients() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut forwarder = Forwarder::default();
        let log = Logger::root(slog::Discard, slog::o!());
        forwarder.open("web", vec![(PORT, listener)], &log).unwrap();
        let path = dir.path().join("nothing.sock");
        let endpoint = Endpoint::Unix { path };
        forwarder.aim(
            "web",
            Some(Target {
                generation: 1,
                endpoint,
            }),
        );
        let mut client = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut client).await.is_err());
    }
}
