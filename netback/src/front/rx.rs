//! What the guest receives.

use std::collections::VecDeque;
use std::sync::Arc;

use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantAccess, GrantRef, Guest, PAGE_SIZE, Shared};
use ring::{FrontRing, Layout};

use super::{Checksum, Error, Meta, broken, share_ring, unshare};
use crate::abi::{Extra, RING_SLOTS, RX_SLOT, RxRequest, RxResponse, rx_flag};

/// A piece of a received frame, in the [pool](Rx::pool).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, in bytes.
    pub offset: usize,
    /// Its bytes.
    pub len: usize,
    page: u16,
}

/// A received frame. Its pages stay the guest's until they are [recycled](Rx::recycle). Use one for many frames.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    pieces: Vec<Piece>,
    len: usize,
    meta: Meta,
}

impl Frame {
    /// Its bytes, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none: nothing was received.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What goes with it.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }
}

/// The receive ring, with a page for each slot.
#[derive(Debug)]
pub struct Rx {
    ring: FrontRing<Arc<Mapping>>,
    ring_memory: Arc<Mapping>,
    ring_ref: GrantRef,
    pool: Arc<Mapping>,
    refs: Vec<GrantRef>,
    /// Pages the backend has, in the order of its answers: response i answers request i.
    posted: VecDeque<u16>,
    /// Pages that are not in the ring.
    free: Vec<u16>,
    /// Requests made so far.
    produced: u32,
    /// Responses that said that the packet could not be delivered.
    errors: u64,
}

impl Rx {
    pub(super) fn new(guest: &dyn Guest, backend: DomId) -> Result<Self, Error> {
        let (ring_memory, ring_ref) = share_ring(guest, backend)?;
        let Shared { memory, refs } = guest.share(backend, RING_SLOTS as usize, GrantAccess::ReadWrite)?;
        Ok(Self {
            ring: FrontRing::init(Arc::clone(&ring_memory), Layout::new(RX_SLOT, 1)),
            ring_memory,
            ring_ref,
            pool: Arc::new(memory),
            refs,
            posted: VecDeque::with_capacity(RING_SLOTS as usize),
            free: (0..RING_SLOTS as u16).rev().collect(),
            produced: 0,
            errors: 0,
        })
    }

    /// Offers up to `count` pages that are free to the backend; it sees them after
    /// [`publish`](super::Queue::publish). Returns how many were offered.
    #[inline]
    pub fn refill(&mut self, count: usize) -> usize {
        let count = count.min(self.free.len()).min(self.ring.free() as usize);
        for _ in 0..count {
            let Some(page) = self.free.pop() else { break };
            // As Linux: the id is the number of the slot.
            let id = (self.produced % RING_SLOTS) as u16;
            self.ring.request(&RxRequest { id, gref: self.refs[usize::from(page)] }.encode());
            self.produced = self.produced.wrapping_add(1);
            self.posted.push_back(page);
        }
        count
    }

    /// Takes the next frame; false, and an empty frame, when there is none. What could not be delivered is counted and
    /// passed over.
    ///
    /// # Errors
    /// When the backend broke the ring, or a packet in it.
    #[inline]
    pub fn receive(&mut self, frame: &mut Frame) -> Result<bool, Error> {
        loop {
            frame.pieces.clear();
            frame.len = 0;
            frame.meta = Meta::default();
            let Some((first, page)) = self.next()? else { return Ok(false) };
            let first = RxResponse::decode(&first);
            frame.meta.checksum = if first.flags & rx_flag::CSUM_BLANK != 0 {
                Checksum::Blank
            } else if first.flags & rx_flag::DATA_VALIDATED != 0 {
                Checksum::Validated
            } else {
                Checksum::Unchecked
            };
            let mut more_extras = first.flags & rx_flag::EXTRA_INFO != 0;
            while more_extras {
                let (extra, page) = self.next()?.ok_or_else(|| bad("an extra is missing"))?;
                // The page of an extra's slot was not used.
                self.free.push(page);
                let (extra, more) = Extra::decode(&extra);
                match extra.map_err(|error| bad(&error.to_string()))? {
                    Extra::Gso { size, kind } if size > 0 => frame.meta.gso = Some((kind, size)),
                    hash @ Extra::Hash { .. } => frame.meta.hash = Some(hash),
                    Extra::Xdp { headroom } => frame.meta.headroom = Some(headroom),
                    other => return Err(bad(&format!("{other:?}"))),
                }
                more_extras = more;
            }
            // Linux' netfront looks for the data there, whatever the response says.
            let first_offset = frame.meta.headroom.unwrap_or(first.offset);
            let mut good = self.take_piece(frame, first, first_offset, page)?;
            let mut more = first.flags & rx_flag::MORE_DATA != 0;
            while more {
                let (slot, page) = self.next()?.ok_or_else(|| bad("a packet ends in the middle"))?;
                let response = RxResponse::decode(&slot);
                good &= self.take_piece(frame, response, response.offset, page)?;
                more = response.flags & rx_flag::MORE_DATA != 0;
            }
            if good {
                return Ok(true);
            }
            self.errors += 1;
            self.recycle(frame);
        }
    }

