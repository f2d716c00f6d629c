//! Regains the sockets of published ports: from the agents that hold them, otherwise by binding them again.

use std::time::Duration;

use crate::model::EventKind;
use futures_util::future::join_all;
use slog::{info, warn};

use super::Ports;
use crate::model::generation::AnyGeneration;
use crate::platform::ambient;
use crate::platform::events::Draft;

/// Pause between two attempts to regain a port.
pub const PORT_RETRY: Duration = Duration::from_millis(500);
/// Maximum time that a spawn waits for its ports.
const PORT_WAIT: Duration = Duration::from_secs(30);

/// How the missing ports of an instance were regained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Regained {
    /// None was missing, or an agent returned some of them and still has them too.
    Shared,
    /// All missing ports were bound again: no agent had them.
    Bound,
}

impl Ports {
    /// Tries once to regain the missing ports of `instance`: from the agents of `holders`, generations that may run,
    /// otherwise by binding them. Publishes changes as events of `generation`, the active one.
    ///
    /// # Errors
    /// The ports that are still missing, with the reasons.
    pub async fn regain(
        &self,
        instance: &str,
        generation: u64,
        holders: &[AnyGeneration],
    ) -> Result<Regained, String> {
        let Some(before) = self.publisher.borrow().missing(instance) else {
            return Ok(Regained::Shared);
        };
        let mut regained = Regained::Bound;
        if self.backend.passes_sockets() {
            let asked = join_all(holders.iter().map(|holder| self.ask_for_sockets(holder))).await;
            for sockets in asked {
                if self.publisher.borrow_mut().give(instance, sockets) {
                    regained = Regained::Shared;
                }
            }
        }
        self.publisher.borrow_mut().bind_missing(instance);
        let missing = self.publisher.borrow().missing(instance);
        match missing {
            None => {
                self.forward(instance).map_err(|e| e.to_string())?;
                info!(self.log, "its published ports are held"; "instance" => instance,
                    "generation" => generation);
                let text = "published ports: kmorphd holds all of them";
                self.events
                    .publish(Draft::of(EventKind::Ports, instance, generation, text));
                Ok(regained)
            }
            Some(missing) => {
                if missing != before {
                    warn!(self.log, "a published port is missing"; "instance" => instance,
                        "generation" => generation, "missing" => &missing);
                    let text = format!("published ports: {missing}; kmorphd keeps trying");
                    self.events
                        .publish(Draft::of(EventKind::Ports, instance, generation, text));
                }
                Err(missing)
            }
        }
    }

    async fn ask_for_sockets(&self, holder: &AnyGeneration) -> Vec<std::os::fd::OwnedFd> {
        let Some(placement) = holder.placement().cloned() else {
            return Vec::new();
        };
        let backend = self.backend.clone();
        let asked = ambient::blocking(move || backend.passed_sockets(&placement)).await;
        match asked {
            Ok(Ok(sockets)) => sockets,
            Ok(Err(error)) => {
                info!(self.log, "an agent did not give the published sockets back";
                    "instance" => &holder.instance, "generation" => holder.generation,
                    "error" => %error);
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Waits until the daemon holds every published port of `instance`, for [`PORT_WAIT`] at most.
    ///
    /// # Errors
    /// The ports that another program holds, with the next step.
    pub async fn wait(&self, instance: &str, generation: u64) -> Result<(), String> {
        let deadline = tokio::time::Instant::now() + PORT_WAIT;
        loop {
            let Err(missing) = self.regain(instance, generation, &[]).await else {
                return Ok(());
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(format!(
                    "a published port cannot be had: {missing}; end the program that has the port (`ss -ltnp` shows it)"
                ));
            }
            tokio::time::sleep(PORT_RETRY).await;
        }
    }
}
