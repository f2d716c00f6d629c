//! Overlays: applies and undoes their fragments and operations in the kernel's order.

use nix::libc::{EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, ENOMEM, EPERM};

use super::{Done, Instance, Mk, OWN_BYTES, PAGE, Trap};
use crate::fdt::Fdt;

impl Mk {
    pub(super) fn run(&mut self, fdt: &Fdt, undo: bool) -> Done {
        let mut fragments = Vec::new();
        for fragment in fdt.kids.iter().filter(|k| k.name.starts_with("fragment@")) {
            let unit = u32::from_str_radix(&fragment.name[9..], 16).map_err(|_| EINVAL)?;
            fragments.push((unit, fragment));
        }
        if fragments.is_empty() {
            return if undo { Ok(()) } else { Err(EINVAL) };
        }
        fragments.sort_by_key(|(unit, _)| *unit);
        if undo {
            fragments.reverse();
        }
        if self.kexec {
            return Err(EBUSY);
        }
        for (_, fragment) in fragments {
            self.run_fragment(fragment, undo)?;
        }
        Ok(())
    }

    fn run_fragment(&mut self, fragment: &Fdt, undo: bool) -> Done {
        let target = fragment.get_text("target-path").ok_or(EINVAL)?;
        let name = target.strip_prefix("/instances/");
        match (target, name) {
            ("/resources", _) if self.pool.is_none() => return Err(EPERM),
            ("/resources" | "/instances", _) => {}
            (_, Some(name)) if self.instances.iter().any(|i| i.name == name) => {}
            // An undo may meet an instance that never existed.
            (_, Some(_)) if undo => return Ok(()),
            (_, Some(_)) => return Err(ENOENT),
            _ => return Err(EINVAL),
        }
        let overlay = fragment.kid("__overlay__").ok_or(EINVAL)?;
        let mut order = match target {
            "/resources" => [
                "instance-create",
                "cpu-remove",
                "device-remove",
                "memory-remove",
                "memory-add",
                "cpu-add",
                "device-add",
                "instance-remove",
            ],
            _ => [
                "instance-create",
                "memory-remove",
                "memory-add",
                "cpu-remove",
                "cpu-add",
                "device-remove",
                "device-add",
                "instance-remove",
            ],
        };
        if undo {
            order.reverse();
        }
        for operation in order {
            let Some(node) = overlay.kid(operation) else {
                continue;
            };
            let of_set = operation.starts_with("instance-");
            if of_set != (target == "/instances") {
                return Err(EINVAL);
            }
            self.run_operation(operation, node, name, undo)?;
        }
        Ok(())
    }

    fn run_operation(
        &mut self,
        operation: &str,
        node: &Fdt,
        name: Option<&str>,
        undo: bool,
    ) -> Done {
        match (operation, undo) {
            ("instance-create", false) => return self.create(node),
            ("instance-create", true) => {
                return match self.destroy(node.get_text("instance-name").ok_or(EINVAL)?) {
                    Err(ENOENT) => Ok(()),
                    other => other,
                };
            }
            ("instance-remove", false) => {
                return self.destroy(node.get_text("instance-name").ok_or(EINVAL)?);
            }
            ("instance-remove", true) => return Ok(()),
            _ => {}
        }
        let give = operation.ends_with("-add") != undo;
        if operation.starts_with("device")
            && matches!(self.trap, Trap::DevicesBusy | Trap::NoUndo)
            && !undo
        {
            return Err(EBUSY);
        }
        for item in &node.kids {
            let moved = match operation.split('-').next().unwrap_or_default() {
                "cpu" if item.name.starts_with("cpu@") => self.move_cpu(cpu_of(item)?, name, give),
                "device" if item.name.starts_with("pci@") => {
                    self.move_device(item.get_text("pci-id").ok_or(EINVAL)?, name, give)
                }
                "memory" if item.name.starts_with("memory@") => {
                    self.move_memory(item, name, give, undo)
                }
                _ => Ok(()),
            };
            // The undo of a failed transaction ignores operations that never ran.
            match moved {
                Err(_) if undo => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn create(&mut self, node: &Fdt) -> Done {
        let name = node
            .get_text("instance-name")
            .filter(|n| !n.is_empty() && !n.contains('/'))
            .ok_or(EINVAL)?;
        let resources = node.kid("resources").ok_or(EINVAL)?;
        if self.instances.iter().any(|i| i.name == name) {
            return Err(EEXIST);
        }
        let id = match node.get_u32("id") {
            Some(0) => return Err(ENOMEM),
            Some(id) if self.instances.iter().any(|i| i.id == id) => return Err(EEXIST),
            Some(id) => id,
            None => (1..)
                .find(|id| self.instances.iter().all(|i| i.id != *id))
                .ok_or(ENOMEM)?,
        };
        let cpus = match resources.get("cpus") {
            Some(_) => resources
                .get_u64s("cpus")
                .filter(|c| !c.is_empty())
                .ok_or(EINVAL)?,
            None => Vec::new(),
        };
        let bytes = match resources.get("memory-bytes") {
            Some(_) => resources
                .get_u64s("memory-bytes")
                .filter(|b| b.len() == 1)
                .ok_or(EINVAL)?[0],
            None => 0,
        };
        if !bytes.is_multiple_of(PAGE) || resources.get("device-names").is_some() {
            return Err(EINVAL);
        }
        let pool = self.pool.as_ref().ok_or(ENODEV)?;
        if cpus.iter().any(|cpu| !pool.free.contains(cpu)) {
            return Err(EBUSY);
        }
        // Only the first node counts.
        let node = resources.get("numa-nodes").and_then(|v| v.first_chunk());
        let node = node.map(|cell| u32::from_be_bytes(*cell));
        let own = self.allocate(OWN_BYTES, None, &[])?;
        let regions = self.allocate_pieces(bytes, node, own)?;
        if let Some(pool) = &mut self.pool {
            pool.free.retain(|cpu| !cpus.contains(cpu));
        }
        self.instances.push(Instance {
            name: name.to_owned(),
            id,
            cpus,
            regions,
            pci: Vec::new(),
            state: "ready",
            late: None,
            own,
        });
        Ok(())
    }

    fn destroy(&mut self, name: &str) -> Done {
        let at = self
            .instances
            .iter()
            .position(|i| i.name == name)
            .ok_or(ENOENT)?;
        if matches!(self.instances[at].state, "active" | "loaded") {
            return Err(EBUSY);
        }
        let gone = self.instances.remove(at);
        if let Some(pool) = &mut self.pool {
            pool.free.extend(gone.cpus);
            pool.pci.extend(gone.pci);
        }
        Ok(())
    }
}

fn cpu_of(item: &Fdt) -> Result<u64, i32> {
    let wide = item.get_u64s("reg").filter(|r| r.len() == 1).map(|r| r[0]);
    wide.or(item.get_u32("reg").map(u64::from)).ok_or(EINVAL)
}
