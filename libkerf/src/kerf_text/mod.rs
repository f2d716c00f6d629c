//! The text format of kerf 0.1, `/multikernel-v1/;`.
//!
//! It resembles device tree source but is not: kerf 0.1 found its parts with regular expressions, and later versions
//! do not read it. This module reads it as kerf 0.1 did, quirks included, so that its contents can be converted, and
//! reports the parts that kerf 0.1 silently dropped.

mod scan;

use std::collections::HashMap;

use thiserror::Error;

use crate::model::{
    Chunk, Device, DeviceKind, DeviceReference, Instance, PciAddress, Resources, System,
};
use crate::tree::MAX_DEPTH;
use scan::{after, block, brace_end, flag, number_list, word_before};

/// Maximum size of a text, in bytes.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

/// The contents of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KerfText {
    /// Pool and instances. The pool has one chunk, at the address in the text;
    /// [`Resources::to_baseline`] returns the tree for a current kernel.
    pub system: System,
    /// Parts that kerf 0.1 did not see, or read in an unexpected way.
    pub remarks: Vec<String>,
}

/// Why kerf 0.1 did not read a text.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KerfTextError {
    /// The text is larger than [`MAX_TEXT_BYTES`].
    #[error("kerf text: {0} bytes; at most {MAX_TEXT_BYTES} are read")]
    TooLarge(usize),
    /// Braces are nested too deep.
    #[error("kerf text: more than {MAX_DEPTH} nested braces")]
    Depth,
    /// A required part is missing.
    #[error("kerf text: no {0}")]
    Missing(&'static str),
    /// An invalid number. CPUs are decimal, memory is hexadecimal.
    #[error("kerf text: {name}: {text:?} is not a {form} number below 2^64")]
    Number {
        /// Name of the field.
        name: String,
        /// The text in place of the number.
        text: String,
        /// Decimal or hexadecimal.
        form: &'static str,
    },
}

/// Reads a text.
///
/// # Errors
///
/// The error at which kerf 0.1 would have stopped.
pub fn read(text: &str) -> Result<KerfText, KerfTextError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(KerfTextError::TooLarge(text.len()));
    }
    check_depth(text)?;
    let mut remarks = Vec::new();
    let resources = read_resources(text, &mut remarks)?;
    let system = System {
        resources,
        instances: read_instances(text, &mut remarks),
        references: read_references(text),
    };
    Ok(KerfText { system, remarks })
}

/// Refuses braces that are nested too deep: the functions below read a text once for each surrounding brace.
fn check_depth(text: &str) -> Result<(), KerfTextError> {
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'{' if depth == MAX_DEPTH => return Err(KerfTextError::Depth),
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// A collection by name; of two entries with the same name the later one counts.
struct ByName<'a, T> {
    all: Vec<Option<T>>,
    places: HashMap<&'a str, usize>,
}

