//! The pool: CPUs and memory that the daemon allocates to instances.
//!
//! Pure accounting, no I/O. A [`Lease`] records the resources of one generation; [`Pool::give_back`] frees it only
//! once that generation is fenced. After a restart, the daemon takes the leases of adopted generations again with
//! [`Pool::retake`].

use std::collections::BTreeMap;

use crate::model::shown::PoolUsage;

use crate::model::settings::Stock;

/// CPUs and memory held by one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Host CPUs.
    pub cpus: Vec<u16>,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// The holder of a lease: instance and generation.
pub type Holder = (String, u64);

/// The pool cannot satisfy a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolExhausted {
    /// Not enough CPUs.
    #[error("{asked} CPUs were asked for, {free} of the pool's {total} are free")]
    Cpus {
        /// Requested.
        asked: u16,
        /// Free.
        free: usize,
        /// In the pool.
        total: usize,
    },
    /// Not enough memory.
    #[error("{} of memory were asked for{}, {} of the pool's {} are free", size(*asked), besides(*bookkeeping), size(*free), size(*total))]
    Memory {
        /// Requested.
        asked: u64,
        /// Additional memory for bookkeeping.
        bookkeeping: u64,
        /// Free.
        free: u64,
        /// In the pool.
        total: u64,
    },
}

/// Returns a size in its largest binary unit: whole, or with one decimal, rounded down.
fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let reached = units.into_iter().find(|(shift, _)| bytes >> shift > 0);
    let Some((shift, unit)) = reached else {
        return format!("{bytes} bytes");
    };
    let (whole, rest) = (bytes >> shift, bytes & ((1 << shift) - 1));
    match rest {
        0 => format!("{whole} {unit}"),
        // Less than 10, because the rest is below a unit of at most 2^40.
        rest => format!("{whole}.{} {unit}", (rest * 10) >> shift),
    }
}

fn besides(bookkeeping: u64) -> String {
    match bookkeeping {
        0 => String::new(),
        bytes => format!(
            " and {} are needed for the kernel's bookkeeping",
            size(bytes)
        ),
    }
}

/// The accounts.
#[derive(Debug)]
pub struct Pool {
    stock: Stock,
    leases: BTreeMap<Holder, Lease>,
}

impl Pool {
    /// Creates a pool without leases.
    pub fn new(mut stock: Stock) -> Self {
        stock.cpus.sort_unstable();
        stock.cpus.dedup();
        Self {
            stock,
            leases: BTreeMap::new(),
        }
    }

    /// Takes `cpus` CPUs and `memory_bytes` for `holder`.
    ///
    /// # Errors
    /// When the pool does not have enough. Nothing is taken then.
    pub fn take(
        &mut self,
        holder: Holder,
        cpus: u16,
        memory_bytes: u64,
    ) -> Result<Lease, PoolExhausted> {
        let mut choice = self.candidates();
        if choice.len() < usize::from(cpus) {
            let (free, total) = (choice.len(), self.stock.cpus.len());
            return Err(PoolExhausted::Cpus {
                asked: cpus,
                free,
                total,
            });
        }
        let free = self.memory_free();
        if self.with_bookkeeping(memory_bytes) > free {
            return Err(PoolExhausted::Memory {
                asked: memory_bytes,
                bookkeeping: self.stock.bookkeeping_bytes,
                free,
                total: self.stock.memory_bytes,
            });
        }
        choice.truncate(usize::from(cpus));
        choice.sort_unstable();
        let lease = Lease {
            cpus: choice,
            memory_bytes,
        };
        self.leases.insert(holder, lease.clone());
        Ok(lease)
    }

    /// Records that a running `holder` holds `lease`, even if the pool no longer contains it: a smaller pool in the
    /// configuration takes nothing from a running instance.
    pub fn retake(&mut self, holder: Holder, lease: Lease) {
        self.leases.insert(holder, lease);
    }

    /// Frees the lease of `holder`. Returns it, or `None` if there was none.
    pub fn give_back(&mut self, holder: &Holder) -> Option<Lease> {
        self.leases.remove(holder)
    }

    /// Changes the size of the pool; leases stay.
    pub fn resize(&mut self, stock: Stock) {
        let leases = std::mem::take(&mut self.leases);
        *self = Self {
            leases,
            ..Self::new(stock)
        };
    }

    /// Returns all holders of leases.
    pub fn holders(&self) -> Vec<Holder> {
        self.leases.keys().cloned().collect()
    }

    /// Returns the allocated and free resources.
    pub fn usage(&self) -> PoolUsage {
        let unused = self.stock.cpus.iter().filter(|c| self.load(**c) == 0);
        PoolUsage {
            cpus: self.stock.cpus.clone(),
            cpus_free: unused.copied().collect(),
            cpus_shared: self.stock.cpus_shared,
            memory_bytes: self.stock.memory_bytes,
            memory_free_bytes: self.memory_free(),
            cpus_besides: Vec::new(),
            memory_besides_bytes: 0,
        }
    }

