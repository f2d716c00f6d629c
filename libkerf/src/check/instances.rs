//! Rules for single instances, and for resources that two instances must not share.

use std::collections::HashMap;

use super::pool::Pool;
use super::resources::{cache_ways, twice};
use super::{Finding, Report, Rule, usage};
use crate::model::{Instance, PAGE_BYTES, System, list};
use crate::tree::NodePath;

/// Maximum id for which a kernel image can be loaded: `kexec_file_load` has 11 bits for it.
pub const MAX_ID: u32 = 2047;

/// Maximum id that kerf's commands accept.
pub const MAX_KERF_ID: u32 = 511;

/// Maximum length of a name, in bytes: the name becomes a directory.
const MAX_NAME_BYTES: usize = 255;

/// Returns the path of an instance in a tree with all instances.
fn path_of(instance: &Instance) -> NodePath {
    NodePath::from("/instances").child(&instance.name)
}

/// Applies all rules for the instances of a system with a pool of `pool_bytes`.
pub(super) fn check(system: &System, pool_bytes: u128, report: &mut Report) {
    let pool = Pool::of(system);
    let mut shares = Shares::default();
    let instances = distinct(system, report);
    for instance in instances.iter().copied() {
        let path = path_of(instance);
        check_own(instance, &path, report);
        check_cpus(instance, &pool, &path, report);
        check_nodes(instance, &pool, &path, report);
        usage::check_placement(instance, &pool, &path, report);
        usage::check_devices(instance, &pool, &path, report);
        check_cache(instance, &pool, &path, report);
        shares.add(instance, &pool, &path, report);
    }
    usage::check_sums(&instances, &pool, pool_bytes, report);
    usage::check_overlaps(&instances, report);
    usage::check_references(&system.references, &pool, report);
}

/// Returns the instances, except those that a later one with the same name hides, as in kerf.
fn distinct<'a>(system: &'a System, report: &mut Report) -> Vec<&'a Instance> {
    let indexed = || system.instances.iter().enumerate();
    let last: HashMap<&str, usize> = indexed().map(|(n, i)| (i.name.as_str(), n)).collect();
    let mut distinct = Vec::with_capacity(last.len());
    for (number, instance) in indexed() {
        if last.get(instance.name.as_str()) == Some(&number) {
            distinct.push(instance);
            continue;
        }
        let problem = format!("there is another {:?} below", instance.name);
        let finding = Finding::new(
            Rule::InstanceTwice,
            path_of(instance),
            problem,
            "rename one",
        );
        report.push(finding);
    }
    distinct
}

/// Applies the rules for one instance that depend on nothing else.
pub(super) fn check_own(instance: &Instance, path: &NodePath, report: &mut Report) {
    check_name(&instance.name, path, report);
    check_id(instance.id, path, report);
    twice(&instance.cpus, path.child("resources").as_str(), report);
    if let Some(base) = instance.memory_base.filter(|base| base % PAGE_BYTES != 0) {
        let problem = format!("{base:#x} is not a multiple of {PAGE_BYTES}");
        let advice = format!("{:#x} would be", base / PAGE_BYTES * PAGE_BYTES);
        let finding = Finding::new(
            Rule::InstanceMemoryBase,
            path.child("resources"),
            problem,
            advice,
        );
        report.push(finding.of("memory-base"));
    }
    cache_ways(instance.llc_ways, path.child("resources"), report);
}

/// Applies the rule for a name, which becomes a directory.
pub(crate) fn check_name(name: &str, path: &NodePath, report: &mut Report) {
    let usable =
        !matches!(name, "" | "." | "..") && !name.contains('/') && name.len() <= MAX_NAME_BYTES;
    if !usable {
        let problem = format!("{name:?} cannot name a directory");
        let advice = format!("use up to {MAX_NAME_BYTES} characters without a slash");
        report.push(Finding::new(
            Rule::InstanceName,
            path.clone(),
            problem,
            advice,
        ));
    }
}

/// Applies the rules for an id.
pub(crate) fn check_id(id: Option<u32>, path: &NodePath, report: &mut Report) {
    let finding = |rule, problem: String| {
        let advice = format!("use an id from 1 to {MAX_KERF_ID}");
        Finding::new(rule, path.clone(), problem, advice).of("id")
    };
    match id {
        Some(0) => report.push(finding(Rule::IdZero, "id 0 is the host's".to_owned())),
        Some(id) if id > MAX_ID => {
            let problem = format!("id {id}: no kernel can be loaded for ids above {MAX_ID}");
            report.push(finding(Rule::IdRange, problem));
        }
        Some(id) if id > MAX_KERF_ID => {
            let problem = format!("id {id}: kerf's commands take none above {MAX_KERF_ID}");
            report.push(finding(Rule::IdKerf, problem));
        }
        _ => {}
    }
}

