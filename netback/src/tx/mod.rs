//! From the guest to the tap.
//!
//! The way of a packet, in [`Tx::turn`]: its slots are copied out of the ring, once, and checked from the copies; the
//! data of all packets of the turn come over in one batch of grant copies, each packet in one piece and in memory that
//! nobody else sees; its headers are parsed there; a [vnet header](crate::vnet) is put before it, and one `writev`
//! gives it to the tap. Then all slots are answered, in order, and shown.
//!
//! What a guest may get wrong, and what becomes of it (Linux xen-netback: xenvif_count_requests, xenvif_get_extras,
//! xenvif_set_skb_gso, checksum_setup):
//!
//! | fault | what happens | here |
//! |---|---|---|
//! | producer index more than a ring ahead | the vif closes | [`Broken::Ring`] |
//! | the packet, or its chain of extras, goes on beyond the last request | the vif closes | [`Fatal::Unfinished`] |
//! | a 21st slot after the first | the vif closes | [`Fatal::Slots`] |
//! | `offset + size` of a slot beyond its page (also "size 65535 in one slot") | the vif closes | [`Fatal::CrossesPage`] |
//! | an extra of an unknown type, GSO of an unknown type | the vif closes | [`Fatal::Extra`] |
//! | GSO with a size of 0 or of type NONE | the vif closes | [`Fatal::Gso`] |
//! | a 19th or 20th slot after the first | the packet: ERROR | [`Refusal::Slots`] |
//! | a later slot larger than what is left of the packet | the packet: ERROR | [`Refusal::SlotSize`] |
//! | less than 14 bytes in the first slot (so also a packet of size 0) | the packet: ERROR | [`Refusal::Short`] |
//! | a grant that cannot be copied from | the packet: ERROR in all its slots | [`Refusal::Grant`] |
//! | `csum_blank` on what is neither TCP nor UDP over IP, on a fragment, or truncated | the packet: ERROR | [`Refusal::Checksum`] |
//! | GSO whose type is not the packet's, or on UDP | the packet: ERROR | [`Refusal::Gso`] |
//! | the kernel finds header and packet to contradict each other | the packet: ERROR | [`Refusal::Kernel`] |
//! | a group that cannot be joined | ERROR | [`Refusal::Multicast`] |
//! | later slots of no bytes (XSA-448) | fine, they add nothing | |
//! | GSO without `csum_blank` | fine, the checksum is made partial; counted | |
//! | two extras of one type | fine, the last one counts, as in Linux | |
//! | more bytes than the rate allows | it waits in the ring | |
//! | the tap is full or down | the packet: DROPPED; counted | |

mod resume;
mod send;

use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use hypervisor::memory::{IoList, Mapping};
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, GrantStatus, PAGE_SIZE};
use ring::BackRing;
use xenstore_client::LogGate;

use crate::abi::{Extra, GsoType, MAX_PACKET, SLOTS_MIN, TX_SLOT, TxRequest, tx_flag};
use crate::broken::{Broken, Fatal};
use crate::counters::Counters;
use crate::multicast::Multicast;
use crate::packet::ETHERNET;
use crate::queue::Live;
use crate::tap::Tap;
use crate::vnet::Offload;

/// Packets of one turn. Enough to share the price of a batch; few enough that the guest can refill the ring while we
/// work.
const BATCH: usize = 64;
/// Bytes that packets are copied to in one turn: eight of the largest. What is used stays in the processor's cache.
const ARENA: usize = 8 * ROOM;
/// Bytes that one packet may need there, with its header before it.
const ROOM: usize = 68 * 1024;
/// Slots after the first beyond which a guest is taken for hostile (Linux: fatal_skb_slots).
const SLOTS_FATAL: usize = 20;

const _: () = assert!(ROOM >= Offload::SIZE + MAX_PACKET);