    fn load(&self, cpu: u16) -> usize {
        self.leases
            .values()
            .filter(|l| l.cpus.contains(&cpu))
            .count()
    }

    fn memory_free(&self) -> u64 {
        let taken = self.leases.values();
        let taken = taken.map(|lease| self.with_bookkeeping(lease.memory_bytes));
        let used = taken.fold(0u64, u64::saturating_add);
        self.stock.memory_bytes.saturating_sub(used)
    }

    fn with_bookkeeping(&self, memory_bytes: u64) -> u64 {
        memory_bytes.saturating_add(self.stock.bookkeeping_bytes)
    }

    /// Returns the CPUs that can be allocated now, the least loaded first.
    fn candidates(&self) -> Vec<u16> {
        let mut loaded: Vec<_> = self
            .stock
            .cpus
            .iter()
            .map(|c| (self.load(*c), *c))
            .collect();
        if !self.stock.cpus_shared {
            loaded.retain(|(load, _)| *load == 0);
        }
        loaded.sort_unstable();
        loaded.into_iter().map(|(_, cpu)| cpu).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(cpus: &[u16], cpus_shared: bool, memory_bytes: u64) -> Stock {
        Stock {
            cpus: cpus.to_vec(),
            cpus_shared,
            memory_bytes,
            bookkeeping_bytes: 0,
        }
    }

    fn holder(generation: u64) -> Holder {
        ("web".to_owned(), generation)
    }

    #[test]
    fn sizes_are_told_in_units_that_people_read() {
        assert_eq!(size(1 << 40), "1 TiB");
        assert_eq!(size(1536 << 20), "1.5 GiB");
        assert_eq!(size(24_068_542_464), "22.4 GiB");
        assert_eq!(size((1 << 30) - 1), "1023.9 MiB");
        assert_eq!(size(1000), "1000 bytes");
        assert_eq!(size(u64::MAX), "16777215.9 TiB");
        assert_eq!(size(0), "0 bytes");
    }

    #[test]
    fn what_is_taken_is_not_given_twice_and_comes_back() {
        let mut pool = Pool::new(stock(&[2, 3], false, 100));
        let first = pool.take(holder(1), 1, 60).unwrap();
        let second = pool.take(holder(2), 1, 40).unwrap();
        assert_ne!(first.cpus, second.cpus);
        assert!(matches!(
            pool.take(holder(3), 1, 0),
            Err(PoolExhausted::Cpus { free: 0, .. })
        ));
        assert_eq!(pool.give_back(&holder(1)), Some(first));
        assert!(matches!(
            pool.take(holder(3), 1, 61),
            Err(PoolExhausted::Memory { free: 60, .. })
        ));
        assert_eq!(pool.usage().cpus_free.len(), 1, "a refusal takes nothing");
        pool.take(holder(3), 1, 60).unwrap();
    }

    #[test]
    fn a_shared_pool_gives_the_least_loaded_cpu() {
        let mut pool = Pool::new(stock(&[0, 1], true, 1000));
        let first = pool.take(holder(1), 1, 1).unwrap();
        let second = pool.take(holder(2), 1, 1).unwrap();
        assert_ne!(first.cpus, second.cpus);
        assert!(
            pool.take(holder(3), 3, 1).is_err(),
            "more CPUs than there are"
        );
        assert_eq!(pool.take(holder(3), 2, 1).unwrap().cpus, vec![0, 1]);
    }

    #[test]
    fn a_smaller_pool_takes_nothing_from_what_runs() {
        let mut pool = Pool::new(stock(&[0, 1], false, 1000));
        let lease = pool.take(holder(1), 2, 900).unwrap();
        pool.resize(stock(&[0], false, 500));
        assert_eq!(pool.usage().memory_free_bytes, 0);
        assert_eq!(pool.give_back(&holder(1)), Some(lease));
        assert_eq!(pool.usage().memory_free_bytes, 500);
    }

    #[test]
    fn each_generation_takes_its_bookkeeping_besides() {
        let mut pool = Pool::new(Stock {
            bookkeeping_bytes: 2,
            ..stock(&[0, 1, 2], false, 100)
        });
        pool.take(holder(1), 1, 48).unwrap();
        assert_eq!(pool.usage().memory_free_bytes, 50);
        let refused = pool.take(holder(2), 1, 49).unwrap_err();
        let text = "49 bytes of memory were asked for and 2 bytes are needed for the kernel's bookkeeping, \
                    50 bytes of the pool's 100 bytes are free";
        assert_eq!(refused.to_string(), text);
        pool.take(holder(2), 1, 48).unwrap();
        assert_eq!(pool.usage().memory_free_bytes, 0);
    }
}
