//! A queue stepped by hand, with the clock in the test's hands: what happens to a guest that posts no pages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU16;
use std::time::{Duration, Instant};

use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, Guest, Shared};
use netback::abi::{RX_SLOT, RxRequest, RxResponse, TX_SLOT, TxRequest, TxResponse, status};
use netback::channels::Channels;
use netback::counters::Counters;
use netback::credit::Rate;
use netback::hash::HashState;
use netback::multicast::Multicast;
use netback::negotiate::Receives;
use netback::queue::{Live, Parts, Queue};
use netback::rx::{self, DRAIN, DRAIN_UNTOLD, Rx, STALL};
use netback::tap::Tap;
use netback::tx::{self, Tx};
use netback::vnet::Offload;
use ring::{BackRing, FrontRing, Layout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

struct Rig {
    queue: Queue,
    tx: FrontRing<Arc<Mapping>>,
    rx: FrontRing<Arc<Mapping>>,
    pages: Shared,
    network: OwnedFd,
    counters: Arc<Counters>,
    live: Arc<Live>,
    _channel: Box<dyn EventChannel>,
    _guest: GuestSeat,
    _machine: Machine,
}

impl Rig {
    fn new(notifies: bool, rate: Option<Rate>) -> Self {
        let machine = Machine::new(Limits::default()).unwrap();
        let guest = machine.create_guest(GuestOptions::default()).unwrap();
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId(0)).unwrap());
        let peer = Guest::domid(&guest);
        let ring = |slot| {
            let page = guest.share(DomId(0), 1, GrantAccess::ReadWrite).unwrap();
            let back = xen.map(peer, &page.refs, GrantAccess::ReadWrite).unwrap();
            let front = FrontRing::init(Arc::new(page.memory), Layout::new(slot, 1));
            (front, BackRing::attach(back, Layout::new(slot, 1), 0))
        };
        let (tx, tx_back) = ring(TX_SLOT);
        let (rx, rx_back) = ring(RX_SLOT);
        let channel = guest.alloc_unbound(DomId(0)).unwrap();
        let counters = Arc::new(Counters::default());
        let (multicast, hash) = (Arc::new(Multicast::default()), Arc::new(HashState::default()));
        let receives = Receives { sg: true, notifies, ..Receives::default() };
        let live = Arc::new(Live::new(rate, u32::from(notifies)));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, network) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let queue = Queue::new(Parts {
            tx: Tx::new(tx::Parts {
                ring: tx_back,
                xen: Arc::clone(&xen),
                peer,
                live: Arc::clone(&live),
                multicast: Arc::clone(&multicast),
                counters: Arc::clone(&counters),
            })
            .unwrap(),
            rx: Rx::new(rx::Parts {
                ring: rx_back,
                xen: Arc::clone(&xen),
                peer,
                receives,
                headroom: Arc::new(AtomicU16::new(0)),
                hash,
                multicast,
                counters: Arc::clone(&counters),
            })
            .unwrap(),
            tap: Tap::from_fd(ours).unwrap(),
            channels: Channels::Shared(xen.bind(peer, channel.port()).unwrap()),
            control: None,
            live: Arc::clone(&live),
            counters: Arc::clone(&counters),
        });
        let pages = guest.share(DomId(0), 64, GrantAccess::ReadWrite).unwrap();
        Self { queue, tx, rx, pages, network, counters, live, _channel: channel, _guest: guest, _machine: machine }
    }

    /// A frame comes from the network.
    fn frame(&self, len: usize, seed: u8) {
        let frame = [&Offload::NONE.encode()[..], &vec![seed; len]].concat();
        rustix::io::write(&self.network, &frame).unwrap();
    }

    fn post(&mut self, count: u16) {
        for id in 0..count {
            let gref = self.pages.refs[usize::from(id) % 64];
            self.rx.request(&RxRequest { id, gref }.encode());
        }
        // Whether we would be notified is not the point: the test steps.
        let _ = self.rx.publish();
    }

    /// Responses on the receive ring: their statuses.
    fn received(&mut self) -> Vec<i16> {
        self.rx.pending().unwrap();
        let (mut all, mut slot) = (Vec::new(), [0; RX_SLOT]);
        while self.rx.consume(&mut slot) {
            all.push(RxResponse::decode(&slot).status);
        }
        all
    }

    fn turn(&mut self, now: Instant) {
        self.queue.turn(now).unwrap();
    }
}

