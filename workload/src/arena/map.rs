//! The mapping: the only code of this module that touches raw memory.
//!
//! Words are accessed as relaxed atomics, because another process may map the same memory. Byte slices are available
//! only to a process that may use them: the owner, or any process while the arena is frozen (see
//! [`super::ownership`]).

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use super::dirty::DirtyPages;
use super::{ArenaError, MAX_CAPACITY, MIN_CAPACITY, Result, index};

/// Bytes populated per system call, so that other page faults of the process can proceed in between.
const PREFAULT_STEP_BYTES: u64 = 4 << 20;

/// A shared mapping of an entire memfd.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: u64,
    fd: OwnedFd,
    dirty: Option<DirtyPages>,
    written_bytes: u64,
}

fn system(what: &'static str) -> impl FnOnce(nix::errno::Errno) -> ArenaError {
    move |errno| ArenaError::System {
        what,
        source: errno.into(),
    }
}

impl Mapping {
    /// Creates an empty memfd of `len` bytes. Its memory is allocated only when it is written.
    ///
    /// # Errors
    /// [`ArenaError::Incompatible`] for a size out of range; else the system's error.
    pub fn create(len: u64) -> Result<Self> {
        check_len(len)?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"kmorph-arena", flags).map_err(system("creating the arena"))?;
        let size = i64::try_from(len).unwrap_or(i64::MAX);
        nix::unistd::ftruncate(&fd, size).map_err(system("sizing the arena"))?;
        // No process can shrink the memfd under another process that maps it.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(system("sealing the arena"))?;
        Self::map(fd, len)
    }

    /// Maps the memfd of another process.
    ///
    /// # Errors
    /// [`ArenaError::Incompatible`] if it is not a sealed memfd of `len` bytes.
    pub fn open(fd: OwnedFd, len: u64) -> Result<Self> {
        check_len(len)?;
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)
            .map_err(|_| ArenaError::Incompatible("not a memfd".to_owned()))?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            let text = "its memfd is not sealed against shrinking";
            return Err(ArenaError::Incompatible(text.to_owned()));
        }
        let stat = nix::sys::stat::fstat(&fd).map_err(system("asking the arena's size"))?;
        if u64::try_from(stat.st_size).ok() != Some(len) {
            let text = format!("its memfd has {} bytes, not {len}", stat.st_size);
            return Err(ArenaError::Incompatible(text));
        }
        Self::map(fd, len)
    }

    fn map(fd: OwnedFd, len: u64) -> Result<Self> {
        let size = NonZeroUsize::new(index(len))
            .ok_or_else(|| ArenaError::Incompatible("the arena is empty".to_owned()))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing; the file
        // is sealed against shrinking, so every byte of it stays backed.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &fd, 0) }
            .map_err(system("mapping the arena"))?
            .cast::<u8>();
        Ok(Self {
            base,
            len,
            fd,
            dirty: None,
            written_bytes: 0,
        })
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always returns false: an arena has at least [`MIN_CAPACITY`] bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the memfd, to pass to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Populates the pages of `start..end` in this process, writable, so that no page fault delays
    /// its first answers.
    ///
    /// # Errors
    /// The system's error, except `EINVAL` from kernels before 5.14.
    pub fn prefault(&self, start: u64, end: u64) -> Result<()> {
        let end = end.min(self.len);
        let mut at = start & !(PREFAULT_STEP_BYTES - 1);
        while at < end {
            let step = PREFAULT_STEP_BYTES.min(self.len - at);
            // SAFETY: `at < len` and `at + step <= len`, so the range lies in this mapping, which
            // populating does not change.
            let result = unsafe {
                let address = self.base.add(index(at)).cast();
                madvise(address, index(step), MmapAdvise::MADV_POPULATE_WRITE)
            };
            match result {
                Ok(()) => {}
                Err(nix::errno::Errno::EINVAL) => return Ok(()),
                Err(errno) => return Err(system("prefaulting the arena")(errno)),
            }
            at += step;
        }
        Ok(())
    }

    /// Returns the word at `offset`, as an atomic.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`] when the offset is unaligned or out of bounds.
    pub fn word(&self, offset: u64) -> Result<&AtomicU64> {
        if !offset.is_multiple_of(8) || offset.checked_add(8).is_none_or(|end| end > self.len) {
            return Err(ArenaError::Corrupt {
                what: "word",
                offset,
            });
        }
        // SAFETY: in bounds and aligned, as just checked; the mapping lives as long as `self`; all
        // processes access words as atomics.
        Ok(unsafe { self.base.add(index(offset)).cast::<AtomicU64>().as_ref() })
    }

    /// Reads a word.
    ///
    /// # Errors
    /// As [`Mapping::word`].
    pub fn get(&self, offset: u64) -> Result<u64> {
        Ok(self.word(offset)?.load(Ordering::Relaxed))
    }

    /// Writes a word.
    ///
    /// # Errors
    /// As [`Mapping::word`].
    pub fn put(&mut self, offset: u64, value: u64) -> Result<()> {
        self.word(offset)?.store(value, Ordering::Relaxed);
        self.note_write(offset, 8);
        Ok(())
    }

    /// Returns bytes. The caller is the owner, or the arena is frozen.
    ///
    /// # Errors
    /// [`ArenaError::Corrupt`] when the range is out of bounds.
    pub fn bytes(&self, offset: u64, len: u64) -> Result<&[u8]> {
        self.check_range(offset, len)?;
        // SAFETY: in bounds, as just checked. There are no concurrent writes: this process has no writer while `self`
        // is borrowed, and other processes must not write an arena that they do not own.
        Ok(
            unsafe {
                std::slice::from_raw_parts(self.base.as_ptr().add(index(offset)), index(len))
            },
        )
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// As [`Mapping::bytes`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.check_range(offset, len)?;
        // SAFETY: in bounds, as just checked; `bytes` cannot overlap the mapping: slices of the
        // mapping only exist as shared borrows of `self`, and `self` is borrowed mutably.
        unsafe {
            let to = self.base.as_ptr().add(index(offset));
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        self.note_write(offset, len);
        Ok(())
    }

    /// Copies bytes within the arena; the ranges may overlap.
    ///
    /// # Errors
    /// As [`Mapping::bytes`].
    pub fn copy_within(&mut self, from: u64, to: u64, len: u64) -> Result<()> {
        self.check_range(from, len)?;
        self.check_range(to, len)?;
        // SAFETY: both ranges are in bounds, as just checked; `copy` allows them to overlap.
        unsafe {
            let source = self.base.as_ptr().add(index(from));
            let target = self.base.as_ptr().add(index(to));
            std::ptr::copy(source, target, index(len));
        }
        self.note_write(to, len);
        Ok(())
    }

    /// Writes zeros.
    ///
    /// # Errors
    /// As [`Mapping::bytes`].
    pub fn zero(&mut self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        // SAFETY: in bounds, as just checked.
        unsafe { std::ptr::write_bytes(self.base.as_ptr().add(index(offset)), 0, index(len)) };
        self.note_write(offset, len);
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(ArenaError::Corrupt {
                what: "range",
                offset,
            }),
        }
    }

    /// Records that `len` bytes from `offset` on have changed.
    pub(super) fn note_write(&mut self, offset: u64, len: u64) {
        self.written_bytes = self.written_bytes.wrapping_add(len);
        if let Some(dirty) = &mut self.dirty {
            dirty.mark(offset, len);
        }
    }

    /// Returns the number of bytes written through this mapping so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Begins to track writes; all of `0..end` counts as written.
    pub fn track_dirty(&mut self, end: u64) {
        let mut dirty = DirtyPages::new(self.len);
        dirty.mark(0, end.min(self.len));
        self.dirty = Some(dirty);
    }

    /// Stops tracking writes.
    pub fn stop_tracking(&mut self) {
        self.dirty = None;
    }

    /// Returns the number of bytes written and not yet taken; 0 without tracking.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.as_ref().map_or(0, DirtyPages::bytes)
    }

    /// Takes the next run of written pages, at most `max_bytes`. Returns its offset and bytes.
    ///
    /// # Errors
    /// As [`Mapping::bytes`].
    pub fn take_dirty(&mut self, max_bytes: u64) -> Result<Option<(u64, &[u8])>> {
        let Some(dirty) = &mut self.dirty else {
            return Ok(None);
        };
        let Some((offset, len)) = dirty.take(max_bytes) else {
            return Ok(None);
        };
        let len = len.min(self.len - offset);
        Ok(Some((offset, self.bytes(offset, len)?)))
    }
}

