//! Where things lie in a shared ring.

use hypervisor::PAGE_SIZE;

/// Offsets of the four shared indices, in bytes from the start of the ring (struct sring in ring.h).
pub const REQ_PROD: usize = 0;
/// See [`REQ_PROD`].
pub const REQ_EVENT: usize = 4;
/// See [`REQ_PROD`].
pub const RSP_PROD: usize = 8;
/// See [`REQ_PROD`].
pub const RSP_EVENT: usize = 12;
/// Offset of the first slot, in bytes.
pub const HEADER: usize = 64;

/// The shape of a ring: how many slots, how far apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    stride: usize,
    entries: u32,
}

impl Layout {
    /// A ring of `pages` pages whose slots are `stride` bytes apart, `stride` being the size of the larger of
    /// request and response. It has as many slots as fit, rounded down to a power of two (macro __RING_SIZE).
    ///
    /// # Panics
    /// When not one slot fits.
    pub const fn new(stride: usize, pages: usize) -> Self {
        let fit = (pages * PAGE_SIZE - HEADER) / stride;
        assert!(fit > 0, "no slot fits");
        let entries = 1 << fit.ilog2();
        Self { stride, entries }
    }

    /// Slots in the ring, a power of two.
    #[inline]
    pub const fn entries(self) -> u32 {
        self.entries
    }

    /// Bytes from one slot to the next.
    #[inline]
    pub const fn stride(self) -> usize {
        self.stride
    }

    /// Offset of the slot that index `index` falls on, in bytes from the start of the ring.
    #[inline]
    pub const fn slot(self, index: u32) -> usize {
        HEADER + (index & (self.entries - 1)) as usize * self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_rings_have_32_entries_a_page_in_every_abi() {
        for stride in [112, 108] {
            for (pages, entries) in [(1, 32), (2, 64), (4, 128), (8, 256), (16, 512)] {
                assert_eq!(Layout::new(stride, pages).entries(), entries);
            }
        }
    }

    #[test]
    fn network_rings_have_256_entries() {
        assert_eq!(Layout::new(12, 1).entries(), 256);
        assert_eq!(Layout::new(8, 1).entries(), 256);
    }

    #[test]
    fn slots_wrap() {
        let layout = Layout::new(112, 1);
        assert_eq!(layout.slot(u32::MAX), HEADER + 31 * 112);
        assert_eq!(layout.slot(u32::MAX.wrapping_add(1)), HEADER);
    }
}
