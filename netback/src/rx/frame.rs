//! A frame between the tap and the guest's pages: what it is, and what has to be done to it for this guest.

use std::sync::atomic::Ordering;
use std::time::Instant;

use hypervisor::PAGE_SIZE;
use hypervisor::memory::Mapping;

use super::{ROOM, Rx};
use crate::abi::{GsoType, MAX_PACKET, rx_flag};
use crate::hash::{Algorithm, PacketHash};
use crate::negotiate::Gso;
use crate::packet::{self, ETHERNET, HEADERS_MAX, Network};
use crate::segment::Segments;
use crate::vnet::{Offload, Partial};

/// A frame of ours, ready for the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    /// Where it is in the arena, without its vnet header.
    pub(super) at: usize,
    pub(super) len: usize,
    /// Of its first slot.
    pub(super) flags: u16,
    pub(super) gso: Option<(GsoType, u16)>,
    /// How the guest is told of the GSO.
    pub(super) how: Gso,
    pub(super) hash: Option<PacketHash>,
    pub(super) headroom: u16,
    /// When it was read.
    pub(super) since: Instant,
}

impl Frame {
    pub(super) fn room(&self) -> usize {
        PAGE_SIZE - usize::from(self.headroom)
    }

    pub(super) fn data_slots(&self) -> usize {
        self.len.div_ceil(self.room())
    }

    /// Slots before or after the first that carry no data.
    pub(super) fn other_slots(&self) -> usize {
        usize::from(self.gso.is_some()) + usize::from(self.hash.is_some()) + usize::from(self.headroom > 0)
    }

    pub(super) fn slots(&self) -> usize {
        self.data_slots() + self.other_slots()
    }
}

/// Who read a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// This queue, from the tap.
    Tap,
    /// Another queue, for this one.
    Post,
}

impl Rx {
    pub(super) fn next_segment(&mut self, at: usize, now: Instant) -> Option<Frame> {
        let segments = self.segments.as_mut()?;
        let Some(len) = segments.next(&self.arena, at) else {
            self.segments = None;
            return None;
        };
        let headroom = self.headroom.load(Ordering::Relaxed);
        let frame = Frame {
            at,
            len,
            flags: rx_flag::DATA_VALIDATED,
            gso: None,
            how: Gso::No,
            hash: segments.hash(),
            headroom,
            since: now,
        };
        if !self.receives.sg && frame.data_slots() > 1 {
            self.segments = None;
            self.counters.rx_dropped.add(1);
            return None;
        }
        Some(frame)
    }

    /// Looks at what was read to `at`; none where it is not for the guest, or for another of its queues.
    pub(super) fn examine(&mut self, at: usize, read: usize, origin: Origin, now: Instant) -> Option<Frame> {
        let len = read.saturating_sub(Offload::SIZE);
        if len < ETHERNET || read >= ROOM {
            self.counters.rx_dropped.add(1);
            return None;
        }
        let at = at + Offload::SIZE;
        let mut beginning = [0; Offload::SIZE + HEADERS_MAX];
        let hashing = self.hash.settings().types() != 0;
        let mut offload = [0; Offload::SIZE];
        self.arena.copy_out(at - Offload::SIZE, &mut offload);
        let offload = Offload::decode(&offload);
        let look = match &offload {
            Ok(offload) if hashing || offload.partial.is_some() || offload.gso.is_some() => HEADERS_MAX,
            _ => ETHERNET,
        };
        let headers = &mut beginning[..look.min(len)];
        self.arena.copy_out(at, headers);
        let destination = [headers[0], headers[1], headers[2], headers[3], headers[4], headers[5]];
        if !self.multicast.wanted(destination) {
            self.counters.rx_filtered.add(1);
            return None;
        }
        let Ok(offload) = offload else {
            self.counters.rx_dropped.add(1);
            return None;
        };
        let hash = if hashing { packet::flow(headers).and_then(|flow| self.hash.settings().hash(&flow)) } else { None };
        if origin == Origin::Tap && self.hand_over(at - Offload::SIZE, read, hash) {
            return None;
        }
        let mut frame = Frame {
            at,
            len,
            flags: if offload.validated { rx_flag::DATA_VALIDATED } else { 0 },
            gso: None,
            how: Gso::No,
            hash,
            headroom: self.headroom.load(Ordering::Relaxed),
            since: now,
        };
        if let Some(partial) = offload.partial {
            self.settle(&mut frame, &offload, partial, headers)?;
        } else if offload.gso.is_some() {
            // The kernel never cuts without having to sum.
            self.counters.rx_dropped.add(1);
            return None;
        }
        if frame.len > MAX_PACKET || (frame.data_slots() > 1 && !self.receives.sg) {
            self.counters.rx_dropped.add(1);
            return None;
        }
        Some(frame)
    }

