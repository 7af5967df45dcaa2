//! The state of the machine: its domains, and the seats of those who act for them.
//!
//! Everything here happens under one lock, one call at a time. Nothing of it is on the way of a copy or an event.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::board::{Board, DOMAINS};
use super::call::{Answer, DomainInfo, Join, Refusal, Reply};
use super::counters::{Slot, Slots, Tally};
use super::entry::ENTRY_SIZE;
use super::maptrack::{Actives, Map};
use super::memfd;
use super::ports::Channels;
use super::table::GrantTable;
use crate::memory::Mapping;
use crate::{DomId, GrantRef, GrantStatus, PAGE_SIZE, Port};

/// What a machine allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Grant entries in each guest's table. 64 frames of entries are what Xen gives a guest at most by default.
    pub grants: u32,
    /// Grants one domain may have mapped at a time (Xen: max_maptrack_frames, 1024 frames of 256 entries).
    pub maptrack: u32,
    /// Ports in each domain, port 0 included, which is never used (the 2-level ABI has 4096).
    pub ports: u32,
    /// Pages of a guest that does not say how many it wants.
    pub memory_pages: u32,
    /// Pages a guest may have at most.
    pub memory_pages_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { grants: 32_768, maptrack: 262_144, ports: 4096, memory_pages: 16_384, memory_pages_max: 1 << 22 }
    }
}

/// Whose process it is. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SeatId(u64);

/// What kind of domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Dom0 is always there.
    Dom0,
    /// A driver domain lives while one of its backends has a seat.
    Driver,
    /// A guest has one seat and lives as long.
    Guest,
}

/// What only guests have.
#[derive(Debug)]
pub(super) struct GuestMemory {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) pages: u32,
    pub(super) table_fd: Arc<OwnedFd>,
    pub(super) table: GrantTable,
}

#[derive(Debug)]
pub(super) struct Domain {
    kind: Kind,
    name: String,
    pub(super) generation: u32,
    pub(super) memory: Option<GuestMemory>,
    /// Grants of this domain that are mapped now.
    pub(super) actives: Actives,
    /// Grants of others that this domain has mapped.
    pub(super) maps_held: u32,
    pub(super) ports: BTreeMap<Port, (super::ports::ChannelId, super::wire::Side)>,
    /// Destroyed: nobody finds it any more.
    pub(super) dying: bool,
    /// Its home in XenStore is gone.
    cleared: bool,
}

#[derive(Debug)]
pub(super) struct Seat {
    pub(super) domid: DomId,
    pub(super) maps: HashMap<u64, Map>,
    pub(super) ports: BTreeSet<Port>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) limits: Limits,
    pub(super) domains: BTreeMap<DomId, Domain>,
    pub(super) seats: HashMap<SeatId, Seat>,
    pub(super) channels: Channels,
    pub(super) slots: Slots,
    pub(super) tally: Arc<Tally>,
    tally_fd: Arc<OwnedFd>,
    pub(super) board: Arc<Board>,
    board_fd: Arc<OwnedFd>,
    next_domid: u16,
    next_generation: u32,
    next_seat: u64,
    pub(super) next_map: u64,
}

impl State {
    pub(super) fn new(limits: Limits) -> std::io::Result<Self> {
        let (board, board_fd) = Board::create()?;
        let (tally, tally_fd) = Tally::create()?;
        let mut state = Self {
            limits,
            domains: BTreeMap::new(),
            seats: HashMap::new(),
            channels: Channels::default(),
            slots: Slots::default(),
            tally: Arc::new(tally),
            tally_fd: Arc::new(tally_fd),
            board: Arc::new(board),
            board_fd: Arc::new(board_fd),
            next_domid: 1,
            next_generation: 1,
            next_seat: 1,
            next_map: 1,
        };
        state.add_domain(DomId::DOM0, Kind::Dom0, "Domain-0".to_owned(), None);
        Ok(state)
    }

    /// A domain that has not been destroyed.
    pub(super) fn live(&self, domid: DomId) -> Option<&Domain> {
        self.domains.get(&domid).filter(|domain| !domain.dying)
    }

    pub(super) fn live_mut(&mut self, domid: DomId) -> Option<&mut Domain> {
        self.domains.get_mut(&domid).filter(|domain| !domain.dying)
    }

    /// The domain a seat acts for; an error when it was destroyed under the seat.
    pub(super) fn domain_of(&self, seat: SeatId) -> Result<DomId, Refusal> {
        self.seats.get(&seat).map(|seat| seat.domid).ok_or_else(|| Refusal::invalid("our domain was destroyed"))
    }

    fn add_domain(&mut self, domid: DomId, kind: Kind, name: String, memory: Option<GuestMemory>) {
        let generation = self.next_generation;
        // 0 means "nobody" on the board.
        self.next_generation = self.next_generation.checked_add(1).unwrap_or(1);
        self.board.set(domid, generation);
        let domain = Domain {
            kind,
            name,
            generation,
            memory,
            actives: Actives::default(),
            maps_held: 0,
            ports: BTreeMap::new(),
            dying: false,
            cleared: false,
        };
        self.domains.insert(domid, domain);
    }

