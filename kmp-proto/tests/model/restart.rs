//! A daemon starts: what it knows is what the journal holds and what it observes, as in
//! `actors/src/supervisor/restoring.rs`.

use kmp_proto::message::Side;

use crate::bound::{Mutation, Mutations};
use crate::kernel::Life;
use crate::machines::{Gen, InstanceOrigin, MorphEnd, MorphEvent, MorphOrigin, Wanted};
use crate::model::Model;
use crate::shell::Turn;
use crate::world::{Daemon, Deed, Job, MorphRow, Row, State, Watch, Write};

/// How a restarted daemon begins with the instance.
enum Found {
    Morph(MorphRow),
    Other(InstanceOrigin),
}

impl Model {
    /// The next daemon starts.
    pub(crate) fn start(&mut self, state: &mut State) {
        state.journal.incarnation += 1;
        let found = find(state, self.bound.mutations);
        let origin = match &found {
            Found::Other(origin) => *origin,
            Found::Morph(row) => {
                InstanceOrigin::Morphing(!row.committed && !ended(state, row.source))
            }
        };
        let (instance, effects) = self.instances.begin(origin);
        let daemon = Daemon {
            incarnation: state.journal.incarnation,
            active: state.journal.active,
            instance,
            job: Job::None,
            over: None,
            waiting: Default::default(),
            queue: Vec::new(),
            deeds: Default::default(),
            watch: Watch::None,
            target_watch: Watch::None,
            fence_waits: false,
            told_person: false,
        };
        let mut turn = Turn {
            model: self,
            state,
            daemon,
            replaced: false,
        };
        for effect in effects {
            turn.instance_effect(effect);
        }
        let kept = match found {
            Found::Morph(row) => {
                turn.resume_morph(row);
                vec![row.source, row.target]
            }
            Found::Other(_) => vec![turn.daemon.active],
        };
        turn.sweep(&kept);
        let daemon = turn.daemon;
        state.daemon = Some(daemon);
    }
}

fn ended(state: &State, generation: Gen) -> bool {
    state.journal.row(generation) != Row::Kept || state.kernel(generation).life != Life::Runs
}

fn find(state: &State, mutations: Mutations) -> Found {
    let journal = &state.journal;
    let active = journal.active;
    let row = journal.row(active);
    let gone = ended(state, active);
    Found::Other(match journal.wanted {
        Wanted::Resting if row != Row::Released => InstanceOrigin::Failed(Some(false)),
        resting @ (Wanted::Unhealed | Wanted::Resting | Wanted::OperatorAction) => {
            InstanceOrigin::Resting(resting)
        }
        Wanted::Running => {
            let owner = |row: &MorphRow| match row.committed {
                true => row.target,
                false => row.source,
            };
            // The failure that a morph ended with may have been in the last daemon's memory only.
            let unfinished = |row: &MorphRow| match row.end {
                None => true,
                Some(MorphEnd::Committed | MorphEnd::RolledBack) => false,
                Some(_) => !gone && !mutations.has(Mutation::FailedMorphForgotten),
            };
            let left = journal
                .morph
                .filter(|row| owner(row) == active && unfinished(row));
            match left {
                Some(left) => return Found::Morph(left),
                None if !gone => {
                    let succeeds = journal.recovery.is_some_and(|failed| failed < active);
                    InstanceOrigin::Adopted(succeeds)
                }
                None => {
                    let never_ran = row == Row::Kept && state.kernel(active).life == Life::Intended;
                    InstanceOrigin::Failed(never_ran.then_some(true))
                }
            }
        }
    })
}

impl Turn<'_> {
    /// Goes on with the morph that an earlier daemon left.
    fn resume_morph(&mut self, row: MorphRow) {
        let MorphRow { source, target, .. } = row;
        let origin = match row.committed {
            true => MorphOrigin::Committed(source, target),
            false => MorphOrigin::Uncommitted(source, target),
        };
        let (mut id, mut effects) = self.model.morphs.begin(origin);
        for (side, generation) in [(Side::Source, source), (Side::Target, target)] {
            if self.has_ended(generation) {
                let (next, more) = self.model.morphs.step(id, MorphEvent::Died(side));
                id = next;
                effects.extend(more);
            }
        }
        self.daemon.job = Job::Morph(id, row);
        if row.committed && self.state.kernel(target).life != Life::Intended {
            self.daemon.target_watch = Watch::Begun;
        }
        for effect in effects {
            self.morph_effect(effect, row);
        }
    }

    /// Fences generations that belong to no instance any more.
    fn sweep(&mut self, kept: &[Gen]) {
        for generation in 1..=self.state.journal.newest() {
            if kept.contains(&generation) {
                continue;
            }
            match self.state.journal.row(generation) {
                Row::Kept | Row::Ending => self.write(Write::Ending(generation)),
                Row::Fenced => {
                    self.daemon.deeds.insert(Deed::Release(generation));
                }
                Row::Released => {}
            }
        }
    }
}
