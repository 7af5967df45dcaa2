//! A queue stepped by hand, with the clock in the test's hands.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU16;
use std::time::Instant;

use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::memory::Mapping;
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, GrantRef, Guest, Shared};
use netback::abi::{CTRL_SLOT, RX_SLOT, RxRequest, RxResponse, TX_SLOT, TxResponse};
use netback::broken::Broken;
use netback::channels::Channels;
use netback::counters::Counters;
use netback::credit::Rate;
use netback::ctrl::{self, Control};
use netback::hash::HashState;
use netback::multicast::Multicast;
use netback::negotiate::Receives;
use netback::queue::{Live, Parts, Queue};
use netback::rx::{self, Rx};
use netback::tap::Tap;
use netback::tx::{self, Tx};
use netback::vnet::Offload;
use ring::{BackRing, Field, FrontRing, Layout, RingMemory as _};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// A ring, as the guest has it.
pub struct GuestRing {
    pub front: FrontRing<Arc<Mapping>>,
    pub memory: Arc<Mapping>,
    pub layout: Layout,
    gref: GrantRef,
}

impl GuestRing {
    fn new(guest: &GuestSeat, slot: usize) -> Self {
        let page = guest.share(DomId(0), 1, GrantAccess::ReadWrite).unwrap();
        let (memory, layout) = (Arc::new(page.memory), Layout::new(slot, 1));
        Self { front: FrontRing::init(Arc::clone(&memory), layout), memory, layout, gref: page.refs[0] }
    }

    /// Writes an answer that is not shown, as a backend does that dies before it shows it.
    pub fn write(&self, index: u32, answer: &[u8]) {
        self.memory.write_slot(self.layout.slot(index), answer);
    }
}

pub struct Rig {
    /// None between two backends.
    pub queue: Option<Queue>,
    pub tx: GuestRing,
    pub rx: GuestRing,
    pub control: GuestRing,
    pub pages: Shared,
    pub network: OwnedFd,
    pub counters: Arc<Counters>,
    pub live: Arc<Live>,
    receives: Receives,
    channel: Box<dyn EventChannel>,
    control_channel: Box<dyn EventChannel>,
    guest: GuestSeat,
    machine: Machine,
}

impl Rig {
    pub fn new(notifies: bool, rate: Option<Rate>) -> Self {
        let receives = Receives { sg: true, notifies, ..Receives::default() };
        let mut rig = Self::without_backend(receives, rate);
        rig.begin(false).unwrap();
        rig
    }

    /// A connected guest whose backend has died.
    pub fn without_backend(receives: Receives, rate: Option<Rate>) -> Self {
        let machine = Machine::new(Limits::default()).unwrap();
        let guest = machine.create_guest(GuestOptions::default()).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Replaced as soon as there is a backend.
        let (_, network) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        Self {
            queue: None,
            tx: GuestRing::new(&guest, TX_SLOT),
            rx: GuestRing::new(&guest, RX_SLOT),
            control: GuestRing::new(&guest, CTRL_SLOT),
            pages: guest.share(DomId(0), 64, GrantAccess::ReadWrite).unwrap(),
            network,
            counters: Arc::default(),
            live: Arc::new(Live::new(rate, u32::from(receives.notifies))),
            receives,
            channel: guest.alloc_unbound(DomId(0)).unwrap(),
            control_channel: guest.alloc_unbound(DomId(0)).unwrap(),
            guest,
            machine,
        }
    }

