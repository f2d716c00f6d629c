//! The morph's transition table.

use super::stage::Stage;
use crate::transition::{Transition, row};

const PREPARING: &str = Stage::Preparing.as_str();
const NEGOTIATING: &str = Stage::Negotiating.as_str();
const TRANSFERRING: &str = Stage::Transferring.as_str();
const HELD: &str = Stage::Held.as_str();
const VALIDATING: &str = Stage::Validating.as_str();
const COMMITTABLE: &str = Stage::Committable.as_str();
const FREEZING: &str = Stage::Freezing.as_str();
const LAST_ROUND: &str = Stage::LastRound.as_str();
const ACTIVATING: &str = Stage::Activating.as_str();
const RECORDING: &str = Stage::Recording.as_str();
const SERVING: &str = Stage::Serving.as_str();
const RETIRING: &str = Stage::Retiring.as_str();
const FENCING_SOURCE: &str = Stage::FencingSource.as_str();
const FENCING_TARGET: &str = Stage::FencingTarget.as_str();
const RESUMING: &str = Stage::Resuming.as_str();
const DONE: &str = Stage::Done.as_str();

const OVERDUE: &str = "deadline over";
const AGAIN: &str = "asked again after 200 ms, until the detector judges";
const ASK_DUE: &str = "200 ms after a refusal or silence, or deadline over";
const UNDER_WAY: &str = "nothing more to do: that is under way";
const UNDO: &[&str] = &["Phase", "Fence(target)"];
const FENCE_SOURCE: &[&str] = &["Fence(source)"];

/// The events that cause a rollback before the commit record, from one state.
macro_rules! undone_from {
    ($state:ident) => {
        [
            row($state, "RollbackRequested", "", FENCING_TARGET, UNDO),
            row($state, "Died(source)", "", FENCING_TARGET, UNDO),
            row($state, "Died(target)", "", FENCING_TARGET, UNDO),
            row($state, "Refused(source)", "", FENCING_TARGET, UNDO),
            row($state, "Refused(target)", "", FENCING_TARGET, UNDO),
            row($state, "Unanswered(source)", "", FENCING_TARGET, UNDO),
            row($state, "Unanswered(target)", "", FENCING_TARGET, UNDO),
            row($state, "Tick", OVERDUE, FENCING_TARGET, UNDO),
        ]
    };
}

const FORWARD: &[Transition] = &[
    row("–", "begin", "", PREPARING, &["Prepare(source)"]),
    row(
        "–",
        "resume",
        "no commit record",
        FENCING_TARGET,
        &["Fence(target)"],
    ),
    row("–", "resume", "commit record found", SERVING, &["Serve"]),
    row(
        PREPARING,
        "TargetHealthy",
        "the first",
        PREPARING,
        &["Prepare(target)"],
    ),
    row(PREPARING, "NotStarted", "", FENCING_TARGET, UNDO),
    row(
        PREPARING,
        "Prepared",
        "the other side is not",
        PREPARING,
        &[],
    ),
    row(
        PREPARING,
        "Prepared",
        "both sides are",
        NEGOTIATING,
        &["Phase", "Negotiate(source)", "Negotiate(target)"],
    ),
    row(NEGOTIATING, "Offered", "by one side", NEGOTIATING, &[]),
    row(
        NEGOTIATING,
        "Offered",
        "by both, and a provider can be used by both",
        TRANSFERRING,
        &["Phase", "Chosen", "Round"],
    ),
    row(
        NEGOTIATING,
        "Offered",
        "by both, and no provider can",
        FENCING_TARGET,
        UNDO,
    ),
    row(
        TRANSFERRING,
        "RoundApplied",
        "copied, the last round would be long, and each was shorter; at most 10 rounds",
        TRANSFERRING,
        &["Round"],
    ),
    row(
        TRANSFERRING,
        "RoundApplied",
        "otherwise",
        VALIDATING,
        &["Phase", "Validate"],
    ),
    row(
        TRANSFERRING,
        "RoundApplied",
        "the first, and its validation is to be asked for",
        HELD,
        &["Transferred"],
    ),
    row(
        HELD,
        "ValidationRequested",
        "copied, and the last round would be long",
        TRANSFERRING,
        &["Round"],
    ),
    row(
        HELD,
        "ValidationRequested",
        "otherwise",
        VALIDATING,
        &["Phase", "Validate"],
    ),
    row(
        VALIDATING,
        "Report",
        "at least one check, none failed",
        COMMITTABLE,
        &["Phase", "Committable"],
    ),
    row(VALIDATING, "Report", "otherwise", FENCING_TARGET, UNDO),
    row(
        COMMITTABLE,
        "CommitRequested",
        "estimate within the limit, or none is set",
        FREEZING,
        &["Phase", "Freeze"],
    ),
    row(
        COMMITTABLE,
        "CommitRequested",
        "otherwise",
        COMMITTABLE,
        &["CommitRefused"],
    ),
    row(
        COMMITTABLE,
        "CommitRequested",
        "otherwise, and nobody is there to decide",
        FENCING_TARGET,
        UNDO,
    ),
    row(FREEZING, "Frozen", "", LAST_ROUND, &["Round(last)"]),
    row(LAST_ROUND, "RoundApplied", "", ACTIVATING, &["Activate"]),
    row(
        ACTIVATING,
        "Activated",
        "the digests agree",
        RECORDING,
        &["WriteCommitRecord"],
    ),
    row(
        ACTIVATING,
        "Activated",
        "the digests differ",
        FENCING_TARGET,
        UNDO,
    ),
    row(
        RECORDING,
        "RecordDurable",
        "of this morph",
        SERVING,
        &["Serve"],
    ),
    row(
        RECORDING,
        "RecordDurable",
        "of this morph, and the target died meanwhile",
        FENCING_SOURCE,
        FENCE_SOURCE,
    ),
    row(RECORDING, "RecordFailed", "", FENCING_TARGET, UNDO),
    row(
        RECORDING,
        "Died(source)",
        "remembered until the record's outcome is known",
        RECORDING,
        &[],
    ),
    row(
        RECORDING,
        "Died(target)",
        "remembered until the record's outcome is known",
        RECORDING,
        &[],
    ),
];

