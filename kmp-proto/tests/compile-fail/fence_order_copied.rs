//! A fence order cannot be copied, so it cannot be confirmed twice.
use kmp_proto::fence::FenceOrder;

fn copy(order: &FenceOrder) -> FenceOrder {
    order.clone()
}

fn main() {}
