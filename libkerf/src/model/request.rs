//! Memory requested for a pool, in the format of kerf's `--memory`: `2GB`, or `8GB@0,8GB@1` for NUMA nodes.

use thiserror::Error;

use super::{MAX_NUMA_NODES, MemoryRequest, PAGE_BYTES};

/// The units of kerf, with their sizes in bytes.
const UNITS: [(&str, u64); 4] = [
    ("KB", 1 << 10),
    ("MB", 1 << 20),
    ("GB", 1 << 30),
    ("TB", 1 << 40),
];

/// Why a text is not a memory request.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NoRequest {
    /// The text is empty.
    #[error("no memory size: write a size such as 2GB, or 8GB@0,8GB@1 for NUMA nodes")]
    Empty,
    /// A size is invalid.
    #[error(
        "invalid size {0:?}: write a number of bytes, or one with KB, MB, GB or TB behind it, in whole pages of 4096 bytes"
    )]
    Size(String),
    /// A NUMA node is invalid.
    #[error("invalid NUMA node {0:?}: write SIZE@NODE with a node below {MAX_NUMA_NODES}")]
    Node(String),
    /// A node appears twice.
    #[error("NUMA node {0} is given twice: write its whole size once")]
    Twice(u32),
    /// A size without a node is combined with others.
    #[error(
        "a size without a NUMA node must be the only one: give a node for each, or write one size"
    )]
    Mixed,
}

impl MemoryRequest {
    /// Reads sizes as kerf does.
    ///
    /// # Errors
    ///
    /// The error in the text.
    pub fn parse_list(text: &str) -> Result<Vec<MemoryRequest>, NoRequest> {
        let parts = text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty());
        let requests: Vec<MemoryRequest> = parts.map(parse).collect::<Result<_, _>>()?;
        if requests.is_empty() {
            return Err(NoRequest::Empty);
        }
        if requests.len() > 1 && requests.iter().any(|request| request.node.is_none()) {
            return Err(NoRequest::Mixed);
        }
        let mut seen = std::collections::HashSet::new();
        for node in requests.iter().filter_map(|request| request.node) {
            if !seen.insert(node) {
                return Err(NoRequest::Twice(node));
            }
        }
        Ok(requests)
    }

    /// Formats sizes for kerf, in bytes.
    #[must_use]
    pub fn write_list(requests: &[MemoryRequest]) -> String {
        let parts = requests.iter().map(|request| match request.node {
            Some(node) => format!("{}@{node}", request.size),
            None => request.size.to_string(),
        });
        parts.collect::<Vec<_>>().join(",")
    }
}

fn parse(part: &str) -> Result<MemoryRequest, NoRequest> {
    let (size, node) = match part.rsplit_once('@') {
        Some((size, node)) => (size, Some(node)),
        None => (part, None),
    };
    let node = node.map(|text| {
        let node = text.trim().parse().ok();
        node.filter(|node| *node < MAX_NUMA_NODES)
            .ok_or_else(|| NoRequest::Node(text.to_owned()))
    });
    Ok(MemoryRequest {
        size: parse_size(size).ok_or_else(|| NoRequest::Size(size.to_owned()))?,
        node: node.transpose()?,
    })
}

/// Parses a size as whole pages, at least one. A number with a unit may have a fraction.
fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_uppercase();
    let unit = UNITS.iter().find_map(|(unit, bytes)| {
        let number = text.strip_suffix(unit)?;
        Some((number.trim_end(), *bytes))
    });
    let (number, unit) = unit.unwrap_or((text.as_str(), 1));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let bytes = digits.checked_mul(u128::from(unit))? / scale;
    let bytes = u64::try_from(bytes).ok()?;
    (bytes > 0 && bytes.is_multiple_of(PAGE_BYTES)).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_kerf_reads_them() {
        let of = |text| MemoryRequest::parse_list(text);
        let request = |size, node| MemoryRequest { size, node };
        assert_eq!(of("2GB"), Ok(vec![request(2 << 30, None)]));
        assert_eq!(
            of(" 8gb@0 , 1.5GB@1,"),
            Ok(vec![request(8 << 30, Some(0)), request(3 << 29, Some(1))])
        );
        assert_eq!(of("4096"), Ok(vec![request(4096, None)]));
        assert_eq!(of(" , "), Err(NoRequest::Empty));
        assert_eq!(of("1GB@0,1GB"), Err(NoRequest::Mixed));
        assert_eq!(of("1GB,1GB"), Err(NoRequest::Mixed));
        assert_eq!(of("1GB@3,2GB@3"), Err(NoRequest::Twice(3)));
        for wrong in ["0", "4097", "-1GB", "1.GBx", "GB", "99999999999TB", "1e3MB"] {
            assert_eq!(of(wrong), Err(NoRequest::Size(wrong.to_owned())), "{wrong}");
        }
        for wrong in ["1GB@", "1GB@-1", "1GB@1024", "1GB@x"] {
            assert!(matches!(of(wrong), Err(NoRequest::Node(_))), "{wrong}");
        }
        let both = [request(8 << 30, Some(0)), request(3 << 29, Some(1))];
        assert_eq!(of(&MemoryRequest::write_list(&both)), Ok(both.to_vec()));
    }
}