fn check_cpus(instance: &Instance, pool: &Pool<'_>, path: &NodePath, report: &mut Report) {
    let (mut beyond, mut foreign) = (Vec::new(), Vec::new());
    for cpu in &instance.cpus {
        if pool.highest_cpu.is_none_or(|highest| *cpu > highest) {
            beyond.push(*cpu);
        } else if !pool.cpus.contains(cpu) {
            foreign.push(*cpu);
        }
    }
    let advice = format!("the pool has {}", list(&pool.resources.cpus));
    for (rule, cpus) in [(Rule::CpuBeyondPool, beyond), (Rule::CpuForeign, foreign)] {
        if !cpus.is_empty() {
            let problem = format!("CPU {} is not in the pool", list(&cpus));
            let finding = Finding::new(rule, path.child("resources"), problem, advice.clone());
            report.push(finding.of("cpus"));
        }
    }
}

/// Checks the NUMA nodes: the kernel takes memory only from the first NUMA node in the list.
fn check_nodes(instance: &Instance, pool: &Pool<'_>, path: &NodePath, report: &mut Report) {
    let nodes = &pool.nodes;
    // A pool that does not state the nodes of its memory can have memory from any node.
    let absent = instance
        .numa_nodes
        .first()
        .filter(|node| !nodes.is_empty() && !nodes.contains(node));
    if let Some(absent) = absent {
        let problem = format!("the pool has no memory of NUMA node {absent}");
        let advice = format!("it has some of {}", list(nodes));
        let finding = Finding::new(Rule::NumaAbsent, path.child("resources"), problem, advice);
        report.push(finding.of("numa-nodes"));
    }
}

fn check_cache(instance: &Instance, pool: &Pool<'_>, path: &NodePath, report: &mut Report) {
    let Some(mask) = instance.llc_ways.filter(|mask| *mask != 0) else {
        return;
    };
    let finding = |rule, problem: String, advice: String| {
        Finding::new(rule, path.child("resources"), problem, advice).of("llc-way-mask")
    };
    match pool.resources.llc_ways {
        None => {
            let advice = "add llc-way-mask to /resources of the baseline".to_owned();
            let problem = "the pool has no cache ways".to_owned();
            report.push(finding(Rule::LlcWithoutPool, problem, advice));
        }
        Some(ways) if mask & !ways != 0 => {
            let problem = format!("ways {:#x} are not the pool's", mask & !ways);
            let advice = format!("the pool has {ways:#x}");
            report.push(finding(Rule::LlcOutside, problem, advice));
        }
        Some(_) => {}
    }
}

/// The current holders of resources.
#[derive(Default)]
struct Shares<'a> {
    ids: HashMap<u32, &'a str>,
    cpus: HashMap<u64, &'a str>,
    ways: Vec<(u32, &'a str)>,
    devices: HashMap<String, &'a str>,
}

impl<'a> Shares<'a> {
    /// Adds an instance, and reports resources that another instance already has.
    fn add(
        &mut self,
        instance: &'a Instance,
        pool: &Pool<'_>,
        path: &NodePath,
        report: &mut Report,
    ) {
        let name = instance.name.as_str();
        if let Some(id) = instance.id
            && let Some(other) = self.ids.insert(id, name)
        {
            let problem = format!("{other} has id {id} too");
            let finding = Finding::new(Rule::IdTwice, path.clone(), problem, "give one another id");
            report.push(finding.of("id"));
        }
        self.add_cpus(instance, pool, path, report);
        self.add_devices(instance, pool, path, report);
        if let Some(mask) = instance.llc_ways {
            if let Some((other_mask, other)) = self.ways.iter().find(|(other, _)| other & mask != 0)
            {
                let problem = format!("{other} has ways {:#x} too", other_mask & mask);
                let advice = "give each way to one instance";
                let finding =
                    Finding::new(Rule::LlcShared, path.child("resources"), problem, advice);
                report.push(finding.of("llc-way-mask"));
            }
            self.ways.push((mask, name));
        }
    }

    fn add_cpus(
        &mut self,
        instance: &'a Instance,
        pool: &Pool<'_>,
        path: &NodePath,
        report: &mut Report,
    ) {
        let mut shared: Vec<(u64, &str)> = Vec::new();
        for cpu in &instance.cpus {
            let owner = *self.cpus.entry(*cpu).or_insert(&instance.name);
            if owner != instance.name {
                shared.push((*cpu, owner));
            }
        }
        let Some((_, owner)) = shared.first() else {
            return;
        };
        let cpus: Vec<u64> = shared.iter().map(|(cpu, _)| *cpu).collect();
        let advice = match pool.free.as_slice() {
            [] => "no CPU of the pool is free".to_owned(),
            free => format!("free are {}", list(free)),
        };
        let problem = format!("CPU {} belongs to {owner} too", list(&cpus));
        let finding = Finding::new(Rule::CpuShared, path.child("resources"), problem, advice);
        report.push(finding.of("cpus"));
    }

    fn add_devices(
        &mut self,
        instance: &'a Instance,
        pool: &Pool<'_>,
        path: &NodePath,
        report: &mut Report,
    ) {
        for reference in &instance.devices {
            let device = usage::canonical(reference, pool);
            let owner = *self.devices.entry(device).or_insert(&instance.name);
            if owner != instance.name {
                let problem = format!("{reference} belongs to {owner} too");
                let advice = "give each device, virtual function or namespace to one instance";
                let finding =
                    Finding::new(Rule::DeviceShared, path.child("resources"), problem, advice);
                report.push(finding.of("device-names"));
            }
        }
    }
}
