//! The kernel's reactions to writes: pool, instances, transactions, and errors.

use std::collections::BTreeMap;
use std::time::Instant;

use nix::libc::{EBUSY, EINVAL, ENODEV, ENOENT};

use crate::fdt::Fdt;

mod moves;
mod operations;
mod show;

type Done = Result<(), i32>;

const PAGE: u64 = 4096;
/// Memory that the kernel itself takes from the pool for each instance, bytes.
const OWN_BYTES: u64 = 65 * PAGE;

/// An instance in the kernel's records.
#[derive(Clone, Debug, Default)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// Its ID.
    pub id: u32,
    /// Physical IDs of its CPUs.
    pub cpus: Vec<u64>,
    pub(crate) regions: Vec<(u64, u64)>,
    pub(crate) pci: Vec<String>,
    /// Its state, in the kernel's words.
    pub state: &'static str,
    /// The old state that its status file still shows, and until when.
    pub(crate) late: Option<(&'static str, Instant)>,
    own: (u64, u64),
}

impl Instance {
    /// Returns the state that the status file shows now.
    pub(crate) fn shown(&self) -> &'static str {
        match self.late {
            Some((before, until)) if Instant::now() < until => before,
            _ => self.state,
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Pool {
    free: Vec<u64>,
    chunks: Vec<(u64, u64, u32)>,
    pci: Vec<String>,
}

/// A transaction.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub(crate) status: &'static str,
    pub(crate) target: String,
    pub(crate) blob: Vec<u8>,
}

/// A fault to inject, for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Trap {
    /// No fault.
    #[default]
    None,
    /// The next operation on devices fails, because the kexec lock is taken.
    DevicesBusy,
    /// The next overlay is reported as applied, without any effect.
    Lie,
    /// Another program's transaction follows immediately after the next overlay.
    Other,
    /// Like `DevicesBusy`, and the undo fails too.
    NoUndo,
}

/// The emulated kernel.
#[derive(Debug, Default)]
pub struct Mk {
    /// The host's CPUs; the first is its logical CPU 0.
    pub(crate) host: Vec<u64>,
    pool: Option<Pool>,
    /// Its instances.
    pub instances: Vec<Instance>,
    pub(crate) transactions: BTreeMap<u64, Transaction>,
    last: u64,
    next_chunk: u64,
    /// The next fault.
    pub trap: Trap,
    /// True during a load, boot or halt: the kernel's kexec lock.
    pub(crate) kexec: bool,
}

impl Mk {
    pub(crate) fn new() -> Self {
        Self {
            host: (0..16).map(|n| n * 2).collect(),
            last: 1,
            next_chunk: 0x8_4000_0000,
            ..Self::default()
        }
    }

    pub(crate) fn write_baseline(&mut self, blob: &[u8]) -> Done {
        let fdt = Fdt::parse(blob).ok_or(EINVAL)?;
        if fdt.kid("instances").is_some_and(|i| !i.kids.is_empty()) {
            return Err(EINVAL);
        }
        if self.pool.is_some() {
            return Err(EBUSY);
        }
        let resources = fdt.kid("resources").ok_or(EINVAL)?;
        let cpus = resources
            .get_u64s("cpus")
            .filter(|c| !c.is_empty())
            .ok_or(EINVAL)?;
        let mut sizes = Vec::new();
        for memory in resources
            .kids
            .iter()
            .filter(|k| k.name.starts_with("memory@"))
        {
            sizes.push((
                size_of(memory)?,
                memory.get_u32("numa-node-id").unwrap_or(0),
            ));
        }
        if sizes.is_empty() {
            return Err(EINVAL);
        }
        if cpus.iter().any(|cpu| !self.host.contains(cpu)) {
            return Err(ENODEV);
        }
        let mut pci = Vec::new();
        for device in resources.kid("devices").iter().flat_map(|d| &d.kids) {
            if device.get_text("device-type") == Some("pci") {
                let complete =
                    device.get_u32("vendor-id").is_some() && device.get_u32("device-id").is_some();
                let id = device
                    .get_text("pci-id")
                    .filter(|_| complete)
                    .ok_or(EINVAL)?;
                pci.push(id.to_owned());
            }
        }
        if cpus.contains(&self.host[0]) {
            return Err(EBUSY);
        }
        self.host.retain(|cpu| !cpus.contains(cpu));
        self.pool = Some(Pool {
            free: cpus,
            chunks: Vec::new(),
            pci,
        });
        for (size, node) in sizes {
            self.grow(size, node);
        }
        Ok(())
    }

    fn grow(&mut self, size: u64, node: u32) {
        let base = self.next_chunk;
        self.next_chunk += size.next_multiple_of(1 << 32) + (1 << 32);
        if let Some(pool) = &mut self.pool {
            pool.chunks.push((base, size, node));
        }
    }

    pub(crate) fn write_overlay(&mut self, blob: &[u8]) -> Done {
        let fdt = Fdt::parse(blob).ok_or(EINVAL)?;
        let trap = std::mem::take(&mut self.trap);
        let done = match trap {
            Trap::Lie => Ok(()),
            Trap::DevicesBusy | Trap::NoUndo => {
                self.trap = trap;
                self.run(&fdt, false)
            }
            _ => self.run(&fdt, false),
        };
        if done.is_err() && self.trap == Trap::DevicesBusy {
            self.trap = Trap::None;
        }
        self.record(if done.is_ok() { "applied" } else { "failed" }, &fdt, blob);
        if trap == Trap::Other {
            self.record("failed", &Fdt::new(""), &Fdt::new("").blob());
        }
        Ok(())
    }

    fn record(&mut self, status: &'static str, fdt: &Fdt, blob: &[u8]) {
        self.last += 1;
        let target = fdt.kids.first().and_then(|f| f.get_text("target-path"));
        let transaction = Transaction {
            status,
            target: target.unwrap_or("unknown").to_owned(),
            blob: blob.to_vec(),
        };
        self.transactions.insert(self.last, transaction);
    }

    pub(crate) fn remove_transaction(&mut self, number: u64) -> Done {
        let blob = self.transactions.get(&number).ok_or(ENOENT)?.blob.clone();
        let undone = if self.trap == Trap::NoUndo {
            Err(EBUSY)
        } else {
            self.run(&Fdt::parse(&blob).ok_or(EINVAL)?, true)
        };
        match undone {
            Ok(()) => {
                self.transactions.remove(&number);
                Ok(())
            }
            Err(error) => {
                if let Some(transaction) = self.transactions.get_mut(&number) {
                    transaction.status = "failed";
                }
                Err(error)
            }
        }
    }
}

fn size_of(item: &Fdt) -> Result<u64, i32> {
    match item.get_u64s("size").as_deref() {
        Some([size]) if *size > 0 && size.is_multiple_of(PAGE) => Ok(*size),
        _ => Err(EINVAL),
    }
}
