//! One ring and the disk behind it.
//!
//! The way of a request, in [`Queue::turn`]:
//!
//! 1. it is copied out of its slot, once ([`BackRing::consume`]);
//! 2. it is checked, from the copy ([`request::parse`]);
//! 3. its pages are found mapped, or their copies are collected ([`Grants::add`]);
//! 4. the data of all writes of this turn are copied in one batch;
//! 5. one submission, which owns the memory, goes to the disk ([`Storage`]);
//! 6. when it is done, the data of all reads of this turn are copied in one batch;
//! 7. the responses are written and shown ([`BackRing::publish`]), and the guest is notified if it asked to be.
//!
//! A queue has no thread and never waits: [`worker`](crate::worker) drives it, and a test can single-step it.

mod flight;
mod hold;
mod order;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hypervisor::memory::{IoList, Mapping};
use hypervisor::{CopyDirection, CopyOp, EventChannel, GrantStatus};
use ring::{BackRing, Overflow};
use xenstore_client::LogGate;

use crate::abi::{DIRECT_SEGMENTS, Protocol, Response, SECTOR, SEGMENT_SIZE, SEGMENTS_PER_PAGE, Segment, Slot, Status};
use crate::barrier::{Barriers, Seat};
use crate::counters::Counters;
use crate::grants::Grants;
use crate::health::Health;
use crate::inflight::{self, InFlightLog};
use crate::request::{self, Refusal, Shape, Transfer, Work};
use crate::storage::{Done, Storage};

use flight::{Doing, Due, Flight};

/// Requests taken in one turn. Enough to share the price of a system call; few enough that the guest can refill the
/// ring while we work on the rest of it.
const BATCH: u32 = 16;

/// Why a queue must stop.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The guest broke the ring.
    #[error("the frontend broke the ring: {0}")]
    Ring(#[from] Overflow),
    /// A flush failed: no write or flush of this disk will be answered any more.
    #[error(
        "flush failed: {0}; data written since the last flush may be lost. The disk is not written to again before it was checked"
    )]
    Flush(#[source] io::Error),
    /// The machine under us failed.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Requests taken from the ring.
    pub taken: u32,
    /// Responses given.
    pub answered: u32,
    /// Of those, to requests that made no sense.
    pub refused: u32,
}

impl Progress {
    /// Whether there was nothing to do.
    pub fn is_idle(self) -> bool {
        self == Self::default()
    }
}

/// What a queue is made of.
#[derive(Debug)]
pub struct Parts<S> {
    /// The mapped ring.
    pub ring: BackRing<Mapping>,
    /// Its layout.
    pub protocol: Protocol,
    /// The guest's pages.
    pub grants: Grants,
    /// The event channel.
    pub channel: Box<dyn EventChannel>,
    /// The disk.
    pub storage: S,
    /// What the disk can do.
    pub shape: Shape,
    /// Shared with the disk's other queues.
    pub health: Arc<Health>,
    /// Shared with the disk's other queues.
    pub barriers: Arc<Barriers>,
    /// An eventfd that is written to when another queue's flush has ended and this one's may begin, and for barriers.
    pub wake: Arc<OwnedFd>,
    /// Read by others.
    pub counters: Arc<Counters>,
    /// What is in flight, for who comes after us.
    pub log: Option<InFlightLog>,
}

/// A ring, its event channel, the guest's pages and the disk.
#[derive(Debug)]
pub struct Queue<S> {
    ring: BackRing<Mapping>,
    protocol: Protocol,
    grants: Grants,
    channel: Box<dyn EventChannel>,
    storage: S,
    shape: Shape,
    health: Arc<Health>,
    seat: Seat,
    wake: Arc<OwnedFd>,
    counters: Arc<Counters>,
    flights: Vec<Flight>,
    /// Places in `flights` that are free.
    free: Vec<u32>,
    /// Copies of this turn, and which flight each run of them belongs to.
    batch: Vec<CopyOp>,
    batched: Vec<(u32, Range<usize>)>,
    /// Flights that wait for a flush, and those that the flush under way serves.
    flush_waiting: Vec<u32>,
    flush_running: Vec<u32>,
    /// The barrier that was taken; nothing is taken after it.
    barrier: Option<u32>,
    /// Writes that the storage had no room for, and whether they are to wait for it.
    held: Vec<u32>,
    holds: bool,
    /// One of them was done.
    room: bool,
    /// Segments of the request at hand.
    segments: Vec<Segment>,
    /// Lists to be used again.
    lists: Vec<IoList>,
    in_flight_log: Option<InFlightLog>,
    log: LogGate,
}