impl<'a, T> ByName<'a, T> {
    fn new() -> Self {
        Self {
            all: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// Adds an entry after all others, and removes an earlier one with the same name.
    fn push(&mut self, name: &'a str, thing: T) {
        if let Some(earlier) = self.places.insert(name, self.all.len()) {
            self.all[earlier] = None;
        }
        self.all.push(Some(thing));
    }

    /// Replaces an earlier entry with the same name in place. Returns whether there was one.
    fn replace(&mut self, name: &'a str, thing: T) -> bool {
        let earlier = self.places.get(name).copied();
        match earlier {
            Some(place) => self.all[place] = Some(thing),
            None => self.push(name, thing),
        }
        earlier.is_some()
    }

    fn into_vec(self) -> Vec<T> {
        self.all.into_iter().flatten().collect()
    }
}

fn read_resources(text: &str, remarks: &mut Vec<String>) -> Result<Resources, KerfTextError> {
    let own = block(text, "resources").ok_or(KerfTextError::Missing("resources { … }"))?;
    let cpus = after(own, "cpus", '<', '>').ok_or(KerfTextError::Missing("cpus in resources"))?;
    let base = after(own, "memory-base", '<', '>');
    let base = base.ok_or(KerfTextError::Missing("memory-base in resources"))?;
    let size = after(own, "memory-bytes", '<', '>');
    let size = size.ok_or(KerfTextError::Missing("memory-bytes in resources"))?;
    if own.contains("topology") {
        remarks.push("topology is not read from text: NUMA nodes are lost".to_owned());
        if own.find("memory-base") > own.find("topology") {
            remarks.push(
                "the first memory-base and cpus of topology may be taken for the pool's".to_owned(),
            );
        }
    }
    Ok(Resources {
        cpus: decimals("cpus", cpus)?,
        chunks: vec![Chunk {
            base: hexadecimal("memory-base", base)?,
            size: hexadecimal("memory-bytes", size)?,
            node: None,
        }],
        devices: read_devices(own, remarks)?,
        ..Resources::default()
    })
}

fn read_devices(resources: &str, remarks: &mut Vec<String>) -> Result<Vec<Device>, KerfTextError> {
    let Some(own) = block(resources, "devices") else {
        return Ok(Vec::new());
    };
    let mut devices = ByName::new();
    for (open, _) in own.match_indices('{') {
        let Some(name) = word_before(&own[..open]) else {
            continue;
        };
        let Some(end) = brace_end(&own[open..]) else {
            continue;
        };
        let device = read_device(name, &own[open + 1..open + end])?;
        if devices.replace(name, device) {
            remarks.push(format!(
                "two devices are called {name:?}: the first is lost"
            ));
        }
    }
    Ok(devices.into_vec())
}

fn read_device(name: &str, text: &str) -> Result<Device, KerfTextError> {
    let address = after(text, "pci-id", '"', '"').and_then(PciAddress::parse);
    let platform = after(text, "device-type", '"', '"') == Some("platform");
    let kind = match (address, platform) {
        (Some(address), _) => DeviceKind::Pci(address),
        (None, true) => {
            let own = after(text, "device-name", '"', '"');
            DeviceKind::Platform(own.unwrap_or(name).to_owned())
        }
        (None, false) => DeviceKind::Other,
    };
    let numbers = |key| {
        let list = after(text, key, '<', '>').map(|list| narrow(key, list));
        list.transpose()
    };
    for key in ["vendor-id", "device-id"] {
        after(text, key, '<', '>')
            .map(|text| hexadecimal(key, text))
            .transpose()?;
    }
    Ok(Device {
        name: name.to_owned(),
        kind,
        alias: None,
        functions: numbers("available-vfs")?,
        namespaces: numbers("available-ns")?,
    })
}

/// Reads instances, line by line. kerf 0.1 silently dropped an instance that it could not read.
fn read_instances(text: &str, remarks: &mut Vec<String>) -> Vec<Instance> {
    let Some(own) = block(text, "instances") else {
        return Vec::new();
    };
    let lines: Vec<&str> = own.split('\n').collect();
    let mut instances = ByName::new();
    // The end of the last instance: text within it is not lost.
    let mut end = 0;
    for (number, line) in lines.iter().enumerate() {
        let line = line.trim();
        if line.is_empty()
            || line.starts_with("//")
            || line.starts_with("/*")
            || !line.contains('{')
        {
            continue;
        }
        let name = line.split('{').next().unwrap_or_default().trim();
        if ["resources", "devices", "cpus", "memory"].contains(&name) {
            continue;
        }
        let Some(length) = node_lines(&lines[number..]) else {
            continue;
        };
        let inner = lines[number..number + length]
            .get(1..length - 1)
            .unwrap_or_default();
        match read_instance(name, &inner.join("\n")) {
            Some(instance) => {
                end = number + length;
                instances.push(name, instance);
            }
            None if number >= end => {
                remarks.push(format!(
                    "instance {name:?} is lost: it has no id, or not all of its resources"
                ));
            }
            None => {}
        }
    }
    instances.into_vec()
}

/// Returns the number of lines of a node, including the closing one.
fn node_lines(lines: &[&str]) -> Option<usize> {
    let mut depth = 0_i64;
    for (number, line) in lines.iter().enumerate() {
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' => {
                    depth -= 1;
                    if depth == 0 {
                        return Some(number + 1);
                    }
                }
                _ => {}
            }
        }
        if depth == 0 {
            return None;
        }
    }
    None
}

