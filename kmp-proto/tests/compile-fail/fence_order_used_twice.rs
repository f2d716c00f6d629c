//! A fence order certifies once.
use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};

fn main() {
    let order = FenceOrder::new(1);
    let _ = order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 0);
    let _ = order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 0);
}
