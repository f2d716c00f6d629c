//! Rules for the resources that instances take from the pool: memory and devices.

use super::pool::Pool;
use super::{Finding, Report, Rule};
use crate::model::{Device, DeviceReference, Instance, list};
use crate::tree::NodePath;

/// Memory of the pool that each instance leaves for the kernel's bookkeeping, in bytes. The message
/// rings alone take 65 pages; the rest depends on the kernel.
pub const SLACK_BYTES: u64 = 2 << 20;

fn end(base: u64, bytes: u64) -> u128 {
    u128::from(base) + u128::from(bytes)
}

/// Returns the location of an instance's memory: its regions if known, otherwise all of it from its base.
fn regions(instance: &Instance) -> Vec<(u64, u64)> {
    match (instance.regions.as_slice(), instance.memory_base) {
        ([], Some(base)) => vec![(base, instance.memory_bytes)],
        (regions, _) => regions.to_vec(),
    }
}

/// Applies the rules for the location of an instance's memory.
pub(super) fn check_placement(
    instance: &Instance,
    pool: &Pool<'_>,
    path: &NodePath,
    report: &mut Report,
) {
    for (base, bytes) in regions(instance) {
        let end = end(base, bytes);
        let finding = |rule, problem: String, advice: &str| {
            Finding::new(rule, path.child("resources"), problem, advice).of("memory-base")
        };
        let chunks = &pool.resources.chunks;
        let within = |chunk: &&crate::model::Chunk| chunk.base <= base && end <= chunk.end();
        if !chunks.is_empty() && chunks.iter().find(within).is_none() {
            let problem = format!("{base:#x} with {bytes:#x} bytes lies in no chunk of the pool");
            let there: Vec<String> = chunks
                .iter()
                .map(|c| format!("{:#x}+{:#x}", c.base, c.size))
                .collect();
            let advice = format!("the chunks are {}", list(&there));
            report.push(finding(Rule::MemoryOutside, problem, &advice));
        } else if end > 1 << 64 {
            let problem = format!("{base:#x} with {bytes:#x} bytes ends above 2^64");
            report.push(finding(
                Rule::MemoryOverflow,
                problem,
                "choose a lower base",
            ));
        }
    }
}

/// Applies the rule that no two instances' memory overlaps.
pub(super) fn check_overlaps(instances: &[&Instance], report: &mut Report) {
    let mut all: Vec<(u64, u64, &str)> = instances
        .iter()
        .flat_map(|i| {
            regions(i)
                .into_iter()
                .map(|(base, bytes)| (base, bytes, i.name.as_str()))
        })
        .collect();
    all.sort_unstable();
    // The earlier region with the highest end.
    let mut farthest: Option<(u64, u64, &str)> = None;
    for region in all {
        let (base, bytes, name) = region;
        if let Some((low, low_bytes, other)) = farthest {
            let low_end = end(low, low_bytes);
            let overlaps = u128::from(base) < low_end && u128::from(low) < end(base, bytes);
            if overlaps && other != name {
                let common = low_end.min(end(base, bytes)) - u128::from(base);
                let problem = format!("{common:#x} bytes from {base:#x} belong to {other} too");
                let path = NodePath::from("/instances").child(name).child("resources");
                let advice = "place one elsewhere, or leave memory-base to the kernel";
                report.push(
                    Finding::new(Rule::MemoryOverlap, path, problem, advice).of("memory-base"),
                );
            }
            if low_end >= end(base, bytes) {
                continue;
            }
        }
        farthest = Some(region);
    }
}

/// Applies the rules for the instances' total resources.
pub(super) fn check_sums(
    instances: &[&Instance],
    pool: &Pool<'_>,
    pool_bytes: u128,
    report: &mut Report,
) {
    if instances.is_empty() {
        return;
    }
    let path = || NodePath::from("/instances");
    let cpus: usize = instances.iter().map(|i| i.cpus.len()).sum();
    let pool_cpus = pool.resources.cpus.len();
    if cpus > pool_cpus {
        let problem = format!("the instances list {cpus} CPUs and the pool {pool_cpus}");
        let advice = "take CPUs from instances, or give the pool more";
        report.push(Finding::new(Rule::CpusExceedPool, path(), problem, advice).of("cpus"));
    }
    let memory: u128 = instances.iter().map(|i| u128::from(i.memory_bytes)).sum();
    let slack = u128::from(SLACK_BYTES) * instances.len() as u128;
    let finding = |rule, problem: String| {
        let advice = format!("leave {slack} bytes for the kernel's bookkeeping");
        Finding::new(rule, path(), problem, advice).of("memory-bytes")
    };
    if memory > pool_bytes {
        let problem = format!("{memory} bytes of {pool_bytes} that the pool has");
        report.push(finding(Rule::MemoryExceedsPool, problem));
    } else if memory == pool_bytes && memory > 0 {
        let problem = format!("all {pool_bytes} bytes of the pool");
        report.push(finding(Rule::MemoryFillsPool, problem));
    } else if memory > 0 && pool_bytes - memory < slack {
        let problem = format!("only {} bytes of the pool are left", pool_bytes - memory);
        report.push(finding(Rule::PoolSlack, problem));
    }
}

