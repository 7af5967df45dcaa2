//! From the tap to the guest.
//!
//! The way of a frame, in [`Rx::turn`]: one `readv` brings it, with its vnet header before it, into memory of ours; it
//! is looked at, and whatever the guest cannot take is done for it; it is given the pages that the guest has posted;
//! the copies of all frames of the turn are one batch, and so are the responses.
//!
//! A guest that posts too few pages (XSA-392) holds up a frame here, and behind it as many as the `backlog` takes;
//! those that come after that are dropped. After [`DRAIN`] the frame is dropped, and as long as there still are no pages every frame that comes. A guest
//! that posts nothing for [`STALL`] loses its carrier until it does; one that does not say `feature-rx-notify` never
//! tells when it has posted, so it is looked at every [`DRAIN_UNTOLD`] and keeps its carrier.

mod backlog;
mod frame;
mod resume;

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU16;
use std::time::{Duration, Instant};

use hypervisor::memory::{IoList, Mapping};
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, GrantStatus, PAGE_SIZE};
use ring::BackRing;

use crate::abi::{Extra, RX_SLOT, RxRequest, RxResponse, rx_flag, status};
use crate::broken::Broken;
use crate::counters::Counters;
use crate::hash::{HashReader, HashState};
use crate::multicast::{Multicast, MulticastReader};
use crate::negotiate::{Gso, Receives};
use crate::segment::Segments;
use crate::steer::Post;
use crate::tap::Tap;
pub use backlog::BACKLOG;
use backlog::Backlog;
use frame::{Frame, Origin};

/// Frames of one turn.
const BATCH: usize = 64;
/// Bytes for one frame with its header: the largest that a tap delivers, 64 KiB and an Ethernet header with tags.
const ROOM: usize = 68 * 1024;
/// Bytes that frames are read to in one turn.
const ARENA: usize = 8 * ROOM;
/// How long a frame waits for pages (Linux: rx_drain_timeout_msecs).
pub const DRAIN: Duration = Duration::from_secs(10);
/// The same for a guest that does not tell when it has posted some.
pub const DRAIN_UNTOLD: Duration = Duration::from_millis(30);
/// After how long without any pages a guest has stalled (Linux: rx_stall_timeout_msecs).
pub const STALL: Duration = Duration::from_secs(60);
/// How often the ring of a guest that does not tell is looked at while a frame waits.
const LOOK: Duration = Duration::from_millis(5);

/// What goes into a slot of the ring.
#[derive(Debug, Clone, Copy)]
enum Answer {
    /// Data; the copy is the one of this number.
    Data(RxResponse, usize),
    /// An extra.
    Extra([u8; Extra::SIZE]),
    /// What comes before a frame that is to be cut.
    Prefix(RxResponse),
}

/// Whether the guest has pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Since the last look it has got some, after it had stalled.
    Ready,
    /// It has had none for too long.
    Stalled,
}

/// The receive ring and what its frames go through.
#[derive(Debug)]
pub struct Rx {
    ring: BackRing<Mapping>,
    xen: Arc<dyn Backend>,
    peer: DomId,
    receives: Receives,
    headroom: Arc<AtomicU16>,
    hash: HashReader,
    multicast: MulticastReader,
    post: Option<Post>,
    counters: Arc<Counters>,
    arena: Rc<Mapping>,
    /// Requests that the guest has posted and that were not used yet. They are taken out of the ring at once: only then
    /// can we ask to be notified of the next one.
    posted: VecDeque<RxRequest>,
    /// A frame that waits for pages.
    waiting: Option<Frame>,
    /// What has come after it.
    backlog: Backlog,
    /// Frames that come are dropped until there are pages.
    dry: bool,
    /// Segments that are still to be made of a frame that the guest cannot cut.
    segments: Option<Segments>,
    stalled: bool,
    /// Pages have come since the guest stalled, though they may be used up already.
    came: bool,
    /// When a frame was last delivered, or the guest last became ready.
    last: Instant,
    ops: Vec<CopyOp>,
    answers: Vec<Answer>,
    memory: IoList,
}

