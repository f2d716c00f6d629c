//! Explores every state of a model, breadth first.
//!
//! Safety: no step breaks a rule. Liveness, without further faults or wishes: every path ends, and ends well. That is
//! shown in two parts. A step that repeats itself while a kernel has ended and its detector has not judged yet
//! ([`Cause::Waiting`]) is left out: what remains has no cycle, so that no path is endless. With these steps, an end
//! stays within reach of every state, so that a daemon that waits is not stuck.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use crate::model::Model;
use crate::rules;
use crate::steps::{Cause, Step};
use crate::world::State;

/// A complete exploration.
pub(crate) struct Explored {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    /// The most steps that a state is away from the beginning.
    pub(crate) depth: u32,
    pub(crate) took: Duration,
    /// How paths end without further faults, and in how many states.
    pub(crate) ends: BTreeMap<&'static str, usize>,
}

impl std::fmt::Display for Explored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            states,
            steps,
            depth,
            took,
            ends,
        } = self;
        write!(
            f,
            "{states} states, {steps} steps, depth {depth}, {took:.1?}; ends: {ends:?}"
        )
    }
}

/// A path to a state in which something is wrong.
pub(crate) struct Counterexample {
    pub(crate) rule: &'static str,
    pub(crate) path: String,
}

#[derive(Clone, Copy)]
struct Origin {
    before: u32,
    depth: u32,
    /// Which of the steps of `before`.
    step: u32,
}

#[derive(Default)]
struct Graph {
    /// By two hashes of 64 bits with different beginnings: that two states have both in common is out of the question.
    known: HashMap<(u64, u64), u32>,
    origins: Vec<Origin>,
    /// Steps that are due, from and to; whether the step may repeat itself.
    due: Vec<(u32, u32, bool)>,
    good: Vec<u32>,
    steps: usize,
}

fn fingerprint(state: &State) -> (u64, u64) {
    let mut first = DefaultHasher::new();
    state.hash(&mut first);
    let mut second = DefaultHasher::new();
    second.write_u8(1);
    state.hash(&mut second);
    (first.finish(), second.finish())
}

/// Explores the model to its bound.
pub(crate) fn explore(model: &mut Model) -> Result<Explored, Counterexample> {
    let began = Instant::now();
    let mut graph = Graph::default();
    let mut ends = BTreeMap::new();
    let first = model.beginning();
    graph.enter(
        &first,
        Origin {
            before: 0,
            depth: 0,
            step: 0,
        },
    );
    let mut queue = VecDeque::from([(first, 0)]);
    while let Some((state, at)) = queue.pop_front() {
        let steps = model.steps(&state);
        let mut over = true;
        for (number, (step, cause)) in steps.into_iter().enumerate() {
            let due = matches!(cause, Cause::Due | Cause::Waiting);
            over &= !due;
            let mut next = model.after(&state, step);
            if cause == Cause::Fault {
                next.faults -= 1;
            }
            graph.steps += 1;
            let origin = Origin {
                before: at,
                depth: graph.origins[at as usize].depth + 1,
                step: u32::try_from(number).expect("few steps"),
            };
            let (id, new) = graph.enter(&next, origin);
            let only = model.bound.only;
            if let Some(rule) = rules::broken(&state, &next)
                && only.is_none_or(|only| only == rule)
            {
                return Err(graph.counterexample(model, rule, at, Some(step)));
            }
            if due {
                graph.due.push((at, id, cause == Cause::Waiting));
            }
            if new {
                queue.push_back((next, id));
            }
        }
        if over {
            match rules::end(model, &state) {
                Ok(end) => *ends.entry(end).or_default() += 1,
                Err(_) if model.bound.only.is_some() => {}
                Err(rule) => return Err(graph.counterexample(model, rule, at, None)),
            }
            graph.good.push(at);
        }
    }
    if let Some(at) = graph.endless() {
        return Err(graph.counterexample(model, "a path without faults has no end", at, None));
    }
    if let Some(at) = graph.stuck() {
        return Err(graph.counterexample(model, "no end is within reach", at, None));
    }
    Ok(Explored {
        states: graph.origins.len(),
        steps: graph.steps,
        depth: graph
            .origins
            .iter()
            .map(|origin| origin.depth)
            .max()
            .unwrap_or(0),
        took: began.elapsed(),
        ends,
    })
}

