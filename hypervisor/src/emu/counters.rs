//! What the machine counted: memory that all its processes add to.
//!
//! Every ordered pair of domains (who did it, to whom) has a slot of its own, so that the two ends of a busy device
//! never write to the same cache line. Adding is relaxed: the numbers order nothing.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::memfd;
use crate::memory::Mapping;
use crate::{DomId, GrantStatus};

const SLOTS: usize = 4096;
const SLOT_SIZE: usize = 256;
/// The last word of a slot says whose it is; 0 is nobody's.
const OWNER: usize = SLOT_SIZE - 8;
const STATUSES: usize = 14;

/// Which number of a slot.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(super) enum Event {
    Map,
    Unmap,
    Copy,
    CopiedBytes,
    TornCopy,
    Bind,
    Sent,
    Suppressed,
    Dropped,
    RefusedPort,
    /// The first of `STATUSES` numbers, indexed by the status without its sign.
    Refused,
}

const _: () = assert!((Event::Refused as usize + STATUSES) * 8 <= OWNER);

/// What was counted, on a whole machine or from one domain to another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Grants mapped.
    pub maps: u64,
    /// Grants unmapped.
    pub unmaps: u64,
    /// Grant copy operations that succeeded.
    pub copies: u64,
    /// Bytes they moved.
    pub copied_bytes: u64,
    /// Copies that failed because the grant changed while they ran. They are also among the refusals.
    pub torn_copies: u64,
    /// Event channels bound.
    pub binds: u64,
    /// Events that took a system call.
    pub notifications: u64,
    /// Events that took none: the peer's port was pending or masked.
    pub notifications_suppressed: u64,
    /// Events dropped because nobody was bound to the port.
    pub notifications_dropped: u64,
    /// Event channel operations refused.
    pub refused_ports: u64,
    /// Grant operations refused, by status; see [`refused`](Self::refused).
    refused: [u64; STATUSES],
}

fn status_index(status: GrantStatus) -> usize {
    usize::from((status as i16).unsigned_abs()).min(STATUSES - 1)
}

impl Counters {
    /// Grant maps and copies refused with this status.
    pub fn refused(&self, status: GrantStatus) -> u64 {
        self.refused[status_index(status)]
    }

    /// Grant maps and copies refused for any reason.
    pub fn refused_grants(&self) -> u64 {
        self.refused.iter().sum()
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.combine(earlier, u64::wrapping_sub)
    }

    fn combine(&self, other: &Self, with: fn(u64, u64) -> u64) -> Self {
        Self {
            maps: with(self.maps, other.maps),
            unmaps: with(self.unmaps, other.unmaps),
            copies: with(self.copies, other.copies),
            copied_bytes: with(self.copied_bytes, other.copied_bytes),
            torn_copies: with(self.torn_copies, other.torn_copies),
            binds: with(self.binds, other.binds),
            notifications: with(self.notifications, other.notifications),
            notifications_suppressed: with(self.notifications_suppressed, other.notifications_suppressed),
            notifications_dropped: with(self.notifications_dropped, other.notifications_dropped),
            refused_ports: with(self.refused_ports, other.refused_ports),
            refused: std::array::from_fn(|at| with(self.refused[at], other.refused[at])),
        }
    }
}

/// A slot's number; slot 0 collects what belongs to no living pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Slot(u16);

impl Slot {
    pub(super) const NOBODY: Self = Self(0);
}

/// The shared memory.
#[derive(Debug)]
pub(super) struct Tally {
    memory: Mapping,
}

impl Tally {
    pub(super) fn create() -> io::Result<(Self, OwnedFd)> {
        let fd = memfd::sealed("xen-counters", SLOTS * SLOT_SIZE)?;
        Ok((Self::open(&fd)?, fd))
    }