/// What an [`Rx`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The mapped ring.
    pub ring: BackRing<Mapping>,
    /// The hypervisor.
    pub xen: Arc<dyn Backend>,
    /// The guest.
    pub peer: DomId,
    /// What it can take.
    pub receives: Receives,
    /// Bytes it wants before each frame; it may change its mind.
    pub headroom: Arc<AtomicU16>,
    /// How it wants frames to be hashed.
    pub hash: Arc<HashState>,
    /// The groups it joined.
    pub multicast: Arc<Multicast>,
    /// The way to and from the vif's other queues, where there are any.
    pub post: Option<Post>,
    /// Read by others.
    pub counters: Arc<Counters>,
}

impl Rx {
    /// Puts it together.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts { ring, xen, peer, receives, headroom, hash, multicast, post, counters } = parts;
        let slots = ring.layout().entries() as usize;
        Ok(Self {
            ring,
            xen,
            peer,
            receives,
            headroom,
            hash: HashReader::new(hash),
            multicast: MulticastReader::new(multicast),
            post,
            counters,
            arena: Rc::new(Mapping::anonymous(ARENA + ROOM)?),
            posted: VecDeque::with_capacity(slots),
            waiting: None,
            backlog: Backlog::default(),
            dry: false,
            segments: None,
            // Until it has posted its first page it has no carrier.
            stalled: receives.notifies,
            came: false,
            last: Instant::now(),
            ops: Vec::with_capacity(slots),
            answers: Vec::with_capacity(slots),
            memory: IoList::with_capacity(1),
        })
    }

    /// Whether a frame would be read from the tap now.
    pub fn wants_frames(&self) -> bool {
        self.waiting.is_some() || !self.posted.is_empty() || self.dry || !self.stalled
    }

    /// Whether pages have come that something waits for.
    ///
    /// # Errors
    /// When the guest broke the ring.
    #[inline]
    pub fn has_pages(&mut self) -> Result<bool, Broken> {
        Ok(self.waits_for_pages() && self.ring.pending().map_err(ring_broken)? > 0)
    }

    fn waits_for_pages(&self) -> bool {
        self.waiting.is_some() || self.stalled || self.dry
    }

    /// The way to and from the vif's other queues, for who drives the queue.
    pub fn post(&self) -> Option<&Post> {
        self.post.as_ref()
    }

    /// Asks the guest to notify us of its next page, if anything waits for it. True when there is one already.
    ///
    /// # Errors
    /// When the guest broke the ring.
    pub fn rearm(&mut self) -> Result<bool, Broken> {
        if !self.waits_for_pages() {
            return Ok(false);
        }
        Ok(self.ring.rearm().map_err(ring_broken)? > 0)
    }

    /// When something has to be done even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let frame = self.waiting.map(|frame| {
            // Nobody tells us of new pages then.
            if self.receives.notifies { frame.since + DRAIN } else { Instant::now() + LOOK }
        });
        let stall = (self.receives.notifies && !self.stalled && self.posted.is_empty()).then(|| self.last + STALL);
        match (frame, stall) {
            (Some(frame), Some(stall)) => Some(frame.min(stall)),
            (frame, stall) => frame.or(stall),
        }
    }

    /// Whether the guest has stalled, or is ready again, since the last call. Both count for the carrier.
    pub fn pages(&mut self, now: Instant) -> Option<Pages> {
        if self.stalled && self.came {
            (self.stalled, self.last) = (false, now);
            return Some(Pages::Ready);
        }
        if self.receives.notifies && !self.stalled && self.posted.is_empty() && now >= self.last + STALL {
            (self.stalled, self.came) = (true, false);
            return Some(Pages::Stalled);
        }
        None
    }

    /// Takes the requests that the guest has posted.
    fn refill(&mut self) -> Result<(), Broken> {
        if self.ring.pending().map_err(ring_broken)? == 0 {
            return Ok(());
        }
        let mut slot = [0; RX_SLOT];
        while self.ring.consume(&mut slot) {
            self.posted.push_back(RxRequest::decode(&slot));
        }
        (self.dry, self.came) = (false, true);
        Ok(())
    }

    /// Brings as many frames as there are, and pages for. Returns how much was done, 0 for nothing, and whether the guest
    /// wants to be notified of responses.
    ///
    /// # Errors
    /// When the queue must stop.
    pub fn turn(&mut self, tap: &Tap, now: Instant) -> Result<(u32, bool), Broken> {
        self.refill()?;
        let mut moved = 0;
        // A frame that waits stays where it is; others are read behind it.
        let mut used = self.waiting.map_or(0, |frame| frame.at + frame.len);
        for _ in 0..BATCH {
            let Some(frame) = self.next_frame(tap, &mut used, &mut moved, now)? else { break };
            if frame.slots() <= self.posted.len() {
                self.place(&frame);
                self.last = now;
                moved += 1;
            } else if self.dry || now.saturating_duration_since(frame.since) >= self.drain() {
                self.dry = true;
                self.segments = None;
                self.counters.rx_dropped.add(1);
            } else {
                self.waiting = Some(frame);
                break;
            }
        }
        if self.waiting.is_some() {
            moved += self.read_ahead(tap)?;
        }
        self.deliver()?;
        Ok((moved, self.ring.publish()))
    }

    /// Takes out of the tap what has come behind the frame that waits. Returns how many frames that were.
    fn read_ahead(&mut self, tap: &Tap) -> Result<u32, Broken> {
        for count in 0..BATCH as u32 {
            let full = self.backlog.is_full();
            // What will be dropped need not be copied: the kernel frees all of a frame, however little of it was read.
            let Some(len) = self.read_tap(tap, ARENA, if full { PAGE_SIZE } else { ROOM })? else { return Ok(count) };
            if full {
                self.counters.rx_dropped.add(1);
                continue;
            }
            let mut frame = vec![0; len].into_boxed_slice();
            self.arena.copy_out(ARENA, &mut frame);
            self.backlog.push(frame);
        }
        Ok(BATCH as u32)
    }

    /// One frame from the tap to this place in the arena. None where there is none.
    fn read_tap(&mut self, tap: &Tap, at: usize, room: usize) -> Result<Option<usize>, Broken> {
        self.memory.clear();
        self.memory.push(&self.arena, at, room);
        match tap.read(&self.memory) {
            Ok(0) => {
                let source = io::ErrorKind::UnexpectedEof.into();
                Err(Broken::Host { what: "the tap was closed", source })
            }
            Ok(len) => Ok(Some(len)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
            Err(source) => Err(Broken::Host { what: "reading from the tap", source }),
        }
    }

    fn drain(&self) -> Duration {
        if self.receives.notifies { DRAIN } else { DRAIN_UNTOLD }
    }

    /// The frame that waits, or else the next segment of one that is being cut, or else a new one.
    fn next_frame(
        &mut self,
        tap: &Tap,
        used: &mut usize,
        moved: &mut u32,
        now: Instant,
    ) -> Result<Option<Frame>, Broken> {
        if let Some(frame) = self.waiting.take() {
            return Ok(Some(frame));
        }
        // Frames that are not delivered are no reason to stop, but must not keep us for ever.
        for _ in 0..BATCH {
            if ARENA - *used < ROOM {
                return Ok(None);
            }
            if let Some(frame) = self.next_segment(*used, now) {
                *used = (frame.at + frame.len).next_multiple_of(64);
                return Ok(Some(frame));
            }
            if !self.wants_frames() {
                return Ok(None);
            }
            if let Some(frame) = self.post.as_ref().and_then(Post::take) {
                self.arena.copy_in(*used, &frame);
                *moved += 1;
                if let Some(frame) = self.examine(*used, frame.len(), Origin::Post, now) {
                    *used = (frame.at + frame.len).next_multiple_of(64);
                    return Ok(Some(frame));
                }
                continue;
            }
            let len = match self.backlog.pop() {
                Some(frame) => {
                    self.arena.copy_in(*used, &frame);
                    frame.len()
                }
                None => match self.read_tap(tap, *used, ROOM)? {
                    Some(len) => len,
                    None => return Ok(None),
                },
            };
            *moved += 1;
            if let Some(frame) = self.examine(*used, len, Origin::Tap, now) {
                *used = (frame.at + frame.len).next_multiple_of(64);
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Gives a frame its pages.
    fn place(&mut self, frame: &Frame) {
        let mut extras = [None; 3];
        let mut rest = frame.len;
        let prefix = frame.gso.filter(|_| frame.how == Gso::Prefix);
        if let Some((_, size)) = prefix {
            let id = self.take_request().id;
            let slots = (frame.data_slots() + frame.other_slots() - 1) as i16;
            let flags = rx_flag::GSO_PREFIX | rx_flag::MORE_DATA;
            self.answers.push(Answer::Prefix(RxResponse { id, offset: size, flags, status: slots }));
        } else if let Some((kind, size)) = frame.gso {
            extras[0] = Some(Extra::Gso { size, kind });
        }
        extras[1] = frame.hash.map(|hash| Extra::Hash {
            kind: hash.kind,
            algorithm: crate::hash::Algorithm::Toeplitz.number(),
            value: hash.value,
        });
        extras[2] = (frame.headroom > 0).then_some(Extra::Xdp { headroom: frame.headroom });
        let mut left = extras.iter().flatten().count();
        let mut flags = frame.flags | if left > 0 { rx_flag::EXTRA_INFO } else { 0 };
        loop {
            let request = self.take_request();
            let len = rest.min(frame.room());
            let op = CopyOp {
                gref: request.gref,
                offset: frame.headroom,
                len: len as u16,
                direction: CopyDirection::ToGuest,
                local: frame.at + frame.len - rest,
                status: GrantStatus::GeneralError,
            };
            rest -= len;
            flags |= if rest > 0 { rx_flag::MORE_DATA } else { 0 };
            // Linux counts the headroom into the first page's bytes and says offset 0, and its netfront then sees as
            // many bytes too many; netif.h says where the data begin and how many there are.
            let response = RxResponse { id: request.id, offset: frame.headroom, flags, status: len as i16 };
            self.answers.push(Answer::Data(response, self.ops.len()));
            self.ops.push(op);
            for extra in extras.iter_mut().filter_map(Option::take) {
                left -= 1;
                self.take_request();
                self.answers.push(Answer::Extra(extra.encode(left > 0)));
            }
            flags = 0;
            if rest == 0 {
                break;
            }
        }
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(frame.len as u64);
    }

    fn take_request(&mut self) -> RxRequest {
        // The caller has counted them: a frame is placed only where it fits.
        self.posted.pop_front().unwrap_or(RxRequest { id: 0, gref: hypervisor::GrantRef(0) })
    }

    /// Copies what was placed, and responds.
    fn deliver(&mut self) -> Result<(), Broken> {
        if self.answers.is_empty() {
            return Ok(());
        }
        self.xen.copy(self.peer, &self.arena, &mut self.ops).map_err(Broken::Copy)?;
        for answer in self.answers.drain(..) {
            match answer {
                Answer::Data(mut response, op) => {
                    if self.ops[op].status != GrantStatus::Okay {
                        response.status = status::ERROR;
                        self.counters.rx_errors.add(1);
                    }
                    self.ring.respond(&response.encode());
                }
                Answer::Prefix(response) => self.ring.respond(&response.encode()),
                Answer::Extra(extra) => self.ring.respond(&extra),
            }
        }
        self.ops.clear();
        Ok(())
    }
}

fn ring_broken(source: ring::Overflow) -> Broken {
    Broken::Ring { ring: "receive", source }
}
