//! Pass 1: determines the pages of the machine, and the pages to write. The result is two bitmaps, one bit per page,
//! in a file: for a kdump-compressed dump in the dump itself, at their final place.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Contents, Control};
use crate::kernel::pages::{PageCounts, PageKind, Pages};
use crate::memory::{PAGE, PAGE_BYTES};

/// Number of pages per block of a bitmap: 128 MiB, one section of the kernel.
pub(super) const WINDOW_PAGES: u64 = PAGE * 8;

/// One block: a bit for each page.
pub(super) type Block = [u8; PAGE_BYTES];

/// The bitmaps.
pub(super) struct PageMap<'a> {
    file: &'a File,
    /// Offset of the bitmap of the machine's pages; the second bitmap follows.
    first: u64,
    second: u64,
    /// Blocks that contain memory of the machine, sorted.
    pub(super) windows: Vec<u64>,
    /// For each of these blocks: number of pages in the file before it. One more entry has the total.
    pub(super) before: Vec<u64>,
}

/// The result of pass 1.
#[derive(Debug, Default)]
pub(super) struct Filtered {
    /// Number of omitted pages, by type.
    pub(super) left_out: PageCounts,
    /// Number of the machine's pages.
    pub(super) pages: u64,
    /// The actual level.
    pub(super) level: u32,
    pub(super) not_filtered: Option<String>,
    pub(super) sections_kept: u64,
}

/// Returns the number of blocks of one bitmap.
pub(super) fn blocks(contents: &Contents<'_>) -> u64 {
    let end = contents.memory.ranges().last().map_or(0, |range| range.end);
    (end / PAGE).div_ceil(WINDOW_PAGES)
}

impl<'a> PageMap<'a> {
    /// Selects the pages for the file, with several threads, and writes the bitmaps to `file`.
    pub(super) fn make(
        file: &'a File,
        at: u64,
        contents: &Contents<'_>,
        level: u32,
        threads: usize,
        control: &Control,
    ) -> io::Result<(Self, Filtered)> {
        let mut map = Self {
            file,
            first: at,
            second: at + blocks(contents) * PAGE,
            windows: windows(contents),
            before: Vec::new(),
        };
        let mut filtered = Filtered {
            level: level & 1 | contents.level_of_source,
            ..Filtered::default()
        };
        let pages = match pages(contents, level) {
            Ok(pages) => pages,
            Err(why) => {
                filtered.not_filtered = Some(why);
                None
            }
        };
        if pages.is_some() {
            filtered.level |= level;
        }
        let next = AtomicUsize::new(0);
        let work = || map.decide(contents, level, pages.as_ref(), &next, control);
        let parts: Vec<io::Result<Part>> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            started.into_iter().map(joined).collect()
        });
        let mut sums = vec![0; map.windows.len()];
        for part in parts {
            let part = part?;
            filtered.left_out = filtered.left_out.plus(part.left_out);
            filtered.pages += part.pages;
            filtered.sections_kept += part.sections_kept;
            for (index, count) in part.sums {
                sums[index] = count;
            }
        }
        let mut all = 0;
        map.before.push(0);
        map.before.extend(sums.into_iter().map(|sum| {
            all += sum;
            all
        }));
        Ok((map, filtered))
    }

    /// Returns the number of pages in the file.
    pub(super) fn pages_in_file(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// Returns the pages of a window that go into the file.
    pub(super) fn block(&self, window: u64) -> io::Result<Block> {
        let mut block = [0; PAGE_BYTES];
        self.file
            .read_exact_at(&mut block, self.second + window * PAGE)?;
        Ok(block)
    }

    fn decide(
        &self,
        contents: &Contents<'_>,
        level: u32,
        pages: Option<&Pages<'_, '_>>,
        next: &AtomicUsize,
        control: &Control,
    ) -> io::Result<Part> {
        let mut part = Part::default();
        let (mut kinds, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&window) = self.windows.get(index) else {
                return Ok(part);
            };
            if control.stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let start = window * WINDOW_PAGES;
            if let Some(pages) = pages {
                let whole = pages.kinds(start, &mut kinds, &mut buffer).is_ok();
                part.sections_kept += u64::from(!whole);
            }
            let (mut has, mut goes) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
            let mut sum = 0;
            for (from, upto) in stretches(contents, start) {
                let mut pfn = from;
                while pfn < upto {
                    let at = contents.memory.next_present(pfn * PAGE, upto * PAGE) / PAGE;
                    for absent in pfn..at {
                        set(&mut has, absent - start);
                    }
                    part.pages += at - pfn;
                    if at >= upto {
                        break;
                    }
                    set(&mut has, at - start);
                    part.pages += 1;
                    let within = usize::try_from(at - start).unwrap_or(0);
                    let kind = kinds.get(within).copied().unwrap_or(PageKind::Kernel);
                    if kind.left_out_at(level) {
                        part.left_out.add(kind);
                    } else {
                        set(&mut goes, at - start);
                        sum += 1;
                    }
                    pfn = at + 1;
                }
            }
            part.sums.push((index, sum));
            for (bitmap, block) in [(self.first, &has), (self.second, &goes)] {
                self.file.write_all_at(block, bitmap + window * PAGE)?;
            }
        }
    }
}

#[derive(Default)]
struct Part {
    left_out: PageCounts,
    pages: u64,
    sections_kept: u64,
    sums: Vec<(usize, u64)>,
}

/// Returns the source of page types, if something is to be omitted; otherwise why there is none.
fn pages<'k>(contents: &Contents<'k>, level: u32) -> Result<Option<Pages<'k, 'k>>, String> {
    if level & !1 == 0 {
        return Ok(None);
    }
    let kernel = contents
        .kernel
        .ok_or("no VMCOREINFO was found, so page types are unknown")?;
    let pages = Pages::of(kernel).map_err(|error| error.to_string())?;
    match pages.section_pages() == WINDOW_PAGES {
        true => Ok(Some(pages)),
        false => Err("the kernel's memory sections are not 128 MiB in size".to_owned()),
    }
}

/// Returns the blocks that contain memory of the machine.
fn windows(contents: &Contents<'_>) -> Vec<u64> {
    let mut windows: Vec<u64> = Vec::new();
    for range in contents.memory.ranges() {
        let first = range.start / PAGE / WINDOW_PAGES;
        let behind = (range.end / PAGE).div_ceil(WINDOW_PAGES);
        let from = windows.last().map_or(first, |last| first.max(last + 1));
        windows.extend(from..behind);
    }
    windows
}

/// Returns the machine's memory in the window that begins with page `start`.
pub(super) fn stretches(contents: &Contents<'_>, start: u64) -> Vec<(u64, u64)> {
    let end = start + WINDOW_PAGES;
    let ranges = contents.memory.ranges();
    let first = ranges.partition_point(|range| range.end / PAGE <= start);
    ranges[first..]
        .iter()
        .map(|range| (range.start / PAGE, range.end / PAGE))
        .take_while(|(from, _)| *from < end)
        .map(|(from, upto)| (from.max(start), upto.min(end)))
        .collect()
}

fn set(block: &mut Block, bit: u64) {
    // A bit of the window.
    let bit = usize::try_from(bit).unwrap_or(0);
    block[bit / 8] |= 1 << (bit % 8);
}

/// Returns the result of a thread; propagates its panic.
pub(super) fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