impl<S: Storage> Queue<S> {
    /// Puts a queue together. The frontend may already have made requests.
    pub fn new(parts: Parts<S>) -> Self {
        let Parts { ring, protocol, grants, channel, storage, shape, health, barriers, wake, counters, log } = parts;
        let entries = ring.layout().entries();
        let most = shape.indirect.max(DIRECT_SEGMENTS);
        assert!(shape.indirect <= SEGMENTS_PER_PAGE, "indirect descriptors are read from one page");
        Self {
            ring,
            protocol,
            grants,
            channel,
            storage,
            shape,
            health,
            seat: barriers.join(&wake),
            wake,
            counters,
            flights: (0..entries).map(|_| Flight::default()).collect(),
            free: (0..entries).rev().collect(),
            batch: Vec::with_capacity(BATCH as usize * most),
            batched: Vec::with_capacity(entries as usize),
            flush_waiting: Vec::with_capacity(entries as usize),
            flush_running: Vec::with_capacity(entries as usize),
            barrier: None,
            held: Vec::new(),
            holds: true,
            room: false,
            segments: Vec::with_capacity(most),
            lists: (0..entries).map(|_| IoList::with_capacity(DIRECT_SEGMENTS)).collect(),
            in_flight_log: log,
            log: LogGate::default(),
        }
    }

    /// Requests that fit into the ring.
    pub fn slots(&self) -> u32 {
        self.ring.layout().entries()
    }

    /// Requests taken and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// The disk, for who drives the queue.
    pub fn storage(&mut self) -> &mut S {
        &mut self.storage
    }

    /// The event channel, for who drives the queue.
    pub fn channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// From now on this is what the disk can do. Requests in flight go on under the old terms.
    pub fn reshape(&mut self, shape: Shape) {
        assert!(shape.indirect <= self.shape.indirect, "lists were sized for less");
        self.shape = shape;
    }

    /// Puts another disk under the queue.
    ///
    /// # Panics
    /// When requests are in flight on the old one.
    pub fn change_disk(&mut self, storage: S, shape: Shape) {
        assert_eq!(self.in_flight(), 0, "the disk is changed under requests");
        self.storage = storage;
        self.reshape(shape);
    }

    /// Does what can be done now, without waiting.
    ///
    /// # Errors
    /// When the queue must stop; it then takes no more requests ([`drain`](Self::drain) finishes those in flight).
    pub fn turn(&mut self) -> Result<Progress, Broken> {
        let mut progress = Progress::default();
        self.finish(&mut progress)?;
        self.start(&mut progress)?;
        self.storage.submit().map_err(|source| Broken::Host { what: "io_uring", source })?;
        self.finish(&mut progress)?;
        self.show()?;
        Ok(progress)
    }

    /// Finishes what can be finished now and takes nothing new.
    ///
    /// # Errors
    /// As [`turn`](Self::turn).
    pub fn drain(&mut self) -> Result<Progress, Broken> {
        let mut progress = Progress::default();
        let finished = self.finish(&mut progress);
        self.advance_barrier();
        self.start_flush();
        self.storage.submit().map_err(|source| Broken::Host { what: "io_uring", source })?;
        self.show()?;
        finished.map(|()| progress)
    }

    /// Whether [`turn`](Self::turn) would find something to do.
    ///
    /// # Errors
    /// When the guest broke the ring.
    #[inline]
    pub fn has_work(&mut self) -> Result<bool, Broken> {
        Ok(self.storage.has_completions() || (self.can_take() && self.ring.pending()? > 0))
    }

    /// Asks the guest to notify us of its next request. True when there is work already, and sleeping would be wrong.
    ///
    /// # Errors
    /// When the guest broke the ring.
    pub fn rearm(&mut self) -> Result<bool, Broken> {
        Ok(self.ring.rearm()? > 0 && self.can_take() || self.can_flush())
    }

    /// Unmaps pages that have long not been used; to be called every ten seconds or so.
    pub fn next_period(&mut self) {
        self.grants.next_period();
    }

    /// Whether a request of any size could be carried out: otherwise it stays in the ring until others are done.
    #[inline]
    fn can_take(&self) -> bool {
        !self.seat.is_closed()
            && self.barrier.is_none()
            && !self.free.is_empty()
            && self.grants.free_pages() > self.reserve()
    }

    /// Pages of ours that the largest request there can be may need.
    #[inline]
    fn reserve(&self) -> usize {
        self.shape.indirect.max(DIRECT_SEGMENTS)
    }

