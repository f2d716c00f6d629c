//! Pass 2: chunks of 1 MiB, made ready by several threads and put into the file in their order.
//!
//! A thread takes the next chunk, reads and packs it, and waits until it is that chunk's turn: then its
//! place in the file is known, and its checksum is added to those before. It writes after its turn, so
//! writing is parallel too. The chunk whose turn it is never waits, so all come to an end.

use std::io;
use std::sync::{Condvar, Mutex};

use super::page_map::{Block, PageMap, WINDOW_PAGES, joined};
use super::{Contents, Control};
use crate::memory::{PAGE, PAGE_BYTES};

/// Pages of one chunk.
pub(super) const CHUNK_PAGES: usize = 256;
const CHUNKS_PER_WINDOW: u64 = WINDOW_PAGES / CHUNK_PAGES as u64;

/// Pages of one chunk that may go into the file.
pub(super) struct Chunk<'a> {
    /// Number of its first page.
    pub(super) start: u64,
    /// Pages that go into the file before this chunk.
    pub(super) rank: u64,
    bits: &'a [u8],
}

impl Chunk<'_> {
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

    /// Reads the pages of the chunk that go into the file. `bytes` is right where `filled` says so.
    pub(super) fn take(&mut self, contents: &Contents<'_>, chunk: &Chunk<'_>) {
        self.filled.fill(false);
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
    /// Makes the chunk ready.
    fn prepare(&mut self, chunk: &Chunk<'_>) -> io::Result<()>;
    /// Takes its place in the file: called in the order of the chunks, by one thread at a time.
    fn place(&mut self, chunk: &Chunk<'_>, shared: &mut S);
    /// Writes it.
    fn write(&mut self) -> io::Result<()>;
}

struct Turn<S> {
    next: u64,
    failed: bool,
    shared: S,
}

/// Does all chunks with the workers and returns both.
pub(super) fn run<S: Send, W: Worker<S>>(
    map: &PageMap<'_>,
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
    let taken = std::sync::atomic::AtomicU64::new(0);
    let crew = Crew {
        map,
        control,
        turn: &turn,
        moved: &moved,
        taken: &taken,
    };
    let ends: Vec<Result<W, Halt>> = std::thread::scope(|scope| {
        let started: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(|| crew.work(worker)))
            .collect();
        started.into_iter().map(joined).collect()
    });
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
    control: &'a Control,
    turn: &'a Mutex<Turn<S>>,
    moved: &'a Condvar,
    taken: &'a std::sync::atomic::AtomicU64,
}

impl<S> Crew<'_, S> {
    fn work<W: Worker<S>>(&self, mut worker: W) -> Result<W, Halt> {
        // When this thread ends before its turn came, the others must not wait for it.
        let mut guard = FailOnDrop {
            crew: self,
            armed: true,
        };
        let mut loaded: Option<(u64, Block)> = None;
        loop {
            let number = self
                .taken
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let index = usize::try_from(number / CHUNKS_PER_WINDOW).unwrap_or(usize::MAX);
            let Some(&window) = self.map.windows.get(index) else {
                guard.armed = false;
                return Ok(worker);
            };
            if self.control.stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(Halt::Stopped);
            }
            let block = match &loaded {
                Some((number, block)) if *number == window => block,
                _ => {
                    let block = self.map.block(window);
                    let block = block.map_err(Halt::Failed)?;
                    &loaded.insert((window, block)).1
                }
            };
            let within = number % CHUNKS_PER_WINDOW;
            // A part of one block.
            let at = usize::try_from(within * (CHUNK_PAGES / 8) as u64).unwrap_or(0);
            let before: u64 = block[..at].iter().map(|b| u64::from(b.count_ones())).sum();
            let chunk = Chunk {
                start: window * WINDOW_PAGES + within * CHUNK_PAGES as u64,
                rank: self.map.before[index] + before,
                bits: &block[at..at + CHUNK_PAGES / 8],
            };
            worker.prepare(&chunk).map_err(Halt::Failed)?;
            self.take_turn(number, |shared| worker.place(&chunk, shared))?;
            worker.write().map_err(Halt::Failed)?;
            let done = &self.control.pages_done;
            done.fetch_add(CHUNK_PAGES as u64, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn take_turn(&self, number: u64, place: impl FnOnce(&mut S)) -> Result<(), Halt> {
        let turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let waited = self
            .moved
            .wait_while(turn, |turn| turn.next != number && !turn.failed);
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
        }
    }
}
