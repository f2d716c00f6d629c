//! Openings that lead an instance to what chance seldom meets: to a row of its transition table where two things have to
//! come within a moment, mostly a write that fails and a failure meanwhile, or the sixth failure and something else; or to
//! the death of the daemon, or the end of a timer, at one moment. A script waits for steps of the engines, one after the
//! other, and does something at each.

use kmorph_actors::platform::witness::{Machine, Step};

use crate::coverage::Command;

/// Failures in a row that are healed; with one more an instance is quarantined.
const HEALED: u32 = 5;

/// Something that a script does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deed {
    Give(Command),
    /// A morph that goes on to its commit by itself.
    Morph,
    AutoHealOff,
    /// The newest kernel of the instance dies.
    Kill,
    /// The oldest kernel of the instance dies.
    KillSource,
    /// The newest kernel of the instance hangs.
    Hang,
    /// So many of the next fences of the newest kernel are not confirmed.
    Stubborn(u32),
    /// The kernels of all other instances die, and their fences are not confirmed at once.
    KillOthers,
    /// The actor of the instance panics.
    Panic,
    /// Each write of the journal takes up to seconds from now on.
    SlowDisk,
    /// Connections to the instance's port must be taken, or wait.
    ExpectOpen,
    /// A client writes to the instance; its port must take that where the instance serves.
    Write,
    /// The daemon dies.
    Die,
    /// Waits this many milliseconds.
    Wait(u64),
    /// Waits up to this many milliseconds, as the seed has it.
    WaitUpTo(u64),
}

/// A step that is waited for, and what is done then.
struct Scene {
    machine: Machine,
    /// The event, or the state that it leads to.
    at: &'static str,
    /// The journal's next transaction takes a while, and fails.
    spoils: bool,
    deeds: &'static [Deed],
}

/// An opening.
pub(crate) struct Script {
    /// Memory can be captured.
    pub(crate) captures: bool,
    /// The instance has failed as often as it is healed when the scenes begin.
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

/// The wish that has been asked for cannot be written.
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

/// What was under way is written by then.
const SOON: Deed = Deed::Wait(30);
const RECOVER: Deed = Deed::Give(Command::Recover);
const TERMINATE: Deed = Deed::Give(Command::TerminateByForce);

/// All openings. Each is named by the row that it leads to, or by what is tested.
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
    // What the last daemon has frozen for a capture, and did not live to resume, is resumed and not fenced.
    Script {
        captures: true,
        ..script(&[
            scene("serving", &[SOON, Deed::Give(Command::Capture)]),
            scene("capturing", &[Deed::Wait(45), Deed::Die]),
        ])
    },
    // Ports are held anew after each failure: the hold that an earlier one began does not end this one.
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
    // What may still serve, because its fence is not confirmed, is not cut off when the hold is over, nor by the next
    // daemon.
    script(&[
        scene("serving", &[SOON, Deed::Stubborn(12), RECOVER]),
        scene(
            "RecoveryOver(OperatorActionNeeded)",
            &[Deed::Wait(5_000), Deed::Write, Deed::Die],
        ),
        scene("resting", &[SOON, Deed::Write]),
    ]),
];

/// A script that is followed.
pub(crate) struct Followed {
    script: &'static Script,
    failed: u32,
    next: usize,
}

/// What a step asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cue {
    /// The journal's next transaction fails.
    pub(crate) spoils: bool,
    /// What is done.
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

    /// Whether nothing is waited for any more.
    pub(crate) fn is_over(&self) -> bool {
        self.next == self.script.scenes.len()
    }

    /// A step of the instance that the script is about.
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
