//! blkfront: the guest's half, for emulated guests, tests and benchmarks.
//!
//! [`Frontend::connect`] walks through the handshake of a Linux guest's blkfront; [`Queue`] is one ring with a pool of
//! granted pages. Like blkfront's persistent grants, the pool is granted once; the caller says which of its pages a
//! request uses.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::memory::Mapping;
use hypervisor::{DomId, EventChannel, GrantAccess, GrantRef, Guest, PAGE_SIZE, Shared};
use ring::{FrontRing, Layout, Overflow};
use rustix::event::{PollFd, PollFlags};
use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, ErrorCode, Store};

use crate::abi::{Answer, DIRECT_SEGMENTS, Protocol, SEGMENT_SIZE, SEGMENTS_PER_PAGE, Segment, Slot};

/// How long the backend may take for each step of the handshake.
const PATIENCE: Duration = Duration::from_secs(10);

/// What went wrong at the guest's side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor refused.
    #[error(transparent)]
    Xen(#[from] hypervisor::Error),
    /// XenStore refused.
    #[error(transparent)]
    Store(#[from] xenstore_client::Error),
    /// The backend did not do its part.
    #[error("{0}")]
    Backend(String),
}

/// What the guest asks for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Slot layout.
    pub protocol: Protocol,
    /// Whether the key `protocol` is written; without it the backend must take us for a 32-bit guest.
    pub name_protocol: bool,
    /// 2^order pages a ring, at most what the backend offers.
    pub ring_order: u32,
    /// Queues, at most what the backend offers.
    pub queues: u32,
    /// Whether to say `feature-persistent`.
    pub persistent: bool,
    /// Pages of data for each queue.
    pub pool_pages: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            protocol: Protocol::X86_64,
            name_protocol: true,
            ring_order: 0,
            queues: 1,
            persistent: true,
            pool_pages: 32 * DIRECT_SEGMENTS,
        }
    }
}

/// What the backend says about the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Capacity in units of 512 bytes.
    pub sectors: u64,
    /// Bytes of the disk's own sectors.
    pub sector_size: u32,
    /// VDISK_* bits.
    pub info: u32,
    /// Whether FLUSH_DISKCACHE is offered.
    pub flush: bool,
    /// Whether DISCARD is offered.
    pub discard: bool,
    /// Most segments of an indirect request; 0 where they are not offered.
    pub indirect: usize,
}

impl Disk {
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.info & 4 != 0
    }
}

/// A connected disk.
#[derive(Debug)]
pub struct Frontend {
    store: Client,
    guest: Arc<dyn Guest>,
    path: String,
    backend_path: String,
    disk: Disk,
    queues: Vec<Queue>,
}

impl Frontend {
    /// Connects device `devid`, which the toolstack has attached to our domain.
    ///
    /// # Errors
    /// When the backend does not offer what is asked for, does not answer in time, or refuses; its `error` node is
    /// part of the message.
    pub fn connect(guest: Arc<dyn Guest>, devid: u32, options: &Options) -> Result<Self, Error> {
        let store = guest.store()?;
        let path = format!("{}/device/vbd/{devid}", guest.domid().home());
        let backend_path = store.read_str(&format!("{path}/backend"))?;
        let backend = store.read_str(&format!("{path}/backend-id"))?;
        let backend: DomId = backend.parse().map_err(|_| Error::Backend(format!("backend-id is {backend:?}")))?;
        let mut front = Self { store, guest, path, backend_path, disk: Disk::none(), queues: Vec::new() };
        // Closed is where a backend stands that was just left, and comes back from.
        front.wait(&[State::InitWait], &[])?;
        let options = front.choose(options)?;
        for _ in 0..options.queues {
            let queue = Queue::new(&front.guest, backend, &options)?;
            front.queues.push(queue);
        }
        front.publish(&options)?;
        front.wait(&[State::Connected], &[State::Closing, State::Closed])?;
        front.disk = front.read_disk()?;
        for queue in &mut front.queues {
            queue.indirect = front.disk.indirect;
        }
        front.switch(State::Connected)?;
        Ok(front)
    }

    /// What is asked for, as far as the backend offers it.
    fn choose(&self, options: &Options) -> Result<Options, Error> {
        let ring_order = self.backend_number("max-ring-page-order")?.unwrap_or(0) as u32;
        let queues = self.backend_number("multi-queue-max-queues")?.unwrap_or(1) as u32;
        Ok(Options {
            ring_order: options.ring_order.min(ring_order),
            queues: options.queues.clamp(1, queues),
            ..*options
        })
    }

