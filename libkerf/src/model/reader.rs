//! Reads properties, and reports those that do not have the expected format.

use crate::check::{Finding, Report, Rule, Stance};
use crate::tree::{Node, NodePath, Property, Shape};

/// A node and its location. The path is computed only for a finding.
#[derive(Clone, Copy)]
pub(crate) struct At<'a> {
    above: Option<&'a At<'a>>,
    pub(crate) node: &'a Node,
}

impl<'a> At<'a> {
    pub(crate) fn root(node: &'a Node) -> Self {
        Self { above: None, node }
    }

    pub(crate) fn child(&'a self, name: &str) -> Option<At<'a>> {
        self.node.child(name).map(|node| self.enter(node))
    }

    pub(crate) fn enter(&'a self, node: &'a Node) -> At<'a> {
        At {
            above: Some(self),
            node,
        }
    }

    pub(crate) fn path(&self) -> NodePath {
        match self.above {
            Some(above) => above.path().child(self.node.name()),
            None => NodePath::root(),
        }
    }
}

/// The reader that fails on a malformed property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// Kernel and kerf.
    Both,
    /// Only the kernel.
    Kernel,
    /// Only kerf.
    Kerf,
}

impl By {
    fn stances(self) -> (Stance, Stance) {
        match self {
            By::Both => (Stance::Refuses, Stance::Refuses),
            By::Kernel => (Stance::Refuses, Stance::Takes),
            By::Kerf => (Stance::Takes, Stance::Refuses),
        }
    }
}

/// Reads properties, and reports malformed ones.
pub(crate) struct Reader<'r> {
    pub(crate) report: &'r mut Report,
}

impl Reader<'_> {
    pub(crate) fn push(&mut self, finding: Finding) {
        self.report.push(finding);
    }

    pub(crate) fn u32(&mut self, at: &At<'_>, name: &str, by: By) -> Option<u32> {
        self.read(at, name, by, Property::u32)
    }

    pub(crate) fn u64(&mut self, at: &At<'_>, name: &str, by: By) -> Option<u64> {
        self.read(at, name, by, Property::u64)
    }

    pub(crate) fn u32_list(&mut self, at: &At<'_>, name: &str, by: By) -> Option<Vec<u32>> {
        self.read(at, name, by, Property::u32_list)
    }

    pub(crate) fn text<'a>(&mut self, at: &At<'a>, name: &str, by: By) -> Option<&'a str> {
        let property = at.node.property(name)?;
        match property.text() {
            Ok(text) => Some(text),
            Err(shape) => {
                self.misshapen(at, property, shape, by);
                None
            }
        }
    }

    fn read<T>(
        &mut self,
        at: &At<'_>,
        name: &str,
        by: By,
        read: impl Fn(&Property) -> Result<T, Shape>,
    ) -> Option<T> {
        let property = at.node.property(name)?;
        match read(property) {
            Ok(value) => Some(value),
            Err(shape) => {
                self.misshapen(at, property, shape, by);
                None
            }
        }
    }

    /// Reports a malformed property.
    pub(crate) fn misshapen(&mut self, at: &At<'_>, property: &Property, shape: Shape, by: By) {
        let (kernel, kerf) = by.stances();
        let problem = format!("{} bytes that are not {shape}", property.bytes().len());
        let finding = Finding::new(
            Rule::PropertyShape,
            at.path(),
            problem,
            format!("write it as {shape}"),
        );
        self.push(finding.of(property.name()).judged(kernel, kerf));
    }

    /// Reads physical CPU ids: 64-bit cells, or the 32-bit cells of older formats, as kerf reads them.
    pub(crate) fn cpus(&mut self, at: &At<'_>, name: &str) -> Option<Vec<u64>> {
        let property = at.node.property(name)?;
        if let Ok(cpus) = property.u64_list() {
            self.suspect_32_bits(at, name, &cpus);
            return Some(cpus);
        }
        match property.u32_list() {
            Ok(cpus) => {
                let finding = Finding::new(
                    Rule::Cpus32,
                    at.path(),
                    format!(
                        "{} CPUs in 32-bit cells, as generation A wrote them",
                        cpus.len()
                    ),
                    "write them as 64-bit cells: /bits/ 64 <…>",
                );
                self.push(finding.of(name));
                Some(cpus.into_iter().map(u64::from).collect())
            }
            Err(_) => {
                self.misshapen(at, property, Shape::U64List, By::Both);
                None
            }
        }
    }

    fn suspect_32_bits(&mut self, at: &At<'_>, name: &str, cpus: &[u64]) {
        if !cpus.is_empty() && cpus.iter().all(|cpu| *cpu > u64::from(u32::MAX)) {
            let halves: Vec<u64> = cpus
                .iter()
                .flat_map(|cpu| [cpu >> 32, cpu & 0xffff_ffff])
                .collect();
            let finding = Finding::new(
                Rule::Cpus32Suspected,
                at.path(),
                format!("CPUs {}", list(cpus)),
                format!(
                    "if CPUs {} are meant, write them as 64-bit cells",
                    list(&halves)
                ),
            );
            self.push(finding.of(name));
        }
    }
}

/// Numbers for a message; only the first ones of a long list.
pub(crate) fn list<T: std::fmt::Display>(values: &[T]) -> String {
    const SHOWN: usize = 16;
    let mut text: Vec<String> = values.iter().take(SHOWN).map(T::to_string).collect();
    if values.len() > SHOWN {
        text.push(format!("and {} more", values.len() - SHOWN));
    }
    text.join(" ")
}
