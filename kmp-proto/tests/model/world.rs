//! The state of the model: kernels, a daemon, perhaps its predecessor, the journal and the network.

use std::collections::BTreeSet;

use crate::arena::Id;
use crate::kernel::{Ask, Incarnation, Kernel, Session};
use crate::machines::{End, Gen, MorphEnd, Wanted};

/// A message on its way. Messages overtake each other; of two that are the same, the network holds one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Packet {
    Request {
        from: Incarnation,
        to: Gen,
        session: Session,
        ask: Ask,
    },
    /// The reply to a request: done, or refused.
    Reply {
        to: Incarnation,
        session: Session,
        ask: Ask,
        done: bool,
    },
}

/// What the journal knows of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Row {
    /// Intended or running.
    Kept,
    /// To be fenced.
    Ending,
    /// Fenced: the journal has its certificate.
    Fenced,
    /// Fenced, and its resources are given back.
    Released,
}

/// A morph in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MorphRow {
    pub(crate) session: Session,
    pub(crate) source: Gen,
    pub(crate) target: Gen,
    pub(crate) committed: bool,
    pub(crate) end: Option<MorphEnd>,
}

/// What outlives a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Journal {
    /// Generation n at n - 1.
    pub(crate) rows: Vec<Row>,
    pub(crate) active: Gen,
    pub(crate) wanted: Wanted,
    pub(crate) morph: Option<MorphRow>,
    /// The generation whose recovery is under way.
    pub(crate) recovery: Option<Gen>,
    pub(crate) incarnation: Incarnation,
}

impl Journal {
    pub(crate) fn row(&self, generation: Gen) -> Row {
        self.rows[usize::from(generation) - 1]
    }

    pub(crate) fn set(&mut self, generation: Gen, row: Row) {
        self.rows[usize::from(generation) - 1] = row;
    }

    pub(crate) fn newest(&self) -> Gen {
        Gen::try_from(self.rows.len()).expect("few generations")
    }
}

/// A write that the journal has not carried out. It carries them out in their order, and a crash leaves any number of
/// the first ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Write {
    /// The generation is to be fenced.
    Ending(Gen),
    /// The recovery of the generation begins: it is to be fenced.
    Recovery(Gen),
    /// Its certificate.
    Fenced(Gen),
    Released(Gen),
    CommitRecord,
    MorphDone(MorphEnd),
    RecoveryDone,
    Wanted(Wanted),
    /// A successor is intended, and is the active generation.
    Succeeded,
}

/// Work of the backend that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Deed {
    SpawnTarget(Gen),
    SpawnSuccessor(Gen),
    Fence(Gen),
    Capture,
    Release(Gen),
}

/// A failure detector, as far as its owner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Watch {
    None,
    /// It has not told of a healthy answer yet.
    Begun,
    Healthy,
    /// It has told its verdict, and tells nothing more.
    Judged,
    /// It is to repeat its verdict to a new owner.
    Repeats,
}

impl Watch {
    pub(crate) fn is_on(self) -> bool {
        matches!(self, Self::Begun | Self::Healthy)
    }
}

/// The job of the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Job {
    None,
    Morph(Id, MorphRow),
    Recovery(Id, Gen),
}

/// A job is over, and the instance has not taken its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Over {
    Morph(MorphEnd),
    Recovery(End),
}

/// What dies with a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Daemon {
    pub(crate) incarnation: Incarnation,
    pub(crate) active: Gen,
    pub(crate) instance: Id,
    pub(crate) job: Job,
    pub(crate) over: Option<Over>,
    /// Requests that wait for their answer.
    pub(crate) waiting: BTreeSet<Ask>,
    pub(crate) queue: Vec<Write>,
    pub(crate) deeds: BTreeSet<Deed>,
    /// Of the active generation.
    pub(crate) watch: Watch,
    /// Of the target of a morph.
    pub(crate) target_watch: Watch,
    /// The target's fence waits for the end of its start.
    pub(crate) fence_waits: bool,
    /// A person was told that a generation keeps its resources.
    pub(crate) told_person: bool,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    /// Generation n at n - 1.
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) daemon: Option<Daemon>,
    /// An older daemon that was replaced while it was paused.
    pub(crate) paused: Option<Daemon>,
    pub(crate) journal: Journal,
    pub(crate) network: BTreeSet<Packet>,
    /// Faults that may still happen.
    pub(crate) faults: u8,
    /// Morphs that an operator may still ask for.
    pub(crate) morphs: u8,
    /// Something happened that may be a reason for a recovery.
    pub(crate) hurt: bool,
    /// A rule that a step has broken.
    pub(crate) broken: Option<&'static str>,
}

impl State {
    pub(crate) fn kernel(&self, generation: Gen) -> &Kernel {
        &self.kernels[usize::from(generation) - 1]
    }

    pub(crate) fn kernel_mut(&mut self, generation: Gen) -> &mut Kernel {
        &mut self.kernels[usize::from(generation) - 1]
    }

    /// Ends a kernel. What was sent to it reaches nobody.
    pub(crate) fn end(&mut self, generation: Gen) {
        self.kernel_mut(generation).end();
        self.network
            .retain(|packet| !matches!(packet, Packet::Request { to, .. } if *to == generation));
    }

    pub(crate) fn break_rule(&mut self, rule: &'static str) {
        self.broken.get_or_insert(rule);
    }

    /// Makes a write durable.
    pub(crate) fn make_durable(&mut self, write: Write, forgotten: bool) {
        let journal = &mut self.journal;
        match write {
            Write::Ending(generation) => {
                if journal.row(generation) == Row::Kept {
                    journal.set(generation, Row::Ending);
                }
            }
            Write::Recovery(generation) => {
                journal.recovery = Some(generation);
                if journal.row(generation) == Row::Kept {
                    journal.set(generation, Row::Ending);
                }
            }
            Write::Fenced(generation) => journal.set(generation, Row::Fenced),
            Write::Released(generation) => journal.set(generation, Row::Released),
            Write::CommitRecord => {
                if let (Some(row), false) = (&mut journal.morph, forgotten) {
                    row.committed = true;
                    journal.active = row.target;
                }
            }
            Write::MorphDone(end) => {
                if let Some(row) = &mut journal.morph {
                    row.end = Some(end);
                }
            }
            Write::RecoveryDone => journal.recovery = None,
            Write::Wanted(wanted) => journal.wanted = wanted,
            Write::Succeeded => {
                journal.wanted = Wanted::Running;
                let generation = self.intend();
                self.journal.active = generation;
            }
        }
    }

    /// A new generation.
    pub(crate) fn intend(&mut self) -> Gen {
        self.journal.rows.push(Row::Kept);
        self.kernels.push(Kernel::intended());
        self.journal.newest()
    }

    /// Carries out work of the backend, as seen from the machine.
    pub(crate) fn carry_out(&mut self, deed: Deed) {
        use crate::kernel::Work;
        match deed {
            Deed::SpawnTarget(generation) => self.kernel_mut(generation).boot(Work::Waits),
            Deed::SpawnSuccessor(generation) => self.kernel_mut(generation).boot(Work::Serves),
            Deed::Fence(generation) => self.end(generation),
            Deed::Release(generation) => self.kernel_mut(generation).reclaimed = true,
            Deed::Capture => {}
        }
    }
}
