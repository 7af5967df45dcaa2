//! One queue of the disk with both its halves: the guest's ring, pages and event channel, and blkback's queue.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blkback::abi::{Answer, Protocol, Segment, Slot, op};
use blkback::barrier::Barriers;
use blkback::grants::Grants;
use blkback::health::Health;
use blkback::queue::{Parts, Queue};
use blkback::request::Shape;
use blkback::storage::Storage;
use hypervisor::emu::GuestSeat;
use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, GrantRef, Guest, PAGE_SIZE, Shared};
use ring::{BackRing, FrontRing, Layout};

use super::disk::SECTORS;
use super::plan::{LONGEST, Op, Range};
use super::stamp::{Bytes, Content, SECTOR};

const PROTOCOL: Protocol = Protocol::X86_64;
const SHAPE: Shape =
    Shape { sectors: SECTORS, block: 1, read_only: false, discard: true, secure: true, barrier: true, indirect: 0 };

/// Pages of a request: at most 16 sectors, which begin anywhere in the first.
const PAGES: usize = 3;

/// What no sector holds: what a read does not fill.
const NOTHING: Bytes = [0xee; SECTOR];

/// A lane's pages, which outlive its queue.
#[derive(Debug)]
pub struct Pages {
    ring: Arc<Mapping>,
    ring_refs: Vec<GrantRef>,
    data: Shared,
}

impl Pages {
    /// New pages of this guest's.
    ///
    /// # Panics
    /// When the emulated machine has none left.
    pub fn new(guest: &GuestSeat) -> Self {
        let share = |pages| guest.share(DomId::DOM0, pages, GrantAccess::ReadWrite).expect("pages");
        let Shared { memory, refs } = share(1);
        Self { ring: Arc::new(memory), ring_refs: refs, data: share(LONGEST * PAGES) }
    }
}

/// What the queues of one disk share.
#[derive(Debug, Default, Clone)]
pub struct Together {
    /// Whether a flush has failed.
    pub health: Arc<Health>,
    /// Barriers.
    pub barriers: Arc<Barriers>,
}

/// A queue, and whom it serves.
#[derive(Debug)]
pub struct Lane<S> {
    front: FrontRing<Arc<Mapping>>,
    listener: Box<dyn EventChannel>,
    /// blkback's half.
    pub back: Queue<S>,
    wake: Arc<OwnedFd>,
    /// Requests that the queue has not taken yet.
    pub waiting: VecDeque<usize>,
    /// It sleeps, as its thread would.
    pub asleep: bool,
    /// The guest has raised an event.
    pub event: bool,
    /// Another queue has rung.
    pub woken: bool,
    /// A flush of its own has failed: it only finishes what it has.
    pub broken: bool,
}

impl<S: Storage> Lane<S> {
    /// Connects. `wake` is the eventfd by which other queues wake this one.
    ///
    /// # Panics
    /// When the emulated machine refuses.
    pub fn new(
        (xen, guest): (&Arc<dyn Backend>, &GuestSeat),
        pages: &Pages,
        together: &Together,
        persistent: bool,
        (storage, wake): (S, Arc<OwnedFd>),
    ) -> Self {
        let peer = Guest::domid(guest);
        pages.ring.zero(0, PAGE_SIZE);
        let layout = Layout::new(PROTOCOL.stride(), 1);
        let front = FrontRing::init(Arc::clone(&pages.ring), layout);
        let memory = xen.map(peer, &pages.ring_refs, GrantAccess::ReadWrite).expect("the ring");
        let listener = guest.alloc_unbound(DomId::DOM0).expect("a port");
        let channel = xen.bind(peer, listener.port()).expect("the event channel");
        // A port that was just bound is pending, for nothing.
        channel.take().expect("the event channel");
        let most_kept = if persistent { LONGEST * PAGES } else { 0 };
        let back = Queue::new(Parts {
            ring: BackRing::attach(memory, layout, 0),
            protocol: PROTOCOL,
            grants: Grants::new(Arc::clone(xen), peer, 96, most_kept).expect("memory"),
            channel,
            storage,
            shape: SHAPE,
            health: Arc::clone(&together.health),
            barriers: Arc::clone(&together.barriers),
            wake: Arc::clone(&wake),
            counters: Arc::default(),
            log: None,
        });
        let waiting = VecDeque::new();
        Self { front, listener, back, wake, waiting, asleep: false, event: false, woken: false, broken: false }
    }

