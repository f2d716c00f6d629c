use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libkerf::check::{self, Context};
use libkerf::dts::DtsFault;
use libkerf::kernel;
use libkerf::model::Kind;
use libkerf::record::DIRECTORY;
use libkerf::tree::{self, Node, Property, Shape};
use libkerf::{dtb, dts, kerf_text};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde::{Deserialize, Serialize};

use crate::arguments::{Buffer, List};
use crate::errors::{OrRaise, Raise, on_file};
use crate::instance::Instance;
use crate::machine::Machine;
use crate::pickled::{Reduced, reduce};
use crate::report::Report;
use crate::state::State;

/// A device tree: a blob (DTB), source (DTS), or the text of kerf 0.1, which is read only.
#[pyclass(eq, module = "libkerf")]
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct DeviceTree {
    pub(crate) inner: tree::DeviceTree,
    remarks: Vec<String>,
}

impl PartialEq for DeviceTree {
    fn eq(&self, other: &Self) -> bool {
        self.inner == other.inner
    }
}

impl From<tree::DeviceTree> for DeviceTree {
    fn from(inner: tree::DeviceTree) -> Self {
        Self {
            inner,
            remarks: Vec::new(),
        }
    }
}

/// Why bytes are not a tree.
enum NoTree {
    /// A signal arrived, and its handler raised this exception.
    Signal(PyErr),
    Blob(dtb::DtbError),
    Source(dts::DtsError),
    KerfText(kerf_text::KerfTextError),
}

impl Raise for NoTree {
    fn raise(self, py: Python<'_>) -> PyErr {
        match self {
            NoTree::Signal(error) => error,
            NoTree::Blob(error) => error.raise(py),
            NoTree::Source(error) => error.raise(py),
            NoTree::KerfText(error) => error.raise(py),
        }
    }
}

/// Magic bytes of a blob. No text begins with them.
const MAGIC: [u8; 4] = 0xd00d_feed_u32.to_be_bytes();

fn read(bytes: &[u8]) -> Result<DeviceTree, NoTree> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !bytes.starts_with(&MAGIC) => read_text(text),
        _ => Ok(dtb::read(bytes).map_err(NoTree::Blob)?.into()),
    }
}

/// Reads a text; Ctrl-C, or any other signal whose handler raises, stops the reader.
fn read_text(text: &str) -> Result<DeviceTree, NoTree> {
    let raised = Mutex::new(None);
    let go_on = || match Python::attach(|py| py.check_signals()) {
        Ok(()) => true,
        Err(error) => {
            *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            false
        }
    };
    let read = dts::read_while(text, &go_on);
    let raised = raised.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (read, raised) {
        (Ok(tree), _) => Ok(tree.into()),
        (Err(_), Some(raised)) => Err(NoTree::Signal(raised)),
        (Err(error), None) if error.fault == DtsFault::KerfText => {
            let text = kerf_text::read(text).map_err(NoTree::KerfText)?;
            Ok(DeviceTree {
                inner: text.system.to_tree(),
                remarks: text.remarks,
            })
        }
        (Err(error), None) => Err(NoTree::Source(error)),
    }
}

/// The tree that the kernel serves for the instance whose definition has this path: kerf itself writes no definitions.
fn served_for(path: &Path) -> Option<DeviceTree> {
    let name = path.file_name()?.to_str()?.strip_suffix(".dts")?;
    if path.parent()? != Path::new(DIRECTORY) {
        return None;
    }
    let tree = kernel::Kernel::default().instance_tree(name).ok()?;
    Some(tree.into())
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Baseline => "baseline",
        Kind::Pool => "pool",
        Kind::Instance => "instance",
        Kind::Overlay => "overlay",
    }
}

/// Reads a file, up to the maximum size of a tree.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Read one byte more, so that a file that is too large is refused as such.
    let limit = dts::MAX_TEXT_BYTES as u64 + 1;
    std::fs::File::open(path)?
        .take(limit)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file atomically.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".tmp");
    let write = || {
        let mut file = std::fs::File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)
    };
    write().inspect_err(|_| {
        // The partial file is useless, and may not even exist.
        let _ = std::fs::remove_file(&unfinished);
    })
}

impl DeviceTree {
    fn node(&self, path: &str) -> PyResult<&Node> {
        let node = self.inner.node(path);
        node.ok_or_else(|| PyKeyError::new_err(format!("there is no node {path}")))
    }

