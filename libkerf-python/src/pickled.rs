//! Objects as bytes, for `pickle` and `copy`. The bytes are for this version of the package.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::instance::Instance;
use crate::machine::{Cpu, Machine};
use crate::overlay::Overlay;
use crate::report::{Finding, Report};
use crate::state::State;
use crate::tree::DeviceTree;

/// What `__reduce__` gives: a function, and the arguments that make the object again.
pub(crate) type Reduced<'py> = (Bound<'py, PyAny>, (&'static str, Bound<'py, PyBytes>));

/// An object of this class as what makes it again.
pub(crate) fn reduce<'py>(
    py: Python<'py>,
    class: &'static str,
    value: &impl Serialize,
) -> PyResult<Reduced<'py>> {
    let bytes = py_value_error(serde_json::to_vec(value))?;
    let restore = py.import("libkerf._pickled")?.getattr("restore")?;
    Ok((restore, (class, PyBytes::new(py, &bytes))))
}

fn read<T: DeserializeOwned>(data: &[u8]) -> PyResult<T> {
    let mut from = serde_json::Deserializer::from_slice(data);
    // A tree may lie deeper than JSON usually does; who unpickles trusts what it unpickles.
    from.disable_recursion_limit();
    py_value_error(T::deserialize(&mut from))
}

fn py_value_error<T>(result: serde_json::Result<T>) -> PyResult<T> {
    result.map_err(|error| {
        PyValueError::new_err(format!(
            "this was not pickled by this version of libkerf: {error}"
        ))
    })
}

/// The object of this class that was made these bytes.
#[pyfunction]
pub(crate) fn _restore<'py>(
    py: Python<'py>,
    kind: &str,
    data: &[u8],
) -> PyResult<Bound<'py, PyAny>> {
    match kind {
        "Cpu" => Ok(Bound::new(py, read::<Cpu>(data)?)?.into_any()),
        "DeviceTree" => Ok(Bound::new(py, read::<DeviceTree>(data)?)?.into_any()),
        "Finding" => Ok(Bound::new(py, read::<Finding>(data)?)?.into_any()),
        "Instance" => Ok(Bound::new(py, read::<Instance>(data)?)?.into_any()),
        "Machine" => Ok(Bound::new(py, read::<Machine>(data)?)?.into_any()),
        "Overlay" => Ok(Bound::new(py, read::<Overlay>(data)?)?.into_any()),
        "Report" => Ok(Bound::new(py, read::<Report>(data)?)?.into_any()),
        "State" => Ok(Bound::new(py, read::<State>(data)?)?.into_any()),
        _ => Err(PyValueError::new_err(format!(
            "{kind} is not a class of libkerf that can be pickled"
        ))),
    }
}
