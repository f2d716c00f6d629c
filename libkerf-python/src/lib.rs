//! libkerf for Python. The package around it, `python/libkerf`, exports these names and defines the exceptions; its
//! stub file has the types.

mod arguments;
mod control;
mod convert;
mod daemon;
mod errors;
mod instance;
mod kernel;
mod machine;
mod monitor;
mod overlay;
mod pickled;
mod records;
mod report;
mod state;
mod tree;

use pyo3::pymodule;

#[pymodule]
mod _libkerf {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }

    #[pymodule_export]
    use super::daemon::Daemon;
    #[pymodule_export]
    use super::instance::Instance;
    #[pymodule_export]
    use super::kernel::{Applied, Kernel, Lock};
    #[pymodule_export]
    use super::machine::{Cpu, Machine};
    #[pymodule_export]
    use super::monitor::Monitor;
    #[pymodule_export]
    use super::overlay::Overlay;
    #[pymodule_export]
    use super::pickled::_restore;
    #[pymodule_export]
    use super::records::{Records, inspect_initrd, inspect_kernel};
    #[pymodule_export]
    use super::report::{Finding, Report};
    #[pymodule_export]
    use super::state::State;
    #[pymodule_export]
    use super::tree::DeviceTree;
}
