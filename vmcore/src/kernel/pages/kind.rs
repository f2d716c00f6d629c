//! Page types, and counts per type.

/// The type of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Unused.
    Free,
    /// Contents of a file, without the file system's own data.
    Cache,
    /// Contents of a file, with the file system's own data.
    CachePrivate,
    /// Memory of user processes that is not backed by a file: anonymous, or huge pages.
    User,
    /// The kernel's small objects.
    Slab,
    /// Broken or offlined.
    Unusable,
    /// Any other page, mainly the kernel's own.
    Kernel,
    /// The kernel does not describe the page, or its description cannot be read.
    Unknown,
}

impl PageKind {
    /// Returns true if makedumpfile's `-d level` omits the page. The level's bits: 1 zero (not a type), 2 cache, 4
    /// cache with or without private data, 8 user, 16 free. Unusable pages are omitted at any level but 0.
    pub fn left_out_at(self, level: u32) -> bool {
        match self {
            Self::Cache => level & (2 | 4) != 0,
            Self::CachePrivate => level & 4 != 0,
            Self::User => level & 8 != 0,
            Self::Free => level & 16 != 0,
            Self::Unusable => level != 0,
            Self::Slab | Self::Kernel | Self::Unknown => false,
        }
    }
}

/// Number of pages of each type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PageCounts {
    /// See [`PageKind`]; pages.
    pub free: u64,
    /// Pages.
    pub cache: u64,
    /// Pages.
    pub cache_private: u64,
    /// Pages.
    pub user: u64,
    /// Pages.
    pub slab: u64,
    /// Pages.
    pub unusable: u64,
    /// Pages.
    pub kernel: u64,
    /// Pages that the kernel does not describe, or whose description cannot be read.
    pub unknown: u64,
}

impl PageCounts {
    /// Counts one more page.
    pub fn add(&mut self, kind: PageKind) {
        *match kind {
            PageKind::Free => &mut self.free,
            PageKind::Cache => &mut self.cache,
            PageKind::CachePrivate => &mut self.cache_private,
            PageKind::User => &mut self.user,
            PageKind::Slab => &mut self.slab,
            PageKind::Unusable => &mut self.unusable,
            PageKind::Kernel => &mut self.kernel,
            PageKind::Unknown => &mut self.unknown,
        } += 1;
    }

    /// Returns the sum of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            free: self.free + other.free,
            cache: self.cache + other.cache,
            cache_private: self.cache_private + other.cache_private,
            user: self.user + other.user,
            slab: self.slab + other.slab,
            unusable: self.unusable + other.unusable,
            kernel: self.kernel + other.kernel,
            unknown: self.unknown + other.unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_makedumpfile() {
        let left_out = |kind: PageKind| -> Vec<u32> {
            [1, 2, 4, 8, 16]
                .into_iter()
                .filter(|level| kind.left_out_at(*level))
                .collect()
        };
        assert_eq!(left_out(PageKind::Cache), [2, 4]);
        assert_eq!(left_out(PageKind::CachePrivate), [4]);
        assert_eq!(left_out(PageKind::User), [8]);
        assert_eq!(left_out(PageKind::Free), [16]);
        assert!(left_out(PageKind::Slab).is_empty());
    }
}
