//! The detector's transition table.

use crate::transition::{Transition, row};

const STARTING: &str = "starting";
const MONITORING: &str = "monitoring";
const DETECTING: &str = "detecting_failure";
const FAILED: &str = "failed";

const PROBE_DUE: &str = "a probe is due";
const STUCK: &str = "a CPU has run nothing for the timeout, and policy has that be a failure";
const SILENT: &str =
    "silent for the timeout and the guard, own lateness added; the tick is not late";

/// All steps of a [`Detector`](super::Detector). An event that is not listed changes only the
/// detector's memory: when the channel was lost, which level answered, how late the daemon was.
pub const TRANSITIONS: &[Transition] = &[
    row(STARTING, "ChannelUp", "", STARTING, &["SendProbe"]),
    row(
        STARTING,
        "Answer",
        "not unhealthy, or it was healthy before this watch",
        MONITORING,
        &["Healthy"],
    ),
    row(STARTING, "Tick", PROBE_DUE, STARTING, &["SendProbe"]),
    row(STARTING, "Tick", "start timeout over", FAILED, &["Failed"]),
    row(
        STARTING,
        "SendRefused",
        "refused for a whole timeout",
        STARTING,
        &["TransportCongested"],
    ),
    row(STARTING, "Ended", "", FAILED, &["Failed"]),
    row(MONITORING, "ChannelUp", "", MONITORING, &["SendProbe"]),
    row(MONITORING, "Tick", PROBE_DUE, MONITORING, &["SendProbe"]),
    row(
        MONITORING,
        "Tick",
        "silent for two intervals",
        DETECTING,
        &["Suspect", "LookCloser", "SendProbe"],
    ),
    row(
        MONITORING,
        "Tick",
        SILENT,
        FAILED,
        &["Suspect", "LookCloser", "Failed"],
    ),
    row(
        MONITORING,
        "SendRefused",
        "refused for a whole timeout",
        MONITORING,
        &["TransportCongested"],
    ),
    row(MONITORING, "Ended", "", FAILED, &["Failed"]),
    row(MONITORING, "Stall", STUCK, FAILED, &["Failed"]),
    row(
        DETECTING,
        "ChannelUp",
        "",
        DETECTING,
        &["SendProbe", "LookCloser"],
    ),
    row(
        DETECTING,
        "Answer",
        "to a probe under way",
        MONITORING,
        &["Relieved"],
    ),
    row(
        DETECTING,
        "Tick",
        "a probe is due; each waits twice as long",
        DETECTING,
        &["SendProbe", "LookCloser"],
    ),
    row(DETECTING, "Tick", SILENT, FAILED, &["Failed"]),
    row(
        DETECTING,
        "SendRefused",
        "refused for a whole timeout",
        DETECTING,
        &["TransportCongested"],
    ),
    row(DETECTING, "Ended", "", FAILED, &["Failed"]),
    row(DETECTING, "Stall", STUCK, FAILED, &["Failed"]),
];
