//! Holds every state that a real engine has reached, so that a state of the model needs to store its number only.
//!
//! An engine is not `Clone`, and its tokens must not be. So the arena keeps the events that led to a state, and builds
//! the engine anew from them whenever another event is tried there. Two histories lead to the same state if the `Debug`
//! output of the engine, with all its fields, is the same. Points in time in it count from the last tick, since engines
//! compare times and do nothing else with them.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

use kmp_proto::time::Instant;

/// A real engine as the arena drives it. Events and effects are plain values; the machine turns them into the engine's
/// own events and actions, and keeps the tokens that those carry.
pub(crate) trait Machine: Sized {
    /// How the engine begins.
    type Origin: Copy + Eq + Hash + Debug;
    /// An event for the engine.
    type Event: Copy + Eq + Hash + Debug;
    /// What the engine has done for it.
    type Effect: Copy + Debug;
    /// What others may ask the engine.
    type Facts: Copy + Debug;

    fn begin(origin: Self::Origin) -> Self;
    fn handle(&mut self, event: Self::Event, now: Instant);
    /// Takes all actions from the engine.
    fn effects(&mut self) -> Vec<Self::Effect>;
    fn timeout(&self) -> Option<Instant>;
    fn facts(&self) -> Self::Facts;
    /// The whole state of the engine and of the tokens that are held for it.
    fn print(&self) -> String;
    /// Whether the event is the passing of time.
    fn is_tick(event: Self::Event) -> bool;
    /// The state as its transition table names it.
    fn stage(&self) -> &'static str;
    /// The event as the transition table names it.
    fn name(event: Self::Event) -> &'static str;
}

/// The number of a state of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id(u32);

struct Node<M: Machine> {
    origin: M::Origin,
    events: Vec<M::Event>,
    facts: M::Facts,
    stage: &'static str,
    /// Time from the last tick to the next.
    wait: Option<Duration>,
}

/// A state, and the effects of the step to it.
pub(crate) type Taken<M> = (Id, Vec<<M as Machine>::Effect>);

/// See the module.
pub(crate) struct Arena<M: Machine> {
    nodes: Vec<Node<M>>,
    by_print: HashMap<String, Id>,
    steps: HashMap<(Id, M::Event), Taken<M>>,
}

impl<M: Machine> Default for Arena<M> {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            by_print: HashMap::new(),
            steps: HashMap::new(),
        }
    }
}

impl<M: Machine> Arena<M> {
    /// The engine as it begins.
    pub(crate) fn begin(&mut self, origin: M::Origin) -> Taken<M> {
        let mut engine = M::begin(origin);
        let effects = engine.effects();
        let id = self.enter(&engine, origin, Vec::new(), Instant::from_nanos(0));
        (id, effects)
    }

    /// The engine in the state `id` takes an event.
    pub(crate) fn step(&mut self, id: Id, event: M::Event) -> Taken<M> {
        if let Some(known) = self.steps.get(&(id, event)) {
            return known.clone();
        }
        let node = self.node(id);
        let (origin, mut events) = (node.origin, node.events.clone());
        let (mut engine, mut now) = Self::rebuild(origin, &events);
        if M::is_tick(event) {
            now = engine.timeout().expect("a tick is given when one is due");
        }
        engine.handle(event, now);
        events.push(event);
        let effects = engine.effects();
        let next = self.enter(&engine, origin, events, now);
        self.steps.insert((id, event), (next, effects.clone()));
        (next, effects)
    }

    fn rebuild(origin: M::Origin, events: &[M::Event]) -> (M, Instant) {
        let mut engine = M::begin(origin);
        engine.effects();
        let mut now = Instant::from_nanos(0);
        for event in events {
            if M::is_tick(*event) {
                now = engine.timeout().expect("as when it was recorded");
            }
            engine.handle(*event, now);
            engine.effects();
        }
        (engine, now)
    }

    fn enter(&mut self, engine: &M, origin: M::Origin, events: Vec<M::Event>, now: Instant) -> Id {
        let print = relative(&engine.print(), now);
        let next = Id(u32::try_from(self.nodes.len()).expect("fewer states than that"));
        let id = *self.by_print.entry(print).or_insert(next);
        if id == next {
            self.nodes.push(Node {
                origin,
                events,
                facts: engine.facts(),
                stage: engine.stage(),
                wait: engine.timeout().map(|due| due.since(now)),
            });
        }
        id
    }

    fn node(&self, id: Id) -> &Node<M> {
        &self.nodes[id.0 as usize]
    }

    pub(crate) fn facts(&self, id: Id) -> M::Facts {
        self.node(id).facts
    }

    /// Time until the engine's next timer, counted from its last tick.
    pub(crate) fn wait(&self, id: Id) -> Option<Duration> {
        self.node(id).wait
    }

    pub(crate) fn stage(&self, id: Id) -> &'static str {
        self.node(id).stage
    }

    /// Number of states of the engine.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The pairs of state and event that were tried.
    pub(crate) fn tried(&self) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        let keys = self.steps.keys();
        keys.map(|(id, event)| (self.stage(*id), M::name(*event)))
    }
}

/// The text with every `Instant(n)` counted from `now`.
fn relative(print: &str, now: Instant) -> String {
    const HEAD: &str = "Instant(";
    let mut out = String::with_capacity(print.len());
    let mut rest = print;
    while let Some(at) = rest.find(HEAD) {
        let (before, after) = rest.split_at(at + HEAD.len());
        let end = after.find(')').expect("Debug closes its brackets");
        let nanos: u64 = after[..end].parse().expect("Instant prints a number");
        let ahead = i128::from(nanos) - i128::from(now.as_nanos());
        out.push_str(before);
        out.push_str(&ahead.to_string());
        rest = &after[end..];
    }
    out.push_str(rest);
    out
}
