//! Pass 2: several threads prepare chunks of 1 MiB, which are placed in the file in order.
//!
//! A thread takes the next chunk, reads and compresses it, and waits for that chunk's turn, when its offset in the
//! file is known. It writes after its turn, so writing is parallel too. The chunk whose turn it is never waits, so
//! all threads make progress.
//!
//! One more thread compresses and writes data from helpers (see [`super::shares`]) as soon as it arrives. Helpers
//! affect only one thing in the file: the order of compressed pages.

use std::io;
use std::sync::{Condvar, Mutex};

use super::page_map::{Block, PageMap, WINDOW_PAGES, joined};
use super::shares::{Share, Shares, Taken, Task};
use super::{Contents, Control};
use crate::memory::{PAGE, PAGE_BYTES, PhysRange};

/// Pages of one chunk.
pub(super) const CHUNK_PAGES: usize = 256;
const CHUNKS_PER_WINDOW: u64 = WINDOW_PAGES / CHUNK_PAGES as u64;

/// Pages of one chunk that may go into the file.
pub(super) struct Chunk<'a> {
    /// Chunks before it.
    pub(super) number: u64,
    /// Number of its first page.
    pub(super) start: u64,
    /// Pages that go into the file before this chunk.
    pub(super) rank: u64,
    bits: &'a [u8],
}

impl Chunk<'_> {
    /// Runs of pages that go into the file and are not known to be zero: who reads those of a file's holes
    /// fills the holes.
    fn runs(&self, contents: &Contents<'_>) -> Vec<PhysRange> {
        let mut runs: Vec<PhysRange> = Vec::new();
        for page in (0..CHUNK_PAGES).filter(|page| self.goes(*page)) {
            let start = (self.start + page as u64) * PAGE;
            let end = start + PAGE;
            if contents.memory.next_data(start, end) == end {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(PhysRange { start, end }),
            }
        }
        runs
    }

    /// True when the page goes into the file.
    pub(super) fn goes(&self, page: usize) -> bool {
        self.bits[page / 8] & 1 << (page % 8) != 0
    }

    /// True when none does.
    pub(super) fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }
}

/// The memory of a chunk, read.
pub(super) struct Read {
    /// As many bytes as the chunk has; zeros where nothing was read.
    pub(super) bytes: Vec<u8>,
    /// Pages that are not zero.
    pub(super) filled: [bool; CHUNK_PAGES],
    /// Pages that should be in the file and hold only zeros.
    pub(super) zero: u64,
    /// Pages that could not be read.
    pub(super) unreadable: u64,
}