    /// The node at a path; creates missing nodes of the path.
    fn node_mut(&mut self, path: &str) -> PyResult<&mut Node> {
        let Some(path) = path.strip_prefix('/') else {
            return Err(PyValueError::new_err(format!("{path:?} is not absolute")));
        };
        let mut node = self.inner.root_mut();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if node.child(part).is_none() {
                node.push(Node::new(part));
            }
            let missing = || PyKeyError::new_err(format!("there is no node {part}"));
            node = node.child_mut(part).ok_or_else(missing)?;
        }
        Ok(node)
    }

    fn set(&mut self, path: &str, name: &str, value: Vec<u8>) -> PyResult<()> {
        self.node_mut(path)?.set(Property::new(name, value));
        Ok(())
    }

    fn property(&self, path: &str, name: &str) -> PyResult<&Property> {
        let property = self.node(path)?.property(name);
        property.ok_or_else(|| PyKeyError::new_err(format!("{path} has no property {name}")))
    }

    fn shaped<'a, T>(
        &'a self,
        path: &str,
        name: &str,
        read: impl FnOnce(&'a Property) -> Result<T, Shape>,
    ) -> PyResult<T> {
        read(self.property(path, name)?)
            .map_err(|shape| PyValueError::new_err(format!("{path}, {name} is not {shape}")))
    }
}

