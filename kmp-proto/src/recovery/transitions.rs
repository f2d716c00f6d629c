//! The recovery's transition table.

use crate::transition::{Transition, row};

const PREPARING: &str = "preparing_recovery";
const CAPTURING: &str = "capturing_vmcore";
const RECLAIMING: &str = "reclaiming_resources";
const RESPAWNING: &str = "respawning";
const DONE: &str = "done";

/// All steps of an [`Engine`](super::Engine). An event that is not listed changes nothing.
pub const TRANSITIONS: &[Transition] = &[
    row("–", "begin", "", PREPARING, &["Fence", "NoticeSurvivors"]),
    row(
        "–",
        "resume",
        "the certificate is in the journal; a vmcore is wanted and not there",
        CAPTURING,
        &["Capture"],
    ),
    row(
        "–",
        "resume",
        "the certificate is in the journal; no vmcore is wanted, or it is there",
        RECLAIMING,
        &["Reclaim"],
    ),
    row(
        PREPARING,
        "Fenced",
        "certificate of the failed generation; a vmcore is wanted",
        CAPTURING,
        &["Capture"],
    ),
    row(
        PREPARING,
        "Fenced",
        "certificate of the failed generation; no vmcore is wanted",
        RECLAIMING,
        &["Reclaim"],
    ),
    row(
        PREPARING,
        "FenceUnconfirmed",
        "tried fewer than 5 times",
        PREPARING,
        &[],
    ),
    row(
        PREPARING,
        "Tick",
        "500 ms after an unconfirmed fence",
        PREPARING,
        &["Fence"],
    ),
    row(
        PREPARING,
        "FenceUnconfirmed",
        "tried 5 times",
        DONE,
        &["Finished(OperatorActionNeeded)"],
    ),
    row(CAPTURING, "Captured", "", RECLAIMING, &["Reclaim"]),
    row(
        CAPTURING,
        "CaptureFailed",
        "the vmcore is not required",
        RECLAIMING,
        &["Reclaim"],
    ),
    row(
        CAPTURING,
        "CaptureFailed",
        "the vmcore is required",
        DONE,
        &["Finished(OperatorActionNeeded)"],
    ),
    row(PREPARING, "SuccessorFailed", "", PREPARING, &[]),
    row(CAPTURING, "SuccessorFailed", "", CAPTURING, &[]),
    row(RECLAIMING, "SuccessorFailed", "", RECLAIMING, &[]),
    row(
        RECLAIMING,
        "Released",
        "no successor is wanted any more",
        DONE,
        &["Complete", "Finished(SuccessorFailed)"],
    ),
    row(
        RECLAIMING,
        "Released",
        "a successor is wanted",
        RESPAWNING,
        &["Respawn"],
    ),
    row(
        RECLAIMING,
        "Released",
        "it failed too often",
        DONE,
        &["Complete", "Finished(Quarantined)"],
    ),
    row(
        RESPAWNING,
        "SuccessorStarted",
        "the first, and it is wanted",
        RESPAWNING,
        &[],
    ),
    row(
        RESPAWNING,
        "SuccessorStarted",
        "the first, and it is not wanted any more",
        DONE,
        &["Complete", "Finished(SuccessorFailed)"],
    ),
    row(
        RESPAWNING,
        "NotStarted",
        "it was not started",
        DONE,
        &["Complete", "Finished(SuccessorFailed)"],
    ),
    row(
        RESPAWNING,
        "SuccessorRemains",
        "it was not started",
        DONE,
        &["Complete", "Finished(OperatorActionNeeded)"],
    ),
    row(
        RESPAWNING,
        "SuccessorHealthy",
        "it was started, a later generation",
        DONE,
        &["Complete", "Finished(Recovered)"],
    ),
    row(
        RESPAWNING,
        "SuccessorFailed",
        "it was started",
        DONE,
        &["Complete", "Finished(SuccessorFailed)"],
    ),
    row(
        RESPAWNING,
        "SuccessorFailed",
        "its start is under way: it is not wanted any more",
        RESPAWNING,
        &[],
    ),
];
