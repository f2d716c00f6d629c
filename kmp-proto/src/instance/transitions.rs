//! The instance's transition table.

use super::stage::Stage;
use crate::transition::{Transition, row};

const STARTING: &str = Stage::Starting.as_str();
const SERVING: &str = Stage::Serving.as_str();
const RESTING: &str = Stage::Resting.as_str();
const ASKED: &str = Stage::Asked.as_str();
const FAILED: &str = Stage::Failed.as_str();
const BACKING_OFF: &str = Stage::BackingOff.as_str();
const QUEUED: &str = Stage::Queued.as_str();
const RECOVERING: &str = Stage::Recovering.as_str();
const MORPHING: &str = Stage::Morphing.as_str();
const CAPTURING: &str = Stage::Capturing.as_str();
const ENDING: &str = Stage::Ending.as_str();
const GONE: &str = Stage::Gone.as_str();

const NOT_ENDING: &str = "no termination is asked for";
const SPAWN: &str = "by its spawn, and no termination is asked for";
const WRITING: &str = "a termination is being written";
const RECORDED: &str = "a termination is in the journal";
const HEALED: &str = "auto-heal is on, and the failure the first in a row";
const AGAIN: &str = "auto-heal is on, and the failure not the first in a row";
const TOO_OFTEN: &str = "auto-heal is on, and it fails too often";
const NOT_HEALED: &str = "auto-heal is off";
const UNFAILED: &str = "it has not failed meanwhile";
const MEANWHILE: &str = "it failed meanwhile; then as Failed";

const END: &[&str] = &["Disappoint", "Show", "Ports(hold)", "Watch(end)", "End"];
const GIVE_UP: &[&str] = &["Show", "Ports(hold)", "Watch(end)", "End"];
const SHOW: &[&str] = &["Show"];
const NONE: &[&str] = &[];

/// The policy's reaction to a failure, after the effects `first`.
macro_rules! healed {
    ($state:ident, $event:literal $(, $first:literal)*) => {
        [
            row($state, $event, HEALED, QUEUED,
                &[$($first,)* "Show", "Watch(end)", "Ports(hold for a while)", "Queue"]),
            row($state, $event, AGAIN, BACKING_OFF,
                &[$($first,)* "Show", "Watch(end)", "Ports(hold for a while)", "BackOff"]),
            row($state, $event, TOO_OFTEN, QUEUED,
                &[$($first,)* "Show", "Watch(end)", "Ports(hold for a while)", "Save", "Queue"]),
            row($state, $event, NOT_HEALED, RESTING,
                &[$($first,)* "Show", "Watch(end)", "Ports(hold for a while)", "Ports(close)", "Save"]),
        ]
    };
}

/// A failure while a termination is being written waits for that write, after the effects `first`.
macro_rules! waits {
    ($state:ident, $event:literal $(, $first:literal)*) => {
        row($state, $event, WRITING, FAILED,
            &[$($first,)* "Show", "Watch(end)", "Ports(hold for a while)"])
    };
}

const BEGINNING: &[Transition] = &[
    row("–", "spawned", "", STARTING, &["Watch(begin)"]),
    row("–", "adopted", "", STARTING, &["Watch(adopt)"]),
    row("–", "morphing", "", MORPHING, &["Watch(begin)", "Show"]),
    row("–", "resting", "", RESTING, &["Ports(close)"]),
    row("–", "ending", "", ENDING, END),
    row(
        "–",
        "failed",
        "an earlier daemon decided what follows",
        QUEUED,
        &["Show", "Ports(hold for a while)", "Queue"],
    ),
    row(
        "–",
        "failed",
        HEALED,
        QUEUED,
        &["Show", "Watch(end)", "Ports(hold for a while)", "Queue"],
    ),
    row(
        "–",
        "failed",
        NOT_HEALED,
        RESTING,
        &[
            "Show",
            "Watch(end)",
            "Ports(hold for a while)",
            "Ports(close)",
            "Save",
        ],
    ),
];