    fn add_seat(&mut self, domid: DomId) -> SeatId {
        let seat = SeatId(self.next_seat);
        self.next_seat += 1;
        self.seats.insert(seat, Seat { domid, maps: HashMap::new(), ports: BTreeSet::new() });
        seat
    }

    /// Gives a process a seat. The flag says whether a domain was created for it.
    pub(super) fn join(&mut self, join: Join) -> Result<(SeatId, Answer, Option<String>), Refusal> {
        match join {
            Join::Backend { domid } => self.join_backend(DomId(domid)),
            Join::Guest { name, pages, domid } => self.join_guest(name, pages, domid.map(DomId)),
        }
    }

    fn joined(&self, domid: DomId) -> Answer {
        Answer { reply: Reply::Joined { domid: domid.0 }, fds: vec![self.board_fd.clone(), self.tally_fd.clone()] }
    }

    fn join_backend(&mut self, domid: DomId) -> Result<(SeatId, Answer, Option<String>), Refusal> {
        if domid.0 >= DOMAINS {
            return Err(Refusal::invalid(format!("{domid} is no domain id: they end at {}", DOMAINS - 1)));
        }
        let mut created = None;
        match self.domains.get(&domid) {
            Some(domain) if domain.dying => return Err(Refusal::invalid(format!("domain {domid} is being destroyed"))),
            Some(Domain { kind: Kind::Guest, .. }) => {
                return Err(Refusal::invalid(format!("domain {domid} is a guest: no backend may act for it")));
            }
            Some(_) => {}
            None => {
                let name = format!("driver-{domid}");
                self.add_domain(domid, Kind::Driver, name.clone(), None);
                created = Some(name);
            }
        }
        Ok((self.add_seat(domid), self.joined(domid), created))
    }

    fn join_guest(
        &mut self,
        name: String,
        pages: u32,
        wanted: Option<DomId>,
    ) -> Result<(SeatId, Answer, Option<String>), Refusal> {
        let pages = if pages == 0 { self.limits.memory_pages } else { pages };
        if pages > self.limits.memory_pages_max {
            let most = self.limits.memory_pages_max;
            return Err(Refusal::invalid(format!(
                "{pages} pages of memory are more than the {most} this machine gives"
            )));
        }
        let domid = self.free_domid(wanted)?;
        let name = if name.is_empty() { format!("guest-{domid}") } else { name };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.len() > 64 || !name.chars().all(plain) {
            return Err(Refusal::invalid(format!("{name:?} is no name for a domain: at most 64 of A-Za-z0-9-_.")));
        }
        let memory = GuestMemory::create(pages, self.limits.grants)
            .map_err(|error| Refusal::io("creating the guest's memory", &error))?;
        let mut answer = self.joined(domid);
        answer.fds.extend([Arc::clone(&memory.fd), Arc::clone(&memory.table_fd)]);
        self.add_domain(domid, Kind::Guest, name.clone(), Some(memory));
        Ok((self.add_seat(domid), answer, Some(name)))
    }

    fn free_domid(&mut self, wanted: Option<DomId>) -> Result<DomId, Refusal> {
        if let Some(domid) = wanted {
            return if domid == DomId::DOM0 || domid.0 >= DOMAINS {
                Err(Refusal::invalid(format!("no guest can have the domain id {domid}")))
            } else if self.domains.contains_key(&domid) {
                Err(Refusal::invalid(format!("there is a domain {domid} already")))
            } else {
                Ok(domid)
            };
        }
        // Ids are used again as late as possible, as on Xen, so that a stale id finds nobody instead of somebody else.
        for _ in 1..DOMAINS {
            let domid = DomId(self.next_domid);
            self.next_domid = if self.next_domid + 1 < DOMAINS { self.next_domid + 1 } else { 1 };
            if !self.domains.contains_key(&domid) {
                return Ok(domid);
            }
        }
        Err(Refusal::invalid("all domain ids are in use"))
    }

    /// The counters of a pair. Domains that do not exist get no slot: asking for many of them would use up all.
    pub(super) fn slot_if_known(&mut self, us: DomId, peer: DomId) -> Slot {
        if self.domains.contains_key(&peer) { self.slots.of(&self.tally, us, peer) } else { Slot::NOBODY }
    }

    /// What a mapper or copier needs to know about a domain.
    pub(super) fn peer(&mut self, seat: SeatId, domid: DomId) -> Result<Answer, Refusal> {
        let us = self.domain_of(seat)?;
        let slot = self.slot_if_known(us, domid);
        let domain = self.live(domid).ok_or(Refusal::grant(GrantRef(0), GrantStatus::BadDomain))?;
        let generation = domain.generation;
        Ok(match &domain.memory {
            Some(memory) => Answer {
                reply: Reply::Peer { generation, pages: memory.pages, slot },
                fds: vec![Arc::clone(&memory.fd), Arc::clone(&memory.table_fd)],
            },
            None => Reply::Peer { generation, pages: 0, slot }.into(),
        })
    }