/// Why a packet of the guest's was not sent, though it may send others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Refusal {
    /// More slots than any frontend may use.
    Slots,
    /// A slot is larger than what is left of the packet.
    SlotSize,
    /// Shorter than an Ethernet header.
    Short,
    /// A page could not be copied from.
    Grant,
    /// A checksum is to be finished that is not where one can be.
    Checksum,
    /// It is not what its GSO extra says.
    Gso,
    /// The kernel refused it.
    Kernel,
    /// A group that cannot be joined.
    Multicast,
}

impl Refusal {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Slots,
        Self::SlotSize,
        Self::Short,
        Self::Grant,
        Self::Checksum,
        Self::Gso,
        Self::Kernel,
        Self::Multicast,
    ];
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is to be copied and sent.
    Send,
    /// It is done: a request about groups, which has no data.
    Done,
    /// It is refused.
    Refused(Refusal),
}

/// A packet between its consumption and its responses.
#[derive(Debug)]
struct Packet {
    verdict: Verdict,
    /// Of the first slot.
    flags: u16,
    gso: Option<(GsoType, u16)>,
    /// Slots that carried extras; they come after the first.
    extras: usize,
    /// The ids of its slots, in `ids`: the first one's, the extras', the others'.
    ids: Range<usize>,
    /// Its copies, in `ops`.
    ops: Range<usize>,
    /// Where its header is in the arena; the packet follows.
    at: usize,
    len: usize,
}

/// What the extras of a packet say.
#[derive(Debug, Default)]
struct Extras {
    count: usize,
    gso: Option<(GsoType, u16)>,
    add: Option<[u8; 6]>,
    delete: Option<[u8; 6]>,
}

/// The transmit ring and what its packets go through.
#[derive(Debug)]
pub struct Tx {
    ring: BackRing<Mapping>,
    xen: Arc<dyn Backend>,
    peer: DomId,
    arena: Rc<Mapping>,
    /// Bytes of the arena in use.
    used: usize,
    ops: Vec<CopyOp>,
    packets: Vec<Packet>,
    ids: Vec<u16>,
    memory: IoList,
    /// Has the guest's rate.
    live: Arc<Live>,
    /// A first slot that was taken and waits for credit, and until when.
    held: Option<(TxRequest, Instant)>,
    multicast: Arc<Multicast>,
    counters: Arc<Counters>,
    log: LogGate,
}

/// What a [`Tx`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The mapped ring.
    pub ring: BackRing<Mapping>,
    /// The hypervisor.
    pub xen: Arc<dyn Backend>,
    /// The guest.
    pub peer: DomId,
    /// What it may send.
    pub live: Arc<Live>,
    /// The groups it joined.
    pub multicast: Arc<Multicast>,
    /// Read by others.
    pub counters: Arc<Counters>,
}