const IDLE: &[Transition] = &[
    row(
        STARTING,
        "Healthy",
        "",
        SERVING,
        &["Ports(aim)", "Show", "SpawnSucceeded", "EndRecovery"],
    ),
    row(SERVING, "Healthy", "", SERVING, &["Ports(aim)", "Show"]),
    row(SERVING, "Silent", "", SERVING, SHOW),
    row(SERVING, "Answers", "", SERVING, SHOW),
    row(SERVING, "Said", "", SERVING, SHOW),
    row(SERVING, "Load", "", SERVING, SHOW),
    row(STARTING, "Failed", SPAWN, ENDING, GIVE_UP),
    row(STARTING, "ProgramEnded", SPAWN, ENDING, GIVE_UP),
    row(
        STARTING,
        "Asked(recover)",
        "adopted, and no termination is asked for",
        ASKED,
        &["Record(recover)"],
    ),
    row(
        SERVING,
        "Asked(recover)",
        NOT_ENDING,
        ASKED,
        &["Record(recover)"],
    ),
    row(
        RESTING,
        "Asked(recover)",
        NOT_ENDING,
        ASKED,
        &["Record(recover)"],
    ),
    row(
        SERVING,
        "Asked(morph)",
        "it answers, and no termination is asked for",
        MORPHING,
        &["Show", "Morph"],
    ),
    row(
        STARTING,
        "Asked(capture)",
        NOT_ENDING,
        CAPTURING,
        &["Watch(pause)", "Ports(hold)", "Capture"],
    ),
    row(
        SERVING,
        "Asked(capture)",
        NOT_ENDING,
        CAPTURING,
        &["Watch(pause)", "Ports(hold)", "Show", "Capture"],
    ),
    row(
        RESTING,
        "Asked(capture)",
        NOT_ENDING,
        CAPTURING,
        &["Watch(pause)", "Ports(hold)", "Capture"],
    ),
];

/// Unfinished work gives way to a termination, which may be requested in each of these states.
macro_rules! ended {
    ($state:ident, $guard:expr, $recorded:ident, $effects:expr) => {
        [
            row(
                $state,
                "Asked(terminate)",
                $guard,
                $state,
                &["Record(terminate)"],
            ),
            row($state, "Recorded(terminate)", WRITING, $recorded, $effects),
            row($state, "NotRecorded(terminate)", WRITING, $state, NONE),
        ]
    };
}

const TERMINATION: [[Transition; 3]; 7] = [
    ended!(
        STARTING,
        NOT_ENDING,
        ENDING,
        &[
            "Disappoint",
            "Show",
            "Ports(hold)",
            "Watch(end)",
            "End",
            "EndRecovery"
        ]
    ),
    ended!(SERVING, NOT_ENDING, ENDING, END),
    ended!(RESTING, NOT_ENDING, ENDING, END),
    ended!(
        BACKING_OFF,
        NOT_ENDING,
        ENDING,
        &[
            "CancelBackOff",
            "Disappoint",
            "Show",
            "Ports(hold)",
            "Watch(end)",
            "End"
        ]
    ),
    ended!(QUEUED, NOT_ENDING, ENDING, END),
    ended!(
        RECOVERING,
        NOT_ENDING,
        RECOVERING,
        &["Tell(SuccessorFailed)"]
    ),
    ended!(
        MORPHING,
        "by force, and no termination is asked for",
        MORPHING,
        &["Tell(Terminated)"]
    ),
];