    /// The next response, and the page of its slot.
    #[inline]
    fn next(&mut self) -> Result<Option<([u8; RX_SLOT], u16)>, Error> {
        let mut slot = [0; RX_SLOT];
        if !self.raw_slot(&mut slot)? {
            return Ok(None);
        }
        let page = self.posted.pop_front().ok_or_else(|| bad("a response without a request"))?;
        Ok(Some((slot, page)))
    }

    /// Adds a response's bytes to the frame. False when it says that there are none.
    #[inline]
    fn take_piece(&mut self, frame: &mut Frame, response: RxResponse, offset: u16, page: u16) -> Result<bool, Error> {
        let Ok(len) = usize::try_from(response.status) else {
            self.free.push(page);
            return Ok(false);
        };
        let offset = usize::from(offset);
        if offset + len > PAGE_SIZE {
            return Err(bad(&format!("{len} bytes at {offset} of a page")));
        }
        frame.pieces.push(Piece { offset: usize::from(page) * PAGE_SIZE + offset, len, page });
        frame.len += len;
        Ok(true)
    }

    /// Copies a frame out. `to` is as long as the frame afterwards.
    pub fn copy_out(&self, frame: &Frame, to: &mut Vec<u8>) {
        to.resize(frame.len, 0);
        let mut at = 0;
        for piece in &frame.pieces {
            self.pool.copy_out(piece.offset, &mut to[at..at + piece.len]);
            at += piece.len;
        }
    }

    /// Takes a frame's pages back, to be offered again.
    pub fn recycle(&mut self, frame: &mut Frame) {
        self.free.extend(frame.pieces.drain(..).map(|piece| piece.page));
        frame.len = 0;
    }

    /// Takes the next frame into `to`, and its pages back.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn receive_bytes(&mut self, to: &mut Vec<u8>) -> Result<Option<Meta>, Error> {
        let mut frame = Frame::default();
        if !self.receive(&mut frame)? {
            return Ok(None);
        }
        self.copy_out(&frame, to);
        self.recycle(&mut frame);
        Ok(Some(frame.meta))
    }

    /// Packets that could not be delivered.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Pages the backend has.
    pub fn posted(&self) -> usize {
        self.posted.len()
    }

    /// Pages that could be offered.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The pages that frames come in.
    pub fn pool(&self) -> &Arc<Mapping> {
        &self.pool
    }

    /// The pool's grants, a page each.
    pub fn refs(&self) -> &[GrantRef] {
        &self.refs
    }

    /// The ring's page, for guests that misbehave.
    pub fn ring_memory(&self) -> &Mapping {
        &self.ring_memory
    }

    /// The ring's grant.
    pub fn ring_ref(&self) -> GrantRef {
        self.ring_ref
    }

    /// Puts any bytes into the ring, for guests that misbehave. Answers must be taken with
    /// [`raw_slot`](Self::raw_slot).
    ///
    /// # Panics
    /// When the ring is full.
    pub fn raw_request(&mut self, slot: &[u8]) {
        self.ring.request(slot);
    }

    /// Takes the next slot as it stands in the ring. False when there is none.
    ///
    /// # Errors
    /// When the backend broke the ring.
    #[inline]
    pub fn raw_slot(&mut self, slot: &mut [u8; RX_SLOT]) -> Result<bool, Error> {
        Ok(self.ring.consume(slot) || (self.ring.pending().map_err(broken)? > 0 && self.ring.consume(slot)))
    }

    /// Shows the requests to the backend. True when it asked to be notified.
    #[must_use = "the backend may be waiting for a notification"]
    pub(super) fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    pub(super) fn has_response(&mut self) -> Result<bool, Error> {
        Ok(self.ring.pending().map_err(broken)? > 0)
    }

    pub(super) fn rearm(&mut self) -> Result<bool, Error> {
        Ok(self.ring.rearm().map_err(broken)? > 0)
    }

    pub(super) fn release(self, guest: &dyn Guest) -> Result<(), Error> {
        let Self { ring, ring_memory, ring_ref, pool, refs, .. } = self;
        drop(ring);
        unshare(guest, ring_memory, vec![ring_ref])?;
        unshare(guest, pool, refs)
    }
}

fn bad(what: &str) -> Error {
    Error::Backend(format!("the backend sent a bad packet: {what}"))
}