impl Graph {
    fn enter(&mut self, state: &State, origin: Origin) -> (u32, bool) {
        let next = u32::try_from(self.origins.len()).expect("fewer states than that");
        match self.known.entry(fingerprint(state)) {
            Entry::Occupied(known) => (*known.get(), false),
            Entry::Vacant(place) => {
                place.insert(next);
                self.origins.push(origin);
                (next, true)
            }
        }
    }

    /// A state from which a path of due steps, without those that may repeat themselves, never ends.
    fn endless(&self) -> Option<u32> {
        let mut degrees = vec![0_u32; self.origins.len()];
        let edges = || self.due.iter().filter(|(_, _, waiting)| !waiting);
        for (from, _, _) in edges() {
            degrees[*from as usize] += 1;
        }
        let back = Back::of(
            self.origins.len(),
            edges().map(|(from, to, _)| (*from, *to)),
        );
        let ids = 0..u32::try_from(self.origins.len()).expect("counted so");
        let mut over: Vec<u32> = ids.filter(|id| degrees[*id as usize] == 0).collect();
        while let Some(id) = over.pop() {
            for before in back.of_state(id) {
                degrees[*before as usize] -= 1;
                if degrees[*before as usize] == 0 {
                    over.push(*before);
                }
            }
        }
        let at = degrees.iter().position(|degree| *degree > 0)?;
        u32::try_from(at).ok()
    }

    /// A state from which no good end can be reached by due steps.
    fn stuck(&self) -> Option<u32> {
        let edges = self.due.iter().map(|(from, to, _)| (*from, *to));
        let back = Back::of(self.origins.len(), edges);
        let mut reaches = vec![false; self.origins.len()];
        let mut open = self.good.clone();
        while let Some(id) = open.pop() {
            if !std::mem::replace(&mut reaches[id as usize], true) {
                open.extend(back.of_state(id));
            }
        }
        let at = reaches.iter().position(|reaches| !reaches)?;
        u32::try_from(at).ok()
    }

    fn counterexample(
        &self,
        model: &mut Model,
        rule: &'static str,
        at: u32,
        last: Option<Step>,
    ) -> Counterexample {
        let mut numbers = Vec::new();
        let mut id = at;
        while id != 0 {
            let origin = self.origins[id as usize];
            numbers.push(origin.step);
            id = origin.before;
        }
        let mut path = String::new();
        let mut state = model.beginning();
        for number in numbers.into_iter().rev() {
            let (step, cause) = model.steps(&state)[number as usize];
            let _ = writeln!(path, "  {cause:?}: {step:?}");
            state = model.after(&state, step);
            if cause == Cause::Fault {
                state.faults -= 1;
            }
        }
        if let Some(step) = last {
            let _ = writeln!(path, "  and then: {step:?}");
            state = model.after(&state, step);
        }
        let _ = writeln!(path, "  {}", model.describe(&state));
        Counterexample { rule, path }
    }
}

/// Steps by the state that they lead to.
struct Back {
    begins: Vec<u32>,
    froms: Vec<u32>,
}

impl Back {
    fn of(states: usize, edges: impl Iterator<Item = (u32, u32)> + Clone) -> Self {
        let mut begins = vec![0_u32; states + 1];
        for (_, to) in edges.clone() {
            begins[to as usize + 1] += 1;
        }
        for at in 0..states {
            begins[at + 1] += begins[at];
        }
        let mut places = begins.clone();
        let mut froms = vec![0; begins[states] as usize];
        for (from, to) in edges {
            let place = &mut places[to as usize];
            froms[*place as usize] = from;
            *place += 1;
        }
        Self { begins, froms }
    }

    fn of_state(&self, id: u32) -> &[u32] {
        let (begin, end) = (self.begins[id as usize], self.begins[id as usize + 1]);
        &self.froms[begin as usize..end as usize]
    }
}
