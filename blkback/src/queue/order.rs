//! Flushes and barriers: what must not overtake what.

use std::io;

use super::{Broken, Doing, Progress, Queue};
use crate::health::Permit;
use crate::storage::Storage;

impl<S: Storage> Queue<S> {
    /// Whether a flush waits that could begin. One that may not is announced by the waker.
    pub(super) fn can_flush(&self) -> bool {
        !self.flush_waiting.is_empty() && self.flush_running.is_empty() && self.health.is_free()
    }

    /// Starts one flush for all that wait for one, if it is this queue's turn. It begins after the last of them came,
    /// so it covers everything that was answered before any of them.
    pub(super) fn start_flush(&mut self) {
        if self.flush_waiting.is_empty() || !self.flush_running.is_empty() {
            return;
        }
        match self.health.begin(&self.wake) {
            Permit::Wait => {}
            Permit::Granted => {
                std::mem::swap(&mut self.flush_waiting, &mut self.flush_running);
                self.storage.flush(self.flush_running[0]);
            }
            Permit::Never => {
                while !self.flush_waiting.is_empty() {
                    for token in std::mem::take(&mut self.flush_waiting) {
                        self.withhold(token);
                    }
                    // A barrier may have waited for just these, and nothing else would look at it again.
                    self.advance_barrier();
                }
            }
        }
    }

    /// The flush has ended, for all that it served.
    pub(super) fn finish_flush(&mut self, result: io::Result<()>, progress: &mut Progress) -> Result<(), Broken> {
        self.health.end(result.is_ok());
        let mut served = std::mem::take(&mut self.flush_running);
        for token in served.drain(..) {
            let flight = &mut self.flights[token as usize];
            let memory = std::mem::take(&mut flight.memory);
            match (&result, flight.doing) {
                // Linux takes any failure of a flush for "this disk needs no flushes", reports success to the file
                // system and never flushes again. Silence is the only honest answer.
                (Err(_), _) => {
                    flight.memory = memory;
                    self.counters.io_errors.add(1);
                    self.withhold(token);
                }
                (Ok(()), Some(Doing::FlushThenWrite)) => {
                    flight.doing = Some(Doing::Write);
                    self.storage.write(flight.offset, memory, token);
                }
                (Ok(()), Some(Doing::BarrierFlush)) if flight.len > 0 => {
                    flight.doing = Some(Doing::BarrierWrite);
                    self.storage.write(flight.offset, memory, token);
                }
                (Ok(()), doing) => {
                    let len = flight.len;
                    // A barrier without data is a flush that waited for everybody.
                    let doing = if doing == Some(Doing::BarrierFlush) { Some(Doing::Flush) } else { doing };
                    if let Some(due) = self.land(token, memory) {
                        self.succeed(doing, len, due, progress);
                    }
                }
            }
        }
        self.flush_running = served;
        result.map_err(Broken::Flush)
    }

    /// A barrier was taken: no queue takes anything more until it is done.
    pub(super) fn begin_barrier(&mut self, token: u32) {
        self.barrier = Some(token);
        self.seat.close();
    }

    /// Says that this queue is quiet if another one's barrier waits for that, and begins this one's own when everything
    /// before it, on every queue, is done.
    pub(super) fn advance_barrier(&mut self) {
        if self.seat.is_closed() && self.in_flight() == usize::from(self.barrier.is_some()) {
            self.seat.quiet();
        }
        let Some(token) = self.barrier else { return };
        let waits = self.flights[token as usize].doing == Some(Doing::Barrier);
        if waits && self.in_flight() == 1 && self.seat.may_begin() {
            self.flights[token as usize].doing = Some(Doing::BarrierFlush);
            self.flush_waiting.push(token);
        }
    }

    /// A barrier's data are written: now they are made to last.
    pub(super) fn end_barrier_write(&mut self, token: u32) {
        self.flights[token as usize].doing = Some(Doing::BarrierEnd);
        self.flush_waiting.push(token);
    }
}
