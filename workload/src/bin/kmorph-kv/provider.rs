//! Moves the server: the `cooperative` provider for its arena and its connections.
//!
//! By reference, the arena, the listening sockets and every connection with its buffers move; the new process maps
//! and prefaults the arena before the old one freezes. In rounds, the arena is copied; connections stay behind and
//! break when the old process exits.

use std::time::{Duration, Instant};

use kmorph_workload::arena::{ArenaError, OwnershipPhase};
use kmorph_workload::handover::message::{
    Check, FailureCode, Mode, StateDigest, mode_bit, state_kind,
};
use kmorph_workload::provider::{
    Description, DirtyChunk, ExportSize, Figures, IncomingConnection, IncomingItem,
    OutgoingConnection, OutgoingItem, Provider, ProviderError, Result,
};
use kmorph_workload::store::Store;

use crate::connection::Connection;
use crate::server::{Server, unix_millis};

/// Name of the only memory region, and number of its section.
const ARENA: &str = "arena";
const ARENA_SECTION: u32 = 0;
/// Maximum size of memory that came into use after the early prefault and is populated while
/// clients wait, in bytes; the rest is populated on first access.
const LATE_PREFAULT_BYTES: u64 = 4 << 20;

impl Server {
    fn exported(&mut self) -> Result<&mut Store> {
        let missing = || ProviderError::new(FailureCode::WrongPhase, "there is no state yet");
        self.store.as_mut().ok_or_else(missing)
    }
}

impl Provider for Server {
    fn describe(&self) -> Description {
        Description {
            name: "kmorph-kv".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_kinds: state_kind::MEMORY | state_kind::LISTENERS | state_kind::CONNECTIONS,
            modes: mode_bit::BY_REFERENCE | mode_bit::ROUNDS,
        }
    }

    fn figures(&self) -> Figures {
        let connections = u32::try_from(self.connections.len()).unwrap_or(u32::MAX);
        let store = self.store.as_ref();
        Figures {
            state_bytes: store.and_then(|s| s.touched_bytes().ok()).unwrap_or(0),
            used_bytes: store
                .and_then(|s| s.state().ok())
                .map_or(0, |s| s.used_bytes),
            dirty_bytes_per_s: self.dirty_bytes_per_s,
            connections,
            items: store.and_then(|s| s.keys().ok()).unwrap_or(0),
            requests: self.facts.commands,
        }
    }

    fn prepare_export(&mut self, mode: Mode) -> Result<ExportSize> {
        let store = self.exported()?;
        store.stop_tracking();
        if mode == Mode::Rounds {
            store.track_dirty()?;
        }
        Ok(ExportSize {
            total_len: store.capacity(),
            dirty_bytes: store.dirty_bytes(),
        })
    }

