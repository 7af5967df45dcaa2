//! Writes that the storage has no room for.
//!
//! A sparse image grows as its guest writes. When the file system under it is full, an error would have the guest's file
//! system give up, although nothing is wrong with the disk that an administrator could not mend. So the write waits: the
//! guest's driver knows no time limit, and the ring bounds how many can wait. Other requests go on.

use std::io;

use hypervisor::memory::IoList;

use super::{Doing, Progress, Queue};
use crate::abi::Status;
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
        self.flights[token as usize].memory = memory;
        self.held.push(token);
    }

    /// Tries again what waits. To be followed by a [`turn`](Self::turn) or [`drain`](Self::drain), which submits it.
    pub fn retry_held(&mut self) {
        for token in std::mem::take(&mut self.held) {
            let flight = &mut self.flights[token as usize];
            let memory = std::mem::take(&mut flight.memory);
            let done = flight.len - memory.len() as u64;
            self.storage.write(flight.offset + done, memory, token);
        }
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
