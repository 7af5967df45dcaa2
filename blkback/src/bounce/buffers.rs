//! Memory that requests smaller than the storage's units go through: never more than a queue may have, and given back
//! when nothing goes through it.

use std::io;
use std::rc::Rc;

use hypervisor::memory::Mapping;

/// Bytes that a queue may have.
const MOST: usize = 8 << 20;
/// Bytes that are kept for the next request while nothing is under way.
const KEPT: usize = 256 << 10;

/// Large buffers are multiples of this many bytes.
const STEP: usize = 64 << 10;

/// Bytes of the buffer for so many bytes: few sizes, so that one can be used again.
fn size(len: usize) -> usize {
    if len < STEP { len.next_power_of_two() } else { len.next_multiple_of(STEP) }
}

/// Buffers of one queue.
#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) most: usize,
    /// Bytes in use, and bytes in `spare`.
    used: usize,
    idle: usize,
    spare: Vec<Rc<Mapping>>,
}

impl Buffers {
    /// Room for requests of at most `largest` bytes, one of them at least.
    pub(super) fn new(largest: usize) -> Self {
        Self { most: MOST.max(size(largest)), used: 0, idle: 0, spare: Vec::new() }
    }

    /// Bytes of this process's memory that are in use or kept.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.used + self.idle
    }

    /// Whether [`take`](Self::take) may be called: otherwise a request waits until others are done.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.used + size(len) <= self.most
    }

    /// A buffer of at least `len` bytes.
    ///
    /// # Errors
    /// When the kernel has no memory.
    pub(super) fn take(&mut self, len: usize) -> io::Result<Rc<Mapping>> {
        let size = size(len);
        if let Some(at) = self.spare.iter().position(|spare| spare.len() == size) {
            self.used += size;
            self.idle -= size;
            return Ok(self.spare.swap_remove(at));
        }
        self.drop_spare(self.most.saturating_sub(self.used + size));
        let buffer = Mapping::anonymous(size)?;
        self.used += size;
        Ok(Rc::new(buffer))
    }

    /// A buffer is not used any more.
    pub(super) fn give_back(&mut self, buffer: Rc<Mapping>) {
        self.used -= buffer.len();
        self.idle += buffer.len();
        self.spare.push(buffer);
        if self.used == 0 {
            self.drop_spare(KEPT);
        }
    }

    /// Gives memory back to the kernel until no more than this is kept; the largest first.
    fn drop_spare(&mut self, kept: usize) {
        self.spare.sort_by_key(|spare| spare.len());
        while self.idle > kept {
            let Some(largest) = self.spare.pop() else { break };
            self.idle -= largest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_given_back() {
        let mut buffers = Buffers::new((1 << 20) + 8192);
        let mut taken = Vec::new();
        while buffers.has_room((1 << 20) + 8192) {
            taken.push(buffers.take((1 << 20) + 8192).unwrap());
        }
        assert_eq!(taken.len(), 7);
        assert!(buffers.bytes() <= MOST);
        taken.drain(1..).for_each(|buffer| buffers.give_back(buffer));
        // What is kept in another size makes room.
        for _ in 0..100 {
            taken.push(buffers.take(8192).unwrap());
        }
        assert!(buffers.bytes() <= MOST, "{}", buffers.bytes());
        taken.drain(..).for_each(|buffer| buffers.give_back(buffer));
        assert!(buffers.bytes() <= KEPT, "{}", buffers.bytes());
        // Even the largest request of an odd unit has its buffer.
        assert!(Buffers::new(20 << 20).has_room(20 << 20));
    }
}