fn read_instance(name: &str, text: &str) -> Option<Instance> {
    let id = after_number(text, "id")?;
    let resources = after(text, "resources", '{', '}')?;
    let number = |key| {
        let text = after(resources, key, '<', '>')?;
        hexadecimal(key, text).ok()
    };
    let names = after(resources, "devices", '<', '>').unwrap_or_default();
    let devices = names
        .split(',')
        .map(|name| name.trim().trim_start_matches('&'));
    let text_of = |key| after(resources, key, '"', '"').map(str::to_owned);
    let base = number("memory-base")?;
    let nodes = after(resources, "numa-nodes", '<', '>').map(|list| narrow("numa-nodes", list));
    Some(Instance {
        name: name.to_owned(),
        id: Some(id),
        cpus: decimals("cpus", after(resources, "cpus", '<', '>')?).ok()?,
        memory_base: Some(base).filter(|base| *base != 0),
        memory_bytes: number("memory-bytes")?,
        devices: devices
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
        numa_nodes: nodes.transpose().ok()?.unwrap_or_default(),
        cpu_affinity: text_of("cpu-affinity"),
        memory_policy: text_of("memory-policy"),
        host_kcore: block(text, "options")
            .is_some_and(|options| flag(options, "enable-host-kcore")),
        ..Instance::default()
    })
}

/// Reads the names for virtual functions and namespaces: `eth0_vf1: net-vf@1 { parent = <&eth0>; vf-id = <1>; };`
fn read_references(text: &str) -> Vec<DeviceReference> {
    let mut references = ByName::new();
    // The end of the last reference: text within it is not another reference.
    let mut end = 0;
    for (colon, _) in text.match_indices(':') {
        if colon < end {
            continue;
        }
        let Some(name) = word_before(&text[..colon]) else {
            continue;
        };
        // The label touches its colon.
        if !text[..colon].ends_with(name) || !scan::is_function(name) {
            continue;
        }
        let Some((inner, rest)) = scan::reference_body(&text[colon + 1..]) else {
            continue;
        };
        end = text.len() - rest.len();
        let parent = after(inner, "parent", '<', '>').and_then(|parent| parent.strip_prefix('&'));
        let number = |mark: &str, key| {
            name.contains(mark)
                .then(|| after_number(inner, key))
                .flatten()
        };
        let reference = DeviceReference {
            name: name.to_owned(),
            parent: parent
                .filter(|parent| !parent.is_empty())
                .map(str::to_owned),
            function: number("_vf", "vf-id"),
            namespace: number("_ns", "namespace-id"),
        };
        references.push(name, reference);
    }
    references.into_vec()
}

/// Returns a decimal number between angle brackets, without any other text.
fn after_number(text: &str, key: &str) -> Option<u32> {
    scan::all_after(text, key, '<', '>').find_map(|inner| {
        let is_number = !inner.is_empty() && inner.bytes().all(|b| b.is_ascii_digit());
        is_number.then(|| inner.parse().ok())?
    })
}

fn decimals(name: &str, text: &str) -> Result<Vec<u64>, KerfTextError> {
    number_list(text).map_err(|wrong| KerfTextError::Number {
        name: name.to_owned(),
        text: wrong.to_owned(),
        form: "decimal",
    })
}

fn narrow(name: &str, text: &str) -> Result<Vec<u32>, KerfTextError> {
    let wide = decimals(name, text)?;
    wide.into_iter()
        .map(|value| {
            u32::try_from(value).map_err(|_| KerfTextError::Number {
                name: name.to_owned(),
                text: value.to_string(),
                form: "32-bit decimal",
            })
        })
        .collect()
}

/// Parses one or two hexadecimal cells. The low one may have more than 32 bits.
fn hexadecimal(name: &str, text: &str) -> Result<u64, KerfTextError> {
    let cells: Option<Vec<u128>> = text
        .split_whitespace()
        .map(|cell| {
            let digits = cell
                .strip_prefix("0x")
                .or(cell.strip_prefix("0X"))
                .unwrap_or(cell);
            u128::from_str_radix(digits, 16)
                .ok()
                .filter(|_| !digits.starts_with('+'))
        })
        .collect();
    let value = match cells.as_deref() {
        Some([value]) => Some(*value),
        Some([high, low]) => high.checked_mul(1 << 32).map(|high| high | low),
        _ => None,
    };
    let value = value.and_then(|value| u64::try_from(value).ok());
    value.ok_or_else(|| KerfTextError::Number {
        name: name.to_owned(),
        text: text.trim().to_owned(),
        form: "hexadecimal",
    })
}
