//! Writes that the storage has no room for.
//!
//! A sparse image grows as its guest writes. When the file system under it is full, an error would have the guest's file
//! system give up, although nothing is wrong with the disk that an administrator could not mend. So the write waits: the
//! guest's driver knows no time limit, and the ring bounds how many can wait. Other requests go on.

use std::io;

use hypervisor::CopyDirection;
use hypervisor::memory::IoList;

use super::{Doing, Progress, Queue};
use crate::abi::Status;
use crate::request::Refusal;
use crate::storage::Storage;

impl<S: Storage> Queue<S> {
    /// Whether writes wait for room, or are answered with an error at once.
    pub fn hold_when_full(&mut self, holds: bool) {
        self.holds = holds;
    }

    /// Writes that wait for room.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_to_wait(&self, error: &io::Error) -> bool {
        self.holds && matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
    }

    /// Keeps a write. `memory` is what is left of it.
    pub(super) fn hold(&mut self, token: u32, memory: IoList) {
        let flight = &mut self.flights[token as usize];
        flight.waited = true;
        flight.written = flight.len - memory.len() as u64;
        if flight.segments.is_empty() {
            // The guest's own pages: nothing of ours is in use. A barrier's: nothing else is taken meanwhile.
            flight.memory = memory;
        } else {
            let mut pages = std::mem::take(&mut flight.pages);
            self.grants.give_back(&mut pages);
            self.flights[token as usize].pages = pages;
            self.keep_list(memory);
        }
        self.held.push(token);
    }

    /// Whether a write that had waited was done since this was last asked: there may be room for the others.
    pub fn take_room(&mut self) -> bool {
        std::mem::take(&mut self.room)
    }

    /// Tries again what waits, as far as there are pages for it. To be followed by a [`turn`](Self::turn) or
    /// [`drain`](Self::drain), which submits it.
    pub fn retry_held(&mut self) {
        let mut progress = Progress::default();
        for token in std::mem::take(&mut self.held) {
            let flight = &mut self.flights[token as usize];
            if flight.segments.is_empty() {
                let memory = std::mem::take(&mut flight.memory);
                self.storage.write(flight.offset + flight.written, memory, token);
            } else if self.grants.free_pages() > self.reserve() + self.flights[token as usize].segments.len() {
                self.copy_again(token);
            } else {
                self.held.push(token);
            }
        }
        self.run_batch(|queue, token, okay| {
            let flight = &mut queue.flights[token as usize];
            let mut memory = std::mem::take(&mut flight.memory);
            if okay {
                memory.advance(flight.written as usize);
                queue.storage.write(flight.offset + flight.written, memory, token);
            } else if let Some(due) = queue.land(token, memory) {
                queue.refuse(due, Refusal::Grant, &mut progress);
            }
        });
    }

    /// Puts the copies of a write that waits into the batch.
    fn copy_again(&mut self, token: u32) {
        let mut memory = self.lists.pop().unwrap_or_default();
        let flight = &mut self.flights[token as usize];
        for segment in &flight.segments {
            self.grants.add(
                segment.bytes(),
                CopyDirection::FromGuest,
                &mut memory,
                &mut flight.pages,
                &mut flight.copies,
            );
        }
        flight.memory = memory;
        self.batch_copies(token);
    }

    /// Answers what waits with an error: the disk is being closed, or there will be no more waiting.
    pub fn give_up_held(&mut self) {
        let mut progress = Progress::default();
        for token in std::mem::take(&mut self.held) {
            let memory = std::mem::take(&mut self.flights[token as usize].memory);
            debug_assert!(matches!(self.flights[token as usize].doing, Some(Doing::Write | Doing::BarrierWrite)));
            if let Some(due) = self.land(token, memory) {
                self.counters.io_errors.add(1);
                self.answer(due, Status::Error, &mut progress);
            }
        }
    }
}