    /// A process is gone: its maps and ports go, and its domain if it was the last to act for it. Returns the domain
    /// if that died.
    pub(super) fn leave(&mut self, seat: SeatId) -> Option<DomId> {
        let gone = self.remove_seat(seat)?;
        let domain = self.live(gone)?;
        let survives = match domain.kind {
            Kind::Dom0 => true,
            Kind::Driver => self.seats.values().any(|other| other.domid == gone),
            Kind::Guest => false,
        };
        if survives {
            return None;
        }
        self.bury(gone);
        Some(gone)
    }

    fn remove_seat(&mut self, seat: SeatId) -> Option<DomId> {
        let maps: Vec<u64> = self.seats.get(&seat)?.maps.keys().copied().collect();
        for handle in maps {
            // The handle is from the seat's own list.
            let _ = self.unmap(seat, handle);
        }
        let gone = self.seats.remove(&seat)?;
        for port in gone.ports {
            self.close_port(gone.domid, port);
        }
        Some(gone.domid)
    }

    /// Destroys a domain, whoever acts for it.
    pub(super) fn destroy(&mut self, domid: DomId) -> Result<(), Refusal> {
        let domain = self.live(domid).ok_or_else(|| Refusal::invalid(format!("there is no domain {domid}")))?;
        if domain.kind == Kind::Dom0 {
            return Err(Refusal::invalid("domain 0 cannot be destroyed; stop the machine instead"));
        }
        let seats: Vec<SeatId> =
            self.seats.iter().filter(|(_, seat)| seat.domid == domid).map(|(&seat, _)| seat).collect();
        for seat in seats {
            self.remove_seat(seat);
        }
        self.bury(domid);
        Ok(())
    }

    /// From here on nobody finds the domain any more. It stays as a zombie while its pages are mapped: those mappings
    /// remain good memory, as on Xen. And it keeps its id until XenStore has forgotten it, see `cleared`.
    fn bury(&mut self, domid: DomId) {
        self.board.set(domid, 0);
        if let Some(domain) = self.domains.get_mut(&domid) {
            domain.dying = true;
        }
    }

    /// XenStore has forgotten a domain that was buried: its id may be used again, as far as that goes.
    pub(super) fn cleared(&mut self, domid: DomId) {
        if let Some(domain) = self.domains.get_mut(&domid).filter(|domain| domain.dying) {
            domain.cleared = true;
        }
        self.reap(domid);
    }

    /// Forgets a zombie that nobody holds any more.
    pub(super) fn reap(&mut self, domid: DomId) {
        let done = |domain: &Domain| domain.dying && domain.cleared && domain.actives.maps == 0;
        if !self.domains.get(&domid).is_some_and(done) {
            return;
        }
        // Driver domains come back, and the channels that guests keep for them go on counting.
        if let Some(Domain { kind: Kind::Guest, .. }) = self.domains.remove(&domid) {
            self.slots.retire(&self.tally, domid);
        }
    }

    /// The domains that may serve devices.
    pub(super) fn backends(&self) -> Vec<DomId> {
        self.domains.iter().filter(|(_, domain)| domain.kind != Kind::Guest).map(|(&domid, _)| domid).collect()
    }

    pub(super) fn list(&self) -> Vec<DomainInfo> {
        let seats = |domid| self.seats.values().filter(|seat| seat.domid == domid).count();
        self.domains
            .iter()
            .map(|(&domid, domain)| DomainInfo {
                domid,
                name: domain.name.clone(),
                memory_pages: domain.memory.as_ref().map_or(0, |memory| memory.pages),
                grants: domain.memory.as_ref().map_or(0, |memory| memory.table.in_use()),
                mapped: domain.actives.maps,
                maps_held: domain.maps_held,
                ports: u32::try_from(domain.ports.len()).unwrap_or(u32::MAX),
                seats: u32::try_from(seats(domid)).unwrap_or(u32::MAX),
                zombie: domain.dying,
            })
            .collect()
    }
}

impl GuestMemory {
    fn create(pages: u32, grants: u32) -> std::io::Result<Self> {
        let fd = memfd::sealed("xen-guest-memory", pages as usize * PAGE_SIZE)?;
        let table_len = (grants as usize * ENTRY_SIZE).next_multiple_of(PAGE_SIZE);
        let table_fd = memfd::sealed("xen-grant-table", table_len)?;
        let table = GrantTable::new(Mapping::of_file(&table_fd, 0, table_len, true)?);
        Ok(Self { fd: Arc::new(fd), pages, table_fd: Arc::new(table_fd), table })
    }
}
