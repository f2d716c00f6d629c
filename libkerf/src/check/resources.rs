//! Rules for the resources that a pool has or requests.

use std::collections::{HashMap, HashSet};

use super::{Context, Finding, Report, Rule, Stance};
use crate::machine::Machine;
use crate::model::{At, MAX_NUMA_NODES, Resources, System, list};
use crate::tree::NodePath;

const RESOURCES: &str = "/resources";

fn finding(rule: Rule, problem: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding::new(rule, NodePath::from(RESOURCES), problem, advice)
}

/// Applies the rules for a baseline.
pub(super) fn of_baseline(
    root: &At<'_>,
    system: &System,
    context: Context<'_>,
    report: &mut Report,
) {
    let Some(node) = root.child("resources") else {
        return;
    };
    let resources = &system.resources;
    if resources.cpus.is_empty() && is_readable(&node, "cpus") {
        let advice = "list them by physical id: cpus = /bits/ 64 <…>";
        report.push(finding(Rule::CpusMissing, "no CPUs", advice).of("cpus"));
    }
    memory_of_baseline(&node, resources, report);
    cpus(resources, context.machine, report);
    devices(resources, report);
    cache_ways(resources.llc_ways, NodePath::from(RESOURCES), report);
}

/// Returns whether a property is missing or readable. False for one that was reported as malformed.
fn is_readable(at: &At<'_>, name: &str) -> bool {
    at.node
        .property(name)
        .is_none_or(|property| property.bytes().len().is_multiple_of(4))
}

fn memory_of_baseline(at: &At<'_>, resources: &Resources, report: &mut Report) {
    let count = at.node.children_with_prefix("memory@").count();
    let advice = "add memory@0 { size = /bits/ 64 <…>; }";
    if count == 0 {
        // kerf treats a tree without memory as a live pool if it lists free CPUs, and then reports
        // the missing memory all the same.
        let has_legacy = at.node.property("memory-bytes").is_some();
        let problem = if has_legacy {
            "no memory@ node; memory-bytes is not read any more"
        } else {
            "no memory@ node"
        };
        report.push(finding(Rule::MemoryMissing, problem, advice));
        return;
    }
    if count > MAX_NUMA_NODES as usize {
        let problem = format!("{count} memory@ nodes; the kernel takes {MAX_NUMA_NODES}");
        report.push(finding(
            Rule::MemoryNodes,
            problem,
            "ask for each NUMA node's memory once",
        ));
    }
    let any_read = !resources.requests.is_empty() || !resources.chunks.is_empty();
    if any_read && resources.memory_bytes() == 0 {
        report.push(finding(Rule::PoolEmpty, "the total memory is zero", advice));
    }
}

fn cpus(resources: &Resources, machine: Option<&Machine>, report: &mut Report) {
    twice(&resources.cpus, RESOURCES, report);
    if resources.cpus.contains(&0) {
        let problem = "CPU 0 is in the list";
        let advice = "leave the CPU that the host booted on with the host";
        report.push(finding(Rule::CpuBoot, problem, advice).of("cpus"));
    }
    let Some(machine) = machine else { return };
    let absent: Vec<u64> = resources
        .cpus
        .iter()
        .copied()
        .filter(|cpu| machine.cpu(*cpu).is_none())
        .collect();
    if !absent.is_empty() {
        let there: Vec<u64> = machine.cpus().map(|cpu| cpu.id).collect();
        let problem = format!("the machine has no CPU {}", list(&absent));
        let advice = format!(
            "it has {}; these are physical ids, not logical numbers",
            list(&there)
        );
        report.push(finding(Rule::CpuAbsent, problem, advice).of("cpus"));
    }
    let host = resources.cpus.iter().filter_map(|cpu| machine.cpu(*cpu));
    for cpu in host.filter(|cpu| cpu.logical == Some(0)) {
        let problem = format!("CPU {} is the host's logical CPU 0", cpu.id);
        report.push(finding(Rule::CpuHost, problem, "leave it with the host").of("cpus"));
    }
}

/// Reports CPUs that a list names more than once.
pub(super) fn twice(cpus: &[u64], path: &str, report: &mut Report) {
    let mut seen = HashSet::new();
    let again: Vec<u64> = cpus
        .iter()
        .copied()
        .filter(|cpu| !seen.insert(*cpu))
        .collect();
    if !again.is_empty() {
        let problem = format!("CPU {} is named again", list(&again));
        let finding = Finding::new(
            Rule::CpuTwice,
            NodePath::from(path),
            problem,
            "name each CPU once",
        );
        report.push(finding.of("cpus"));
    }
}