/// A device, virtual function or namespace that an instance names.
enum Part<'a> {
    Device(&'a str),
    Function(&'a str, &'a str),
    Namespace(&'a str, &'a str),
}

fn part(reference: &str) -> Part<'_> {
    let split = |mark| {
        let mut parts = reference.split(mark);
        Some((parts.next()?, parts.next()?))
    };
    match (split("_vf"), split("_ns")) {
        (Some((device, number)), _) => Part::Function(device, number),
        (None, Some((device, number))) => Part::Namespace(device, number),
        (None, None) => Part::Device(reference),
    }
}

/// Returns a unique name for each device, virtual function or namespace, for all ways in which an instance may name it.
pub(super) fn canonical(reference: &str, pool: &Pool<'_>) -> String {
    let name = |device: &str| {
        let known = pool.device(device);
        known.map_or_else(|| device.to_owned(), |known| known.name.clone())
    };
    match part(reference) {
        Part::Device(device) => name(device),
        Part::Function(device, number) => format!("{}_vf{}", name(device), number.trim()),
        Part::Namespace(device, number) => format!("{}_ns{}", name(device), number.trim()),
    }
}

/// Applies the rules for an instance's devices.
pub(super) fn check_devices(
    instance: &Instance,
    pool: &Pool<'_>,
    path: &NodePath,
    report: &mut Report,
) {
    for reference in &instance.devices {
        let (device, function) = match part(reference) {
            Part::Device(device) => (device, None),
            Part::Function(device, number) => (device, Some((number, "virtual function"))),
            Part::Namespace(device, number) => (device, Some((number, "namespace"))),
        };
        let finding = |rule, problem: String, advice: String| {
            Finding::new(rule, path.child("resources"), problem, advice).of("device-names")
        };
        let number = function.map(|(number, what)| (number.trim().parse::<u32>(), what));
        if let Some((Err(_), what)) = &number {
            let problem = format!("{reference:?} names no {what}");
            report.push(finding(
                Rule::FunctionName,
                problem,
                "end it in _vf or _ns and a number".into(),
            ));
            continue;
        }
        let Some(known) = pool.device(device) else {
            let names: Vec<&str> = pool
                .resources
                .devices
                .iter()
                .map(|d| d.name.as_str())
                .collect();
            let advice = match names.as_slice() {
                [] => "the pool has no devices".to_owned(),
                names => format!("the pool has {}", list(names)),
            };
            let problem = format!("the pool has no device {device:?}");
            report.push(finding(Rule::DeviceUnknown, problem, advice));
            continue;
        };
        if let Some((Ok(number), what)) = number
            && !is_available(known, what, number)
        {
            let problem = format!("{what} {number} of {} is not available", known.name);
            let there = available(known, what).map(list).unwrap_or_default();
            report.push(finding(
                Rule::FunctionUnavailable,
                problem,
                format!("available are {there}"),
            ));
        }
    }
}

fn available<'a>(device: &'a Device, what: &str) -> Option<&'a [u32]> {
    let list = match what {
        "namespace" => &device.namespaces,
        _ => &device.functions,
    };
    list.as_deref().filter(|list| !list.is_empty())
}

fn is_available(device: &Device, what: &str, number: u32) -> bool {
    available(device, what).is_none_or(|there| there.contains(&number))
}

/// Checks that the names from kerf 0.1 refer to existing functions and namespaces.
pub(super) fn check_references(
    references: &[DeviceReference],
    pool: &Pool<'_>,
    report: &mut Report,
) {
    for reference in references {
        let Some(parent) = &reference.parent else {
            continue;
        };
        let parent = parent.trim_start_matches('&');
        let device = pool.device(parent);
        let missing = match device {
            None => Some(format!("the pool has no device {parent:?}")),
            Some(device) => [
                (reference.function, "virtual function"),
                (reference.namespace, "namespace"),
            ]
            .into_iter()
            .filter_map(|(number, what)| Some((number?, what)))
            .find(|(number, what)| !is_available(device, what, *number))
            .map(|(number, what)| format!("{what} {number} of {parent} is not available")),
        };
        if let Some(problem) = missing {
            let path = NodePath::root().child(&reference.name);
            let advice = "point it to something in the pool, or remove it";
            report.push(Finding::new(Rule::ReferenceDangling, path, problem, advice).of("parent"));
        }
    }
}