    /// Takes requests and starts them.
    fn start(&mut self, progress: &mut Progress) -> Result<(), Broken> {
        let pending = self.ring.pending()?.min(BATCH);
        for _ in 0..pending {
            let mut slot = Slot::new(self.protocol);
            let index = self.ring.taken();
            if !self.can_take() || !self.ring.consume(slot.record()) {
                break;
            }
            progress.taken += 1;
            let mut due = Due::new(&slot);
            if let Some(log) = &mut self.in_flight_log {
                due.logged = Some(log.take(index, inflight::Request { id: due.id, operation: due.operation }));
            }
            if let Err((due, reason)) = self.start_one(&slot, due) {
                self.refuse(due, reason, progress);
            }
        }
        self.start_copied_writes(progress);
        self.advance_barrier();
        self.start_flush();
        Ok(())
    }

    fn start_one(&mut self, slot: &Slot, due: Due) -> Result<(), (Due, Refusal)> {
        let work = match request::parse(slot, &self.shape) {
            Ok(work) => work,
            Err(reason) => return Err((due, reason)),
        };
        // What stands behind a flush that failed must not reach the medium: a barrier may be among what is withheld, and
        // would be overtaken.
        if !work.is_read() && self.health.flush_failed() {
            due.withhold();
            return Ok(());
        }
        match work {
            Work::Flush => {
                let token = self.take_off(due, Doing::Flush, 0, 0);
                self.flush_waiting.push(token);
            }
            Work::Barrier => {
                let token = self.take_off(due, Doing::Barrier, 0, 0);
                self.begin_barrier(token);
            }
            Work::Discard { offset, len } => {
                let token = self.take_off(due, Doing::Discard, offset, len);
                self.storage.discard(offset, len, token);
            }
            Work::Erase { offset, len } => {
                let token = self.take_off(due, Doing::Erase, offset, len);
                self.storage.erase(offset, len, token);
            }
            Work::Direct { transfer, segments } => {
                self.segments.clear();
                self.segments.extend((0..segments).map(|index| slot.segment(index)));
                return self.start_transfer(slot.sector(), transfer, due);
            }
            Work::Indirect { transfer, segments } => {
                let mut page = [0; SEGMENTS_PER_PAGE * SEGMENT_SIZE];
                let descriptors = &mut page[..segments * SEGMENT_SIZE];
                if !self.grants.read_page(slot.indirect_page(0), descriptors) {
                    return Err((due, Refusal::Grant));
                }
                self.segments.clear();
                let (descriptors, _) = descriptors.as_chunks();
                self.segments.extend(descriptors.iter().map(Segment::decode));
                return self.start_transfer(slot.sector(), transfer, due);
            }
        }
        Ok(())
    }

    /// Starts a read or write of `self.segments`.
    fn start_transfer(&mut self, sector: u64, transfer: Transfer, due: Due) -> Result<(), (Due, Refusal)> {
        let len = match self.check_segments(sector) {
            Ok(len) => len,
            Err(reason) => return Err((due, reason)),
        };
        let (doing, direction) = match transfer {
            Transfer::Read => (Doing::Read, CopyDirection::ToGuest),
            Transfer::Write => (Doing::Write, CopyDirection::FromGuest),
            Transfer::FlushThenWrite => (Doing::FlushThenWrite, CopyDirection::FromGuest),
            Transfer::Barrier => (Doing::Barrier, CopyDirection::FromGuest),
        };
        let offset = sector * SECTOR;
        let token = self.take_off(due, doing, offset, len);
        if doing == Doing::Barrier {
            self.begin_barrier(token);
        }
        let mut memory = self.lists.pop().unwrap_or_default();
        let flight = &mut self.flights[token as usize];
        for segment in &self.segments {
            // Checked by check_segments, from the same private copy.
            self.grants.add(segment.bytes(), direction, &mut memory, &mut flight.pages, &mut flight.copies);
        }
        if matches!(doing, Doing::Write | Doing::FlushThenWrite) && !flight.copies.is_empty() && self.holds {
            flight.segments.extend_from_slice(&self.segments);
        }
        match doing {
            Doing::Read => self.storage.read(offset, memory, token),
            Doing::Write if flight.copies.is_empty() => self.storage.write(offset, memory, token),
            _ => {
                flight.memory = memory;
                self.batch_copies(token);
            }
        }
        Ok(())
    }