    /// Puts request `index` of the history into the ring, `data` for each sector it writes.
    ///
    /// # Panics
    /// When the ring is full.
    pub fn ask(&mut self, pages: &Pages, (index, id): (usize, u64), op: Op, mut data: impl FnMut(u64, &mut Bytes)) {
        let (operation, range) = match op {
            Op::Read(range) => (op::READ, Some(range)),
            Op::Write(range) => (op::WRITE, Some(range)),
            Op::Flush => (op::FLUSH_DISKCACHE, None),
            Op::FlushWrite(range) => (op::FLUSH_DISKCACHE, Some(range)),
            Op::Barrier => (op::WRITE_BARRIER, None),
            Op::BarrierWrite(range) => (op::WRITE_BARRIER, Some(range)),
            Op::Discard(Range { first, count }) | Op::Erase(Range { first, count }) => {
                let secure = u8::from(matches!(op, Op::Erase(_)));
                let slot = Slot::discard(PROTOCOL, id, first, count, secure);
                return self.publish(&slot, index);
            }
        };
        let Some(Range { first, count }) = range else {
            return self.publish(&Slot::direct(PROTOCOL, operation, id, 0, &[]), index);
        };
        let start = place(index);
        let mut bytes = NOTHING;
        for sector in 0..count {
            if op.writes().is_some() {
                data(first + sector, &mut bytes);
            }
            pages.data.memory.copy_in(start + sector as usize * SECTOR, &bytes);
        }
        let mut segments = [Segment { gref: GrantRef(0), first_sect: 0, last_sect: 0 }; PAGES];
        let (mut used, mut at, end) = (0, start, start + count as usize * SECTOR);
        while at < end {
            let page_end = (at / PAGE_SIZE + 1) * PAGE_SIZE;
            let stop = end.min(page_end);
            segments[used] = Segment {
                gref: pages.data.refs[at / PAGE_SIZE],
                first_sect: (at % PAGE_SIZE / SECTOR) as u8,
                last_sect: ((stop - 1) % PAGE_SIZE / SECTOR) as u8,
            };
            (used, at) = (used + 1, stop);
        }
        self.publish(&Slot::direct(PROTOCOL, operation, id, first, &segments[..used]), index);
    }

    fn publish(&mut self, slot: &Slot, index: usize) {
        self.front.request(&slot.bytes[..PROTOCOL.stride()]);
        if self.front.publish() {
            self.listener.notify().expect("the event channel");
            self.event = true;
        }
        self.waiting.push_back(index);
    }

    /// What request `index` has read into the guest's page for the `nth` of its sectors.
    pub fn was_read(pages: &Pages, index: usize, nth: u64) -> Content {
        let mut bytes = [0; SECTOR];
        pages.data.memory.copy_out(place(index) + nth as usize * SECTOR, &mut bytes);
        Content::of(&bytes)
    }

    /// The next answer: (id, status).
    ///
    /// # Errors
    /// When the backend broke the ring.
    pub fn answer(&mut self) -> Result<Option<(u64, i16)>, ring::Overflow> {
        let mut record = [0; 12];
        if !self.front.consume(&mut record) {
            self.front.pending()?;
            if !self.front.consume(&mut record) {
                return Ok(None);
            }
        }
        let answer = Answer::decode(&record);
        Ok(Some((answer.id, answer.status)))
    }

    /// Asks to be woken by the next answer, as blkfront does when it has taken all.
    ///
    /// # Errors
    /// When the backend broke the ring.
    pub fn rearm(&mut self) -> Result<u32, ring::Overflow> {
        self.front.rearm()
    }

    /// Takes the wake-up that another queue may have sent.
    pub fn take_wake(&mut self) {
        self.woken |= rustix::io::read(&*self.wake, &mut [0; 8]).is_ok();
    }

    /// Whether its thread would run.
    pub fn is_ready(&mut self) -> bool {
        // A broken queue hears the guest no more.
        !self.asleep || (self.event && !self.broken) || self.woken || self.back.storage().has_completions()
    }
}

/// Where in its lane's pages a request's data are: each begins at another sector of its page.
fn place(index: usize) -> usize {
    index % LONGEST * PAGES * PAGE_SIZE + index * 5 % 8 * SECTOR
}
