//! Which pages of its memory a guest uses: first fit, always side by side.

use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct Frames {
    pages: u32,
    /// Free runs: first frame → how many. Neighbours are always merged.
    free: BTreeMap<u32, u32>,
}

impl Frames {
    pub(super) fn new(pages: u32) -> Self {
        Self { pages, free: BTreeMap::from([(0, pages)]) }
    }

    /// The first of `count` pages side by side.
    pub(super) fn take(&mut self, count: u32) -> Option<u32> {
        let (first, len) = self.free.iter().map(|(&first, &len)| (first, len)).find(|&(_, len)| len >= count)?;
        if count > 0 {
            self.free.remove(&first);
            if len > count {
                self.free.insert(first + count, len - count);
            }
        }
        Some(first)
    }

    /// Gives pages back; says no when one of them is free already or is not there at all.
    pub(super) fn give(&mut self, first: u32, count: u32) -> bool {
        let Some(end) = first.checked_add(count).filter(|&end| end <= self.pages) else { return false };
        if count == 0 {
            return true;
        }
        let before = self.free.range(..end).next_back().map(|(&at, &len)| (at, at + len));
        if before.is_some_and(|(_, before_end)| before_end > first) {
            return false;
        }
        let mut run = (first, end);
        if let Some((at, before_end)) = before
            && before_end == first
        {
            run.0 = at;
        }
        if let Some(after) = self.free.remove(&end) {
            run.1 = end + after;
        }
        self.free.insert(run.0, run.1 - run.0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn first_fit_and_merging() {
        let mut frames = Frames::new(8);
        assert_eq!((frames.take(3), frames.take(3), frames.take(3)), (Some(0), Some(3), None));
        assert!(frames.give(0, 3));
        assert_eq!((frames.take(4), frames.take(2), frames.take(2)), (None, Some(0), Some(6)));
        assert!(frames.give(3, 3));
        assert!(frames.give(6, 2));
        assert_eq!(frames.take(6), Some(2));
    }

    #[test]
    fn what_is_free_cannot_be_freed() {
        let mut frames = Frames::new(8);
        assert_eq!(frames.take(4), Some(0));
        for (first, count) in [(4, 1), (3, 2), (7, 2), (u32::MAX, 2), (8, 1)] {
            assert!(!frames.give(first, count), "{first}+{count}");
        }
        assert!(frames.give(1, 2));
        assert!(!frames.give(0, 4), "its middle is free");
    }

    proptest! {
        #[test]
        fn no_page_is_ever_handed_out_twice(steps in prop::collection::vec((any::<bool>(), 1..9u32), 1..200)) {
            let mut frames = Frames::new(64);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (take, count) in steps {
                if take {
                    if let Some(first) = frames.take(count) {
                        prop_assert!(first + count <= 64);
                        prop_assert!(held.iter().all(|&(at, len)| first + count <= at || at + len <= first));
                        held.push((first, count));
                    }
                } else if !held.is_empty() {
                    let (first, len) = held.swap_remove(count as usize % held.len());
                    prop_assert!(frames.give(first, len));
                }
            }
            for (first, len) in held {
                prop_assert!(frames.give(first, len));
            }
            prop_assert_eq!(frames.take(64), Some(0));
        }
    }
}
