use super::{At, By, Reader, Virtio};
use crate::check::{Finding, Rule, Stance};
use crate::tree::Shape;
use serde::{Deserialize, Serialize};

/// An instance: its resources, actual or requested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// Its id; `None` if the kernel is to pick one.
    pub id: Option<u32>,
    /// Physical ids of its CPUs. The first one boots.
    pub cpus: Vec<u64>,
    /// Physical address of its first memory; `None` if the kernel has not placed it.
    pub memory_base: Option<u64>,
    /// Total size of its memory, in bytes.
    pub memory_bytes: u64,
    /// The regions of its memory, as (base, bytes), if known. A tree gives only base and sum.
    pub regions: Vec<(u64, u64)>,
    /// Its devices, as the tree names them.
    pub devices: Vec<String>,
    /// Its preferred NUMA nodes; the kernel takes memory from the first one.
    pub numa_nodes: Vec<u32>,
    /// kerf's policy for CPUs: compact, spread or local.
    pub cpu_affinity: Option<String>,
    /// kerf's policy for memory: local, interleave or bind.
    pub memory_policy: Option<String>,
    /// Its own last-level cache ways, one bit for each.
    pub llc_ways: Option<u32>,
    /// kerf's shared io_uring.
    pub uring: Option<Uring>,
    /// Virtio devices that the host's kernel serves to the instance, in the order of the tree.
    pub virtio: Vec<Virtio>,
    /// Whether the host may read its memory through `/proc/kcore`.
    pub host_kcore: bool,
}

/// Sizes of an instance's shared `io_uring`; `None` for kerf's defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Uring {
    /// Entries of the submission queue.
    pub sq_entries: Option<u32>,
    /// Entries of the completion queue.
    pub cq_entries: Option<u32>,
    /// Pages of shared data.
    pub shim_pages: Option<u32>,
}

impl Instance {
    /// Returns the number of bytes of its memory that [`regions`](Self::regions) does not contain.
    #[must_use]
    pub fn unplaced_bytes(&self) -> u64 {
        let placed = self.regions.iter().map(|(_, bytes)| *bytes);
        self.memory_bytes
            .saturating_sub(placed.fold(0, u64::saturating_add))
    }

    /// Reads an instance of a tree's `/instances`, or the tree that the kernel serves for one.
    pub(super) fn read(at: &At<'_>, name: &str, read: &mut Reader<'_>) -> Instance {
        let id = read.u32(at, "id", By::Kerf);
        if at.node.property("id").is_none() {
            let finding =
                Finding::new(Rule::IdMissing, at.path(), "no id", "add id, from 1 to 511");
            read.push(finding.of("id"));
        }
        let mut instance = Instance {
            name: name.to_owned(),
            id,
            host_kcore: at
                .child("options")
                .is_some_and(|o| o.node.property("enable-host-kcore").is_some()),
            ..Instance::default()
        };
        let Some(resources) = at.child("resources") else {
            let finding = Finding::new(
                Rule::InstanceResources,
                at.path(),
                "no node resources",
                "add it",
            );
            read.push(finding);
            return instance;
        };
        instance.read_cpus(&resources, read);
        instance.read_memory(&resources, read);
        instance.read_devices(&resources, read);
        instance.read_preferences(&resources, read);
        instance
    }

    /// Reads the CPUs; an instance may have none.
    pub(crate) fn read_cpus(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        match read.cpus(at, "cpus") {
            Some(cpus) if cpus.is_empty() => {
                let problem = "the list of CPUs is empty";
                let advice = "name at least one free CPU of the pool";
                let finding = Finding::new(Rule::InstanceCpusEmpty, at.path(), problem, advice);
                read.push(finding.of("cpus"));
            }
            Some(cpus) => self.cpus = cpus,
            None if at.node.property("cpus").is_none() => {
                let problem = "no CPUs: it can exist, but not boot";
                let advice = "name free CPUs of the pool by their physical ids";
                let finding = Finding::new(Rule::InstanceCpusMissing, at.path(), problem, advice);
                read.push(finding.of("cpus"));
            }
            None => {}
        }
    }

