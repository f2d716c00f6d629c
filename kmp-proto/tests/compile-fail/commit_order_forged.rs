//! The order to write a commit record comes from the engine, once.
use kmp_proto::morph::{CommitOrder, CommitRecord};

fn forge() -> CommitOrder {
    CommitOrder::new(1, 2)
}

fn copy(order: &CommitOrder) -> CommitOrder {
    order.clone()
}

fn twice(order: CommitOrder) -> [CommitRecord; 2] {
    [order.recorded(), order.recorded()]
}

fn main() {}
