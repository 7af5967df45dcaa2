//! What the guest sends.

use std::sync::Arc;

use hypervisor::memory::Mapping;
use hypervisor::{DomId, GrantAccess, GrantRef, Guest, PAGE_SIZE, Shared};
use ring::{FrontRing, Layout};

use super::{Checksum, Error, Meta, broken, share_ring, unshare};
use crate::abi::{Extra, MAX_PACKET, RING_SLOTS, TX_SLOT, TxRequest, TxResponse, status, tx_flag};
use crate::multicast::Mac;

/// Pages of the longest packet.
const PAGES_MAX: usize = MAX_PACKET.div_ceil(PAGE_SIZE);

/// What became of packets' slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Slots that were sent.
    pub okay: u64,
    /// Slots that were refused.
    pub error: u64,
    /// Slots for which there was no room.
    pub dropped: u64,
}

/// Pages of the pool, and slots of the ring, set aside for one packet. It has to be [sent](Tx::send) or
/// [given back](Tx::give_back); else they are lost to the queue.
#[derive(Debug)]
#[must_use = "its pages are lost to the queue until it is sent or given back"]
pub struct Room {
    pages: [u16; PAGES_MAX],
    count: usize,
}

impl Room {
    /// Where in the [pool](Tx::pool) the bytes go: offsets of pages, in order.
    pub fn offsets(&self) -> impl Iterator<Item = usize> + '_ {
        self.pages[..self.count].iter().map(|&page| usize::from(page) * PAGE_SIZE)
    }

    /// Bytes that fit.
    pub fn len(&self) -> usize {
        self.count * PAGE_SIZE
    }

    /// There is always a page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Slots it may need: one a page, and one that says how the packet is to be cut.
    fn slots(&self) -> u32 {
        // At most 16 pages.
        self.count as u32 + 1
    }
}

/// The transmit ring, with a page for each slot.
#[derive(Debug)]
pub struct Tx {
    ring: FrontRing<Arc<Mapping>>,
    ring_memory: Arc<Mapping>,
    ring_ref: GrantRef,
    pool: Arc<Mapping>,
    refs: Vec<GrantRef>,
    /// Pages that nobody uses. A page's number is also its slot's id.
    free: Vec<u16>,
    /// Pages the backend has.
    busy: Vec<bool>,
    /// Slots set aside.
    reserved: u32,
    sent: Sent,
}

impl Tx {
    pub(super) fn new(guest: &dyn Guest, backend: DomId) -> Result<Self, Error> {
        let (ring_memory, ring_ref) = share_ring(guest, backend)?;
        // Linux' netfront grants what it sends read-only.
        let Shared { memory, refs } = guest.share(backend, RING_SLOTS as usize, GrantAccess::ReadOnly)?;
        Ok(Self {
            ring: FrontRing::init(Arc::clone(&ring_memory), Layout::new(TX_SLOT, 1)),
            ring_memory,
            ring_ref,
            pool: Arc::new(memory),
            refs,
            free: (0..RING_SLOTS as u16).rev().collect(),
            busy: vec![false; RING_SLOTS as usize],
            reserved: 0,
            sent: Sent::default(),
        })
    }

    /// Sets pages aside for a packet of at most `bytes` bytes; none when the ring is too full now.
    ///
    /// # Panics
    /// When `bytes` is more than a packet can have.
    #[inline]
    pub fn room(&mut self, bytes: usize) -> Option<Room> {
        assert!(bytes <= MAX_PACKET, "a packet of {bytes} bytes");
        let count = bytes.div_ceil(PAGE_SIZE).max(1);
        let mut room = Room { pages: [0; PAGES_MAX], count };
        if self.ring.free() < self.reserved + room.slots() || self.free.len() < count {
            return None;
        }
        self.reserved += room.slots();
        let rest = self.free.len() - count;
        // The pages that were used last, which are still in the cache, are used next.
        for (page, free) in room.pages.iter_mut().zip(self.free.drain(rest..).rev()) {
            *page = free;
        }
        Some(room)
    }

    /// Gives a room back unused.
    pub fn give_back(&mut self, room: Room) {
        self.reserved -= room.slots();
        self.free.extend(room.pages[..room.count].iter().rev());
    }