/// XSA-392: the guest keeps its ring almost, but not quite, full.
#[test]
fn a_frame_waits_for_enough_pages_and_is_dropped_in_the_end() {
    let mut rig = Rig::new(true, None);
    let start = Instant::now();
    rig.post(1);
    rig.turn(start);
    rig.frame(9000, 1);
    rig.frame(100, 2);
    rig.turn(start);
    // The first needs three pages; the second stays behind it, though it would fit.
    assert!(rig.received().is_empty());
    assert!(!rig.queue.wants_frames(), "more frames are read while one waits");
    assert!(!rig.queue.rearm().unwrap(), "a page that is known already keeps us awake");
    let deadline = rig.queue.deadline().unwrap();
    assert!(deadline <= start + DRAIN && deadline > start + DRAIN / 2);
    // Two more, and it goes through.
    rig.post(2);
    assert!(rig.queue.has_work().unwrap());
    rig.turn(start + Duration::from_secs(9));
    assert_eq!(rig.received(), [4096, 4096, 808]);
    rig.post(1);
    rig.turn(start + Duration::from_secs(9));
    assert_eq!(rig.received(), [100]);
    // The next time nobody comes.
    rig.frame(9000, 3);
    rig.turn(start + Duration::from_secs(20));
    rig.frame(9000, 4);
    rig.turn(start + Duration::from_secs(29));
    assert_eq!(rig.counters.rx_dropped.get(), 0);
    rig.turn(start + Duration::from_secs(30));
    // And what came meanwhile goes with it: nobody wants old frames.
    assert_eq!(rig.counters.rx_dropped.get(), 2);
    rig.frame(9000, 5);
    rig.turn(start + Duration::from_secs(31));
    assert_eq!(rig.counters.rx_dropped.get(), 3);
    rig.post(3);
    rig.turn(start + Duration::from_secs(32));
    rig.frame(9000, 6);
    rig.turn(start + Duration::from_secs(32));
    assert_eq!(rig.received(), [4096, 4096, 808]);
}

#[test]
fn a_guest_without_pages_stalls_and_gets_ready_again() {
    let mut rig = Rig::new(true, None);
    let start = Instant::now();
    // At first it has none: no frame is read, and its first page makes it ready.
    rig.frame(100, 1);
    rig.turn(start);
    assert!(!rig.queue.wants_frames());
    rig.post(1);
    assert!(rig.queue.rearm().unwrap(), "the first page is not waited for");
    rig.turn(start);
    rig.turn(start);
    assert_eq!(rig.received(), [100]);
    // It has used its page. After a minute it has stalled, once; then nothing is due any more.
    let deadline = rig.queue.deadline().unwrap();
    rig.turn(deadline - Duration::from_millis(1));
    assert!(rig.queue.wants_frames());
    rig.turn(start + STALL);
    assert!(!rig.queue.wants_frames() && rig.queue.deadline().is_none());
    rig.post(1);
    assert!(rig.queue.has_work().unwrap());
    rig.turn(start + STALL * 2);
    assert!(rig.queue.wants_frames());
    assert!(rig.queue.deadline().is_none(), "a guest with pages and nothing to receive has all the time");
}

#[test]
fn a_guest_that_does_not_tell_is_looked_at_often() {
    let mut rig = Rig::new(false, None);
    let start = Instant::now();
    rig.frame(100, 1);
    rig.turn(start);
    assert!(rig.queue.deadline().unwrap() < Instant::now() + DRAIN_UNTOLD);
    rig.post(1);
    rig.turn(start + DRAIN_UNTOLD / 2);
    assert_eq!(rig.received(), [100]);
    rig.frame(100, 2);
    rig.turn(start + Duration::from_secs(1));
    rig.turn(start + Duration::from_secs(1) + DRAIN_UNTOLD);
    assert_eq!(rig.counters.rx_dropped.get(), 1);
    assert!(rig.queue.wants_frames(), "it lost its carrier");
    rig.post(1);
    rig.frame(100, 3);
    rig.turn(start + Duration::from_secs(600));
    assert_eq!(rig.received(), [100]);
}

#[test]
fn a_rate_lets_packets_wait_in_the_ring() {
    let rate = Rate { bytes: 1000, interval: Duration::from_secs(1) };
    let mut rig = Rig::new(true, Some(rate));
    let start = Instant::now();
    for id in 0..5 {
        let request = TxRequest { gref: rig.pages.refs[0], offset: 0, flags: 0, id, size: 600 };
        rig.tx.request(&request.encode());
    }
    assert!(rig.tx.publish());
    let answered = |rig: &mut Rig, now| {
        rig.turn(now);
        rig.tx.pending().unwrap();
        let (mut count, mut slot) = (0, [0; TX_SLOT]);
        while rig.tx.consume(&mut slot) {
            assert_eq!(TxResponse::decode(&slot).status, status::OKAY);
            count += 1;
        }
        count
    };
    assert_eq!(answered(&mut rig, start), 1);
    assert!(!rig.queue.has_work().unwrap() && !rig.queue.rearm().unwrap(), "what has to wait keeps us awake");
    let until = rig.queue.deadline().unwrap();
    assert_eq!(answered(&mut rig, until - Duration::from_millis(1)), 0);
    assert_eq!(answered(&mut rig, until), 2);
    rig.live.set_rate(None);
    assert_eq!(answered(&mut rig, until), 2);
}