#[pymethods]
impl DeviceTree {
    /// Reads a file: a blob, source, or the text of kerf 0.1, distinguished by the contents.
    ///
    /// If /var/lib/kerf/instances/NAME.dts, which kerf does not write, does not exist, returns the tree that the
    /// running kernel serves for the instance.
    ///
    /// Raises OSError if it cannot be read, TreeError if it is not a device tree.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let bytes = py.detach(|| read_bounded(&path));
        if let Err(error) = &bytes
            && error.kind() == std::io::ErrorKind::NotFound
            && let Some(tree) = py.detach(|| served_for(&path))
        {
            return Ok(tree);
        }
        let bytes = bytes.map_err(|error| on_file(&error, &path))?;
        py.detach(|| read(&bytes)).or_raise(py)
    }

    /// Reads a blob, or the bytes of a text, from any object with a buffer.
    ///
    /// Raises TreeError if it is not a device tree.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: Buffer<'_>) -> PyResult<Self> {
        let data = data.as_bytes();
        py.detach(|| read(data)).or_raise(py)
    }

    /// Reads source, or the text of kerf 0.1.
    ///
    /// Raises TreeError if it is not a device tree.
    #[staticmethod]
    fn from_source(py: Python<'_>, text: &str) -> PyResult<Self> {
        py.detach(|| read_text(text)).or_raise(py)
    }

    /// The blob: the original one of an unchanged tree.
    ///
    /// Raises BlobError if a name cannot be written, or it is larger than the kernel accepts.
    fn to_bytes(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        py.detach(|| dtb::write(&self.inner)).or_raise(py)
    }

    /// The source: the original one of an unchanged tree.
    ///
    /// Raises UnprintableError for a name that source cannot express.
    fn to_source(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| dts::write(&self.inner)).or_raise(py)
    }

    /// Writes a file atomically: source if its name ends with .dts, otherwise a blob.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let bytes = match path.extension() {
            Some(extension) if extension == "dts" => self.to_source(py)?.into_bytes(),
            _ => self.to_bytes(py)?,
        };
        py.detach(|| write_whole(&path, &bytes))
            .map_err(|error| on_file(&error, &path))
    }

    /// The kind of the tree: "baseline", "pool", "instance" or "overlay".
    #[getter]
    fn kind(&self) -> &'static str {
        kind(Kind::of(&self.inner))
    }

    /// Parts of its text that kerf 0.1 did not see, or read in an unexpected way. Empty for other formats.
    #[getter]
    fn remarks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.remarks)
    }

    /// Checks the tree according to its kind; an overlay against `state`, if given. The hardware is
    /// checked only if `machine` is given. Returns the findings.
    #[pyo3(signature = (*, machine = None, state = None))]
    fn validate(
        &self,
        py: Python<'_>,
        machine: Option<Bound<'_, Machine>>,
        state: Option<PyRef<'_, State>>,
    ) -> Report {
        let machine = machine.as_ref().map(|machine| &machine.get().0);
        let state = state.as_ref().map(|state| &state.0);
        let context = Context { machine };
        let tree = &self.inner;
        let report = py.detach(|| match Kind::of(tree) {
            Kind::Overlay => check::overlay(tree, state).1,
            Kind::Instance => check::instance(tree).1,
            Kind::Pool => check::system(tree, context).1,
            // A baseline with instances is a plan: kerf's global tree.
            Kind::Baseline if tree.node("/instances").is_some() => check::system(tree, context).1,
            Kind::Baseline => check::baseline(tree, context).1,
        });
        report.into()
    }

    /// The instances in it.
    fn instances(&self, py: Python<'_>) -> PyResult<Vec<Instance>> {
        Instance::all_of(py, self)
    }

    /// The names of a node's children.
    ///
    /// Raises KeyError if the node does not exist.
    #[pyo3(signature = (path = "/"))]
    fn children(&self, path: &str) -> PyResult<Vec<String>> {
        let children = self.node(path)?.children().iter();
        Ok(children.map(|child| child.name().to_owned()).collect())
    }

    /// The names of a node's properties.
    ///
    /// Raises KeyError if the node does not exist.
    #[pyo3(signature = (path = "/"))]
    fn properties(&self, path: &str) -> PyResult<Vec<String>> {
        let properties = self.node(path)?.properties().iter();
        Ok(properties.map(|p| p.name().to_owned()).collect())
    }

    /// A property's bytes.
    ///
    /// Raises KeyError if the node or property does not exist.
    fn get_bytes(&self, path: &str, name: &str) -> PyResult<Vec<u8>> {
        Ok(self.property(path, name)?.bytes().to_vec())
    }

    /// A property as 32-bit cells.
    ///
    /// Raises KeyError if the node or property does not exist, ValueError if it has another format.
    fn get_u32s(&self, path: &str, name: &str) -> PyResult<Vec<u32>> {
        self.shaped(path, name, Property::u32_list)
    }

    /// A property as 64-bit numbers.
    ///
    /// Raises KeyError if the node or property does not exist, ValueError if it has another format.
    fn get_u64s(&self, path: &str, name: &str) -> PyResult<Vec<u64>> {
        self.shaped(path, name, Property::u64_list)
    }

    /// A property as strings.
    ///
    /// Raises KeyError if the node or property does not exist, ValueError if it has another format.
    fn get_texts(&self, path: &str, name: &str) -> PyResult<Vec<String>> {
        let texts = self.shaped(path, name, Property::text_list)?;
        Ok(texts.into_iter().map(str::to_owned).collect())
    }

    /// Sets a property. Creates missing nodes of the path.
    fn set_bytes(&mut self, path: &str, name: &str, value: Buffer<'_>) -> PyResult<()> {
        self.set(path, name, value.as_bytes().to_vec())
    }

    /// Sets a property to 32-bit cells. Creates missing nodes of the path.
    fn set_u32s(&mut self, path: &str, name: &str, values: List<u32>) -> PyResult<()> {
        let bytes = values.0.iter().flat_map(|value| value.to_be_bytes());
        self.set(path, name, bytes.collect())
    }

    /// Sets a property to 64-bit numbers. Creates missing nodes of the path.
    fn set_u64s(&mut self, path: &str, name: &str, values: List<u64>) -> PyResult<()> {
        let bytes = values.0.iter().flat_map(|value| value.to_be_bytes());
        self.set(path, name, bytes.collect())
    }

    /// Sets a property to strings. Creates missing nodes of the path.
    ///
    /// Raises ValueError if a string contains a NUL.
    fn set_texts(&mut self, path: &str, name: &str, values: List<String>) -> PyResult<()> {
        let mut bytes = Vec::new();
        for value in values.0 {
            if value.contains('\0') {
                return Err(PyValueError::new_err("a string holds a NUL"));
            }
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        self.set(path, name, bytes)
    }

    /// Removes a property, or a node with its contents.
    ///
    /// Raises KeyError if it does not exist, ValueError for the root.
    #[pyo3(signature = (path, name = None))]
    fn remove(&mut self, path: &str, name: Option<&str>) -> PyResult<()> {
        let missing = || PyKeyError::new_err(format!("there is no {path} {}", name.unwrap_or("")));
        self.node(path)?;
        if let Some(name) = name {
            let removed = self.node_mut(path)?.remove_property(name);
            return removed.map(drop).ok_or_else(missing);
        }
        let (parent, child) = path.rsplit_once('/').ok_or_else(missing)?;
        if child.is_empty() {
            return Err(PyValueError::new_err("the root stays"));
        }
        let parent = self.node_mut(if parent.is_empty() { "/" } else { parent })?;
        parent.remove_child(child).map(drop).ok_or_else(missing)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        reduce(py, "DeviceTree", self)
    }

    fn __repr__(&self) -> String {
        format!("<DeviceTree: {}>", self.kind())
    }
}
