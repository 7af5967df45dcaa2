//! Which peers a process knows.
//!
//! A copy must find its peer without a lock and without touching memory that other threads write. Each thread
//! remembers the last few it used, by weak reference, so that it keeps no dead domain's memory; everything else goes
//! the slow way, through a lock and perhaps a question to the machine.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::call::{Refusal, Request};
use super::peer::Peer;
use super::seat::Seat;
use crate::{DomId, Error, GrantRef, GrantStatus, Result};

/// A queue's thread works for one peer, a thread with several queues for a few.
const REMEMBERED: usize = 8;

struct Remembered {
    /// Which `Peers`; a process may have several seats.
    of: u64,
    domid: DomId,
    generation: u32,
    peer: Weak<Peer>,
}

thread_local! {
    static RECENT: RefCell<Vec<Remembered>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
pub(super) struct Peers {
    id: u64,
    known: Mutex<BTreeMap<DomId, Arc<Peer>>>,
}

impl Peers {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), known: Mutex::default() }
    }

    /// The domain that lives under this id now.
    pub(super) fn get(&self, seat: &Seat, domid: DomId) -> Result<Arc<Peer>> {
        let generation = seat.board.generation(domid);
        if generation == 0 {
            return Err(bad_domain(domid));
        }
        let recent = RECENT.with_borrow(|recent| {
            let wanted =
                |entry: &&Remembered| (entry.of, entry.domid, entry.generation) == (self.id, domid, generation);
            recent.iter().find(wanted).and_then(|entry| entry.peer.upgrade())
        });
        match recent {
            Some(peer) => Ok(peer),
            None => self.look_up(seat, domid, generation),
        }
    }

    #[cold]
    fn look_up(&self, seat: &Seat, domid: DomId, generation: u32) -> Result<Arc<Peer>> {
        let known = self.known().get(&domid).filter(|peer| peer.generation == generation).cloned();
        let peer = match known {
            Some(peer) => peer,
            None => {
                let answer = seat
                    .call(Request::Peer { domid: domid.0 })
                    .map_err(|refusal: Refusal| refusal.into_error("look-up", domid))?;
                let peer = Arc::new(Peer::open(&answer)?);
                self.known().insert(domid, Arc::clone(&peer));
                peer
            }
        };
        RECENT.with_borrow_mut(|recent| {
            recent.retain(|entry| entry.peer.strong_count() > 0 && (entry.of, entry.domid) != (self.id, domid));
            if recent.len() == REMEMBERED {
                recent.remove(0);
            }
            let entry = Remembered { of: self.id, domid, generation: peer.generation, peer: Arc::downgrade(&peer) };
            recent.push(entry);
        });
        Ok(peer)
    }

    /// Lets go of the memory of domains that are dead.
    pub(super) fn sweep(&self, seat: &Seat) {
        self.known().retain(|&domid, peer| seat.board.generation(domid) == peer.generation);
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<DomId, Arc<Peer>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bad_domain(domain: DomId) -> Error {
    Error::Grant { operation: "look-up", domain, gref: GrantRef(0), status: GrantStatus::BadDomain }
}
