//! What instances are given, and who holds it: CPUs, memory, ports, numbers.

pub mod forward;
pub mod numbers;
pub mod pool;
pub mod ports;