    /// Bytes of all segments together, if each is sound and they all fit on the disk.
    #[inline]
    fn check_segments(&self, sector: u64) -> Result<u64, Refusal> {
        let mut len = 0;
        for segment in &self.segments {
            len += u64::from(request::segment_bytes(segment, &self.shape)?.1);
        }
        request::check_range(sector, len / SECTOR, &self.shape)?;
        Ok(len)
    }

    /// Puts a flight's copies into this turn's batch.
    fn batch_copies(&mut self, token: u32) {
        let first = self.batch.len();
        self.batch.append(&mut self.flights[token as usize].copies);
        self.batched.push((token, first..self.batch.len()));
    }

    /// Carries out the batch and hands each flight its outcome.
    fn run_batch(&mut self, mut each: impl FnMut(&mut Self, u32, bool)) {
        self.grants.copy(&mut self.batch);
        let mut batched = std::mem::take(&mut self.batched);
        for (token, range) in batched.drain(..) {
            let okay = self.batch[range].iter().all(|copy| copy.status == GrantStatus::Okay);
            each(self, token, okay);
        }
        self.batch.clear();
        self.batched = batched;
    }

    /// The data of the writes of this turn are copied from the guest, and the writes, or the flushes before them,
    /// begin.
    fn start_copied_writes(&mut self, progress: &mut Progress) {
        if self.batched.is_empty() {
            return;
        }
        self.run_batch(|queue, token, okay| {
            let flight = &mut queue.flights[token as usize];
            match flight.doing {
                _ if !okay => {
                    let memory = std::mem::take(&mut flight.memory);
                    if let Some(due) = queue.land(token, memory) {
                        queue.refuse(due, Refusal::Grant, progress);
                    }
                }
                Some(Doing::FlushThenWrite) => queue.flush_waiting.push(token),
                // Its data are safe with us; it begins when everything before it is done.
                Some(Doing::Barrier) => {}
                _ => {
                    let memory = std::mem::take(&mut flight.memory);
                    queue.storage.write(flight.offset, memory, token);
                }
            }
        });
    }

    /// Ends a request without an answer.
    fn withhold(&mut self, token: u32) {
        let memory = std::mem::take(&mut self.flights[token as usize].memory);
        if let Some(due) = self.land(token, memory) {
            due.withhold();
        }
    }

    /// Answers what the disk has done.
    fn finish(&mut self, progress: &mut Progress) -> Result<(), Broken> {
        let mut outcome = Ok(());
        while let Some(done) = self.storage.next() {
            if let Err(broken) = self.finish_one(done, progress) {
                outcome = Err(broken);
            }
        }
        if !self.batched.is_empty() {
            self.run_batch(|queue, token, okay| {
                let (doing, len) = (queue.flights[token as usize].doing, queue.flights[token as usize].len);
                let Some(due) = queue.land(token, IoList::default()) else { return };
                if okay {
                    queue.succeed(doing, len, due, progress);
                } else {
                    queue.refuse(due, Refusal::Grant, progress);
                }
            });
        }
        outcome
    }

    fn finish_one(&mut self, done: Done, progress: &mut Progress) -> Result<(), Broken> {
        let Done { token, memory, result } = done;
        let flight = &mut self.flights[token as usize];
        let (doing, offset, len, waited) = (flight.doing, flight.offset, flight.len, flight.waited);
        match (doing, result) {
            (Some(Doing::Read), Ok(())) if !flight.copies.is_empty() => {
                self.keep_list(memory);
                self.batch_copies(token);
                return Ok(());
            }
            (
                Some(Doing::Flush | Doing::FlushThenWrite | Doing::BarrierFlush | Doing::BarrierEnd | Doing::EraseEnd),
                result,
            ) => {
                return self.finish_flush(result, progress);
            }
            (Some(Doing::BarrierWrite), Ok(())) => {
                self.room |= waited;
                self.keep_list(memory);
                self.end_barrier_write(token);
            }
            (Some(Doing::Erase), Ok(())) => {
                self.flights[token as usize].doing = Some(Doing::EraseZeros);
                self.storage.discard(offset, len, token);
            }
            (Some(Doing::EraseZeros), Ok(())) => {
                self.flights[token as usize].doing = Some(Doing::EraseEnd);
                self.flush_waiting.push(token);
            }
            (Some(Doing::Write | Doing::BarrierWrite), Err(error)) if self.is_to_wait(&error) => {
                self.hold(token, memory);
            }
            (doing, result) => {
                self.room |= waited && result.is_ok();
                let Some(due) = self.land(token, memory) else { return Ok(()) };
                match result {
                    Ok(()) => self.succeed(doing, len, due, progress),
                    Err(error) => self.fail(doing, offset, &error, due, progress),
                }
            }
        }
        Ok(())
    }

