//! The three real engines, driven with their own events and tokens.

mod instance;
mod morph;
mod recovery;

use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};

pub(crate) use instance::{InstanceEffect, InstanceEvent, InstanceMachine, InstanceOrigin, Wanted};
pub(crate) use morph::{MorphEffect, MorphEnd, MorphEvent, MorphMachine, MorphOrigin};
pub(crate) use recovery::{End, RecoveryEffect, RecoveryEvent, RecoveryMachine, RecoveryOrigin};

/// A generation's number.
pub(crate) type Gen = u8;

/// A text of an event. Engines pass texts on and never read them.
fn text() -> String {
    "it is so".to_owned()
}

fn certify(order: FenceOrder) -> FenceCertificate {
    order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1)
}
