//! Frames behind one that waits for pages.
//!
//! A tap keeps a thousand frames, however large: eight queues of 64 KiB frames are half a gigabyte of dom0's memory that
//! a guest can hold by not posting pages. So while a frame waits, those behind it are read out of the tap and kept here,
//! up to as many bytes as Linux' netback keeps for a queue; what comes after that is dropped.

use std::collections::VecDeque;

/// Most bytes of frames that wait (Linux: XENVIF_RX_QUEUE_BYTES, half a ring of pages). The frame that makes it more is
/// still taken.
pub const BACKLOG: usize = 512 * 1024;
/// What a small frame costs besides its bytes.
const OVERHEAD: usize = 128;

/// Frames with their vnet headers, as the tap gave them.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    frames: VecDeque<Box<[u8]>>,
    cost: usize,
}

impl Backlog {
    pub(super) fn is_full(&self) -> bool {
        self.cost >= BACKLOG
    }

    pub(super) fn push(&mut self, frame: Box<[u8]>) {
        self.cost += frame.len() + OVERHEAD;
        self.frames.push_back(frame);
    }

    pub(super) fn pop(&mut self) -> Option<Box<[u8]>> {
        let frame = self.frames.pop_front()?;
        self.cost -= frame.len() + OVERHEAD;
        if self.frames.is_empty() {
            // Small frames can have made it long, and most guests never need it.
            self.frames = VecDeque::new();
        }
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_bounded_whatever_the_size() {
        for len in [60, 1514, 65_548] {
            let mut backlog = Backlog::default();
            let mut count = 0;
            while !backlog.is_full() {
                backlog.push(vec![count as u8; len].into());
                count += 1;
            }
            assert!(count * len <= BACKLOG + len && count * (len + OVERHEAD) >= BACKLOG, "{count} of {len}");
            for at in 0..count {
                assert_eq!(backlog.pop().unwrap()[0], at as u8);
            }
            assert!(backlog.pop().is_none() && !backlog.is_full());
        }
    }
}
