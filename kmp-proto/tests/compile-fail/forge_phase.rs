//! A phase can only be entered by its transition.
use kmp_proto::recovery::{Reclaiming, Recovery};

fn reclaiming(phase: Reclaiming) -> Recovery<Reclaiming> {
    Recovery {
        failed_generation: 1,
        phase,
    }
}

fn main() {}
