//! The reference workload: an in-memory key-value server.
fn main() {}
