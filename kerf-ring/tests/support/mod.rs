//! Memory for tests: shared by several ends, and by whoever writes garbage into it.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared by several test programs"
)]

use std::time::Duration;

use kmorph_kerf_ring::{Geometry, Link, LinkEvent, Mapped, Memory, Region};

/// Memory that every [`Self::view`] shares; it must outlive them.
pub struct Shared {
    words: Vec<u64>,
}

impl Shared {
    pub fn new(bytes: u64) -> Self {
        let words = usize::try_from(bytes.div_ceil(8)).unwrap();
        Self {
            words: vec![0; words],
        }
    }

    pub fn size(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    pub fn start(&self) -> *mut u8 {
        self.words.as_ptr().cast_mut().cast()
    }

    pub fn view(&self) -> Mapped {
        // SAFETY: the words live longer than the views in each test, and are not looked at meanwhile.
        unsafe { Mapped::new(self.start(), self.size()) }
    }
}

/// For links that are not lost in between.
pub const NOW: Duration = Duration::ZERO;

pub fn small() -> Geometry {
    Geometry::new(2, 32, 64 * 1024).unwrap()
}

/// A region of `geometry` and the memory under it.
pub fn region(geometry: Geometry) -> (Shared, Region<Mapped>) {
    let shared = Shared::new(geometry.region_size());
    let region = Region::format(shared.view(), geometry).unwrap();
    (shared, region)
}

/// Two ends, up.
pub fn linked<M: Memory>(region: &Region<M>) -> (Link, Link) {
    let (a, b) = (region.attach(0, 1), region.attach(1, 1));
    let (mut a, mut b) = (Link::new(0, 1, a), Link::new(1, 0, b));
    assert_eq!(a.poll(region, NOW), LinkEvent::Down);
    assert_eq!(b.poll(region, NOW), LinkEvent::CameUp);
    assert_eq!(a.poll(region, NOW), LinkEvent::CameUp);
    (a, b)
}

/// `len` bytes that tell `seed` apart from others.
pub fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}