    pub(super) fn open(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self { memory: Mapping::of_file(fd, 0, SLOTS * SLOT_SIZE, true)? })
    }

    #[inline]
    fn word(&self, slot: Slot, index: usize) -> &std::sync::atomic::AtomicU64 {
        self.memory.atomic_u64(usize::from(slot.0) % SLOTS * SLOT_SIZE + index * 8)
    }

    #[inline]
    pub(super) fn add(&self, slot: Slot, event: Event, count: u64) {
        self.word(slot, event as usize).fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn refuse(&self, slot: Slot, status: GrantStatus) {
        self.word(slot, Event::Refused as usize + status_index(status)).fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self, slot: Slot) -> Counters {
        let number = |index: usize| self.word(slot, index).load(Ordering::Relaxed);
        let event = |event: Event| number(event as usize);
        Counters {
            maps: event(Event::Map),
            unmaps: event(Event::Unmap),
            copies: event(Event::Copy),
            copied_bytes: event(Event::CopiedBytes),
            torn_copies: event(Event::TornCopy),
            binds: event(Event::Bind),
            notifications: event(Event::Sent),
            notifications_suppressed: event(Event::Suppressed),
            notifications_dropped: event(Event::Dropped),
            refused_ports: event(Event::RefusedPort),
            refused: std::array::from_fn(|at| number(Event::Refused as usize + at)),
        }
    }

    /// The slots somebody owns, with their pairs.
    fn owned(&self) -> impl Iterator<Item = (Slot, DomId, DomId)> {
        (1..SLOTS as u16).map(Slot).filter_map(|slot| {
            let owner = self.word(slot, OWNER / 8).load(Ordering::Relaxed);
            (owner != 0).then_some((slot, DomId((owner >> 16) as u16), DomId(owner as u16)))
        })
    }

    pub(super) fn total(&self) -> Counters {
        self.owned().fold(self.read(Slot::NOBODY), |sum, (slot, ..)| sum.combine(&self.read(slot), u64::wrapping_add))
    }

    pub(super) fn between(&self, from: DomId, to: DomId) -> Counters {
        self.owned().find(|&(_, a, b)| (a, b) == (from, to)).map(|(slot, ..)| self.read(slot)).unwrap_or_default()
    }

    /// Every pair that has a slot, with what it counted.
    pub(super) fn pairs(&self) -> Vec<(DomId, DomId, Counters)> {
        self.owned().map(|(slot, from, to)| (from, to, self.read(slot))).collect()
    }
}

/// Who has which slot. Only the machine hands them out.
#[derive(Debug, Default)]
pub(super) struct Slots {
    of: HashMap<(DomId, DomId), Slot>,
    free: Vec<Slot>,
}

impl Slots {
    /// The slot of a pair; when there are none left, the one for everybody else.
    pub(super) fn of(&mut self, tally: &Tally, from: DomId, to: DomId) -> Slot {
        if let Some(&slot) = self.of.get(&(from, to)) {
            return slot;
        }
        let fresh = || u16::try_from(self.of.len() + 1).ok().filter(|&at| usize::from(at) < SLOTS).map(Slot);
        let Some(slot) = self.free.pop().or_else(fresh) else { return Slot::NOBODY };
        self.of.insert((from, to), slot);
        // The highest bit tells the pair (0, 0) from nobody.
        let owner = 1 << 63 | u64::from(from.0) << 16 | u64::from(to.0);
        tally.word(slot, OWNER / 8).store(owner, Ordering::Relaxed);
        slot
    }

    /// A domain is gone: its numbers move to slot 0, so that totals never go backwards. What a straggler adds to the
    /// old slot afterwards goes astray, which only hurts a statistic.
    pub(super) fn retire(&mut self, tally: &Tally, gone: DomId) {
        let free = &mut self.free;
        self.of.retain(|&(from, to), &mut slot| {
            let stays = from != gone && to != gone;
            if !stays {
                tally.word(slot, OWNER / 8).store(0, Ordering::Relaxed);
                for index in 0..OWNER / 8 {
                    let count = tally.word(slot, index).swap(0, Ordering::Relaxed);
                    tally.word(Slot::NOBODY, index).fetch_add(count, Ordering::Relaxed);
                }
                free.push(slot);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_survive_the_pairs() {
        let (tally, _fd) = Tally::create().unwrap();
        let mut slots = Slots::default();
        let pair = slots.of(&tally, DomId(0), DomId(1));
        let other = slots.of(&tally, DomId(1), DomId(0));
        tally.add(pair, Event::Copy, 3);
        tally.add(other, Event::Copy, 4);
        tally.refuse(pair, GrantStatus::BadPage);
        assert_eq!(tally.between(DomId(0), DomId(1)).copies, 3);
        slots.retire(&tally, DomId(1));
        assert_eq!(tally.between(DomId(0), DomId(1)), Counters::default());
        let total = tally.total();
        assert_eq!((total.copies, total.refused(GrantStatus::BadPage), total.refused_grants()), (7, 1, 1));
        assert_eq!(total.since(&total), Counters::default());
    }

    #[test]
    fn slots_are_used_again_and_never_twice() {
        let (tally, _fd) = Tally::create().unwrap();
        let mut slots = Slots::default();
        let mut seen = std::collections::HashSet::new();
        for to in 1..SLOTS as u16 {
            assert!(seen.insert(slots.of(&tally, DomId(0), DomId(to)).0));
        }
        assert_eq!(slots.of(&tally, DomId(9), DomId(9)), Slot::NOBODY);
        slots.retire(&tally, DomId(7));
        assert_ne!(slots.of(&tally, DomId(9), DomId(9)), Slot::NOBODY);
    }
}
