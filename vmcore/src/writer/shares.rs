//! Divides the chunks of the memory between the writer's own threads and helpers, which access the memory in another
//! way.
//!
//! ```text
//!            writer's threads ─▶                       ◀─ helpers
//! chunks:    done done done taken │ unassigned …         │ offered lent lent done done
//!                                 └── meet in the middle ──┘
//! ```
//!
//! The writer's threads take chunks from the front; helpers are offered chunks from the end. When no unassigned
//! chunks remain, the writer's threads take those that were offered or lent and have not arrived, so nothing ever
//! waits for a helper: one that fails or is slow costs only the time to read its own chunks. Memory that the writer's
//! threads cannot read themselves ("beyond") goes to helpers, and is recorded as unreadable only if no helper is
//! left, or two could not read it either.
//!
//! Invariant: a chunk has one owner at any time, and only data read by its owner goes into the file.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::chunks::CHUNK_PAGES;
use crate::memory::{PAGE, PAGE_BYTES, PhysRange};

/// Maximum number of chunks that are ready for helpers.
pub(super) const OFFERED_MAX: usize = 4;
/// Maximum number of helpers that may fail to read a chunk before the writer gives it up.
const TRIES_MAX: u32 = 2;
/// Interval at which a waiting thread checks for a stop.
const STOP_INTERVAL: Duration = Duration::from_millis(100);

/// The state shared by the writer and its helpers.
#[derive(Debug, Default)]
pub struct Shares {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// No more chunks are assigned.
    over: bool,
    /// The helpers that may still take chunks, with their accessible memory, once known.
    helpers: BTreeMap<u64, Option<Vec<PhysRange>>>,
    next_helper: u64,
    /// No helper can access the next chunk, until another one declares its memory.
    out_of_reach: bool,
    /// Number of chunks taken by the writer's own threads.
    ticket: u64,
    /// Unassigned chunks.
    free: Range<u64>,
    /// Chunks that a thread of the writer has taken and not yet read or prepared: they may still be reassigned.
    in_hand: BTreeSet<u64>,
    offered: VecDeque<Share>,
    /// Chunks lent to helpers, with the helper.
    lent: BTreeMap<u64, u64>,
    /// Chunks that helpers returned unread.
    returned: Vec<u64>,
    /// Memory that the writer's own threads could not read and helpers have not read yet, with the number of helpers
    /// that could not either.
    beyond: BTreeMap<u64, u32>,
    delivered: VecDeque<Share>,
}

/// A chunk for a helper to read.
#[derive(Debug)]
pub struct Share {
    pub(super) chunk: u64,
    /// Its first page.
    start: u64,
    ranges: Vec<PhysRange>,
    memory: Vec<u8>,
}

/// A chunk for one of the writer's own threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) chunk: u64,
    /// Number of chunks that such threads took before.
    pub(super) ticket: u64,
    /// No helper can read it.
    pub(super) last: bool,
}

/// The next task of the thread that serves the helpers.
pub(super) enum Task {
    /// Write this share, which a helper has read.
    Write(Share),
    /// Offer this chunk to helpers.
    Offer(u64),
}

impl Share {
    /// Creates a chunk that begins with page `start`.
    pub(super) fn new(chunk: u64, start: u64, ranges: Vec<PhysRange>) -> Self {
        Self {
            chunk,
            start,
            ranges,
            memory: Vec::new(),
        }
    }

    /// Returns the ranges to read: sorted, disjoint, in whole pages.
    pub fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    /// Returns the number of bytes to read.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(PhysRange::len).sum()
    }

    /// Returns the buffer for the memory at `range`; `None` if that is not within one of [`Share::ranges`].
    pub fn memory_at(&mut self, range: PhysRange) -> Option<&mut [u8]> {
        let within = |whole: &PhysRange| whole.start <= range.start && range.end <= whole.end;
        if range.end < range.start || !self.ranges.iter().any(within) {
            return None;
        }
        let at = |address: u64| usize::try_from(address - self.start * PAGE).ok();
        self.memory.get_mut(at(range.start)?..at(range.end)?)
    }

    fn is_within(&self, reach: &[PhysRange]) -> bool {
        let within = |range: &PhysRange| {
            reach
                .iter()
                .any(|whole| whole.start <= range.start && range.end <= whole.end)
        };
        self.ranges.iter().all(within)
    }

    /// Returns all bytes of the chunk; zeros outside the ranges to read.
    pub(super) fn memory(&self) -> &[u8] {
        &self.memory
    }
}

impl Shares {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a helper, which takes part until it is dropped, once it has declared its memory.
    pub fn helper(self: &Arc<Self>) -> Helper {
        let mut state = self.lock();
        state.next_helper += 1;
        let number = state.next_helper;
        state.helpers.insert(number, None);
        Helper {
            number,
            shares: Arc::clone(self),
        }
    }