    /// Puts the `len` first bytes of a room into the ring as one packet; the backend sees it after
    /// [`publish`](super::Queue::publish). Pages that are not needed are given back.
    ///
    /// # Panics
    /// When the room has no `len` bytes, or `len` is 0.
    #[inline]
    pub fn send(&mut self, room: Room, len: usize, meta: &Meta) {
        assert!(len > 0 && len <= room.len() && len <= MAX_PACKET, "{len} bytes from a room of {}", room.len());
        self.reserved -= room.slots();
        let count = len.div_ceil(PAGE_SIZE);
        self.free.extend(room.pages[count..room.count].iter().rev());
        let mut flags = match meta.checksum {
            Checksum::Unchecked => 0,
            Checksum::Validated => tx_flag::DATA_VALIDATED,
            Checksum::Blank => tx_flag::CSUM_BLANK | tx_flag::DATA_VALIDATED,
        };
        if meta.gso.is_some() {
            flags |= tx_flag::EXTRA_INFO;
        }
        for (index, &page) in room.pages[..count].iter().enumerate() {
            let more = if index + 1 < count { tx_flag::MORE_DATA } else { 0 };
            // The first slot's size is that of the whole packet.
            let size = if index == 0 { len } else { PAGE_SIZE.min(len - index * PAGE_SIZE) };
            let request = TxRequest {
                gref: self.refs[usize::from(page)],
                offset: 0,
                flags: flags | more,
                id: page,
                size: size as u16,
            };
            self.ring.request(&request.encode());
            self.busy[usize::from(page)] = true;
            if let Some((kind, size)) = meta.gso.filter(|_| index == 0) {
                self.ring.request(&Extra::Gso { size, kind }.encode(false));
            }
            flags = 0;
        }
    }

    /// Copies `pieces` into the pool and puts them into the ring as one packet. False when the ring is too full now.
    ///
    /// # Panics
    /// When they have no bytes, or more than a packet can have.
    pub fn send_bytes(&mut self, pieces: &[&[u8]], meta: &Meta) -> bool {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        let Some(room) = self.room(len) else { return false };
        let mut at = 0;
        for piece in pieces {
            let mut piece = *piece;
            while !piece.is_empty() {
                let page = usize::from(room.pages[at / PAGE_SIZE]);
                let (now, rest) = piece.split_at(piece.len().min(PAGE_SIZE - at % PAGE_SIZE));
                self.pool.copy_in(page * PAGE_SIZE + at % PAGE_SIZE, now);
                at += now.len();
                piece = rest;
            }
        }
        self.send(room, len, meta);
        true
    }

    /// Names a multicast group, or takes it back: a packet that is not sent. False when the ring is too full now.
    pub fn send_group(&mut self, group: Mac, wanted: bool) -> bool {
        let Some(room) = self.room(0) else { return false };
        self.reserved -= room.slots();
        let page = room.pages[0];
        let gref = self.refs[usize::from(page)];
        let request = TxRequest { gref, offset: 0, flags: tx_flag::EXTRA_INFO, id: page, size: 0 };
        self.ring.request(&request.encode());
        self.busy[usize::from(page)] = true;
        let extra = if wanted { Extra::McastAdd(group) } else { Extra::McastDel(group) };
        self.ring.request(&extra.encode(false));
        true
    }

    /// Takes what the backend has answered; the pages can be used again. True when there was something.
    ///
    /// # Errors
    /// When the backend broke the ring, or answered what was not asked.
    #[inline]
    pub fn reap(&mut self) -> Result<bool, Error> {
        let mut any = false;
        while let Some(response) = self.raw_response()? {
            any = true;
            match response.status {
                // The slot carried an extra; what stands in its id means nothing.
                status::NULL => continue,
                status::OKAY => self.sent.okay += 1,
                status::DROPPED => self.sent.dropped += 1,
                _ => self.sent.error += 1,
            }
            let busy = self.busy.get_mut(usize::from(response.id)).filter(|busy| **busy);
            let Some(busy) = busy else {
                return Err(Error::Backend(format!("the backend answered slot {}, which it has not", response.id)));
            };
            *busy = false;
            self.free.push(response.id);
        }
        Ok(any)
    }

    /// What became of what was sent, as far as the backend has said.
    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// Pages the backend has.
    pub fn outstanding(&self) -> usize {
        self.refs.len() - self.free.len()
    }

    /// Slots that can be filled now.
    pub fn free(&self) -> u32 {
        self.ring.free() - self.reserved
    }

    /// The pages that packets are made of: page `n` starts at byte `n * 4096`.
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
    /// [`raw_response`](Self::raw_response).
    ///
    /// # Panics
    /// When the ring is full.
    pub fn raw_request(&mut self, slot: &[u8]) {
        self.ring.request(slot);
    }

    /// Takes the next answer as it stands in the ring.
    ///
    /// # Errors
    /// When the backend broke the ring.
    #[inline]
    pub fn raw_response(&mut self) -> Result<Option<TxResponse>, Error> {
        let mut slot = [0; TX_SLOT];
        if !self.ring.consume(&mut slot) && (self.ring.pending().map_err(broken)? == 0 || !self.ring.consume(&mut slot))
        {
            return Ok(None);
        }
        Ok(Some(TxResponse::decode(&slot)))
    }

    /// Shows the packets to the backend. True when it asked to be notified.
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
