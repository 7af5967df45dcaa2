//! Who has mapped what: the machine's half of grant mapping.

use super::call::{Answer, MAP_MAX, Refusal, Reply};
use super::counters::{Event, Slot};
use super::entry::{READING, WRITING};
use super::state::{Domain, SeatId, State};
use crate::{DomId, GrantAccess, GrantRef, GrantStatus};

/// How often one grant may be mapped for reading, and as often for writing. Xen counts in eight bits and refuses from
/// the moment the highest is set.
const PINS_MAX: u32 = 128;

/// The grants of one domain that are mapped now, by reference. The frame was checked when it was first mapped and
/// holds for as long as it is.
#[derive(Debug, Default)]
pub(super) struct Actives {
    /// As long as the highest reference ever mapped.
    by_ref: Vec<Active>,
    /// How often grants are mapped, taken together.
    pub(super) maps: u32,
}

#[derive(Debug, Clone, Copy)]
struct Active {
    /// Only this domain may map it again meanwhile, whatever the guest writes into the entry.
    by: DomId,
    frame: u32,
    readers: u32,
    writers: u32,
}

const IDLE: Active = Active { by: DomId::SELF, frame: 0, readers: 0, writers: 0 };

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
        let held = self.domains.get(&us).map_or(0, |us| us.maps_held);
        let room = self.limits.maptrack.saturating_sub(held) as usize;
        let domain = self.live_mut(peer).filter(|domain| domain.generation == generation);
        let pinned = match domain {
            Some(domain) => domain.pin_all(us, &refs, access, room),
            None => Err((refs[0], GrantStatus::BadDomain)),
        };
        let frames = pinned.map_err(|(gref, status)| {
            self.tally.refuse(slot, status);
            Refusal::grant(GrantRef(gref), status)
        })?;
        // At most MAP_MAX.
        let count = refs.len() as u32;
        self.tally.add(slot, Event::Map, u64::from(count));
        if let Some(us) = self.domains.get_mut(&us) {
            us.maps_held += count;
        }
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
        // The peer is still there, perhaps as a zombie: our map kept it.
        if let Some(domain) = self.domains.get_mut(&map.peer) {
            domain.unpin_all(&map.refs, map.access);
        }
        if let Some(us) = self.domains.get_mut(&us) {
            us.maps_held -= map.refs.len() as u32;
        }
        self.tally.add(map.slot, Event::Unmap, map.refs.len() as u64);
        self.reap(map.peer);
        Ok(())
    }
}

impl Domain {
    /// Pins all, or none: then the first that was refused, and why. `room` is how many the mapper may still have.
    fn pin_all(
        &mut self,
        us: DomId,
        refs: &[u32],
        access: GrantAccess,
        room: usize,
    ) -> Result<Vec<u32>, (u32, GrantStatus)> {
        let mut frames = Vec::with_capacity(refs.len());
        for &gref in refs {
            let pinned =
                if frames.len() < room { self.pin(us, GrantRef(gref), access) } else { Err(GrantStatus::NoSpace) };
            match pinned {
                Ok(frame) => frames.push(frame),
                Err(status) => {
                    self.unpin_all(&refs[..frames.len()], access);
                    return Err((gref, status));
                }
            }
        }
        Ok(frames)
    }

    fn pin(&mut self, us: DomId, gref: GrantRef, access: GrantAccess) -> Result<u32, GrantStatus> {
        let memory = self.memory.as_ref().ok_or(GrantStatus::BadGrantRef)?;
        // u32 to usize widens.
        let index = gref.0 as usize;
        let active = self.actives.by_ref.get(index).copied().unwrap_or(IDLE);
        let pins = if access == GrantAccess::ReadWrite { active.writers } else { active.readers };
        let is_mapped = active.readers + active.writers > 0;
        if is_mapped && (active.by != us || pins >= PINS_MAX) {
            return Err(GrantStatus::GeneralError);
        }
        let entry = memory.table.pin(gref, us, access, memory.pages)?;
        if is_mapped && active.frame != entry.frame {
            // The guest swapped the page under a mapped grant. Xen would go on with the old page, whose grant the
            // entry no longer shows; here that is refused. The mark stays until the last unmap, as for any map.
            return Err(GrantStatus::GeneralError);
        }
        if index >= self.actives.by_ref.len() {
            // Inside the table, or the entry could not have been pinned.
            self.actives.by_ref.resize(index + 1, IDLE);
        }
        let active = &mut self.actives.by_ref[index];
        (active.by, active.frame) = (us, entry.frame);
        match access {
            GrantAccess::ReadOnly => active.readers += 1,
            GrantAccess::ReadWrite => active.writers += 1,
        }
        self.actives.maps += 1;
        Ok(entry.frame)
    }

    /// Takes pins back that `pin` gave.
    fn unpin_all(&mut self, refs: &[u32], access: GrantAccess) {
        let Some(memory) = &self.memory else { return };
        for &gref in refs {
            let Some(active) = self.actives.by_ref.get_mut(gref as usize) else { continue };
            match access {
                GrantAccess::ReadOnly => active.readers -= 1,
                GrantAccess::ReadWrite => active.writers -= 1,
            }
            self.actives.maps -= 1;
            let marks = match (active.readers, active.writers) {
                (0, 0) => READING | WRITING,
                (_, 0) => WRITING,
                _ => continue,
            };
            memory.table.unpin(GrantRef(gref), marks);
        }
    }
}