impl Tx {
    /// Puts it together.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts { ring, xen, peer, live, multicast, counters } = parts;
        let slots = ring.layout().entries() as usize;
        Ok(Self {
            ring,
            xen,
            peer,
            arena: Rc::new(Mapping::anonymous(ARENA)?),
            used: 0,
            ops: Vec::with_capacity(slots),
            packets: Vec::with_capacity(BATCH),
            ids: Vec::with_capacity(slots),
            memory: IoList::with_capacity(1),
            live,
            held: None,
            multicast,
            counters,
            log: LogGate::default(),
        })
    }

    /// The rate was changed: what waits is looked at again.
    pub fn rate_changed(&mut self, now: Instant) {
        if let Some((_, until)) = &mut self.held {
            *until = now;
        }
    }

    /// Until when the rate stops the guest, if it does.
    pub fn held_until(&self) -> Option<Instant> {
        self.held.map(|(_, until)| until)
    }

    /// Requests that wait to be taken; none while the rate stops the guest.
    ///
    /// # Errors
    /// When the guest broke the ring.
    #[inline]
    pub fn pending(&mut self) -> Result<u32, Broken> {
        if self.held.is_some() {
            return Ok(0);
        }
        self.ring.pending().map_err(ring_broken)
    }

    /// Asks the guest to notify us of its next request. True when one is there already. While the rate stops the guest
    /// nothing is asked for.
    ///
    /// # Errors
    /// When the guest broke the ring.
    pub fn rearm(&mut self) -> Result<bool, Broken> {
        if self.held.is_some() {
            return Ok(false);
        }
        Ok(self.ring.rearm().map_err(ring_broken)? > 0)
    }

    /// Takes what can be taken now, and sends it. Returns how many packets were taken, and whether the guest wants to
    /// be notified of their responses.
    ///
    /// # Errors
    /// When the queue must stop. What was taken before the fault has been sent and answered.
    pub fn turn(&mut self, tap: &Tap, now: Instant) -> Result<(u32, bool), Broken> {
        if self.held.is_some_and(|(_, until)| now < until) {
            return Ok((0, false));
        }
        let gathered = self.gather(now);
        let taken = self.packets.len() as u32;
        let sent = self.send(tap);
        // A notification that is due is no less due because of a fault; but who is told of a fault looks at the state.
        let notify = self.ring.publish();
        gathered.and(sent).map(|()| (taken, notify))
    }

    /// Takes packets out of the ring and notes their copies.
    fn gather(&mut self, now: Instant) -> Result<(), Broken> {
        let mut left = self.ring.pending().map_err(ring_broken)?;
        while self.packets.len() < BATCH && ARENA - self.used >= ROOM {
            let Some(first) = self.first(&mut left) else { break };
            if let Err(until) = self.live.limit().take(u32::from(first.size), || now) {
                self.held = Some((first, until));
                self.counters.tx_throttled.add(1);
                break;
            }
            self.take(first, &mut left)?;
        }
        Ok(())
    }

    fn first(&mut self, left: &mut u32) -> Option<TxRequest> {
        match self.held.take() {
            Some((first, _)) => Some(first),
            None => self.consume(left).map(|slot| TxRequest::decode(&slot)),
        }
    }

    /// The next slot, if there is one.
    #[inline]
    fn consume(&mut self, left: &mut u32) -> Option<[u8; TX_SLOT]> {
        let mut slot = [0; TX_SLOT];
        if *left == 0 || !self.ring.consume(&mut slot) {
            return None;
        }
        *left -= 1;
        Some(slot)
    }

    /// Takes the packet that begins with `first`.
    fn take(&mut self, first: TxRequest, left: &mut u32) -> Result<(), Broken> {
        let ids = self.ids.len();
        self.ids.push(first.id);
        let extras = if first.flags & tx_flag::EXTRA_INFO != 0 { self.extras(left)? } else { Extras::default() };
        let ops = self.ops.len();
        let mut packet = Packet {
            verdict: Verdict::Send,
            flags: first.flags,
            gso: extras.gso,
            extras: extras.count,
            ids: ids..self.ids.len(),
            ops: ops..ops,
            at: self.used,
            len: usize::from(first.size),
        };
        if let Some(verdict) = self.group(&extras) {
            packet.verdict = verdict;
            self.packets.push(packet);
            return Ok(());
        }
        let outcome = match self.slots(&first, packet.at + Offload::SIZE, left) {
            Ok(_) if matches!(packet.gso, Some((GsoType::None, _) | (_, 0))) => Err(Fatal::Gso.into()),
            outcome => outcome,
        };
        packet.verdict = match outcome {
            Ok(verdict) => verdict,
            Err(broken) => {
                // Those of the packets before it are still to be made, and only those.
                self.ops.truncate(ops);
                return Err(broken);
            }
        };
        packet.ids.end = self.ids.len();
        if packet.verdict == Verdict::Send {
            packet.ops.end = self.ops.len();
            // The next header starts on a cache line of its own.
            self.used = (packet.at + Offload::SIZE + packet.len).next_multiple_of(64);
        } else {
            self.ops.truncate(ops);
        }
        self.packets.push(packet);
        Ok(())
    }

    fn extras(&mut self, left: &mut u32) -> Result<Extras, Broken> {
        let mut extras = Extras::default();
        loop {
            let slot = self.consume(left).ok_or(Fatal::Unfinished)?;
            extras.count += 1;
            // What stands in the place of its id stays there, so that the chain can still be followed.
            self.ids.push(u16::from_le_bytes([slot[0], slot[1]]));
            let (extra, more) = Extra::decode(&slot);
            match extra.map_err(Fatal::Extra)? {
                Extra::Gso { size, kind } => extras.gso = Some((kind, size)),
                Extra::McastAdd(group) => extras.add = Some(group),
                Extra::McastDel(group) => extras.delete = Some(group),
                // A hash only helps who would else compute it, and a tap cannot be told it. Headroom is a promise about
                // what we receive, not about what we send.
                Extra::Hash { .. } | Extra::Xdp { .. } => {}
            }
            if !more {
                return Ok(extras);
            }
        }
    }

    /// Joins or leaves a group, if that is what the extras ask for.
    fn group(&mut self, extras: &Extras) -> Option<Verdict> {
        match (extras.add, extras.delete) {
            (Some(group), _) => Some(match self.multicast.add(group) {
                Ok(()) => Verdict::Done,
                Err(_) => Verdict::Refused(Refusal::Multicast),
            }),
            (None, Some(group)) => {
                self.multicast.delete(group);
                Some(Verdict::Done)
            }
            (None, None) => None,
        }
    }

    /// Takes the slots after the first, checks all, and notes their copies to `at` of the arena.
    fn slots(&mut self, first: &TxRequest, at: usize, left: &mut u32) -> Result<Verdict, Broken> {
        let mut verdict = Verdict::Send;
        // What the slot at hand and those after it still have to bring; the first slot's is what none of them brings.
        let mut rest = first.size;
        let mut more = first.flags & tx_flag::MORE_DATA != 0;
        let mut slots = 0;
        let ops = self.ops.len();
        // The first slot's copy comes first, though its length is known last.
        self.ops.push(copy(first, 0, at));
        while more {
            if slots == SLOTS_FATAL {
                return Err(if *left == 0 { Fatal::Unfinished } else { Fatal::Slots }.into());
            }
            let slot = self.consume(left).ok_or(Fatal::Unfinished)?;
            let slot = TxRequest::decode(&slot);
            slots += 1;
            self.ids.push(slot.id);
            if verdict == Verdict::Send {
                if slots > SLOTS_MIN {
                    verdict = Verdict::Refused(Refusal::Slots);
                } else if slot.size > rest {
                    // A packet of 64 KiB or more looks like that: its size did not fit into its field.
                    verdict = Verdict::Refused(Refusal::SlotSize);
                }
            }
            check_page(&slot, slot.size)?;
            if verdict == Verdict::Send {
                rest -= slot.size;
                if slot.size > 0 {
                    self.ops.push(copy(&slot, slot.size, 0));
                }
            }
            more = slot.flags & tx_flag::MORE_DATA != 0;
        }
        if verdict != Verdict::Send {
            return Ok(verdict);
        }
        if usize::from(rest) < ETHERNET {
            return Ok(Verdict::Refused(Refusal::Short));
        }
        check_page(first, rest)?;
        self.ops[ops].len = rest;
        let mut local = at;
        for op in &mut self.ops[ops..] {
            op.local = local;
            local += usize::from(op.len);
        }
        Ok(Verdict::Send)
    }
}

fn copy(slot: &TxRequest, len: u16, local: usize) -> CopyOp {
    CopyOp {
        gref: slot.gref,
        offset: slot.offset,
        len,
        direction: CopyDirection::FromGuest,
        local,
        status: GrantStatus::GeneralError,
    }
}

fn check_page(slot: &TxRequest, size: u16) -> Result<(), Fatal> {
    let offset = slot.offset;
    if usize::from(offset) + usize::from(size) > PAGE_SIZE { Err(Fatal::CrossesPage { offset, size }) } else { Ok(()) }
}

fn ring_broken(source: ring::Overflow) -> Broken {
    Broken::Ring { ring: "transmit", source }
}
