//! Moves CPUs, devices and memory between host, pool and instances.

use nix::libc::{EBUSY, EINVAL, ENODEV, ENOENT, ENOMEM, EPERM};

use super::{Done, Mk, PAGE, size_of};
use crate::fdt::Fdt;

impl Mk {
    /// Finds the first free range of `bytes` in one piece, on the NUMA node or, without `node`, on any.
    pub(super) fn allocate(
        &self,
        bytes: u64,
        node: Option<u32>,
        besides: &[(u64, u64)],
    ) -> Result<(u64, u64), i32> {
        let pool = self.pool.as_ref().ok_or(ENODEV)?;
        let mut used: Vec<(u64, u64)> = self
            .instances
            .iter()
            .flat_map(|i| i.regions.iter().copied().chain([i.own]))
            .collect();
        used.extend_from_slice(besides);
        used.sort_unstable();
        let of_node = |of: u32| node.is_none_or(|node| node == of);
        for (base, size, _) in pool.chunks.iter().filter(|(.., of)| of_node(*of)) {
            let mut at = *base;
            for (start, length) in used
                .iter()
                .filter(|(start, _)| (*base..base + size).contains(start))
            {
                if start - at >= bytes {
                    return Ok((at, bytes));
                }
                at = start + length;
            }
            if base + size - at >= bytes {
                return Ok((at, bytes));
            }
        }
        Err(ENOMEM)
    }

    /// Allocates memory of a new instance: in one piece if possible, else half of the size, repeatedly, until a piece
    /// fits; then the rest in the same way (`multikernel_create_instance_pool` in `kernel/multikernel/mem.c`).
    pub(super) fn allocate_pieces(
        &self,
        bytes: u64,
        node: Option<u32>,
        own: (u64, u64),
    ) -> Result<Vec<(u64, u64)>, i32> {
        let mut taken = vec![own];
        let mut left = bytes;
        while left > 0 {
            let mut size = left;
            let piece = loop {
                match self.allocate(size, node, &taken) {
                    Err(ENOMEM) if size > PAGE => size = size / 2 / PAGE * PAGE,
                    piece => break piece?,
                }
            };
            taken.push(piece);
            left -= piece.1;
        }
        Ok(taken.split_off(1))
    }

    pub(super) fn move_cpu(&mut self, cpu: u64, name: Option<&str>, give: bool) -> Done {
        let pool = self.pool.as_mut().ok_or(EPERM)?;
        let (from, to) = match name {
            Some(name) => {
                let instance = self
                    .instances
                    .iter_mut()
                    .find(|i| i.name == name)
                    .ok_or(ENOENT)?;
                if give {
                    (&mut pool.free, &mut instance.cpus)
                } else {
                    (&mut instance.cpus, &mut pool.free)
                }
            }
            None if give && self.host.first() == Some(&cpu) => return Err(EINVAL),
            None if give => (&mut self.host, &mut pool.free),
            None => (&mut pool.free, &mut self.host),
        };
        let at = from.iter().position(|there| *there == cpu).ok_or(EBUSY)?;
        to.push(from.remove(at));
        Ok(())
    }

    pub(super) fn move_device(&mut self, id: &str, name: Option<&str>, give: bool) -> Done {
        let pool = self.pool.as_mut().ok_or(EPERM)?;
        let Some(name) = name else {
            match (give, pool.pci.iter().position(|there| there == id)) {
                (true, None) => pool.pci.push(id.to_owned()),
                (false, Some(at)) => drop(pool.pci.remove(at)),
                _ => return Err(EBUSY),
            }
            return Ok(());
        };
        let instance = self
            .instances
            .iter_mut()
            .find(|i| i.name == name)
            .ok_or(ENOENT)?;
        let (from, to) = if give {
            (&mut pool.pci, &mut instance.pci)
        } else {
            (&mut instance.pci, &mut pool.pci)
        };
        let at = from.iter().position(|there| there == id).ok_or(EBUSY)?;
        to.push(from.remove(at));
        Ok(())
    }

    pub(super) fn move_memory(
        &mut self,
        item: &Fdt,
        name: Option<&str>,
        give: bool,
        undo: bool,
    ) -> Done {
        let Some(name) = name else {
            if give {
                if item.get("reg").is_some() && !undo {
                    return Err(EINVAL);
                }
                let size = match undo {
                    true => range_of(item)?.1,
                    false => size_of(item)?,
                };
                self.grow(size, item.get_u32("numa-node-id").unwrap_or(0));
                return Ok(());
            }
            // The kernel cannot find a chunk by which the pool grew, and only logs a warning.
            let Ok((base, size)) = range_of(item) else {
                return Ok(());
            };
            let used = self.instances.iter().any(|i| {
                i.regions
                    .iter()
                    .any(|(at, _)| (base..base + size).contains(at))
            });
            let pool = self.pool.as_mut().ok_or(EPERM)?;
            let at = pool
                .chunks
                .iter()
                .position(|(b, s, _)| (*b, *s) == (base, size))
                .ok_or(EINVAL)?;
            if used {
                return Err(EBUSY);
            }
            pool.chunks.remove(at);
            return Ok(());
        };
        let (base, size) = range_of(item)?;
        // The base only matters for a kernel that runs; the records accept any memory of that size.
        let region = if give {
            Some(self.allocate(size, None, &[])?)
        } else {
            None
        };
        let instance = self
            .instances
            .iter_mut()
            .find(|i| i.name == name)
            .ok_or(ENOENT)?;
        match region {
            Some(region) => instance.regions.push(region),
            None => {
                let at = instance
                    .regions
                    .iter()
                    .rposition(|r| *r == (base, size) || (undo && r.1 == size));
                instance.regions.remove(at.ok_or(ENOENT)?);
            }
        }
        Ok(())
    }
}

fn range_of(item: &Fdt) -> Result<(u64, u64), i32> {
    match item.get_u64s("reg").as_deref() {
        Some([base, size]) => Ok((*base, *size)),
        _ => Err(EINVAL),
    }
}