    fn publish(&self, options: &Options) -> Result<(), Error> {
        let mut keys: Vec<(String, String)> = Vec::new();
        if options.queues > 1 {
            keys.push(("multi-queue-num-queues".into(), options.queues.to_string()));
        }
        if options.ring_order > 0 {
            keys.push(("ring-page-order".into(), options.ring_order.to_string()));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let prefix = if options.queues > 1 { format!("queue-{index}/") } else { String::new() };
            for (page, gref) in queue.ring_refs.iter().enumerate() {
                let name = if options.ring_order > 0 { format!("ring-ref{page}") } else { "ring-ref".into() };
                keys.push((format!("{prefix}{name}"), gref.to_string()));
            }
            keys.push((format!("{prefix}event-channel"), queue.channel.port().to_string()));
        }
        if options.name_protocol {
            keys.push(("protocol".into(), options.protocol.name().into()));
        }
        keys.push(("feature-persistent".into(), u32::from(options.persistent).to_string()));
        keys.push(("state".into(), State::Initialised.to_string()));
        self.store.transaction(|tx| {
            keys.iter().try_for_each(|(key, value)| tx.write(&format!("{}/{key}", self.path), value))
        })?;
        Ok(())
    }

    fn read_disk(&self) -> Result<Disk, Error> {
        let number = |key: &str| Ok::<_, Error>(self.backend_number(key)?.unwrap_or(0));
        Ok(Disk {
            sectors: number("sectors")?,
            sector_size: number("sector-size")? as u32,
            info: number("info")? as u32,
            flush: number("feature-flush-cache")? != 0,
            discard: number("feature-discard")? != 0,
            indirect: number("feature-max-indirect-segments")? as usize,
        })
    }

    fn backend_number(&self, key: &str) -> Result<Option<u64>, Error> {
        let text = self.store.read_opt(&format!("{}/{key}", self.backend_path))?;
        text.map(|text| text.parse().map_err(|_| Error::Backend(format!("{key} is {text:?}")))).transpose()
    }

    /// Waits until the backend is in a state that is `wanted`, or has given up; it may have said why.
    fn wait(&self, wanted: &[State], given_up: &[State]) -> Result<(), Error> {
        let path = format!("{}/state", self.backend_path);
        let failure = match toolstack::wait_state(&self.store, &path, &[wanted, given_up].concat(), PATIENCE) {
            Ok(state) if wanted.contains(&state) => return Ok(()),
            Ok(state) => format!("the backend went to state {state}"),
            Err(error @ xenstore_client::Error::Timeout { .. }) => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        let reason = self.store.read_opt(&format!("{}/error", self.backend_path))?;
        Err(Error::Backend(format!("{failure}: {}", reason.as_deref().unwrap_or("it does not say why"))))
    }

    fn switch(&self, state: State) -> Result<(), Error> {
        Ok(self.store.write(&format!("{}/state", self.path), &state.to_string())?)
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The queues, to be driven by one thread each.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// Disconnects as a guest does that unloads its driver: Closing, wait for the backend, Closed, and only then the
    /// pages are taken back. `queues` are those of [`take_queues`](Self::take_queues).
    ///
    /// # Errors
    /// When the backend does not follow in time, or still maps a page afterwards.
    pub fn close(mut self, queues: Vec<Queue>) -> Result<(), Error> {
        self.queues.extend(queues);
        self.switch(State::Closing)?;
        let closing = [State::Closing, State::Closed];
        toolstack::wait_state(&self.store, &format!("{}/state", self.backend_path), &closing, PATIENCE)?;
        match self.switch(State::Closed) {
            Ok(()) => {}
            // A toolstack that saw the backend's 6 does not wait for ours: the directory may be gone already.
            Err(Error::Store(error)) if matches!(error.code(), Some(ErrorCode::Access | ErrorCode::NotFound)) => {}
            Err(error) => return Err(error),
        }
        let state = format!("{}/state", self.backend_path);
        toolstack::wait_state(&self.store, &state, &[State::Closed, State::InitWait, State::Unknown], PATIENCE)?;
        for queue in self.queues.drain(..) {
            queue.release(&*self.guest)?;
        }
        Ok(())
    }

    /// Where the backend's half is in XenStore.
    pub fn backend_path(&self) -> &str {
        &self.backend_path
    }

    /// Where the device is in XenStore.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Disk {
    fn none() -> Self {
        Self { sectors: 0, sector_size: 512, info: 0, flush: false, discard: false, indirect: 0 }
    }
}

/// A piece of a request: sectors `first..=last` of page `page` of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Page of the pool.
    pub page: u32,
    /// First sector in the page.
    pub first: u8,
    /// Last sector in the page, inclusive.
    pub last: u8,
}

/// How the backend answered a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What the submitter gave along.
    pub tag: u64,
    /// BLKIF_RSP_*: 0 is success.
    pub status: i16,
}

