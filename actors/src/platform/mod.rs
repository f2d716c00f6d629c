//! What actors stand on: the journal, the connections, events, operations, clocks and threads.

pub mod ambient;
pub mod aside;
pub mod clock;
pub mod events;
pub mod fault;
pub mod fleet;
pub mod journal;
pub mod operations;
pub mod transport;
pub mod wall_clock;
pub mod witness;
