//! Resources of instances, and their holders: CPUs, memory, ports, numbers.

pub mod forward;
pub mod numbers;
pub mod pool;
pub mod ports;

use std::cell::RefCell;
use std::rc::Rc;

/// The resources that instances use. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Resources {
    /// CPUs and memory.
    pub pool: Rc<RefCell<pool::Pool>>,
    /// Numbers that only grow or must be unique.
    pub numbers: Rc<RefCell<numbers::Numbers>>,
    /// Published ports.
    pub ports: ports::Ports,
}
