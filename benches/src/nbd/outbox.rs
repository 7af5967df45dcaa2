//! What a connection has in flight, and the replies that wait to be sent.
//!
//! Room is reserved before a request goes to the disk and given back when its reply is on the wire, so the bound holds for
//! clients that do not read as well as for disks that do not finish.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Most replies sent with one system call; two buffers each, far below IOV_MAX.
const BATCH: usize = 64;

/// How much one connection may have in flight before the server stops reading from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests: usize,
    /// Payload bytes of reads and writes together. One request alone may exceed it.
    pub payload: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 128, payload: 64 << 20 }
    }
}

/// Something for the thread that writes.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// Send this reply and give back the room.
    Reply { cookie: u64, error: u32, data: Vec<u8>, payload: u64 },
    /// Have the disk flush, and answer with its result. From the writer's thread, as the disk's own is in the middle of
    /// a completion and may hold locks that `submit` wants.
    Flush { cookie: u64 },
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Outgoing>,
    requests: usize,
    payload: u64,
    /// No further requests will come; end when nothing is in flight.
    closing: bool,
    /// The client is gone; replies are thrown away.
    broken: bool,
}

#[derive(Debug)]
pub(super) struct Outbox {
    limits: Limits,
    state: Mutex<State>,
    room: Condvar,
    work: Condvar,
}

impl Outbox {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), room: Condvar::new(), work: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room for one more request. False if the client is gone.
    pub(super) fn reserve(&self, payload: u64) -> bool {
        let full = |state: &mut State| {
            let fits = state.requests < self.limits.requests && state.payload + payload <= self.limits.payload;
            !state.broken && !fits && state.requests > 0
        };
        let mut state = self.room.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        state.requests += 1;
        state.payload += payload;
        !state.broken
    }

    /// Gives back the room of `requests` that were answered, or never will be.
    pub(super) fn release(&self, requests: usize, payload: u64) {
        let mut state = self.state();
        state.requests -= requests;
        state.payload -= payload;
        self.room.notify_one();
        if state.closing && state.requests == 0 {
            self.work.notify_one();
        }
    }

    pub(super) fn push(&self, outgoing: Outgoing) {
        let mut state = self.state();
        if !state.broken {
            state.queue.push_back(outgoing);
            self.work.notify_one();
        }
    }

    /// Waits for something to do. False once everything is done or the client is gone.
    pub(super) fn take(&self, batch: &mut Vec<Outgoing>) -> bool {
        let idle =
            |state: &mut State| state.queue.is_empty() && !state.broken && !(state.closing && state.requests == 0);
        let mut state = self.work.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
        let count = state.queue.len().min(BATCH);
        batch.extend(state.queue.drain(..count));
        count > 0 && !state.broken
    }

    /// No further requests will come.
    pub(super) fn close(&self) {
        self.state().closing = true;
        self.work.notify_all();
    }

    /// The client is gone, or has to go.
    pub(super) fn break_off(&self) {
        let mut state = self.state();
        state.broken = true;
        state.queue.clear();
        self.room.notify_all();
        self.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    fn reply(cookie: u64, payload: u64) -> Outgoing {
        Outgoing::Reply { cookie, error: 0, data: Vec::new(), payload }
    }

    #[test]
    fn room_is_bounded_and_comes_back() {
        let outbox = Arc::new(Outbox::new(Limits { requests: 2, payload: 100 }));
        assert!(outbox.reserve(1000), "alone, anything fits");
        let other = Arc::clone(&outbox);
        let waiting = thread::spawn(move || other.reserve(60) && other.reserve(40));
        outbox.push(reply(1, 1000));
        let mut batch = Vec::new();
        assert!(outbox.take(&mut batch));
        assert_eq!(batch.len(), 1);
        outbox.release(1, 1000);
        assert!(waiting.join().unwrap());
        let other = Arc::clone(&outbox);
        let waiting = thread::spawn(move || other.reserve(0));
        outbox.break_off();
        assert!(!waiting.join().unwrap(), "who waits for room learns that the client is gone");
    }

    #[test]
    fn closing_waits_for_what_is_in_flight() {
        let outbox = Arc::new(Outbox::new(Limits::default()));
        assert!(outbox.reserve(0) && outbox.reserve(7));
        outbox.close();
        let other = Arc::clone(&outbox);
        let writer = thread::spawn(move || {
            let (mut batch, mut sent) = (Vec::new(), 0);
            while other.take(&mut batch) {
                for outgoing in batch.drain(..) {
                    let Outgoing::Reply { payload, .. } = outgoing else { panic!("no flush was asked for") };
                    other.release(1, payload);
                    sent += 1;
                }
            }
            sent
        });
        outbox.push(reply(1, 7));
        outbox.push(reply(2, 0));
        assert_eq!(writer.join().unwrap(), 2);
    }

    #[test]
    fn nothing_is_kept_for_a_client_that_is_gone() {
        let outbox = Outbox::new(Limits::default());
        assert!(outbox.reserve(0));
        outbox.push(reply(1, 0));
        outbox.break_off();
        outbox.push(reply(2, 0));
        let mut batch = Vec::new();
        assert!(!outbox.take(&mut batch) && batch.is_empty());
    }
}