    fn items(&self) -> Vec<OutgoingItem<'_>> {
        let arena = self.store.iter().map(|store| OutgoingItem::Memory {
            name: ARENA.to_owned(),
            len: store.capacity(),
            fd: store.fd(),
        });
        let listeners = self.listeners.iter().map(|listener| {
            use std::os::fd::AsFd;
            OutgoingItem::Listener {
                name: listener.name.clone(),
                fd: listener.socket.as_fd(),
            }
        });
        arena.chain(listeners).collect()
    }

    fn read_dirty(&mut self, max_bytes: usize) -> Result<Option<DirtyChunk<'_>>> {
        let taken = self.exported()?.read_dirty(max_bytes as u64)?;
        Ok(taken.map(|(offset, bytes)| DirtyChunk {
            section: ARENA_SECTION,
            offset,
            bytes,
        }))
    }

    fn dirty_bytes(&self) -> u64 {
        self.store.as_ref().map_or(0, Store::dirty_bytes)
    }

    fn freeze(&mut self) -> Result<StateDigest> {
        Ok(self.exported()?.freeze()?)
    }

    fn connections(&self) -> Vec<OutgoingConnection<'_>> {
        self.connections
            .iter()
            .map(|(_, connection)| connection.export())
            .collect()
    }

    fn resume(&mut self) -> Result<()> {
        let store = self.exported()?;
        if !store.is_owner() {
            store.resume()?;
        }
        store.stop_tracking();
        Ok(())
    }

    fn prepare_import(&mut self, mode: Mode, total_len: u64) -> Result<()> {
        self.close_all();
        self.prefaulted = 0;
        self.store = match mode {
            Mode::ByReference => None,
            Mode::Rounds => Some(Store::awaiting(total_len)?),
        };
        Ok(())
    }

    fn import(&mut self, item: IncomingItem) -> Result<()> {
        match item {
            IncomingItem::Memory { name, len, fd } if name == ARENA && self.store.is_none() => {
                self.store = Some(Store::open(fd, len)?);
                Ok(())
            }
            // The agent has passed the published listeners already.
            IncomingItem::Listener { name, .. }
                if self.listeners.iter().any(|l| l.name == name) =>
            {
                Ok(())
            }
            IncomingItem::Listener { name, fd } => self
                .add_listener(name, fd)
                .map_err(|error| ProviderError::new(FailureCode::System, error.to_string())),
            IncomingItem::Memory { name, .. } | IncomingItem::File { name, .. } => {
                let text = format!("unknown or duplicate item {name:?}");
                Err(ProviderError::new(FailureCode::BadState, text))
            }
        }
    }

    fn early_complete(&mut self) -> Result<u64> {
        let missing = || ProviderError::new(FailureCode::BadState, "the arena was not sent");
        let store = self.store.as_ref().ok_or_else(missing)?;
        let end = store.touched_bytes()?;
        store.prefault(0, end)?;
        self.prefaulted = end;
        Ok(end)
    }

    fn apply(&mut self, section: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        if section != ARENA_SECTION {
            let text = format!("there is no memory section {section}");
            return Err(ProviderError::new(FailureCode::BadRequest, text));
        }
        Ok(self.exported()?.apply(offset, bytes)?)
    }

    fn import_connections(&mut self, connections: Vec<IncomingConnection>) -> Result<()> {
        for IncomingConnection { fd, buffers } in connections {
            let malformed = || ProviderError::new(FailureCode::BadState, "malformed connection");
            let connection = Connection::import(fd, buffers).ok_or_else(malformed)?;
            let key = self.add_connection(connection).map_err(|errno| {
                let text = format!("waiting on a client: {errno}");
                ProviderError::new(FailureCode::System, text)
            })?;
            // No event announces the commands and answers that arrived with the connection.
            self.ready.push(key);
        }
        if let Some(store) = &self.store {
            let end = store.touched_bytes()?;
            store.prefault(
                self.prefaulted,
                end.min(self.prefaulted + LATE_PREFAULT_BYTES),
            )?;
        }
        Ok(())
    }

    fn forget_connections(&mut self) {
        self.close_all();
    }

    fn validate(&mut self, frozen: bool, budget: Duration) -> Vec<Check> {
        let store = self.store.as_ref();
        let frozen = frozen || store.is_some_and(is_frozen);
        let listening = self.listeners.len();
        let mut checks = vec![check("listening sockets", || {
            if listening == 0 {
                return Err("none".to_owned());
            }
            Ok(format!("{listening} present"))
        })];
        let Some(store) = store else {
            checks.push(check("arena", || Err("not received".to_owned())));
            return checks;
        };
        checks.push(check("arena header", || {
            store.check_header().map_err(|error| error.to_string())?;
            Ok(format!("{} bytes of a known layout", store.capacity()))
        }));
        if frozen {
            checks.push(check("arena settled", || {
                store.check_settled().map_err(|error| error.to_string())?;
                Ok("no unfinished change".to_owned())
            }));
            checks.push(check("arena content", || {
                let walked = store
                    .verify_content(budget)
                    .map_err(|error| error.to_string())?;
                Ok(format!(
                    "{} of {} keys checked in the time given",
                    walked.keys, walked.of
                ))
            }));
        }
        checks
    }

    fn activate(&mut self, expected: Option<StateDigest>, budget: Duration) -> Result<StateDigest> {
        let bad = |text: &str| ProviderError::new(FailureCode::BadState, text);
        let store = self
            .store
            .as_ref()
            .ok_or_else(|| bad("the arena was not sent"))?;
        store.check_header()?;
        store.check_settled()?;
        if !is_frozen(store) {
            return Err(bad("the arena is not frozen: the source may still write"));
        }
        let state = store.state()?;
        if expected.is_some_and(|expected| expected != state) {
            return Err(bad(
                "the arena differs from the state that the source froze",
            ));
        }
        store.verify_content(budget)?;
        could_answer(store)?;
        Ok(state)
    }

    fn serve(&mut self) -> Result<()> {
        self.exported()?.claim()?;
        Ok(())
    }
}

/// Looks up a key, as a first request would.
fn could_answer(store: &Store) -> std::result::Result<(), ArenaError> {
    let now = unix_millis();
    let mut key = None;
    store.scan(0, 1, now, |found| {
        key.get_or_insert_with(|| found.to_vec());
    })?;
    store.get(key.as_deref().unwrap_or_default(), now)?;
    Ok(())
}

fn is_frozen(store: &Store) -> bool {
    store
        .ownership()
        .is_ok_and(|ownership| ownership.phase == OwnershipPhase::Frozen)
}

fn check(name: &str, run: impl FnOnce() -> std::result::Result<String, String>) -> Check {
    let begin = Instant::now();
    let result = run();
    Check {
        name: name.to_owned(),
        passed: result.is_ok(),
        duration_us: u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX),
        detail: result.unwrap_or_else(|text| text),
    }
}