    /// A backend comes, for rings that are new or that another one had (`resume`).
    pub fn begin(&mut self, resume: bool) -> Result<(), Broken> {
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&self.machine, DomId(0)).unwrap());
        let peer = Guest::domid(&self.guest);
        let attach = |ring: &GuestRing| {
            let memory = xen.map(peer, &[ring.gref], GrantAccess::ReadWrite).unwrap();
            let start = if resume { memory.load(Field::RspProd) } else { 0 };
            BackRing::attach(memory, ring.layout, start)
        };
        let (multicast, hash) = (Arc::new(Multicast::default()), Arc::new(HashState::default()));
        let mut tx = Tx::new(tx::Parts {
            ring: attach(&self.tx),
            xen: Arc::clone(&xen),
            peer,
            live: Arc::clone(&self.live),
            multicast: Arc::clone(&multicast),
            counters: Arc::clone(&self.counters),
        })
        .unwrap();
        let mut rx = Rx::new(rx::Parts {
            ring: attach(&self.rx),
            xen: Arc::clone(&xen),
            peer,
            receives: self.receives,
            headroom: Arc::new(AtomicU16::new(0)),
            hash: Arc::clone(&hash),
            multicast,
            post: None,
            counters: Arc::clone(&self.counters),
        })
        .unwrap();
        if resume {
            tx.resume()?;
            rx.resume()?;
        }
        let control = Control::new(ctrl::Parts {
            ring: xen.map(peer, &[self.control.gref], GrantAccess::ReadWrite).unwrap(),
            channel: xen.bind(peer, self.control_channel.port()).unwrap(),
            xen: Arc::clone(&xen),
            peer,
            queues: 1,
            hash,
        })
        .unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, network) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        self.network = network;
        self.queue = Some(Queue::new(Parts {
            tx,
            rx,
            tap: Tap::from_fd(ours).unwrap(),
            channels: Channels::Shared(xen.bind(peer, self.channel.port()).unwrap()),
            control: Some(control),
            live: Arc::clone(&self.live),
            counters: Arc::clone(&self.counters),
            resumed: resume,
        }));
        Ok(())
    }

    /// The backend dies.
    pub fn die(&mut self) {
        self.queue = None;
    }

    pub fn queue(&mut self) -> &mut Queue {
        self.queue.as_mut().unwrap()
    }

    /// The guest's end of the event channel.
    pub fn channel(&self) -> &dyn EventChannel {
        &*self.channel
    }

    /// A frame comes from the network.
    pub fn frame(&self, len: usize, seed: u8) {
        let frame = [&Offload::NONE.encode()[..], &vec![seed; len]].concat();
        rustix::io::write(&self.network, &frame).unwrap();
    }

    /// The frames that went to the network.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 1 << 17];
        std::iter::from_fn(|| {
            let len = rustix::io::read(&self.network, &mut buffer[..]).ok()?;
            Some(buffer[Offload::SIZE..len].to_vec())
        })
        .collect()
    }

    pub fn post(&mut self, count: u16) {
        for id in 0..count {
            let gref = self.pages.refs[usize::from(id) % 64];
            self.rx.front.request(&RxRequest { id, gref }.encode());
        }
        // Whether we would be notified is not the point: the test steps.
        let _ = self.rx.front.publish();
    }

    /// Responses on the receive ring.
    pub fn responses(&mut self) -> Vec<RxResponse> {
        self.rx.front.pending().unwrap();
        let (mut all, mut slot) = (Vec::new(), [0; RX_SLOT]);
        while self.rx.front.consume(&mut slot) {
            all.push(RxResponse::decode(&slot));
        }
        all
    }

    /// Responses on the receive ring: their statuses.
    pub fn received(&mut self) -> Vec<i16> {
        self.responses().iter().map(|response| response.status).collect()
    }

    /// Responses on the transmit ring: ids and statuses.
    pub fn sent(&mut self) -> Vec<(u16, i16)> {
        self.tx.front.pending().unwrap();
        let (mut all, mut slot) = (Vec::new(), [0; TX_SLOT]);
        while self.tx.front.consume(&mut slot) {
            let response = TxResponse::decode(&slot);
            all.push((response.id, response.status));
        }
        all
    }

    pub fn turn(&mut self, now: Instant) {
        self.queue().turn(now).unwrap();
    }
}
