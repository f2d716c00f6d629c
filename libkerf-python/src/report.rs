use libkerf::check::{self, Severity, Stance};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde::{Deserialize, Serialize};

use crate::pickled::{Reduced, reduce};

/// An error, or a possible error, in a tree.
#[pyclass(frozen, module = "libkerf")]
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Finding(check::Finding);

fn stance(stance: Stance) -> &'static str {
    match stance {
        Stance::Refuses => "refuses",
        Stance::Warns => "warns",
        Stance::Takes => "takes",
    }
}

#[pymethods]
impl Finding {
    /// The name of the violated rule.
    #[getter]
    fn rule(&self) -> &'static str {
        self.0.rule.id()
    }

    /// "error": the tree is refused; or "warning".
    #[getter]
    fn severity(&self) -> &'static str {
        match self.0.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }

    /// The kernel's reaction: "refuses", "warns" or "takes".
    #[getter]
    fn kernel(&self) -> &'static str {
        stance(self.0.kernel)
    }

    /// kerf 0.4.0's reaction: "refuses", "warns" or "takes".
    #[getter]
    fn kerf(&self) -> &'static str {
        stance(self.0.kerf)
    }

    /// The node.
    #[getter]
    fn path(&self) -> String {
        self.0.path.to_string()
    }

    /// The property, if the finding concerns one.
    #[getter]
    fn property(&self) -> Option<&str> {
        self.0.property.as_deref()
    }

    /// The error, with the values.
    #[getter]
    fn problem(&self) -> &str {
        &self.0.problem
    }

    /// The suggested correction.
    #[getter]
    fn suggestion(&self) -> &str {
        &self.0.suggestion
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Finding", self)
    }

    fn __repr__(&self) -> String {
        format!(
            "<Finding {} {} at {}>",
            self.severity(),
            self.rule(),
            self.path()
        )
    }
}

/// All findings in a tree, in the order of the checks.
#[pyclass(frozen, module = "libkerf")]
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Report(check::Report);

impl From<check::Report> for Report {
    fn from(report: check::Report) -> Self {
        Self(report)
    }
}

#[pymethods]
impl Report {
    /// Whether the report contains no error.
    #[getter]
    fn is_valid(&self) -> bool {
        self.0.is_valid()
    }

    /// Whether the report contains no error.
    fn __bool__(&self) -> bool {
        self.0.is_valid()
    }

    /// The findings; at most 1000.
    #[getter]
    fn findings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let findings: Vec<Finding> = self.0.findings().iter().cloned().map(Finding).collect();
        PyTuple::new(py, findings)
    }

    /// The findings that forbid the tree.
    #[getter]
    fn errors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let errors: Vec<Finding> = self.0.errors().cloned().map(Finding).collect();
        PyTuple::new(py, errors)
    }

    /// The findings that do not forbid the tree.
    #[getter]
    fn warnings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let warnings: Vec<Finding> = self.0.warnings().cloned().map(Finding).collect();
        PyTuple::new(py, warnings)
    }

    /// Number of findings beyond the first 1000.
    #[getter]
    fn dropped(&self) -> usize {
        self.0.dropped()
    }

    /// Whether the kernel refuses the tree, as far as its behaviour is known.
    #[getter]
    fn kernel_refuses(&self) -> bool {
        self.0.kernel_refuses()
    }

    /// Whether kerf 0.4.0 refuses the tree, as far as its behaviour is known.
    #[getter]
    fn kerf_refuses(&self) -> bool {
        self.0.kerf_refuses()
    }

    /// The violated rules, each once.
    #[getter]
    fn rules<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let mut rules = Vec::new();
        for finding in self.0.findings() {
            if !rules.contains(&finding.rule.id()) {
                rules.push(finding.rule.id());
            }
        }
        PyTuple::new(py, rules)
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "Report", self)
    }

    fn __repr__(&self) -> String {
        let (errors, warnings) = (self.0.errors().count(), self.0.warnings().count());
        format!("<Report: {errors} errors, {warnings} warnings>")
    }
}
