//! Who has mapped what: the machine's half of grant mapping.

use super::call::{Answer, MAP_MAX, Refusal, Reply};
use super::counters::{Event, Slot};
use super::entry::{READING, WRITING};
use super::state::{SeatId, State};
use crate::{DomId, GrantAccess, GrantRef, GrantStatus};

/// How often one grant may be mapped for reading, and as often for writing. Xen counts in eight bits and refuses from
/// the moment the highest is set.
const PINS_MAX: u32 = 128;

/// A grant that is mapped. The frame was checked when it was first mapped and holds for as long as it is.
#[derive(Debug)]
pub(super) struct Active {
    /// Only this domain may map it again meanwhile, whatever the guest writes into the entry.
    by: DomId,
    frame: u32,
    readers: u32,
    writers: u32,
}

/// What one call mapped.
#[derive(Debug)]
pub(super) struct Map {
    peer: DomId,
    refs: Vec<u32>,
    access: GrantAccess,
    slot: Slot,
}

impl State {
    /// Maps grants, all of them or none.
    pub(super) fn map(
        &mut self,
        seat: SeatId,
        peer: DomId,
        generation: u32,
        refs: Vec<u32>,
        access: GrantAccess,
    ) -> Result<Answer, Refusal> {
        let us = self.domain_of(seat)?;
        if refs.is_empty() || refs.len() > MAP_MAX {
            return Err(Refusal::invalid(format!("a map takes 1 to {MAP_MAX} grants, not {}", refs.len())));
        }
        let slot = self.slot_if_known(us, peer);
        let mut frames = Vec::with_capacity(refs.len());
        for &gref in &refs {
            match self.pin(us, peer, generation, GrantRef(gref), access) {
                Ok(frame) => frames.push(frame),
                Err(status) => {
                    for &pinned in &refs[..frames.len()] {
                        self.unpin(us, peer, pinned, access);
                    }
                    self.tally.refuse(slot, status);
                    return Err(Refusal::grant(GrantRef(gref), status));
                }
            }
        }
        self.tally.add(slot, Event::Map, refs.len() as u64);
        let handle = self.next_map;
        self.next_map += 1;
        if let Some(seat) = self.seats.get_mut(&seat) {
            seat.maps.insert(handle, Map { peer, refs, access, slot });
        }
        Ok(Reply::Mapped { handle, frames }.into())
    }

    /// Takes a map back. The last one of a zombie's pages lets the zombie go.
    pub(super) fn unmap(&mut self, seat: SeatId, handle: u64) -> Result<(), Refusal> {
        let seat = self.seats.get_mut(&seat).ok_or_else(|| Refusal::invalid("our domain was destroyed"))?;
        let bad = || Refusal::grant(GrantRef(0), GrantStatus::BadHandle);
        let (us, map) = (seat.domid, seat.maps.remove(&handle).ok_or_else(bad)?);
        for &gref in &map.refs {
            self.unpin(us, map.peer, gref, map.access);
        }
        self.tally.add(map.slot, Event::Unmap, map.refs.len() as u64);
        self.reap(map.peer);
        Ok(())
    }

    fn pin(
        &mut self,
        us: DomId,
        peer: DomId,
        generation: u32,
        gref: GrantRef,
        access: GrantAccess,
    ) -> Result<u32, GrantStatus> {
        if self.domains.get(&us).is_none_or(|us| us.maps_held >= self.limits.maptrack) {
            return Err(GrantStatus::NoSpace);
        }
        let domain = self.live_mut(peer).ok_or(GrantStatus::BadDomain)?;
        if domain.generation != generation {
            return Err(GrantStatus::BadDomain);
        }
        let memory = domain.memory.as_ref().ok_or(GrantStatus::BadGrantRef)?;
        let active = domain.active.get(&gref.0);
        if let Some(active) = active {
            let pins = if access == GrantAccess::ReadWrite { active.writers } else { active.readers };
            if active.by != us || pins >= PINS_MAX {
                return Err(GrantStatus::GeneralError);
            }
        }
        let entry = memory.table.pin(gref, us, access, memory.pages)?;
        if active.is_some_and(|active| active.frame != entry.frame) {
            // The guest swapped the page under a mapped grant. Xen would go on with the old page, whose grant the
            // entry no longer shows; here that is refused. The mark stays until the last unmap, as for any map.
            return Err(GrantStatus::GeneralError);
        }
        let fresh = || Active { by: us, frame: entry.frame, readers: 0, writers: 0 };
        let active = domain.active.entry(gref.0).or_insert_with(fresh);
        match access {
            GrantAccess::ReadOnly => active.readers += 1,
            GrantAccess::ReadWrite => active.writers += 1,
        }
        domain.mapped += 1;
        if let Some(us) = self.domains.get_mut(&us) {
            us.maps_held += 1;
        }
        Ok(entry.frame)
    }

    fn unpin(&mut self, us: DomId, peer: DomId, gref: u32, access: GrantAccess) {
        if let Some(us) = self.domains.get_mut(&us) {
            us.maps_held -= 1;
        }
        let Some(domain) = self.domains.get_mut(&peer) else { return };
        let Some(active) = domain.active.get_mut(&gref) else { return };
        match access {
            GrantAccess::ReadOnly => active.readers -= 1,
            GrantAccess::ReadWrite => active.writers -= 1,
        }
        domain.mapped -= 1;
        let mut marks = 0;
        if active.writers == 0 {
            marks |= WRITING;
            if active.readers == 0 {
                marks |= READING;
                domain.active.remove(&gref);
            }
        }
        if let Some(memory) = &domain.memory {
            memory.table.unpin(GrantRef(gref), marks);
        }
    }
}
