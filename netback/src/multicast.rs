//! The multicast groups that a guest wants to hear (xen/include/public/io/netif.h, `feature-multicast-control`).
//!
//! Groups come as extras on any queue and count for all queues of the vif. They may be named before the guest asks
//! for the filter; until it does, everything passes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Groups that one guest may name (Linux: XEN_NETBK_MCAST_MAX).
pub const GROUPS_MAX: usize = 64;

/// An Ethernet address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];

/// Why a group was not added. The request's response is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The address is that of a single station.
    #[error("not a multicast address")]
    NotMulticast,
    /// There are [`GROUPS_MAX`] already.
    #[error("more than {GROUPS_MAX} multicast groups")]
    Full,
}

fn is_multicast(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// What passes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Filter {
    on: bool,
    groups: Vec<Mac>,
}

impl Filter {
    fn add(&mut self, group: Mac) -> Result<(), Refused> {
        if !is_multicast(group) {
            return Err(Refused::NotMulticast);
        }
        if self.groups.contains(&group) {
            return Ok(());
        }
        if self.groups.len() == GROUPS_MAX {
            return Err(Refused::Full);
        }
        self.groups.push(group);
        Ok(())
    }

    fn wanted(&self, destination: Mac) -> bool {
        // Broadcast is not filtered: ARP and DHCP come that way, and no guest names it as a group.
        !self.on || !is_multicast(destination) || destination == BROADCAST || self.groups.contains(&destination)
    }
}

/// The filter of one vif, shared by its queues.
#[derive(Debug, Default)]
pub struct Multicast {
    /// Counts changes.
    generation: AtomicU64,
    filter: Mutex<Arc<Filter>>,
}

impl Multicast {
    fn lock(&self) -> MutexGuard<'_, Arc<Filter>> {
        // The filter is replaced whole, so a panic elsewhere cannot have left it half changed.
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        let mut filter = self.lock();
        let outcome = change(Arc::make_mut(&mut filter));
        self.generation.fetch_add(1, Ordering::Release);
        outcome
    }

    /// Adds a group. One that is there already is no error.
    ///
    /// # Errors
    /// When the address is no group's, or there are too many.
    pub fn add(&self, group: Mac) -> Result<(), Refused> {
        self.change(|filter| filter.add(group))
    }

    /// Removes a group. One that is not there is no error, as in Linux.
    pub fn delete(&self, group: Mac) {
        self.change(|filter| filter.groups.retain(|&have| have != group));
    }

    /// Whether groups are filtered at all: the frontend's `request-multicast-control`.
    pub fn set_filtering(&self, on: bool) {
        self.change(|filter| filter.on = on);
    }

    /// Forgets everything: the frontend has left, and the next one starts anew.
    pub fn clear(&self) {
        self.change(|filter| *filter = Filter::default());
    }

    /// The groups now.
    pub fn groups(&self) -> Vec<Mac> {
        self.lock().groups.clone()
    }
}

/// A queue's view of a [`Multicast`].
#[derive(Debug, Clone)]
pub struct MulticastReader {
    shared: Arc<Multicast>,
    generation: u64,
    filter: Arc<Filter>,
}

impl MulticastReader {
    /// A view of `shared`.
    pub fn new(shared: Arc<Multicast>) -> Self {
        // The generation first: a filter that is newer than it is only looked at once more.
        let generation = shared.generation.load(Ordering::Acquire);
        let filter = Arc::clone(&shared.lock());
        Self { shared, generation, filter }
    }

    /// Whether the guest wants a frame to `destination`. Takes a lock only after a change.
    #[inline]
    pub fn wanted(&mut self, destination: Mac) -> bool {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            self.filter = Arc::clone(&self.shared.lock());
        }
        self.filter.wanted(destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Mac = [0x00, 0x16, 0x3e, 1, 2, 3];

    fn group(number: u8) -> Mac {
        [0x01, 0x00, 0x5e, 0, 0, number]
    }

    #[test]
    fn only_what_was_named_passes_once_filtering() {
        let shared = Arc::new(Multicast::default());
        let mut reader = MulticastReader::new(Arc::clone(&shared));
        assert!(reader.wanted(group(1)), "no filter yet");
        shared.add(group(2)).unwrap();
        assert!(reader.wanted(group(1)), "groups alone are no filter");
        shared.set_filtering(true);
        assert!(!reader.wanted(group(1)) && reader.wanted(group(2)));
        assert!(reader.wanted(HOST) && reader.wanted(BROADCAST), "neither is multicast");
        shared.delete(group(2));
        assert!(!reader.wanted(group(2)));
        shared.set_filtering(false);
        assert!(reader.wanted(group(2)));
        shared.set_filtering(true);
        shared.clear();
        assert!(reader.wanted(group(1)) && shared.groups().is_empty());
    }

    #[test]
    fn no_more_than_sixty_four() {
        let shared = Multicast::default();
        (0..64).for_each(|number| shared.add(group(number)).unwrap());
        assert_eq!(shared.add(group(64)), Err(Refused::Full));
        assert_eq!(shared.add(group(3)), Ok(()), "it is there already");
        shared.delete(group(200));
        assert_eq!(shared.add(group(64)), Err(Refused::Full), "nothing was removed");
        shared.delete(group(3));
        assert_eq!(shared.add(group(64)), Ok(()));
        assert_eq!(shared.groups().len(), GROUPS_MAX);
    }

    #[test]
    fn stations_are_no_groups() {
        let shared = Multicast::default();
        for mac in [HOST, [0; 6], [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(shared.add(mac), Err(Refused::NotMulticast));
        }
        assert_eq!(shared.add([0x33, 0x33, 0, 0, 0, 1]), Ok(()));
    }
}