    /// Stops assigning chunks. The writer calls this when everything is read; the caller of the writer calls it for a
    /// writer that did not get that far.
    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    pub(super) fn begin(&self, chunks: u64) {
        self.lock().free = 0..chunks;
        self.changed.notify_all();
    }

    /// Returns the next chunk for one of the writer's threads; `None` if nothing is left, `Err` if
    /// the writer was stopped or another thread failed.
    pub(super) fn take(&self, stop: &AtomicBool) -> Result<Option<Taken>, ()> {
        let mut state = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) || state.over {
                return Err(());
            }
            if let Some((chunk, last)) = state.next_chunk() {
                let ticket = state.ticket;
                state.ticket += 1;
                state.in_hand.insert(chunk);
                // Another chunk can be offered now.
                self.changed.notify_all();
                return Ok(Some(Taken {
                    chunk,
                    ticket,
                    last,
                }));
            }
            if state.beyond.is_empty() && state.in_hand.is_empty() {
                return Ok(None);
            }
            let waited = self.changed.wait_timeout(state, STOP_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives up a taken chunk that cannot be read here. Returns whether a helper may be able to read it.
    pub(super) fn leave(&self, taken: Taken) -> bool {
        let mut state = self.lock();
        if taken.last || state.helpers.is_empty() {
            return false;
        }
        state.in_hand.remove(&taken.chunk);
        state.beyond.insert(taken.chunk, 0);
        self.changed.notify_all();
        true
    }

    /// Marks a taken chunk as read: it goes into the file.
    pub(super) fn keep(&self, chunk: u64) {
        self.lock().in_hand.remove(&chunk);
        self.changed.notify_all();
    }

    /// Returns the next task for helpers; `None` if there will be no more.
    pub(super) fn task(&self, stop: &AtomicBool) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) || state.over {
                return None;
            }
            if let Some(share) = state.delivered.pop_front() {
                return Some(Task::Write(share));
            }
            if let Some(chunk) = state.next_to_offer() {
                state.in_hand.insert(chunk);
                return Some(Task::Offer(chunk));
            }
            if state.used_up() {
                return None;
            }
            let waited = self.changed.wait_timeout(state, STOP_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn offer(&self, share: Share) {
        let mut state = self.lock();
        state.in_hand.remove(&share.chunk);
        state.offer(share);
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    /// Returns whether all chunks have been written, or have an owner that will write them.
    fn used_up(&self) -> bool {
        self.free.is_empty()
            && self.in_hand.is_empty()
            && self.offered.is_empty()
            && self.lent.is_empty()
            && self.returned.is_empty()
            && self.beyond.is_empty()
            && self.delivered.is_empty()
    }

    /// Returns the next chunk for a writer's thread, and whether no helper can read it.
    fn next_chunk(&mut self) -> Option<(u64, bool)> {
        if let Some(chunk) = self.free.next().or_else(|| self.returned.pop()) {
            return Some((chunk, false));
        }
        let beyond = &self.beyond;
        let own = |chunk: &u64| !beyond.contains_key(chunk);
        if let Some(at) = self.offered.iter().rposition(|share| own(&share.chunk)) {
            return self.offered.remove(at).map(|share| (share.chunk, false));
        }
        if let Some(chunk) = self.lent.keys().copied().find(own) {
            self.lent.remove(&chunk);
            return Some((chunk, false));
        }
        let nobody = match self.out_of_reach {
            true => !self.helpers.values().any(Option::is_none),
            false => self.helpers.is_empty(),
        };
        // Skip a chunk that is about to be offered.
        let in_hand = &self.in_hand;
        let hopeless = |(chunk, tries): (&u64, &u32)| {
            ((nobody || *tries >= TRIES_MAX) && !in_hand.contains(chunk)).then_some(*chunk)
        };
        let chunk = self.beyond.iter().find_map(hopeless)?;
        self.beyond.remove(&chunk);
        self.lent.remove(&chunk);
        self.offered.retain(|share| share.chunk != chunk);
        Some((chunk, true))
    }

    fn next_to_offer(&mut self) -> Option<u64> {
        let some = self.helpers.values().any(Option::is_some);
        if !some || self.out_of_reach || self.offered.len() >= OFFERED_MAX {
            return None;
        }
        let under_way = |chunk: &u64| {
            self.lent.contains_key(chunk) || self.offered.iter().any(|share| share.chunk == *chunk)
        };
        let waits = |(chunk, tries): (&u64, &u32)| {
            (*tries < TRIES_MAX && !under_way(chunk)).then_some(*chunk)
        };
        let beyond = self.beyond.iter().find_map(waits);
        beyond.or_else(|| self.free.next_back())
    }

    fn offer(&mut self, share: Share) {
        let reached = |reach: &Option<Vec<PhysRange>>| {
            reach.as_ref().is_some_and(|reach| share.is_within(reach))
        };
        if self.helpers.values().any(reached) {
            self.offered.push_back(share);
            return;
        }
        // Helpers are offered chunks from the end, where they can access the most: earlier chunks are out of reach too.
        self.out_of_reach = true;
        if !self.beyond.contains_key(&share.chunk) {
            self.returned.push(share.chunk);
        }
    }

    /// Takes back offered chunks that no remaining helper can access.
    fn withdraw(&mut self) {
        for share in std::mem::take(&mut self.offered) {
            self.offer(share);
        }
    }

    fn give_back(&mut self, chunk: u64, helper: u64) {
        if self.lent.get(&chunk) != Some(&helper) {
            return;
        }
        self.lent.remove(&chunk);
        match self.beyond.get_mut(&chunk) {
            Some(tries) => *tries += 1,
            None => self.returned.push(chunk),
        }
    }
}

/// A helper. When it is dropped, it gives back all chunks that it did not deliver.
#[derive(Debug)]
pub struct Helper {
    number: u64,
    shares: Arc<Shares>,
}

impl Helper {
    /// Declares the memory that this helper can access: the helper may receive chunks within one of the ranges.
    pub fn reaches(&self, ranges: Vec<PhysRange>) {
        let mut state = self.shares.lock();
        state.helpers.insert(self.number, Some(ranges));
        state.out_of_reach = false;
        self.shares.changed.notify_all();
    }

    /// Returns the next chunk to read. Waits for one, even before the memory to read is known; `None` if there are no
    /// more.
    pub fn take(&self) -> Option<Share> {
        let mut state = self.shares.lock();
        loop {
            if state.over {
                return None;
            }
            if let Some(share) = self.take_offered(&mut state) {
                return Some(share);
            }
            let waited = self.shares.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns true once there is nothing more to read.
    pub fn is_over(&self) -> bool {
        self.shares.lock().over
    }

    /// Returns the next chunk, if one is available now.
    pub fn take_now(&self) -> Option<Share> {
        let mut state = self.shares.lock();
        (!state.over)
            .then(|| self.take_offered(&mut state))
            .flatten()
    }

    fn take_offered(&self, state: &mut State) -> Option<Share> {
        let reach = state.helpers.get(&self.number)?.as_ref()?;
        let at = state.offered.iter().position(|s| s.is_within(reach))?;
        let mut share = state.offered.remove(at)?;
        state.lent.insert(share.chunk, self.number);
        self.shares.changed.notify_all();
        share.memory = vec![0; CHUNK_PAGES * PAGE_BYTES];
        Some(share)
    }

    /// Delivers a chunk to the writer; returns false if the writer no longer needs it.
    pub fn deliver(&self, share: Share) -> bool {
        let mut state = self.shares.lock();
        let wanted = !state.over && state.lent.get(&share.chunk) == Some(&self.number);
        if wanted {
            state.lent.remove(&share.chunk);
            state.beyond.remove(&share.chunk);
            state.delivered.push_back(share);
            self.shares.changed.notify_all();
        }
        wanted
    }

    /// Gives back a chunk that the helper could not read.
    pub fn give_back(&self, share: &Share) {
        self.shares.lock().give_back(share.chunk, self.number);
        self.shares.changed.notify_all();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let mut state = self.shares.lock();
        state.helpers.remove(&self.number);
        let lent = state.lent.iter();
        let own: Vec<u64> = lent
            .filter(|(_, helper)| **helper == self.number)
            .map(|(chunk, _)| *chunk)
            .collect();
        for chunk in own {
            state.give_back(chunk, self.number);
        }
        state.withdraw();
        self.shares.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: PhysRange = PhysRange {
        start: 0,
        end: PAGE,
    };

    /// A thread of the writer has the only chunk and then cannot read it. The thread that offers chunks must still be
    /// running.
    #[test]
    fn a_chunk_that_is_being_read_may_still_be_offered() {
        let (shares, stop) = (Arc::<Shares>::default(), AtomicBool::new(false));
        let helper = shares.helper();
        helper.reaches(vec![RANGE]);
        shares.begin(1);
        let taken = shares.take(&stop).unwrap().unwrap();
        assert!(!shares.lock().used_up());
        assert!(shares.leave(taken));
        assert!(matches!(shares.task(&stop), Some(Task::Offer(0))));
        // No other thread decides about the chunk while it is prepared.
        assert_eq!(shares.lock().next_chunk(), None);
        shares.offer(Share::new(0, 0, vec![RANGE]));
        assert!(helper.deliver(helper.take_now().unwrap()));
        assert!(matches!(shares.task(&stop), Some(Task::Write(_))));
        assert!(shares.task(&stop).is_none());
        assert!(shares.take(&stop).unwrap().is_none());
    }
}
