//! A backend's seat at the machine.

use std::path::Path;
use std::sync::Arc;

use super::call::{DomainInfo, Join, MAP_MAX, Reply, Request};
use super::counters::{Counters, Event};
use super::guest::{GuestOptions, GuestSeat};
use super::link::unexpected;
use super::machine::Machine;
use super::peer::Refused;
use super::peers::Peers;
use super::seat::{Place, Seat};
use crate::memory::Mapping;
use crate::{
    Backend, CopyDirection, CopyOp, DomId, Error, EventChannel, GrantAccess, GrantRef, GrantStatus, Port, Result,
};

/// One process's seat as dom0, or as a driver domain.
///
/// Its mappings and channels keep the seat; when the last of them and the member itself are gone, or the process
/// dies, the machine takes everything back. A driver domain dies with its last seat.
#[derive(Debug)]
pub struct Member {
    working: Arc<Working>,
    place: OwnedPlace,
}

#[derive(Debug)]
struct Working {
    seat: Arc<Seat>,
    peers: Peers,
}

#[derive(Debug)]
enum OwnedPlace {
    Here(Machine),
    Dir(std::path::PathBuf),
}

impl Member {
    /// Joins the machine that `emu-xen serve --dir DIR` keeps, as dom0 or as the driver domain `domid`, which is
    /// created if it does not exist.
    ///
    /// # Errors
    /// When no machine is there, or `domid` is a guest.
    pub fn join(dir: impl AsRef<Path>, domid: DomId) -> Result<Self> {
        let dir = dir.as_ref();
        Self::take(Place::Dir(dir), OwnedPlace::Dir(dir.to_path_buf()), domid)
    }

    /// Joins a machine of this process.
    ///
    /// # Errors
    /// When `domid` is a guest.
    pub fn local(machine: &Machine, domid: DomId) -> Result<Self> {
        Self::take(Place::Here(machine), OwnedPlace::Here(machine.clone()), domid)
    }

    fn take(place: Place<'_>, owned: OwnedPlace, domid: DomId) -> Result<Self> {
        let (seat, _) = Seat::take(place, Join::Backend { domid: domid.0 })?;
        Ok(Self { working: Arc::new(Working { seat, peers: Peers::new() }), place: owned })
    }

    /// Creates a guest on the same machine, with a seat of its own in this process; dropping it destroys the domain.
    ///
    /// # Errors
    /// When the wanted id is taken, or the kernel has no memory.
    pub fn create_guest(&self, options: GuestOptions) -> Result<GuestSeat> {
        match &self.place {
            OwnedPlace::Here(machine) => GuestSeat::local(machine, options),
            OwnedPlace::Dir(dir) => GuestSeat::join(dir, options),
        }
    }

    /// Destroys a domain, as `xl destroy` does. Pages of it that are mapped stay good memory until they are unmapped.
    ///
    /// # Errors
    /// When we are not dom0, or there is no such domain.
    pub fn destroy(&self, domid: DomId) -> Result<()> {
        self.seat().destroy(domid)
    }

    /// All domains of the machine.
    ///
    /// # Errors
    /// When the machine is gone.
    pub fn domains(&self) -> Result<Vec<DomainInfo>> {
        self.seat().domains()
    }

    /// What was counted on the whole machine.
    pub fn counters(&self) -> Counters {
        self.seat().counters()
    }

    /// What `from` did to `to`, while both live.
    pub fn counters_between(&self, from: DomId, to: DomId) -> Counters {
        self.seat().tally.between(from, to)
    }

    /// What each pair of living domains did, the first to the second.
    pub fn counters_by_pair(&self) -> Vec<(DomId, DomId, Counters)> {
        self.seat().tally.pairs()
    }

    fn seat(&self) -> &Arc<Seat> {
        &self.working.seat
    }
}

