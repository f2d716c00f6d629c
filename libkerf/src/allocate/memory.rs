use crate::overlay::State;

/// Returns the unused memory of the pool, by address: base and bytes. `None` if the location of an
/// instance's memory is unknown; `/proc/iomem` shows it to root.
#[must_use]
pub fn free_ranges(state: &State) -> Option<Vec<(u64, u64)>> {
    let mut used: Vec<(u64, u64)> = Vec::new();
    for instance in &state.system.instances {
        if instance.unplaced_bytes() > 0 {
            return None;
        }
        used.extend(&instance.regions);
    }
    used.extend(state.other_uses());
    used.sort_unstable();
    let mut free = Vec::new();
    let mut chunks = state.system.resources.chunks.clone();
    chunks.sort_unstable();
    for chunk in chunks {
        let mut at = u128::from(chunk.base);
        for (base, bytes) in &used {
            let (start, end) = (u128::from(*base), u128::from(*base) + u128::from(*bytes));
            if end <= at || start >= chunk.end() {
                continue;
            }
            push(&mut free, at, start);
            at = at.max(end);
        }
        push(&mut free, at, chunk.end());
    }
    Some(free)
}

fn push(free: &mut Vec<(u64, u64)>, start: u128, end: u128) {
    if let (Ok(base), Some(bytes)) = (u64::try_from(start), end.checked_sub(start))
        && let Ok(bytes @ 1..) = u64::try_from(bytes)
    {
        free.push((base, bytes));
    }
}

/// Chooses memory for a running kernel: ranges aligned to `block`, `bytes` in total, as few and as
/// high as possible. The kernel places boot memory from the bottom of the pool and pads its end, so
/// later memory is best far from it.
///
/// Returns `None` if such ranges do not have enough memory.
#[must_use]
pub fn place(free: &[(u64, u64)], bytes: u64, block: u64) -> Option<Vec<(u64, u64)>> {
    if block == 0 || bytes == 0 || !bytes.is_multiple_of(block) {
        return None;
    }
    let mut aligned: Vec<(u64, u64)> = free
        .iter()
        .filter_map(|(base, size)| {
            let end = base
                .checked_add(*size)
                .map_or(u64::MAX - u64::MAX % block, |end| end / block * block);
            let start = base.checked_next_multiple_of(block)?;
            let size = end.checked_sub(start).filter(|size| *size > 0)?;
            Some((start, size))
        })
        .collect();
    // Use the highest single range that is large enough; otherwise the largest ranges first.
    aligned.sort_unstable();
    if let Some((start, size)) = aligned.iter().rev().find(|(_, size)| *size >= bytes) {
        return Some(vec![(start + (size - bytes), bytes)]);
    }
    aligned.sort_unstable_by_key(|(start, size)| {
        (std::cmp::Reverse(*size), std::cmp::Reverse(*start))
    });
    let mut chosen = Vec::new();
    let mut left = bytes;
    for (start, size) in aligned {
        let taken = size.min(left);
        chosen.push((start + (size - taken), taken));
        left -= taken;
        if left == 0 {
            return Some(chosen);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn the_highest_range_that_holds_all_is_taken_from_its_end() {
        let free = [(0, 300 * M), (1024 * M, 400 * M), (2048 * M, 100 * M)];
        assert_eq!(
            place(&free, 256 * M, 128 * M),
            Some(vec![(1152 * M, 256 * M)])
        );
        assert_eq!(
            place(&free, 384 * M, 128 * M),
            Some(vec![(1024 * M, 384 * M)])
        );
    }

    #[test]
    fn several_ranges_are_taken_when_none_holds_all() {
        let free = [(0, 300 * M), (1000 * M, 400 * M)];
        let placed = place(&free, 512 * M, 128 * M);
        // 1024..1400 contains two blocks, and so does 0..300.
        assert_eq!(placed, Some(vec![(1024 * M, 256 * M), (0, 256 * M)]));
        assert_eq!(place(&free, 640 * M, 128 * M), None);
        assert_eq!(
            place(&free, 100 * M, 128 * M),
            None,
            "no multiple of the block"
        );
    }

    #[test]
    fn the_end_of_all_addresses_is_no_trap() {
        let free = [(u64::MAX - 256 * M, 256 * M)];
        let placed = place(&free, 128 * M, 128 * M).unwrap();
        assert!(placed[0].0.checked_add(128 * M).is_some());
    }
}