const FAILING: &[Transition] = &[
    row(FAILED, "Recorded(terminate)", "", ENDING, END),
    row(
        FAILED,
        "NotRecorded(terminate)",
        "its spawn has failed",
        ENDING,
        GIVE_UP,
    ),
    // The journal answers the recovery request first.
    row(
        ASKED,
        "Asked(terminate)",
        NOT_ENDING,
        ASKED,
        &["Record(terminate)"],
    ),
    row(
        ASKED,
        "Recorded(recover)",
        "",
        QUEUED,
        &[
            "Watch(end)",
            "Ports(hold for a while)",
            "Queue",
            "EndRecovery",
        ],
    ),
    row(ASKED, "NotRecorded(recover)", "as before", STARTING, NONE),
    row(ASKED, "NotRecorded(recover)", "as before", SERVING, NONE),
    row(ASKED, "NotRecorded(recover)", "as before", RESTING, NONE),
    row(
        ASKED,
        "Failed",
        "",
        ASKED,
        &["Show", "Ports(hold)", "EndRecovery"],
    ),
    row(
        ASKED,
        "Healthy",
        "it did not rest",
        ASKED,
        &["Ports(aim)", "Show", "EndRecovery"],
    ),
    row(BACKING_OFF, "BackOffOver", "", QUEUED, &["Queue"]),
    row(QUEUED, "Granted", "", RECOVERING, &["Show", "Recover"]),
    row(
        RECOVERING,
        "SuccessorStarted",
        "",
        RECOVERING,
        &["Watch(end)", "Watch(begin)"],
    ),
    row(
        RECOVERING,
        "SuccessorStarted",
        RECORDED,
        RECOVERING,
        &["Watch(end)"],
    ),
    row(
        RECOVERING,
        "Healthy",
        "",
        RECOVERING,
        &["Ports(aim)", "Tell(SuccessorHealthy)"],
    ),
    row(
        RECOVERING,
        "Failed",
        "",
        RECOVERING,
        &["Ports(hold)", "Tell(SuccessorFailed)"],
    ),
    row(RECOVERING, "JobGone", "", RECOVERING, &["StartOver"]),
    row(
        RECOVERING,
        "RecoveryOver(Recovered)",
        UNFAILED,
        SERVING,
        &["ReturnGrant", "Show"],
    ),
    row(
        RECOVERING,
        "RecoveryOver(Quarantined)",
        "",
        RESTING,
        &["ReturnGrant", "Show", "Save", "Ports(close)"],
    ),
    row(
        RECOVERING,
        "RecoveryOver(OperatorActionNeeded)",
        "",
        RESTING,
        &["ReturnGrant", "Show", "Save", "Ports(close)"],
    ),
];

/// A job that ends while a termination is in the journal.
macro_rules! ended_after {
    ($state:ident, $event:literal $(, $first:literal)*) => {
        row(
            $state,
            $event,
            RECORDED,
            ENDING,
            &[$($first,)* "Disappoint", "Show", "Ports(hold)", "Watch(end)", "End"],
        )
    };
}

const JOBS: &[Transition] = &[
    ended_after!(RECOVERING, "RecoveryOver(Recovered)", "ReturnGrant"),
    ended_after!(RECOVERING, "RecoveryOver(SuccessorFailed)", "ReturnGrant"),
    ended_after!(RECOVERING, "RecoveryOver(Quarantined)", "ReturnGrant"),
    ended_after!(
        RECOVERING,
        "RecoveryOver(OperatorActionNeeded)",
        "ReturnGrant"
    ),
    ended_after!(MORPHING, "MorphOver(Committed)"),
    ended_after!(MORPHING, "MorphOver(CommittedButFailed)"),
    ended_after!(MORPHING, "MorphOver(RolledBack)"),
    ended_after!(MORPHING, "MorphOver(SourceFailed)"),
    ended_after!(MORPHING, "MorphOver(OperatorActionNeeded)"),
    row(MORPHING, "Failed", "", MORPHING, &["Tell(SourceFailed)"]),
    row(MORPHING, "JobGone", "", MORPHING, &["StartOver"]),
    row(MORPHING, "SourceLeft", "", MORPHING, &["Watch(end)"]),
    row(
        MORPHING,
        "MorphOver(Committed)",
        "",
        SERVING,
        &["Watch(take over)", "Show"],
    ),
    row(
        MORPHING,
        "MorphOver(RolledBack)",
        UNFAILED,
        SERVING,
        &["Watch(begin)", "Show"],
    ),
    row(
        MORPHING,
        "MorphOver(OperatorActionNeeded)",
        "about the source, and the target serves",
        SERVING,
        &["Watch(take over)", "Show"],
    ),
    row(
        MORPHING,
        "MorphOver(OperatorActionNeeded)",
        "about the target",
        RESTING,
        &["Show", "Save"],
    ),
    row(
        MORPHING,
        "MorphOver(OperatorActionNeeded)",
        "about the source, and the target has failed",
        RESTING,
        &["Watch(end)", "Show", "Save", "Ports(close)"],
    ),
    row(CAPTURING, "Failed", "", CAPTURING, &["Show", "EndRecovery"]),
    row(
        CAPTURING,
        "CaptureOver",
        "as before",
        STARTING,
        &["Watch(resume)"],
    ),
    row(
        CAPTURING,
        "CaptureOver",
        "as before",
        SERVING,
        &["Watch(resume)"],
    ),
    row(
        CAPTURING,
        "CaptureOver",
        "as before",
        RESTING,
        &["Watch(resume)"],
    ),
    row(CAPTURING, "CaptureOver", MEANWHILE, ENDING, GIVE_UP),
    row(ENDING, "Unreturned", "", ENDING, SHOW),
    row(ENDING, "Ended", "", GONE, &["Stop"]),
    row(ENDING, "NotEnded", "", RESTING, &["Show", "Ports(close)"]),
];