/// Takes a map back when its memory is gone.
#[derive(Debug)]
struct Held {
    working: Arc<Working>,
    handle: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.working.seat.release(Request::Unmap { handle: self.handle });
        // It may have been the last page of a domain that is dead.
        self.working.peers.sweep(&self.working.seat);
    }
}

impl Backend for Member {
    fn domid(&self) -> DomId {
        self.seat().domid
    }

    fn store(&self) -> Result<xenstore_client::Client> {
        self.seat().store()
    }

    fn map(&self, peer: DomId, refs: &[GrantRef], access: GrantAccess) -> Result<Mapping> {
        if refs.is_empty() || refs.len() > MAP_MAX {
            return Err(Error::Invalid(format!("a map takes 1 to {MAP_MAX} grants, not {}", refs.len())));
        }
        let working = &self.working;
        let known = working.peers.get(&working.seat, peer).map_err(|error| first_of(refs, error))?;
        let request = Request::Map {
            peer: peer.0,
            generation: known.generation,
            refs: refs.iter().map(|gref| gref.0).collect(),
            writable: access == GrantAccess::ReadWrite,
        };
        let answer = working.seat.call(request).map_err(|refusal| refusal.into_error("map", peer))?;
        let Reply::Mapped { handle, frames } = &answer.reply else { return Err(unexpected(&answer)) };
        let held = Held { working: Arc::clone(working), handle: *handle };
        known.window(frames, access, held).map_err(|error| Error::io("mapping granted pages", error))
    }

    fn copy(&self, peer: DomId, local: &Mapping, ops: &mut [CopyOp]) -> Result<()> {
        for op in ops.iter() {
            let end = op.local.checked_add(usize::from(op.len));
            if end.is_none_or(|end| end > local.len()) {
                return Err(Error::Invalid(format!("a copy of {} bytes at {} of {}", op.len, op.local, local.len())));
            }
            if op.direction == CopyDirection::FromGuest && !local.is_writable() {
                return Err(Error::Invalid("a copy into a read-only mapping".to_owned()));
            }
        }
        let Working { seat, peers } = &*self.working;
        let known = match peers.get(seat, peer) {
            Ok(known) => known,
            Err(Error::Grant { status, .. }) => {
                refuse_all(seat, ops, status);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let target = known.copy_target().map_err(|error| Error::io("mapping a domain's memory", error))?;
        let (mut copies, mut bytes) = (0, 0);
        for op in ops.iter_mut() {
            let outcome = match &target {
                Some(target) => target.copy(seat.domid, local, op),
                None => Err(Refused::For(GrantStatus::BadGrantRef)),
            };
            op.status = match outcome {
                Ok(()) => {
                    copies += 1;
                    bytes += u64::from(op.len);
                    GrantStatus::Okay
                }
                Err(Refused::For(status)) => status,
                Err(Refused::Torn) => {
                    seat.tally.add(known.slot, Event::TornCopy, 1);
                    GrantStatus::GeneralError
                }
            };
            if op.status != GrantStatus::Okay {
                seat.tally.refuse(known.slot, op.status);
            }
        }
        if copies > 0 {
            seat.tally.add(known.slot, Event::Copy, copies);
            seat.tally.add(known.slot, Event::CopiedBytes, bytes);
        }
        Ok(())
    }

    fn bind(&self, peer: DomId, remote: Port) -> Result<Box<dyn EventChannel>> {
        self.seat().bind(peer, remote)
    }
}

fn refuse_all(seat: &Seat, ops: &mut [CopyOp], status: GrantStatus) {
    for op in ops {
        op.status = status;
        seat.tally.refuse(super::counters::Slot::NOBODY, status);
    }
}

/// A peer that is not there is the fault of the first reference.
fn first_of(refs: &[GrantRef], error: Error) -> Error {
    match (error, refs.first()) {
        (Error::Grant { domain, status, .. }, Some(&gref)) => Error::Grant { operation: "map", domain, gref, status },
        (error, _) => error,
    }
}
