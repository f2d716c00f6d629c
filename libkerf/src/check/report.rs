use std::fmt;

use super::{Rule, Severity, Stance};
use crate::tree::NodePath;
use serde::{Deserialize, Serialize};

/// Maximum number of findings in a report; further ones are only counted.
pub const MAX_FINDINGS: usize = 1000;

/// An error, or a possible error, in a tree.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Finding {
    /// The violated rule.
    pub rule: Rule,
    /// Whether the tree is refused.
    pub severity: Severity,
    /// The kernel's reaction.
    pub kernel: Stance,
    /// kerf's reaction.
    pub kerf: Stance,
    /// The node.
    pub path: NodePath,
    /// The property, if the finding concerns one.
    pub property: Option<String>,
    /// The error, with the values.
    pub problem: String,
    /// The suggested correction.
    pub suggestion: String,
}

impl Finding {
    /// Creates a finding with the defaults from the rule's table.
    #[must_use]
    pub fn new(
        rule: Rule,
        path: NodePath,
        problem: impl Into<String>,
        suggestion: impl Into<String>,
    ) -> Self {
        Self {
            rule,
            severity: rule.severity(),
            kernel: rule.kernel(),
            kerf: rule.kerf(),
            path,
            property: None,
            problem: problem.into(),
            suggestion: suggestion.into(),
        }
    }

    /// Returns this finding, about a property.
    #[must_use]
    pub fn of(mut self, property: impl Into<String>) -> Self {
        self.property = Some(property.into());
        self
    }

    /// Returns this finding, with reactions of kernel and kerf that differ from the rule's table.
    #[must_use]
    pub fn judged(mut self, kernel: Stance, kerf: Stance) -> Self {
        self.kernel = kernel;
        self.kerf = kerf;
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}", self.path)?;
        if let Some(property) = &self.property {
            write!(f, ", {property}")?;
        }
        write!(f, ": {} [{}]", self.problem, self.rule.id())?;
        if !self.suggestion.is_empty() {
            write!(f, "\n  {}", self.suggestion)?;
        }
        Ok(())
    }
}

/// All findings in a tree, in the order of the checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Report {
    findings: Vec<Finding>,
    dropped: usize,
    dropped_errors: usize,
}

impl Report {
    /// Adds a finding.
    pub fn push(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
            return;
        }
        self.dropped += 1;
        if finding.severity == Severity::Error {
            self.dropped_errors += 1;
        }
    }

    /// Returns whether the report contains no error.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.dropped_errors == 0 && self.errors().next().is_none()
    }

    /// Returns the findings, up to [`MAX_FINDINGS`].
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Returns the number of findings beyond [`MAX_FINDINGS`].
    #[must_use]
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Returns the findings that forbid the tree.
    pub fn errors(&self) -> impl Iterator<Item = &Finding> {
        self.of(Severity::Error)
    }

    /// Returns the findings that do not forbid the tree: it is unusual, or kerf refuses it without a good reason.
    pub fn warnings(&self) -> impl Iterator<Item = &Finding> {
        self.of(Severity::Warning)
    }

    fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |f| f.severity == severity)
    }

    /// Returns whether this rule is violated.
    #[must_use]
    pub fn breaks(&self, rule: Rule) -> bool {
        self.findings.iter().any(|f| f.rule == rule)
    }

    /// Returns whether kerf refuses the tree, as far as its behaviour is known.
    #[must_use]
    pub fn kerf_refuses(&self) -> bool {
        self.findings.iter().any(|f| f.kerf == Stance::Refuses)
    }

    /// Returns whether the kernel refuses the tree, as far as its behaviour is known.
    #[must_use]
    pub fn kernel_refuses(&self) -> bool {
        self.findings.iter().any(|f| f.kernel == Stance::Refuses)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        if self.dropped > 0 {
            writeln!(f, "and {} more", self.dropped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_bounded_and_does_not_forget_that_it_found_errors() {
        let finding = |rule| Finding::new(rule, NodePath::root(), "p", "s");
        let mut report = Report::default();
        for _ in 0..MAX_FINDINGS {
            report.push(finding(Rule::CpuTwice));
        }
        assert!(report.is_valid());
        report.push(finding(Rule::CpuShared));
        assert_eq!(
            (report.findings().len(), report.dropped()),
            (MAX_FINDINGS, 1)
        );
        assert!(!report.is_valid());
    }

    #[test]
    fn a_finding_reads_as_one_sentence_and_one_advice() {
        let finding = Finding::new(
            Rule::CpuShared,
            NodePath::from("/instances/web/resources"),
            "CPU 8 belongs to db too",
            "give web the free CPU 12",
        )
        .of("cpus");
        assert_eq!(
            finding.to_string(),
            "error: /instances/web/resources, cpus: CPU 8 belongs to db too [cpu-shared]\n  \
             give web the free CPU 12"
        );
    }
}