    fn read_memory(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        for name in ["memory-base", "memory-bytes"] {
            if at.node.property(name).is_none() {
                let problem = "no memory: it can exist, but not boot";
                let finding = Finding::new(
                    Rule::InstanceMemoryMissing,
                    at.path(),
                    problem,
                    "give it memory",
                );
                read.push(finding.of(name));
            }
        }
        let base = read.u64(at, "memory-base", By::Kerf);
        self.memory_base = base.filter(|base| *base != 0);
        self.read_bytes(at, read);
    }

    pub(crate) fn read_bytes(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        let Some(bytes) = read.u64(at, "memory-bytes", By::Both) else {
            return;
        };
        self.memory_bytes = bytes;
        if bytes == 0 || !bytes.is_multiple_of(super::PAGE_BYTES) {
            let problem = format!(
                "{bytes} bytes are not a positive multiple of {}",
                super::PAGE_BYTES
            );
            let advice = "give whole pages of 4096 bytes";
            let finding = Finding::new(Rule::InstanceMemorySize, at.path(), problem, advice);
            read.push(finding.of("memory-bytes"));
        }
    }

    fn read_devices(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        if let Some(names) = at.node.property("device-names") {
            match names.text_list() {
                Ok(list) => {
                    if list.len() > 1 {
                        let problem = "kerf 0.4.0 cannot read more than one name here";
                        let advice =
                            "nothing is wrong with it; kerf dump and kerf create --input fail";
                        let finding =
                            Finding::new(Rule::DeviceNamesList, at.path(), problem, advice);
                        read.push(finding.of("device-names"));
                    }
                    // kerf also splits the strings at white space.
                    let names = list.iter().flat_map(|text| text.split_whitespace());
                    self.devices.extend(names.map(str::to_owned));
                }
                Err(shape) => read.misshapen(at, names, shape, By::Kerf),
            }
        }
        if self.devices.is_empty()
            && let Some(devices) = at.child("devices")
        {
            let names = devices.node.children().iter().map(|child| child.name());
            self.devices.extend(names.map(str::to_owned));
        }
    }

    /// Reads optional properties that the kernel and kerf take into account.
    pub(crate) fn read_preferences(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        self.read_numa_nodes(at, read);
        self.cpu_affinity = policy(at, "cpu-affinity", &["compact", "spread", "local"], read);
        self.memory_policy = policy(at, "memory-policy", &["local", "interleave", "bind"], read);
        if self.memory_policy.as_deref() == Some("bind") && self.numa_nodes.is_empty() {
            let problem = "memory-policy is bind, and numa-nodes names no node";
            let finding = Finding::new(Rule::BindNowhere, at.path(), problem, "add numa-nodes");
            read.push(finding.of("memory-policy"));
        }
        self.llc_ways = read.u32(at, "llc-way-mask", By::Kernel);
        self.virtio = Virtio::read(at, read);
        self.uring = at.child("uring").map(|uring| Uring {
            sq_entries: read.u32(&uring, "sq-entries", By::Kerf),
            cq_entries: read.u32(&uring, "cq-entries", By::Kerf),
            shim_pages: read.u32(&uring, "shim-data-pages", By::Kerf),
        });
    }

    fn read_numa_nodes(&mut self, at: &At<'_>, read: &mut Reader<'_>) {
        let Some(property) = at.node.property("numa-nodes") else {
            return;
        };
        match property.u32_list() {
            Ok(nodes) if !nodes.is_empty() => {
                for node in &nodes {
                    super::resources::check_numa(at, "numa-nodes", *node, read);
                }
                self.numa_nodes = nodes;
            }
            _ => read.misshapen(at, property, Shape::U32List, By::Kernel),
        }
    }
}

fn policy(at: &At<'_>, name: &str, known: &[&str], read: &mut Reader<'_>) -> Option<String> {
    let text = match at.node.property(name)?.text() {
        Ok(text) => text,
        Err(shape) => {
            // Neither the kernel nor kerf 0.4.0 reads this property.
            let problem = format!("this is not {shape}");
            let finding = Finding::new(Rule::PolicyUnknown, at.path(), problem, "write a string");
            read.push(finding.of(name).judged(Stance::Takes, Stance::Takes));
            return None;
        }
    };
    if !known.contains(&text) {
        let problem = format!("unknown {name} {text:?}");
        let advice = format!("write one of {}", known.join(", "));
        read.push(Finding::new(Rule::PolicyUnknown, at.path(), problem, advice).of(name));
    }
    Some(text.to_owned())
}
