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

/// Number of pages per chunk.
pub(super) const CHUNK_PAGES: usize = 256;
const CHUNKS_PER_WINDOW: u64 = WINDOW_PAGES / CHUNK_PAGES as u64;

/// The pages of one chunk that may go into the file.
pub(super) struct Chunk<'a> {
    /// Number of chunks before it.
    pub(super) number: u64,
    /// Number of its first page.
    pub(super) start: u64,
    /// Number of pages in the file before this chunk.
    pub(super) rank: u64,
    bits: &'a [u8],
}

impl Chunk<'_> {
    /// Runs of pages for the file that are not known to be zero. Holes of a memory file are not read,
    /// because a read would fill them.
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

    /// Returns true if the page goes into the file.
    pub(super) fn goes(&self, page: usize) -> bool {
        self.bits[page / 8] & 1 << (page % 8) != 0
    }

    /// Returns true if no page goes into the file.
    pub(super) fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }
}

/// The contents of a chunk.
pub(super) struct Read {
    /// All bytes of the chunk; zeros for pages that were not read.
    pub(super) bytes: Vec<u8>,
    /// Nonzero pages.
    pub(super) filled: [bool; CHUNK_PAGES],
    /// Number of zero pages for the file.
    pub(super) zero: u64,
    /// Number of pages that could not be read.
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

    /// Clears the contents.
    fn clear(&mut self) {
        self.filled.fill(false);
        (self.zero, self.unreadable) = (0, 0);
    }

    /// Reads the pages of the chunk that go into the file. `bytes` is valid for the pages in `filled`.
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
            // At most the length of the run.
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

    /// Copies the pages from a share that a helper has read.
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

/// Why the work ended early.
#[derive(Debug)]
pub(super) enum Halt {
    /// The caller stopped it.
    Stopped,
    /// Another thread failed.
    Elsewhere,
    /// This thread failed.
    Failed(io::Error),
}

/// The processing of chunks; each thread has its own worker.
pub(super) trait Worker<S>: Send {
    /// Returns the buffer for the chunk's memory.
    fn read(&mut self) -> &mut Read;
    /// Prepares the chunk that was read.
    fn prepare(&mut self, chunk: &Chunk<'_>) -> io::Result<()>;
    /// Assigns a place in the file to the chunk; only one thread calls this at a time.
    fn place(&mut self, chunk: &Chunk<'_>, shared: &mut S);
    /// Writes the chunk.
    fn write(&mut self) -> io::Result<()>;
}

struct Turn<S> {
    next: u64,
    failed: bool,
    shared: S,
}

/// Returns the number of workers for this many reading threads: one more if there may be helpers.
pub(super) fn workers(threads: usize, control: &Control) -> usize {
    threads + usize::from(control.shares.is_some())
}

/// Processes all chunks with as many [`workers`], and returns the workers and the shared state.
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
            // The first cause is more useful than the fact that another thread failed.
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

/// The part of the map that a thread used last.
#[derive(Default)]
struct Looked(Option<(u64, Block)>);

impl Looked {
    fn chunk<'a>(&'a mut self, map: &PageMap<'_>, number: u64) -> io::Result<Chunk<'a>> {
        // The chunk belongs to one of the map's windows.
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
        // If this thread ends before its turn, the others must not wait for it.
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

    /// Offers chunks to helpers, and writes the chunks that they deliver.
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
                    // The chunk has only zeros, which are not read.
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