fn check_len(len: u64) -> Result<()> {
    if (MIN_CAPACITY..=MAX_CAPACITY).contains(&len) && len.is_multiple_of(4096) {
        return Ok(());
    }
    Err(ArenaError::Incompatible(format!(
        "a size of {len} bytes is not a multiple of 4096 between {MIN_CAPACITY} and {MAX_CAPACITY}"
    )))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the complete mapping that `map` created, and no borrow of it outlives
        // `self`. If the call fails, the memory stays mapped, which is harmless.
        let _ = unsafe { munmap(self.base.cast(), index(self.len)) };
    }
}

// SAFETY: only this value owns the mapping within the process; any thread may use its address.
unsafe impl Send for Mapping {}

impl From<ArenaError> for io::Error {
    fn from(error: ArenaError) -> Self {
        match error {
            ArenaError::System { source, .. } => source,
            other => io::Error::other(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An operation on a mapping, with its offset and length.
    #[derive(Clone, Debug)]
    enum Step {
        Word(u64),
        Put(u64, u64),
        Bytes(u64, u64),
        Write(u64, Vec<u8>),
        Copy(u64, u64, u64),
        Zero(u64, u64),
    }

    /// Offsets inside the memory, at page boundaries, at its end, beyond it, and where sums overflow.
    fn offset() -> impl Strategy<Value = u64> {
        prop_oneof![
            0..MIN_CAPACITY,
            (0..=MIN_CAPACITY / 4096, 0..16_u64)
                .prop_map(|(page, off)| { (page * 4096 + off).saturating_sub(8) }),
            MIN_CAPACITY - 64..MIN_CAPACITY + 64,
            u64::MAX - 64..=u64::MAX,
            any::<u64>(),
        ]
    }

    fn length() -> impl Strategy<Value = u64> {
        prop_oneof![0..64_u64, 0..=MIN_CAPACITY, Just(u64::MAX), any::<u64>()]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            offset().prop_map(Step::Word),
            (offset(), any::<u64>()).prop_map(|(at, value)| Step::Put(at, value)),
            (offset(), length()).prop_map(|(at, len)| Step::Bytes(at, len)),
            (offset(), prop::collection::vec(any::<u8>(), 0..256))
                .prop_map(|(at, bytes)| Step::Write(at, bytes)),
            (offset(), offset(), length()).prop_map(|(from, to, len)| Step::Copy(from, to, len)),
            (offset(), length()).prop_map(|(at, len)| Step::Zero(at, len)),
        ]
    }

    /// Returns the range as indices of the model, if it is within bounds.
    fn within(at: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let end = at.checked_add(len).filter(|end| *end <= MIN_CAPACITY)?;
        Some(index(at)..index(end))
    }

    /// Performs a step on the mapping and, if it is possible there, on the model. Both must agree on whether it is
    /// possible.
    fn take(step: Step, mapping: &mut Mapping, model: &mut [u8]) -> std::result::Result<(), Step> {
        let told = step.clone();
        let (done, possible) = match step {
            Step::Word(at) => {
                let range = within(at, 8).filter(|_| at.is_multiple_of(8));
                let expected = range.as_ref().map(|range| &model[range.clone()]);
                let read = mapping.get(at).map(u64::to_ne_bytes);
                if let (Ok(read), Some(expected)) = (&read, expected)
                    && read != expected
                {
                    return Err(told);
                }
                (read.is_ok(), range.is_some())
            }
            Step::Put(at, value) => {
                let range = within(at, 8).filter(|_| at.is_multiple_of(8));
                if let Some(range) = range.clone() {
                    model[range].copy_from_slice(&value.to_ne_bytes());
                }
                (mapping.put(at, value).is_ok(), range.is_some())
            }
            Step::Bytes(at, len) => {
                let range = within(at, len);
                let read = mapping.bytes(at, len);
                if let (Ok(read), Some(range)) = (&read, range.clone())
                    && *read != &model[range]
                {
                    return Err(told);
                }
                (read.is_ok(), range.is_some())
            }
            Step::Write(at, bytes) => {
                let range = within(at, bytes.len() as u64);
                if let Some(range) = range.clone() {
                    model[range].copy_from_slice(&bytes);
                }
                (mapping.write(at, &bytes).is_ok(), range.is_some())
            }
            Step::Copy(from, to, len) => {
                let ranges = within(from, len).zip(within(to, len));
                if let Some((from, to)) = ranges.clone() {
                    model.copy_within(from, to.start);
                }
                let done = mapping.copy_within(from, to, len);
                (done.is_ok(), ranges.is_some())
            }
            Step::Zero(at, len) => {
                let range = within(at, len);
                if let Some(range) = range.clone() {
                    model[range].fill(0);
                }
                (mapping.zero(at, len).is_ok(), range.is_some())
            }
        };
        if done == possible { Ok(()) } else { Err(told) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// The model is a vector: a step out of bounds is refused and changes nothing, and any other step has the same
        /// effect on both.
        #[test]
        fn a_mapping_is_as_a_vector_that_refuses_what_leads_outside(
            steps in prop::collection::vec(step(), 1..60),
        ) {
            let mut mapping = Mapping::create(MIN_CAPACITY).unwrap();
            let mut model = vec![0; index(MIN_CAPACITY)];
            for step in steps {
                if let Err(step) = take(step, &mut mapping, &mut model) {
                    prop_assert!(false, "the mapping and the model differ at {step:?}");
                }
            }
            prop_assert!(mapping.bytes(0, MIN_CAPACITY).unwrap() == model);
        }
    }

    #[test]
    fn a_memfd_that_may_shrink_is_not_mapped() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"unsealed", flags).unwrap();
        nix::unistd::ftruncate(&fd, i64::try_from(MIN_CAPACITY).unwrap()).unwrap();
        let refused = Mapping::open(fd, MIN_CAPACITY).unwrap_err();
        assert!(refused.to_string().contains("not sealed"), "{refused}");
        let sealed = Mapping::create(MIN_CAPACITY).unwrap();
        let other = sealed.fd().try_clone_to_owned().unwrap();
        let refused = Mapping::open(other, MIN_CAPACITY * 2).unwrap_err();
        assert!(refused.to_string().contains("bytes, not"), "{refused}");
    }
}