    fn succeed(&mut self, doing: Option<Doing>, len: u64, due: Due, progress: &mut Progress) {
        let counters = &self.counters;
        match doing {
            Some(Doing::Read) => {
                counters.reads.add(1);
                counters.bytes_read.add(len);
            }
            // A promise that a later flush could not keep.
            _ if self.health.flush_failed() => return due.withhold(),
            Some(Doing::Write | Doing::FlushThenWrite | Doing::BarrierEnd) => {
                counters.writes.add(1);
                counters.bytes_written.add(len);
            }
            Some(Doing::Flush) => counters.flushes.add(1),
            Some(Doing::Discard | Doing::EraseEnd) => counters.discards.add(1),
            doing => debug_assert!(false, "{doing:?} does not end a request"),
        }
        self.answer(due, Status::Okay, progress);
    }

    fn fail(&mut self, doing: Option<Doing>, offset: u64, error: &io::Error, due: Due, progress: &mut Progress) {
        self.counters.io_errors.add(1);
        if matches!(doing, Some(Doing::Discard | Doing::Erase)) && error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            return self.answer(due, Status::NotSupported, progress);
        }
        // A guest can go on asking for what the disk cannot give; the counters have the rest.
        if let Some(unsaid) = self.log.admit() {
            tracing::warn!(%error, offset, ?doing, unsaid, "request failed");
        }
        self.answer(due, Status::Error, progress);
    }

    /// Finds a place for a request whose answer is due.
    #[inline]
    fn take_off(&mut self, due: Due, doing: Doing, offset: u64, len: u64) -> u32 {
        let Some(token) = self.free.pop() else { panic!("a request was taken without a place for it") };
        let flight = &mut self.flights[token as usize];
        flight.due = Some(due);
        flight.doing = Some(doing);
        flight.offset = offset;
        flight.len = len;
        token
    }

    /// Frees a request's place, pages and memory; what is left is the duty to answer.
    #[inline]
    fn land(&mut self, token: u32, memory: IoList) -> Option<Due> {
        self.keep_list(memory);
        let flight = &mut self.flights[token as usize];
        flight.copies.clear();
        flight.segments.clear();
        (flight.written, flight.waited) = (0, false);
        flight.doing = None;
        self.grants.give_back(&mut flight.pages);
        let due = flight.due.take();
        if due.is_some() {
            self.free.push(token);
            if self.barrier == Some(token) {
                self.barrier = None;
                self.seat.open();
            }
        }
        due
    }

    #[inline]
    fn keep_list(&mut self, mut memory: IoList) {
        if self.lists.len() < self.flights.len() {
            memory.clear();
            self.lists.push(memory);
        }
    }

    fn refuse(&mut self, due: Due, reason: Refusal, progress: &mut Progress) {
        self.counters.refuse(reason);
        progress.refused += 1;
        tracing::debug!(id = due.id, operation = due.operation, %reason, "request refused");
        self.answer(due, reason.status(), progress);
    }

    #[inline]
    fn answer(&mut self, due: Due, status: Status, progress: &mut Progress) {
        let logged = due.logged;
        let (id, operation) = due.spend();
        if let (Some(log), Some(place)) = (&mut self.in_flight_log, logged) {
            log.answer(place, self.ring.answered());
        }
        self.ring.respond(Response::new(self.protocol, id, operation, status).record());
        progress.answered += 1;
    }

    /// Shows the answers to the guest and wakes it if it asked to be.
    fn show(&mut self) -> Result<(), Broken> {
        let notify = self.ring.publish();
        if let Some(log) = &mut self.in_flight_log {
            log.published();
        }
        if notify {
            self.counters.notifications.add(1);
            self.channel.notify().map_err(|source| Broken::Host { what: "event channel", source })?;
        }
        Ok(())
    }
}

impl<S> Drop for Queue<S> {
    /// Requests still in flight are the guest's loss only when the whole device goes; say so once, not per request.
    fn drop(&mut self) {
        // Nobody will see how it ends; the disk's other queues must not wait for it.
        if !self.flush_running.is_empty() {
            self.health.end(false);
        }
        let left: Vec<_> = self.flights.iter_mut().filter_map(|flight| flight.due.take()).collect();
        if !left.is_empty() {
            tracing::warn!(requests = left.len(), "queue closed with requests in flight");
            for due in left {
                due.spend();
            }
        }
    }
}