fn devices(resources: &Resources, report: &mut Report) {
    let mut owners = HashMap::new();
    for device in &resources.devices {
        let Some(address) = device.pci() else {
            continue;
        };
        if let Some(first) = owners.insert(address, &device.name) {
            let path = NodePath::from(RESOURCES)
                .child("devices")
                .child(&device.name);
            let problem = format!("{address} is {first} already");
            report.push(
                Finding::new(Rule::PciTwice, path, problem, "take one of the two out").of("pci-id"),
            );
        }
    }
}

/// Applies the rules for a mask of cache ways, of a pool or an instance.
pub(super) fn cache_ways(mask: Option<u32>, path: NodePath, report: &mut Report) {
    let Some(mask) = mask else { return };
    if mask == 0 {
        let advice = "set a bit for each way, or remove the property";
        report
            .push(Finding::new(Rule::LlcMask, path, "the mask is zero", advice).of("llc-way-mask"));
    } else if !is_contiguous(mask) {
        let problem = format!("{mask:#x} has gaps");
        let advice = "use neighbouring ways, unless the processor takes sparse masks";
        report.push(Finding::new(Rule::LlcSparse, path, problem, advice).of("llc-way-mask"));
    }
}

fn is_contiguous(mask: u32) -> bool {
    let ways = mask >> mask.trailing_zeros().min(31);
    ways & ways.wrapping_add(1) == 0
}

/// Applies the rules for a pool as the kernel shows it.
pub(super) fn of_pool(root: &At<'_>, system: &System, context: Context<'_>, report: &mut Report) {
    let Some(node) = root.child("resources") else {
        return;
    };
    let resources = &system.resources;
    if resources.cpus.is_empty() && is_readable(&node, "cpus") {
        let advice = "give it CPUs with cpu-add to /resources";
        report.push(finding(Rule::PoolWithoutCpus, "the pool has no CPU", advice).of("cpus"));
    }
    let has_items = node.node.children_with_prefix("memory@").next().is_some();
    let unread = has_items && resources.chunks.is_empty() && resources.requests.is_empty();
    if resources.memory_bytes() == 0 && !unread {
        let advice = "give it memory with memory-add to /resources";
        report.push(finding(
            Rule::PoolWithoutMemory,
            "the pool has no memory",
            advice,
        ));
    }
    twice(&resources.cpus, RESOURCES, report);
    free_cpus(resources, report);
    chunks(resources, context.machine, report);
    devices(resources, report);
    cache_ways(resources.llc_ways, NodePath::from(RESOURCES), report);
    if let Some(granule) = resources
        .granule
        .filter(|granule| !granule.is_power_of_two())
    {
        let problem = format!("{granule:#x} is not a power of two");
        let finding = Finding::new(
            Rule::Granule,
            NodePath::root(),
            problem,
            "the memory block size is taken",
        );
        report.push(finding.of("memory-granule"));
    }
}

fn free_cpus(resources: &Resources, report: &mut Report) {
    let Some(free) = &resources.free_cpus else {
        return;
    };
    let pool: HashSet<u64> = resources.cpus.iter().copied().collect();
    let foreign: Vec<u64> = free
        .iter()
        .copied()
        .filter(|cpu| !pool.contains(cpu))
        .collect();
    if !foreign.is_empty() {
        let problem = format!(
            "CPU {} is listed as free, but is not in the pool",
            list(&foreign)
        );
        let advice = "read the tree again: it was not made in one go, or was changed";
        report.push(finding(Rule::FreeForeign, problem, advice).of("cpus-available"));
    }
}

fn chunks(resources: &Resources, machine: Option<&Machine>, report: &mut Report) {
    let mut sorted = resources.chunks.clone();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let [low, high] = pair else { continue };
        if low.end() > u128::from(high.base) {
            let problem = format!(
                "{:#x} with {:#x} bytes reaches into {:#x}",
                low.base, low.size, high.base
            );
            report.push(finding(Rule::ChunkOverlap, problem, "read the tree again").of("reg"));
        }
    }
    let Some(known) = machine.and_then(Machine::pool_chunks) else {
        return;
    };
    for chunk in sorted.iter().filter(|c| !known.contains(&(c.base, c.size))) {
        let problem = format!(
            "{:#x} with {:#x} bytes is not in /proc/iomem",
            chunk.base, chunk.size
        );
        let finding = finding(Rule::ChunkForeign, problem, "read the tree again, as root");
        report.push(finding.of("reg").judged(Stance::Takes, Stance::Refuses));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_without_gaps_is_contiguous() {
        for mask in [1, 0b110, 0xfff0_0000, u32::MAX, 0x8000_0000] {
            assert!(is_contiguous(mask), "{mask:#x}");
        }
        for mask in [0b101, 0x8000_0001, 0b1_0110] {
            assert!(!is_contiguous(mask), "{mask:#x}");
        }
    }
}
