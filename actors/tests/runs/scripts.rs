//! Openings that lead an instance to rare situations: to a row of its transition table that requires two events within
//! a moment, mostly a write that fails and a failure meanwhile, or the sixth failure and something else; or to the
//! death of the daemon, or the end of a timer, at one moment. A script waits for steps of the engines, one after the
//! other, and executes deeds at each.

use kmorph_actors::platform::witness::{Machine, Step};

use crate::coverage::Command;

/// Number of failures in a row that are healed; one more quarantines the instance.
const HEALED: u32 = 5;

/// A deed of a script.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deed {
    Give(Command),
    /// A morph that proceeds to its commit automatically.
    Morph,
    AutoHealOff,
    /// The newest kernel of the instance dies.
    Kill,
    /// The oldest kernel of the instance dies.
    KillSource,
    /// The newest kernel of the instance hangs.
    Hang,
    /// This number of next fences of the newest kernel is not confirmed.
    Stubborn(u32),
    /// The kernels of all other instances die, and their first fences are not confirmed.
    KillOthers,
    /// The actor of the instance panics.
    Panic,
    /// From now on, each write of the journal takes up to several seconds.
    SlowDisk,
    /// Connections to the instance's port must be accepted or queued.
    ExpectOpen,
    /// A client writes to the instance; the port must accept the connection if the instance serves.
    Write,
    /// The daemon dies.
    Die,
    /// Waits this many milliseconds.
    Wait(u64),
    /// Waits up to this many milliseconds, determined by the seed.
    WaitUpTo(u64),
}

/// A step to wait for, and the deeds at that step.
struct Scene {
    machine: Machine,
    /// The event, or the state to which it leads.
    at: &'static str,
    /// The journal's next transaction is slow and fails.
    spoils: bool,
    deeds: &'static [Deed],
}

/// An opening.
pub(crate) struct Script {
    /// Memory can be captured.
    pub(crate) captures: bool,
    /// When the scenes begin, one more failure quarantines the instance.
    weary: bool,
    scenes: &'static [Scene],
}

const fn scene(at: &'static str, deeds: &'static [Deed]) -> Scene {
    Scene {
        machine: Machine::Instance,
        at,
        spoils: false,
        deeds,
    }
}

const fn in_morph(at: &'static str, deeds: &'static [Deed]) -> Scene {
    Scene {
        machine: Machine::Morph,
        ..scene(at, deeds)
    }
}

/// A scene in which the journal cannot write the wish just requested.
const fn unwritten(at: &'static str, deeds: &'static [Deed]) -> Scene {
    Scene {
        spoils: true,
        ..scene(at, deeds)
    }
}

const fn script(scenes: &'static [Scene]) -> Script {
    Script {
        captures: false,
        weary: false,
        scenes,
    }
}

const fn weary(scenes: &'static [Scene]) -> Script {
    Script {
        weary: true,
        ..script(scenes)
    }
}

/// A delay after which pending writes are done.
const SOON: Deed = Deed::Wait(30);
const RECOVER: Deed = Deed::Give(Command::Recover);
const TERMINATE: Deed = Deed::Give(Command::TerminateByForce);

