//! Arguments from Python callers, with Python's wording for errors.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyString};

fn type_name(value: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(value.get_type().name()?.to_string())
}

/// A type that may be an item of a list, or a single argument.
pub(crate) trait Item: Sized {
    fn read(value: &Bound<'_, PyAny>) -> PyResult<Self>;
}

/// An unsigned number with at most this many bits.
fn number(value: &Bound<'_, PyAny>, bits: u32) -> PyResult<u64> {
    let value = match value.cast::<PyInt>() {
        Ok(value) => value.clone().into_any(),
        Err(_) => {
            // As in Python's own functions: any object with __index__ is a number.
            let index = value.py().import("operator")?.getattr("index")?;
            index.call1((value,))?
        }
    };
    let most = u64::MAX >> (64 - bits);
    let refuse = || {
        let text = value.str().map(|text| text.to_string()).unwrap_or_default();
        PyOverflowError::new_err(format!("number must be in range 0 to {most}, not {text}"))
    };
    let number: u64 = value.extract().map_err(|_| refuse())?;
    if number > most {
        return Err(refuse());
    }
    Ok(number)
}

impl Item for u32 {
    fn read(value: &Bound<'_, PyAny>) -> PyResult<Self> {
        // The number is below 2^32, as checked above.
        Ok(u32::try_from(number(value, 32)?).unwrap_or(u32::MAX))
    }
}

impl Item for u64 {
    fn read(value: &Bound<'_, PyAny>) -> PyResult<Self> {
        number(value, 64)
    }
}

impl Item for String {
    fn read(value: &Bound<'_, PyAny>) -> PyResult<Self> {
        match value.cast::<PyString>() {
            Ok(text) => Ok(text.to_cow()?.into_owned()),
            Err(_) => {
                let message = format!("expected str, not {}", type_name(value)?);
                Err(PyTypeError::new_err(message))
            }
        }
    }
}

/// A number or a text.
pub(crate) struct One<T>(pub(crate) T);

impl<'py, T: Item> FromPyObject<'_, 'py> for One<T> {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        T::read(&value).map(Self)
    }
}

/// Any iterable of numbers or texts, except a text itself.
#[derive(Default)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<'py, T: Item> FromPyObject<'_, 'py> for List<T> {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if value.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err(
                "expected a sequence of items, not str",
            ));
        }
        let items = value.try_iter()?;
        let items: PyResult<Vec<T>> = items.map(|item| T::read(&item?)).collect();
        items.map(Self)
    }
}

/// The bytes of any object with a buffer: bytes, bytearray, memoryview, mmap, array.
pub(crate) struct Buffer<'py>(Bound<'py, PyBytes>);

impl Buffer<'_> {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl<'py> FromPyObject<'_, 'py> for Buffer<'py> {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let py = value.py();
        if let Ok(bytes) = value.cast::<PyBytes>() {
            return Ok(Self(bytes.to_owned()));
        }
        if let Ok(array) = value.cast::<PyByteArray>() {
            return Ok(Self(PyBytes::new(py, &array.to_vec())));
        }
        // The stable ABI of Python 3.10 has no buffers. The error has Python's wording too.
        let view = py
            .import("builtins")?
            .getattr("memoryview")?
            .call1((value,))?;
        Ok(Self(view.call_method0("tobytes")?.cast_into()?))
    }
}
