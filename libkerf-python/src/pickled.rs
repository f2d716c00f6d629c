//! Objects as bytes, for `pickle` and `copy`. The bytes are only for this version of the package.

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

/// The result of `__reduce__`: a function, and the arguments that restore the object.
pub(crate) type Reduced<'py> = (Bound<'py, PyAny>, (&'static str, Bound<'py, PyBytes>));

/// Reduces an object of this class to the data that restores it.
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
    // A tree may be nested deeper than JSON usually is; an unpickling caller trusts the data.
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

/// Restores the object of this class from its bytes.
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