    /// Gives a frame to the queue that the guest wants it on. False where that is this one.
    fn hand_over(&mut self, at: usize, read: usize, hash: Option<PacketHash>) -> bool {
        let Some(post) = &self.post else { return false };
        let settings = self.hash.settings();
        if settings.algorithm() == Algorithm::None {
            return false;
        }
        // What has no hash counts as 0, as in Linux.
        let queue = settings.queue(hash.map_or(0, |hash| hash.value), post.queues());
        if queue == post.own() {
            return false;
        }
        let mut frame = vec![0; read];
        self.arena.copy_out(at, &mut frame);
        let counter = if post.give(queue, frame) { &self.counters.rx_handed_over } else { &self.counters.rx_dropped };
        counter.add(1);
        true
    }

    /// Passes a partial checksum, and a frame that is to be cut, on to the guest; or does for it what it cannot.
    fn settle(&mut self, frame: &mut Frame, offload: &Offload, partial: Partial, headers: &[u8]) -> Option<()> {
        let layers = packet::parse(headers).ok().filter(|layers| {
            // What a guest's driver finds by itself; it is not told where the checksum is. Tags it does not look through.
            !layers.tagged
                && layers.transport_at == usize::from(partial.start)
                && layers.checksum_offset() == usize::from(partial.offset)
        });
        let (sums, how) = match layers.map(|layers| layers.network) {
            Some(Network::V4) => (self.receives.checksum4, self.receives.gso4),
            Some(Network::V6) => (self.receives.checksum6, self.receives.gso6),
            None => (false, Gso::No),
        };
        match offload.gso {
            None if sums => frame.flags |= rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED,
            None => {
                if !finish_checksum(&self.arena, frame.at, frame.len, partial) {
                    self.counters.rx_dropped.add(1);
                    return None;
                }
                self.counters.rx_checksums.add(1);
                frame.flags |= rx_flag::DATA_VALIDATED;
            }
            Some(gso) if sums && how != Gso::No && self.receives.sg && gso.1 > 0 && frame.len <= MAX_PACKET => {
                frame.flags |= rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED;
                (frame.gso, frame.how) = (Some(gso), how);
            }
            Some((_, size)) => {
                // Read before the guest's features were set; or longer than any driver of a guest's sends, and so expects;
                // or tagged: none cuts what is tagged.
                self.segments = Segments::begin(&self.arena, frame.at, frame.len, size, frame.hash);
                match self.segments {
                    Some(_) => self.counters.rx_segmented.add(1),
                    None => self.counters.rx_dropped.add(1),
                }
                return None;
            }
        }
        Some(())
    }
}

/// Adds up the rest of a partial checksum and puts it in its place; false where it has none.
fn finish_checksum(arena: &Mapping, at: usize, len: usize, partial: Partial) -> bool {
    let (start, place) = (usize::from(partial.start), usize::from(partial.start) + usize::from(partial.offset));
    if place + 2 > len {
        return false;
    }
    let mut sum = packet::Sum::default();
    let mut buffer = [0; 2048];
    let mut here = start;
    while here < len {
        let piece = &mut buffer[..(len - here).min(2048)];
        arena.copy_out(at + here, piece);
        sum.add(piece);
        here += piece.len();
    }
    // Where UDP has no checksum there is a zero; a sum of zero is written as its other form.
    let checksum = match sum.checksum() {
        0 => 0xffff,
        checksum => checksum,
    };
    arena.copy_in(at + place, &checksum.to_be_bytes());
    true
}
