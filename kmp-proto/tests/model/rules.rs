//! What must hold in every state, from one state to the next, and at the end of every path.

use kmp_proto::instance::Stage;

use crate::kernel::Life;
use crate::model::Model;
use crate::world::{Job, Row, State};

/// The rule that matters most.
pub(crate) const TWO_SERVE: &str = "two generations serve";

/// The rule that a step from `before` to `after` breaks.
pub(crate) fn broken(before: &State, after: &State) -> Option<&'static str> {
    if after
        .kernels
        .iter()
        .filter(|kernel| kernel.serves())
        .count()
        > 1
    {
        return Some(TWO_SERVE);
    }
    if after.broken.is_some() {
        return after.broken;
    }
    let reclaimed = |kernel: &&crate::kernel::Kernel| kernel.reclaimed;
    if after
        .kernels
        .iter()
        .filter(reclaimed)
        .any(|kernel| kernel.life != Life::Ended)
    {
        return Some("the resources of a kernel that was not fenced are reclaimed");
    }
    for (at, kernel) in after.kernels.iter().enumerate() {
        let proven = matches!(after.journal.rows[at], Row::Fenced | Row::Released);
        if kernel.reclaimed && !proven {
            return Some("resources are reclaimed without a certificate in the journal");
        }
    }
    if let Some(row) = after.journal.morph
        && row.committed
        && after.kernel(row.source).serves()
    {
        return Some("the source of a committed morph serves");
    }
    let (old, new) = (&before.journal, &after.journal);
    let older = before
        .kernels
        .iter()
        .zip(&after.kernels)
        .any(|(old, new)| new.seen < old.seen);
    if older || new.incarnation < old.incarnation || new.active < old.active {
        return Some("a generation or an incarnation goes back");
    }
    None
}

/// How a path has ended: in which good way, or what is wrong with it.
pub(crate) fn end(model: &Model, state: &State) -> Result<&'static str, &'static str> {
    let Some(daemon) = &state.daemon else {
        return Err("no daemon starts");
    };
    let facts = model.instances.facts(daemon.instance);
    if daemon.job != Job::None || !daemon.queue.is_empty() {
        return Err("a job does not end");
    }
    let named = facts.asks_person || daemon.told_person;
    let active = state.kernel(daemon.active);
    let others = state.kernels.iter().enumerate();
    let mut others = others.filter(|(at, _)| at + 1 != usize::from(daemon.active));
    if !named && others.any(|(_, kernel)| !kernel.reclaimed) {
        return Err("a generation is left over");
    }
    match facts.stage {
        Stage::Serving if active.serves() && state.journal.active == daemon.active => {
            Ok(match (named, daemon.active) {
                (true, _) => "serves, and a person is told of a leftover",
                (false, 1) => "the source serves",
                (false, 2) => "the target serves",
                (false, _) => "a later generation serves",
            })
        }
        Stage::Serving => Err("the instance counts as serving, and its kernel does not serve"),
        Stage::Resting if facts.asks_person => Ok("a person is asked to act"),
        _ => Err("the instance neither serves nor asks a person to act"),
    }
}
