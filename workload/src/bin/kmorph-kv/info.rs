//! The output of INFO.

use std::time::Instant;

use kmorph_workload::arena::Result;
use kmorph_workload::store::Store;

use crate::resp::Limits;

/// Information about this process, for INFO and CONFIG.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) started: Instant,
    pub(crate) instance: String,
    pub(crate) generation: String,
    pub(crate) kernel_release: String,
    pub(crate) limits: Limits,
    pub(crate) max_clients: usize,
    pub(crate) clients: usize,
    /// Number of commands executed by this process.
    pub(crate) commands: u64,
    /// Number of connections accepted by this process, without those taken over.
    pub(crate) accepted: u64,
}

impl Facts {
    /// Reads the values from the environment; the agent's registration overrides them.
    pub(crate) fn from_env(limits: Limits, max_clients: usize) -> Self {
        let env = |name: &str| std::env::var(name).unwrap_or_default();
        let running = nix::sys::utsname::uname()
            .map(|uname| uname.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let told = env("KMORPH_KERNEL_RELEASE");
        Self {
            started: Instant::now(),
            instance: env("KMORPH_INSTANCE"),
            generation: env("KMORPH_GENERATION"),
            kernel_release: if told.is_empty() { running } else { told },
            limits,
            max_clients,
            clients: 0,
            commands: 0,
            accepted: 0,
        }
    }
}

/// Returns the text of INFO.
pub(crate) fn text(facts: &Facts, store: &Store) -> Result<String> {
    let state = store.state()?;
    let keys = store.keys()?;
    let expires = store.keys_with_expiry()?;
    Ok(format!(
        "# Server\r\n\
         server_name:kmorph-kv\r\n\
         kmorph_kv_version:{version}\r\n\
         redis_version:7.0.0\r\n\
         redis_mode:standalone\r\n\
         os:Linux {kernel}\r\n\
         process_id:{pid}\r\n\
         uptime_in_seconds:{uptime}\r\n\
         \r\n# Kmorph\r\n\
         kmorph_instance:{instance}\r\n\
         kmorph_generation:{generation}\r\n\
         kmorph_kernel_release:{kernel}\r\n\
         kmorph_state_epoch:{epoch}\r\n\
         kmorph_state_changes:{changes}\r\n\
         kmorph_state_digest:{digest:016x}\r\n\
         \r\n# Clients\r\n\
         connected_clients:{clients}\r\n\
         maxclients:{max_clients}\r\n\
         \r\n# Memory\r\n\
         used_memory:{used}\r\n\
         maxmemory:{capacity}\r\n\
         \r\n# Stats\r\n\
         total_connections_received:{accepted}\r\n\
         total_commands_processed:{commands}\r\n\
         \r\n# Replication\r\n\
         role:master\r\n\
         \r\n# Keyspace\r\n\
         db0:keys={keys},expires={expires},avg_ttl=0\r\n",
        version = env!("CARGO_PKG_VERSION"),
        kernel = facts.kernel_release,
        pid = std::process::id(),
        uptime = facts.started.elapsed().as_secs(),
        instance = facts.instance,
        generation = facts.generation,
        epoch = store.epoch(),
        changes = state.counter,
        digest = state.digest,
        clients = facts.clients,
        max_clients = facts.max_clients,
        used = state.used_bytes,
        capacity = store.capacity(),
        accepted = facts.accepted,
        commands = facts.commands,
    ))
}
