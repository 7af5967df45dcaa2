//! Frames that the kernel gave to one queue and that the guest wants on another (Linux: xenvif_select_queue).
//!
//! Which of a tap's queues a frame comes to is the kernel's choice. As long as the guest has not chosen an algorithm for
//! hashing, that is fine. Afterwards its hash and its table decide, and a frame that came to another queue is handed over:
//! copied once, to a [`Post`] of bounded places and bytes, whose queue is woken. A frame that finds no room is dropped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};

/// Frames that are kept for one queue.
const PLACES: usize = 128;
/// Bytes of them, as of those that the queue itself has read.
const BYTES: usize = crate::rx::BACKLOG;

/// Where a queue gets what others read for it, and gives what it read for others.
#[derive(Debug)]
pub struct Post {
    own: u32,
    inbox: Receiver<Vec<u8>>,
    boxes: Arc<[Letterbox]>,
}

#[derive(Debug)]
struct Letterbox {
    sender: Sender<Vec<u8>>,
    /// Bytes of the frames in it; those whose giving is under way among them.
    bytes: AtomicUsize,
    /// The bell was rung, and its queue has not looked since.
    rung: AtomicBool,
    bell: OwnedFd,
}

impl Post {
    /// One for each of `queues` queues.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn between(queues: u32) -> io::Result<Vec<Self>> {
        let (mut boxes, mut inboxes) = (Vec::new(), Vec::new());
        for _ in 0..queues {
            let (sender, inbox) = bounded(PLACES);
            let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            boxes.push(Letterbox { sender, bytes: AtomicUsize::new(0), rung: AtomicBool::new(false), bell });
            inboxes.push(inbox);
        }
        let boxes: Arc<[Letterbox]> = boxes.into();
        let post = |(own, inbox)| Self { own, inbox, boxes: Arc::clone(&boxes) };
        Ok((0..queues).zip(inboxes).map(post).collect())
    }

    /// The queue's number.
    pub fn own(&self) -> u32 {
        self.own
    }

    /// How many queues there are.
    pub fn queues(&self) -> u32 {
        self.boxes.len() as u32
    }

    /// Gives a frame, with its vnet header, to `queue`. False when that has too many already.
    #[must_use]
    pub fn give(&self, queue: u32, frame: Vec<u8>) -> bool {
        let Some(other) = self.boxes.get(queue as usize) else { return false };
        let len = frame.len();
        if other.bytes.fetch_add(len, Ordering::Relaxed) + len > BYTES || other.sender.try_send(frame).is_err() {
            other.bytes.fetch_sub(len, Ordering::Relaxed);
            return false;
        }
        // Whoever has rung and was not heard yet has rung for this frame too.
        if !other.rung.swap(true, Ordering::AcqRel) {
            // It only fails when the bell has been rung 2^64 times.
            let _ = rustix::io::write(&other.bell, &1u64.to_ne_bytes());
        }
        true
    }

    /// The next frame that another queue has read for this one.
    pub fn take(&self) -> Option<Vec<u8>> {
        let frame = self.inbox.try_recv().ok()?;
        self.boxes[self.own as usize].bytes.fetch_sub(frame.len(), Ordering::Relaxed);
        Some(frame)
    }

    /// Readable after a frame was given to this queue, until [`quiet`](Self::quiet).
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.boxes[self.own as usize].bell.as_fd()
    }

    /// The bell was heard: the next frame rings it again. To be called before frames are taken.
    pub fn quiet(&self) {
        let own = &self.boxes[self.own as usize];
        // Empty is as good.
        let _ = rustix::io::read(&own.bell, &mut [0; 8]);
        own.rung.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_find_their_queue_and_wake_it_once() {
        let posts = Post::between(3).unwrap();
        let rings = |queue: usize| rustix::io::read(posts[queue].bell(), &mut [0; 8]).is_ok();
        assert!(posts[0].give(2, vec![1]) && posts[1].give(2, vec![2]));
        assert!(rings(2) && !rings(2) && !rings(0));
        posts[2].quiet();
        assert_eq!((posts[2].take(), posts[2].take(), posts[2].take()), (Some(vec![1]), Some(vec![2]), None));
        assert!(posts[0].give(2, vec![3]) && rings(2));
        assert!(!posts[0].give(3, vec![4]), "there is no queue 3");
    }

    #[test]
    fn a_queue_that_does_not_look_costs_no_more_than_its_places() {
        let posts = Post::between(2).unwrap();
        let given = (0..10 * PLACES).filter(|_| posts[0].give(1, vec![0])).count();
        assert_eq!(given, PLACES);
        assert!(posts[1].give(0, vec![0]));
        let given = (0..PLACES).filter(|_| posts[1].give(0, vec![0; 1 << 16])).count();
        assert_eq!(given, BYTES / (1 << 16) - 1, "the byte before takes room too");
        while posts[0].take().is_some() {}
        assert!(posts[1].give(0, vec![0; BYTES]), "all of it is free again");
    }
}