/// All openings. Each is named after the row to which it leads, or after its subject.
pub(crate) const SCRIPTS: [Script; 14] = [
    // asked --NotRecorded(recover)--> resting: auto-heal is off
    script(&[
        scene("serving", &[SOON, Deed::AutoHealOff, RECOVER]),
        unwritten("Asked(recover)", &[Deed::Kill]),
    ]),
    // asked --NotRecorded(recover)--> queued: it fails too often
    weary(&[
        scene("serving", &[SOON, RECOVER]),
        unwritten("Asked(recover)", &[Deed::Kill]),
    ]),
    // asked --NotRecorded(recover)--> failed: a termination is being written
    script(&[
        scene("serving", &[SOON, RECOVER]),
        unwritten("Asked(recover)", &[Deed::Kill, TERMINATE]),
    ]),
    // asked --NotRecorded(recover)--> starting
    script(&[
        scene("serving", &[SOON, Deed::Hang, Deed::Panic]),
        scene("adopted", &[RECOVER]),
        unwritten("Asked(recover)", &[]),
    ]),
    // failed --NotRecorded(terminate)--> resting: auto-heal is off
    script(&[
        scene("serving", &[SOON, Deed::AutoHealOff, TERMINATE]),
        unwritten("Asked(terminate)", &[Deed::Kill]),
    ]),
    // failed --NotRecorded(terminate)--> queued: it fails too often
    weary(&[
        scene("serving", &[SOON, TERMINATE]),
        unwritten("Asked(terminate)", &[Deed::Kill]),
    ]),
    // queued --NotRecorded(terminate)--> queued: others are recovered first
    script(&[
        scene(
            "serving",
            &[Deed::Wait(300), Deed::KillOthers, SOON, Deed::Kill],
        ),
        scene("queued", &[TERMINATE]),
        unwritten("Asked(terminate)", &[]),
    ]),
    // morphing --MorphOver(CommittedButFailed)--> queued: it fails too often
    weary(&[
        scene("serving", &[SOON, Deed::Morph]),
        in_morph("committed.serving", &[Deed::Kill]),
    ]),
    // morphing --MorphOver(CommittedButFailed)--> failed: a termination is being written
    script(&[
        scene("serving", &[SOON, Deed::Morph]),
        in_morph(
            "committed.fencing_source",
            &[Deed::SlowDisk, Deed::Kill, Deed::WaitUpTo(9_000), TERMINATE],
        ),
    ]),
    // morphing --MorphOver(SourceFailed)--> queued: it fails too often
    weary(&[
        scene("serving", &[SOON, Deed::Morph]),
        in_morph("transferring", &[Deed::KillSource]),
    ]),
    // capturing --CaptureOver--> queued: it fails too often
    Script {
        captures: true,
        ..weary(&[
            scene("serving", &[SOON, Deed::Give(Command::Capture)]),
            scene("capturing", &[Deed::Kill]),
        ])
    },
    // After a restart, the daemon resumes, and does not fence, a kernel that its predecessor froze for a capture.
    Script {
        captures: true,
        ..script(&[
            scene("serving", &[SOON, Deed::Give(Command::Capture)]),
            scene("capturing", &[Deed::Wait(45), Deed::Die]),
        ])
    },
    // Each failure starts the hold of the ports anew: the hold of an earlier failure does not end the new one.
    script(&[
        scene("serving", &[SOON, Deed::Kill]),
        scene(
            "serving",
            &[
                Deed::Wait(4_300),
                Deed::Stubborn(3),
                Deed::Kill,
                Deed::Wait(1_200),
                Deed::ExpectOpen,
            ],
        ),
    ]),
    // A kernel that may still serve, because its fence is not confirmed, is not cut off at the end of the hold, nor by
    // the next daemon.
    script(&[
        scene("serving", &[SOON, Deed::Stubborn(12), RECOVER]),
        scene(
            "RecoveryOver(OperatorActionNeeded)",
            &[Deed::Wait(5_000), Deed::Write, Deed::Die],
        ),
        scene("resting", &[SOON, Deed::Write]),
    ]),
];

/// A script in progress.
pub(crate) struct Followed {
    script: &'static Script,
    failed: u32,
    next: usize,
}

/// The deeds that a step triggers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cue {
    /// The journal's next transaction fails.
    pub(crate) spoils: bool,
    /// The deeds.
    pub(crate) deeds: &'static [Deed],
}

impl Followed {
    pub(crate) fn new(script: &'static Script) -> Self {
        Self {
            script,
            failed: 0,
            next: 0,
        }
    }

    /// Returns true if the script is over.
    pub(crate) fn is_over(&self) -> bool {
        self.next == self.script.scenes.len()
    }

    /// Advances the script by a step of its instance.
    pub(crate) fn see(&mut self, step: &Step) -> Option<Cue> {
        let begins_to_serve = step.to == "serving" && step.from != "serving";
        if self.script.weary && self.failed < HEALED {
            let fails = step.machine == Machine::Instance && begins_to_serve;
            self.failed += u32::from(fails);
            return fails.then_some(Cue {
                spoils: false,
                deeds: &[SOON, Deed::Kill],
            });
        }
        let scene = self.script.scenes.get(self.next)?;
        let comes = step.event == scene.at || step.to == scene.at && step.from != step.to;
        if step.machine != scene.machine || !comes {
            return None;
        }
        self.next += 1;
        Some(Cue {
            spoils: scene.spoils,
            deeds: scene.deeds,
        })
    }
}