const AFTER_THE_RECORD: &[Transition] = &[
    row(SERVING, "Serving", "", RETIRING, &["Retire"]),
    row(
        SERVING,
        "Refused(target)",
        "asked fewer than 5 times; asked again after 200 ms",
        SERVING,
        &[],
    ),
    row(
        SERVING,
        "Refused(target)",
        "asked 5 times",
        FENCING_SOURCE,
        FENCE_SOURCE,
    ),
    row(SERVING, "Unanswered(target)", AGAIN, SERVING, &[]),
    row(SERVING, "Tick", ASK_DUE, SERVING, &["Serve"]),
    row(SERVING, "Died(target)", "", FENCING_SOURCE, FENCE_SOURCE),
    row(RETIRING, "Retired", "", FENCING_SOURCE, FENCE_SOURCE),
    row(
        RETIRING,
        "Refused(source)",
        "",
        FENCING_SOURCE,
        FENCE_SOURCE,
    ),
    row(
        RETIRING,
        "Unanswered(source)",
        "",
        FENCING_SOURCE,
        FENCE_SOURCE,
    ),
    row(RETIRING, "Died(source)", "", FENCING_SOURCE, FENCE_SOURCE),
    row(RETIRING, "Died(target)", "", RETIRING, &[]),
    row(RETIRING, "Tick", OVERDUE, FENCING_SOURCE, FENCE_SOURCE),
    row(
        FENCING_SOURCE,
        "Fenced(source)",
        "certificate of the source generation",
        DONE,
        &["Phase", "Finished(Committed)"],
    ),
    row(
        FENCING_SOURCE,
        "Fenced(source)",
        "the same, and the target failed",
        DONE,
        &["Phase", "Finished(CommittedButFailed)"],
    ),
    row(FENCING_SOURCE, "Died(target)", "", FENCING_SOURCE, &[]),
    row(
        FENCING_SOURCE,
        "FenceUnconfirmed(source)",
        "tried fewer than 10 times",
        FENCING_SOURCE,
        &[],
    ),
    row(
        FENCING_SOURCE,
        "Tick",
        "1 s after an unconfirmed fence",
        FENCING_SOURCE,
        FENCE_SOURCE,
    ),
    row(
        FENCING_SOURCE,
        "FenceUnconfirmed(source)",
        "tried 10 times",
        DONE,
        &["Phase", "Finished(OperatorActionNeeded)"],
    ),
];

const ROLLING_BACK: &[Transition] = &[
    row(
        FENCING_TARGET,
        "RollbackRequested",
        UNDER_WAY,
        FENCING_TARGET,
        &[],
    ),
    row(RESUMING, "RollbackRequested", UNDER_WAY, RESUMING, &[]),
    row(
        FENCING_TARGET,
        "Fenced(target)",
        "certificate of the target generation",
        RESUMING,
        &["ResumeSource"],
    ),
    row(
        FENCING_TARGET,
        "Fenced(target)",
        "the same, and the source has failed",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
    row(FENCING_TARGET, "Died(source)", "", FENCING_TARGET, &[]),
    row(
        FENCING_TARGET,
        "FenceUnconfirmed(target)",
        "tried fewer than 10 times",
        FENCING_TARGET,
        &[],
    ),
    row(
        FENCING_TARGET,
        "Tick",
        "1 s after an unconfirmed fence",
        FENCING_TARGET,
        &["Fence(target)"],
    ),
    row(
        FENCING_TARGET,
        "FenceUnconfirmed(target)",
        "tried 10 times",
        DONE,
        &["Phase", "Finished(OperatorActionNeeded)"],
    ),
    row(
        RESUMING,
        "SourceRunning",
        "",
        DONE,
        &["Phase", "Finished(RolledBack)"],
    ),
    row(
        RESUMING,
        "Refused(source)",
        "asked fewer than 5 times; asked again after 200 ms",
        RESUMING,
        &[],
    ),
    row(
        RESUMING,
        "Refused(source)",
        "asked 5 times",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
    row(RESUMING, "Unanswered(source)", AGAIN, RESUMING, &[]),
    row(RESUMING, "Tick", ASK_DUE, RESUMING, &["ResumeSource"]),
    row(
        RESUMING,
        "Died(source)",
        "",
        DONE,
        &["Phase", "Finished(SourceFailed)"],
    ),
];

const UNDONE: [[Transition; 8]; 9] = [
    undone_from!(PREPARING),
    undone_from!(NEGOTIATING),
    undone_from!(TRANSFERRING),
    undone_from!(HELD),
    undone_from!(VALIDATING),
    undone_from!(COMMITTABLE),
    undone_from!(FREEZING),
    undone_from!(LAST_ROUND),
    undone_from!(ACTIVATING),
];

/// All steps of an [`Engine`](super::Engine), part by part: forward to the commit record, rollbacks
/// before it, after it, and the rollback itself. An event that is not listed changes nothing.
pub const TRANSITIONS: [&[Transition]; 4] = [
    FORWARD,
    UNDONE.as_flattened(),
    AFTER_THE_RECORD,
    ROLLING_BACK,
];
