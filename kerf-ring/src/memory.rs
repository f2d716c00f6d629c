//! Access to memory that other processes or kernels write at the same time.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// Memory shared with peers. Offsets are bytes from its start; words are aligned to their size.
///
/// # Panics
/// Every method may panic when an offset is out of bounds or not aligned: offsets are the caller's own.
pub trait Memory {
    /// Returns its size, bytes.
    fn size(&self) -> u64;
    /// Reads a word once.
    fn load32(&self, at: u64, order: Ordering) -> u32;
    /// Writes a word once.
    fn store32(&self, at: u64, value: u32, order: Ordering);
    /// Reads a 64-bit word once.
    fn load64(&self, at: u64, order: Ordering) -> u64;
    /// Writes a 64-bit word once.
    fn store64(&self, at: u64, value: u64, order: Ordering);
    /// Replaces a 64-bit word if it is `old`. Returns whether it was.
    fn replace64(&self, at: u64, old: u64, new: u64) -> bool;
    /// Reads bytes, each once and in any order.
    fn read(&self, at: u64, to: &mut [u8]);
    /// Writes bytes.
    fn write(&self, at: u64, from: &[u8]);
    /// A full barrier.
    fn barrier(&self);
}

/// Memory mapped into this process.
#[derive(Debug)]
pub struct Mapped {
    start: *mut u8,
    size: u64,
}

// SAFETY: all threads access the memory only through atomics.
unsafe impl Send for Mapped {}
// SAFETY: likewise.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Uses the memory at `start`.
    ///
    /// # Safety
    /// `size` bytes at `start` are mapped for reading and writing for the lifetime of this value, and no Rust reference
    /// to them exists. Others may write them at any time.
    ///
    /// # Panics
    /// When `start` is not aligned to 8 bytes.
    pub unsafe fn new(start: *mut u8, size: u64) -> Self {
        assert!(start.addr().is_multiple_of(8), "mappings are page-aligned");
        Self { start, size }
    }

    /// Returns the address at offset `at`; checks that `len` bytes are within bounds.
    fn at(&self, at: u64, len: usize) -> *mut u8 {
        let end = at.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.size), "out of bounds");
        let offset = usize::try_from(at).unwrap_or(usize::MAX);
        // SAFETY: within the mapping, as just checked; a mapping is smaller than isize::MAX.
        unsafe { self.start.add(offset) }
    }

    fn word32(&self, at: u64) -> &AtomicU32 {
        assert!(at.is_multiple_of(4), "not aligned");
        // SAFETY: within bounds and aligned; shared memory is accessed only through atomics.
        unsafe { AtomicU32::from_ptr(self.at(at, 4).cast()) }
    }

    fn word64(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8), "not aligned");
        // SAFETY: likewise.
        unsafe { AtomicU64::from_ptr(self.at(at, 8).cast()) }
    }

    fn byte(&self, at: u64) -> &AtomicU8 {
        // SAFETY: likewise.
        unsafe { AtomicU8::from_ptr(self.at(at, 1)) }
    }
}

impl Memory for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn load32(&self, at: u64, order: Ordering) -> u32 {
        u32::from_le(self.word32(at).load(order))
    }

    fn store32(&self, at: u64, value: u32, order: Ordering) {
        self.word32(at).store(value.to_le(), order);
    }

    fn load64(&self, at: u64, order: Ordering) -> u64 {
        u64::from_le(self.word64(at).load(order))
    }

    fn store64(&self, at: u64, value: u64, order: Ordering) {
        self.word64(at).store(value.to_le(), order);
    }

    fn replace64(&self, at: u64, old: u64, new: u64) -> bool {
        let (old, new) = (old.to_le(), new.to_le());
        let order = Ordering::AcqRel;
        let replaced = self
            .word64(at)
            .compare_exchange(old, new, order, Ordering::Relaxed);
        replaced.is_ok()
    }

    fn read(&self, at: u64, to: &mut [u8]) {
        if to.is_empty() {
            return;
        }
        self.at(at, to.len());
        // Packets are aligned to 64 bytes, so all but the last few bytes are copied as words.
        let mut at = at;
        let mut words = to.chunks_exact_mut(8);
        for word in &mut words {
            if at.is_multiple_of(8) {
                let value = self.word64(at).load(Ordering::Relaxed);
                word.copy_from_slice(&value.to_ne_bytes());
            } else {
                for (byte, at) in word.iter_mut().zip(at..) {
                    *byte = self.byte(at).load(Ordering::Relaxed);
                }
            }
            at += 8;
        }
        for (byte, at) in words.into_remainder().iter_mut().zip(at..) {
            *byte = self.byte(at).load(Ordering::Relaxed);
        }
    }

    fn write(&self, at: u64, from: &[u8]) {
        if from.is_empty() {
            return;
        }
        self.at(at, from.len());
        let mut at = at;
        let (words, rest) = from.as_chunks::<8>();
        for word in words {
            if at.is_multiple_of(8) {
                let value = u64::from_ne_bytes(*word);
                self.word64(at).store(value, Ordering::Relaxed);
            } else {
                for (byte, at) in word.iter().zip(at..) {
                    self.byte(at).store(*byte, Ordering::Relaxed);
                }
            }
            at += 8;
        }
        for (byte, at) in rest.iter().zip(at..) {
            self.byte(at).store(*byte, Ordering::Relaxed);
        }
    }

    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}