const HEALING: [[Transition; 4]; 9] = [
    healed!(SERVING, "Failed"),
    healed!(ASKED, "NotRecorded(recover)"),
    healed!(FAILED, "NotRecorded(terminate)"),
    healed!(RECOVERING, "RecoveryOver(Recovered)", "ReturnGrant"),
    healed!(RECOVERING, "RecoveryOver(SuccessorFailed)", "ReturnGrant"),
    healed!(MORPHING, "MorphOver(CommittedButFailed)"),
    healed!(MORPHING, "MorphOver(RolledBack)"),
    healed!(MORPHING, "MorphOver(SourceFailed)"),
    healed!(CAPTURING, "CaptureOver"),
];

/// An adopted instance has no known earlier failure.
const ADOPTED: &[Transition] = &[
    row(
        STARTING,
        "Failed",
        HEALED,
        QUEUED,
        &[
            "Show",
            "Watch(end)",
            "Ports(hold for a while)",
            "Queue",
            "EndRecovery",
        ],
    ),
    row(
        STARTING,
        "Failed",
        NOT_HEALED,
        RESTING,
        &[
            "Show",
            "Watch(end)",
            "Ports(hold for a while)",
            "Ports(close)",
            "Save",
            "EndRecovery",
        ],
    ),
];

const WAITING: &[Transition] = &[
    row(
        STARTING,
        "Failed",
        WRITING,
        FAILED,
        &[
            "Show",
            "Watch(end)",
            "Ports(hold for a while)",
            "EndRecovery",
        ],
    ),
    waits!(SERVING, "Failed"),
    waits!(ASKED, "NotRecorded(recover)"),
    waits!(RECOVERING, "RecoveryOver(Recovered)", "ReturnGrant"),
    waits!(RECOVERING, "RecoveryOver(SuccessorFailed)", "ReturnGrant"),
    waits!(MORPHING, "MorphOver(CommittedButFailed)"),
    waits!(MORPHING, "MorphOver(RolledBack)"),
    waits!(MORPHING, "MorphOver(SourceFailed)"),
];

/// All steps of an [`Engine`](super::Engine), part by part: how it begins, what begins with an idle instance, the
/// handling of failures, the steps after a failure, jobs, and terminations. An event that is not listed changes nothing
/// visible; reports about health and load are remembered in each state.
pub const TRANSITIONS: [&[Transition]; 8] = [
    BEGINNING,
    IDLE,
    ADOPTED,
    HEALING.as_flattened(),
    WAITING,
    FAILING,
    JOBS,
    TERMINATION.as_flattened(),
];