impl Read {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; CHUNK_PAGES * PAGE_BYTES],
            filled: [false; CHUNK_PAGES],
            zero: 0,
            unreadable: 0,
        }
    }

    /// Nothing.
    fn clear(&mut self) {
        self.filled.fill(false);
        (self.zero, self.unreadable) = (0, 0);
    }

    /// Reads the pages of the chunk that go into the file. `bytes` is right where `filled` says so.
    fn take(&mut self, contents: &Contents<'_>, chunk: &Chunk<'_>) {
        self.clear();
        let mut page = 0;
        while page < CHUNK_PAGES {
            if !chunk.goes(page) {
                page += 1;
                continue;
            }
            let run = (page..CHUNK_PAGES)
                .take_while(|page| chunk.goes(*page))
                .count();
            let phys = (chunk.start + page as u64) * PAGE;
            let end = phys + run as u64 * PAGE;
            let data = contents.memory.next_data(phys, end);
            // At most the run.
            let skipped = usize::try_from((data - phys) / PAGE).unwrap_or(0);
            self.zero += skipped as u64;
            if skipped > 0 {
                page += skipped;
                continue;
            }
            self.take_run(contents, phys, page, run);
            page += run;
        }
    }

    /// The same from what a helper has read.
    fn take_share(&mut self, share: &Share, chunk: &Chunk<'_>) {
        self.clear();
        let pages = share.memory().chunks_exact(PAGE_BYTES);
        let own = self.bytes.chunks_exact_mut(PAGE_BYTES);
        for (page, (read, own)) in pages.zip(own).enumerate() {
            if !chunk.goes(page) {
                continue;
            }
            self.filled[page] = !is_zero(read);
            match self.filled[page] {
                true => own.copy_from_slice(read),
                false => self.zero += 1,
            }
        }
    }

    fn take_run(&mut self, contents: &Contents<'_>, phys: u64, first: usize, run: usize) {
        let bytes = &mut self.bytes[first * PAGE_BYTES..(first + run) * PAGE_BYTES];
        let whole = contents.memory.read(phys, bytes).is_ok();
        let pages = bytes.chunks_exact_mut(PAGE_BYTES);
        for (number, page) in (0_u64..).zip(pages) {
            if !whole && contents.memory.read(phys + number * PAGE, page).is_err() {
                self.unreadable += 1;
                continue;
            }
            let at = first + usize::try_from(number).unwrap_or(0);
            self.filled[at] = !is_zero(page);
            self.zero += u64::from(!self.filled[at]);
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// Why the work ended before its end.
#[derive(Debug)]
pub(super) enum Halt {
    /// It was stopped.
    Stopped,
    /// Another thread failed.
    Elsewhere,
    /// This one failed.
    Failed(io::Error),
}

/// What is done with each chunk; every thread has its own.
pub(super) trait Worker<S>: Send {
    /// Where the chunk's memory is read into.
    fn read(&mut self) -> &mut Read;
    /// Makes the chunk ready, which was read.
    fn prepare(&mut self, chunk: &Chunk<'_>) -> io::Result<()>;
    /// Takes its place in the file: called by one thread at a time.
    fn place(&mut self, chunk: &Chunk<'_>, shared: &mut S);
    /// Writes it.
    fn write(&mut self) -> io::Result<()>;
}

struct Turn<S> {
    next: u64,
    failed: bool,
    shared: S,
}

/// Workers that it takes to read with so many threads: one more where there may be helpers.
pub(super) fn workers(threads: usize, control: &Control) -> usize {
    threads + usize::from(control.shares.is_some())
}

/// Does all chunks with as many [`workers`], and returns both.
pub(super) fn run<S: Send, W: Worker<S>>(
    map: &PageMap<'_>,
    contents: &Contents<'_>,
    control: &Control,
    shared: S,
    workers: Vec<W>,
) -> Result<(S, Vec<W>), Halt> {
    let turn = Mutex::new(Turn {
        next: 0,
        failed: false,
        shared,
    });
    let moved = Condvar::new();
    let nobody = Shares::default();
    let shares = control.shares.as_deref().unwrap_or(&nobody);
    shares.begin(map.windows.len() as u64 * CHUNKS_PER_WINDOW);
    let crew = Crew {
        map,
        contents,
        control,
        shares,
        turn: &turn,
        moved: &moved,
    };
    let ends: Vec<Result<W, Halt>> = std::thread::scope(|scope| {
        let serve = |worker| scope.spawn(|| crew.serve_helpers(worker));
        let mut workers = workers.into_iter();
        let serving = control.shares.as_ref().and_then(|_| workers.next());
        let mut started: Vec<_> = serving.into_iter().map(serve).collect();
        started.extend(workers.map(|worker| scope.spawn(|| crew.work(worker))));
        started.into_iter().map(joined).collect()
    });
    shares.end();
    let mut workers = Vec::new();
    let mut halted = None;
    for end in ends {
        match (end, &halted) {
            (Ok(worker), _) => workers.push(worker),
            // The first cause says more than that there was one.
            (Err(halt), None | Some(Halt::Elsewhere)) => halted = Some(halt),
            (Err(_), _) => {}
        }
    }
    match halted {
        Some(halt) => Err(halt),
        None => {
            let turn = turn.into_inner().unwrap_or_else(|e| e.into_inner());
            Ok((turn.shared, workers))
        }
    }
}

struct Crew<'a, S> {
    map: &'a PageMap<'a>,
    contents: &'a Contents<'a>,
    control: &'a Control,
    shares: &'a Shares,
    turn: &'a Mutex<Turn<S>>,
    moved: &'a Condvar,
}

/// The part of the map that a thread looked at last.
#[derive(Default)]
struct Looked(Option<(u64, Block)>);

impl Looked {
    fn chunk<'a>(&'a mut self, map: &PageMap<'_>, number: u64) -> io::Result<Chunk<'a>> {
        // A chunk of one of the map's windows.
        let index = usize::try_from(number / CHUNKS_PER_WINDOW).unwrap_or(usize::MAX);
        let window = map.windows[index];
        if self.0.as_ref().is_none_or(|(number, _)| *number != window) {
            self.0 = None;
        }
        let block = match &mut self.0 {
            Some((_, block)) => block,
            none => &mut none.insert((window, map.block(window)?)).1,
        };
        let within = number % CHUNKS_PER_WINDOW;
        // A part of one block.
        let at = usize::try_from(within * (CHUNK_PAGES / 8) as u64).unwrap_or(0);
        let before: u64 = block[..at].iter().map(|b| u64::from(b.count_ones())).sum();
        Ok(Chunk {
            number,
            start: window * WINDOW_PAGES + within * CHUNK_PAGES as u64,
            rank: map.before[index] + before,
            bits: &block[at..at + CHUNK_PAGES / 8],
        })
    }
}

impl<S> Crew<'_, S> {
    fn guard(&self) -> FailOnDrop<'_, '_, S> {
        FailOnDrop {
            crew: self,
            armed: true,
        }
    }

    fn stopped(&self) -> Halt {
        match self.control.stop.load(std::sync::atomic::Ordering::Relaxed) {
            true => Halt::Stopped,
            false => Halt::Elsewhere,
        }
    }

    fn work<W: Worker<S>>(&self, mut worker: W) -> Result<W, Halt> {
        // When this thread ends before its turn came, the others must not wait for it.
        let mut guard = self.guard();
        let mut looked = Looked::default();
        loop {
            let taken = self.shares.take(&self.control.stop);
            let Some(taken) = taken.map_err(|()| self.stopped())? else {
                guard.armed = false;
                return Ok(worker);
            };
            let chunk = looked.chunk(self.map, taken.chunk).map_err(Halt::Failed)?;
            let read = worker.read();
            match chunk.is_empty() {
                true => read.clear(),
                false => read.take(self.contents, &chunk),
            }
            if read.unreadable > 0 && self.shares.leave(taken) {
                self.take_turn(taken, |_| {})?;
                continue;
            }
            self.shares.keep(taken.chunk);
            worker.prepare(&chunk).map_err(Halt::Failed)?;
            self.take_turn(taken, |shared| worker.place(&chunk, shared))?;
            self.write(&mut worker)?;
        }
    }

    /// Offers chunks to helpers, and writes what they deliver.
    fn serve_helpers<W: Worker<S>>(&self, mut worker: W) -> Result<W, Halt> {
        let mut guard = self.guard();
        let mut looked = Looked::default();
        while let Some(task) = self.shares.task(&self.control.stop) {
            let number = match &task {
                Task::Write(share) => share.chunk,
                Task::Offer(number) => *number,
            };
            let chunk = looked.chunk(self.map, number).map_err(Halt::Failed)?;
            match task {
                Task::Write(share) => worker.read().take_share(&share, &chunk),
                Task::Offer(_) => {
                    let runs = chunk.runs(self.contents);
                    if !runs.is_empty() {
                        let share = Share::new(number, chunk.start, runs);
                        self.shares.offer(share);
                        continue;
                    }
                    self.shares.keep(number);
                    // Nothing but zeros, which are not read.
                    worker.read().take(self.contents, &chunk);
                }
            }
            worker.prepare(&chunk).map_err(Halt::Failed)?;
            let mut turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
            worker.place(&chunk, &mut turn.shared);
            drop(turn);
            self.write(&mut worker)?;
        }
        guard.armed = false;
        Ok(worker)
    }

    fn write<W: Worker<S>>(&self, worker: &mut W) -> Result<(), Halt> {
        worker.write().map_err(Halt::Failed)?;
        let done = &self.control.pages_done;
        done.fetch_add(CHUNK_PAGES as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    fn take_turn(&self, taken: Taken, place: impl FnOnce(&mut S)) -> Result<(), Halt> {
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let waited = self
            .moved
            .wait_while(turn, |turn| turn.next != taken.ticket && !turn.failed);
        let mut turn = waited.unwrap_or_else(|e| e.into_inner());
        if turn.failed {
            return Err(Halt::Elsewhere);
        }
        place(&mut turn.shared);
        turn.next += 1;
        drop(turn);
        self.moved.notify_all();
        Ok(())
    }
}

struct FailOnDrop<'a, 'b, S> {
    crew: &'a Crew<'b, S>,
    armed: bool,
}

impl<S> Drop for FailOnDrop<'_, '_, S> {
    fn drop(&mut self) {
        if self.armed {
            let mut turn = self.crew.turn.lock().unwrap_or_else(|e| e.into_inner());
            turn.failed = true;
            drop(turn);
            self.crew.moved.notify_all();
            self.crew.shares.end();
        }
    }
}