/// A request on its way.
#[derive(Debug, Clone, Copy)]
struct Pending {
    tag: u64,
    operation: u8,
}

/// One ring of the guest's, its event channel, and a pool of granted pages for data.
#[derive(Debug)]
pub struct Queue {
    ring: FrontRing<Arc<Mapping>>,
    ring_memory: Arc<Mapping>,
    ring_refs: Vec<GrantRef>,
    channel: Box<dyn EventChannel>,
    protocol: Protocol,
    pool: Shared,
    /// A page of segment descriptors for each slot.
    descriptors: Shared,
    /// By request id, which is what goes over the wire.
    pending: Vec<Option<Pending>>,
    free_ids: Vec<u32>,
    indirect: usize,
}

impl Queue {
    fn new(guest: &Arc<dyn Guest>, backend: DomId, options: &Options) -> Result<Self, Error> {
        let pages = 1usize << options.ring_order;
        let layout = Layout::new(options.protocol.stride(), pages);
        let slots = layout.entries();
        let Shared { memory, refs: ring_refs } = guest.share(backend, pages, GrantAccess::ReadWrite)?;
        let ring_memory = Arc::new(memory);
        Ok(Self {
            ring: FrontRing::init(Arc::clone(&ring_memory), layout),
            ring_memory,
            ring_refs,
            channel: guest.alloc_unbound(backend)?,
            protocol: options.protocol,
            pool: guest.share(backend, options.pool_pages, GrantAccess::ReadWrite)?,
            descriptors: guest.share(backend, slots as usize, GrantAccess::ReadWrite)?,
            pending: vec![None; slots as usize],
            free_ids: (0..slots).rev().collect(),
            indirect: 0,
        })
    }

    /// The pool's memory: page `n` of it starts at byte `n * 4096`.
    pub fn data(&self) -> &Mapping {
        &self.pool.memory
    }

    /// The pool's grants, a page each.
    pub fn data_refs(&self) -> &[GrantRef] {
        &self.pool.refs
    }

    /// The ring's pages, for guests that misbehave.
    pub fn ring_memory(&self) -> &Mapping {
        &self.ring_memory
    }

    /// The event channel.
    pub fn channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u32 {
        self.ring.layout().entries()
    }

    /// Most pieces of one request.
    pub fn max_pieces(&self) -> usize {
        self.indirect.max(DIRECT_SEGMENTS)
    }

    /// Requests that can be made now.
    #[inline]
    pub fn free(&self) -> u32 {
        self.ring.free().min(self.free_ids.len() as u32)
    }

    /// Puts a read, write or flush into the ring; the backend sees it after [`publish`](Self::publish).
    ///
    /// # Panics
    /// When the ring is full or there are more pieces than [`max_pieces`](Self::max_pieces).
    #[inline]
    pub fn submit(&mut self, operation: u8, sector: u64, pieces: &[Piece], tag: u64) {
        let id = self.take_id(operation, tag);
        let segment = |piece: &Piece| Segment {
            gref: self.pool.refs[piece.page as usize],
            first_sect: piece.first,
            last_sect: piece.last,
        };
        let slot = if pieces.len() <= DIRECT_SEGMENTS {
            let mut segments = [Segment { gref: GrantRef(0), first_sect: 0, last_sect: 0 }; DIRECT_SEGMENTS];
            for (segment_of, piece) in segments.iter_mut().zip(pieces) {
                *segment_of = segment(piece);
            }
            Slot::direct(self.protocol, operation, id.into(), sector, &segments[..pieces.len()])
        } else {
            assert!(pieces.len() <= self.indirect && pieces.len() <= SEGMENTS_PER_PAGE);
            for (index, piece) in pieces.iter().enumerate() {
                let at = id as usize * PAGE_SIZE + index * SEGMENT_SIZE;
                self.descriptors.memory.write_record(at, &segment(piece).encode());
            }
            let page = self.descriptors.refs[id as usize];
            Slot::indirect(self.protocol, operation, id.into(), sector, pieces.len() as u16, &[page])
        };
        self.ring.request(&slot.bytes[..self.protocol.stride()]);
    }

