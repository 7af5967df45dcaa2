//! Two rings, and when to look at them.
//!
//! * Xen's shared ring (xen/include/public/io/ring.h): requests from a frontend and responses from a backend in the
//!   same slots of a few shared pages. [`BackRing`] is the backend's half, [`FrontRing`] the frontend's; [`layout`]
//!   says where things lie, [`memory`] is what both need from the pages.
//! * [`patience`] tells who drives a queue when to look at its ring and when to sleep.
//! * The kernel's io_uring: [`uring`], where a submission owns the memory the kernel may touch.

pub mod back;
pub mod front;
pub mod layout;
pub mod memory;
pub mod patience;
pub mod uring;

pub use back::BackRing;
pub use front::FrontRing;
pub use layout::Layout;
pub use memory::{Field, RingMemory};
pub use patience::Patience;

/// The peer moved an index where no index can be: the ring is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring index {name} is {index}, more than {size} past {base}")]
pub struct Overflow {
    /// Which index, as ring.h calls it.
    pub name: &'static str,
    /// What the peer wrote.
    pub index: u32,
    /// From where at most `size` entries may be outstanding.
    pub base: u32,
    /// Entries that may be outstanding.
    pub size: u32,
}

/// Whether moving a producer from `old` to `new` passes `event`, the index at which the other side asked to be woken.
///
/// The macro RING_PUSH_…_AND_CHECK_NOTIFY of ring.h; all arithmetic is modulo 2^32.
#[inline]
fn passes_event(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}