    /// Puts a discard into the ring.
    ///
    /// # Panics
    /// When the ring is full.
    pub fn submit_discard(&mut self, sector: u64, sectors: u64, tag: u64) {
        let id = self.take_id(crate::abi::op::DISCARD, tag);
        let slot = Slot::discard(self.protocol, id.into(), sector, sectors, 0);
        self.ring.request(&slot.bytes[..self.protocol.stride()]);
    }

    fn take_id(&mut self, operation: u8, tag: u64) -> u32 {
        let Some(id) = self.free_ids.pop() else { panic!("the ring is full") };
        self.pending[id as usize] = Some(Pending { tag, operation });
        id
    }

    /// Puts any bytes into the ring, for guests that misbehave. The answer must be taken with
    /// [`raw_outcome`](Self::raw_outcome).
    pub fn submit_raw(&mut self, slot: &Slot) {
        self.ring.request(&slot.bytes[..self.protocol.stride()]);
    }

    /// Shows the requests to the backend, and notifies it if it asked for that. True when it did.
    ///
    /// # Errors
    /// When the event channel fails.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Error> {
        let notify = self.ring.publish();
        if notify {
            self.channel.notify().map_err(|error| hypervisor::Error::io("notify", error))?;
        }
        Ok(notify)
    }

    /// Takes the next answer, as blkfront does: one that does not fit a request ends the disk.
    ///
    /// # Errors
    /// When the backend broke the ring, or answered what was not asked.
    #[inline]
    pub fn outcome(&mut self) -> Result<Option<Outcome>, Error> {
        let Some(answer) = self.raw_outcome()? else { return Ok(None) };
        let place = usize::try_from(answer.id).ok().and_then(|id| self.pending.get_mut(id));
        let Some(pending) = place.and_then(Option::take) else {
            return Err(Error::Backend(format!("the backend answered request {}, which is not pending", answer.id)));
        };
        if pending.operation != answer.operation {
            let text = format!("the backend answered operation {} with {}", pending.operation, answer.operation);
            return Err(Error::Backend(text));
        }
        self.free_ids.push(answer.id as u32);
        Ok(Some(Outcome { tag: pending.tag, status: answer.status }))
    }

    /// Takes the next answer as it stands in the ring.
    ///
    /// # Errors
    /// When the backend broke the ring.
    #[inline]
    pub fn raw_outcome(&mut self) -> Result<Option<Answer>, Error> {
        let mut record = [0; 12];
        if !self.ring.consume(&mut record)
            && (self.ring.pending().map_err(broken)? == 0 || !self.ring.consume(&mut record))
        {
            return Ok(None);
        }
        Ok(Some(Answer::decode(&record)))
    }

    /// Whether answers wait.
    ///
    /// # Errors
    /// When the backend broke the ring.
    #[inline]
    pub fn has_outcome(&mut self) -> Result<bool, Error> {
        Ok(self.ring.pending().map_err(broken)? > 0)
    }

    /// Asks to be notified of the next answer. True when one waits already, and sleeping would be wrong.
    ///
    /// # Errors
    /// When the backend broke the ring.
    pub fn rearm(&mut self) -> Result<bool, Error> {
        Ok(self.ring.rearm().map_err(broken)? > 0)
    }

    /// Sleeps until an answer waits, `other` becomes readable, or `timeout` is over. True when an answer waits.
    ///
    /// # Errors
    /// When the backend broke the ring, or waiting fails.
    pub fn wait(&mut self, other: Option<BorrowedFd<'_>>, timeout: Duration) -> Result<bool, Error> {
        if self.has_outcome()? || self.rearm()? {
            return Ok(true);
        }
        let failed = |error| hypervisor::Error::io("event channel", error);
        self.channel.unmask().map_err(failed)?;
        let polled = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [polled(self.channel.fd()), polled(other.unwrap_or_else(|| self.channel.fd()))];
        let limit = rustix::event::Timespec::try_from(timeout).ok();
        match rustix::event::poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into()).into()),
        }
        self.channel.take().map_err(failed)?;
        self.has_outcome()
    }

    /// Takes the pages back.
    fn release(self, guest: &dyn Guest) -> Result<(), Error> {
        let Self { ring, ring_memory, ring_refs, channel, pool, descriptors, .. } = self;
        drop((ring, channel));
        let memory = Arc::try_unwrap(ring_memory)
            .map_err(|_| Error::Backend("the ring is still in use by this process".to_owned()))?;
        for shared in [Shared { memory, refs: ring_refs }, pool, descriptors] {
            guest.unshare(shared).map_err(|(_, error)| error)?;
        }
        Ok(())
    }
}

fn broken(overflow: Overflow) -> Error {
    Error::Backend(format!("the backend broke the ring: {overflow}"))
}
