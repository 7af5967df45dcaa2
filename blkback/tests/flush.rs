//! The promise of a flush, single-stepped: queues on a disk whose operations end when, and how, the test says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use blkback::abi::{Answer, Protocol, Segment, Slot, op};
use blkback::barrier::Barriers;
use blkback::grants::Grants;
use blkback::health::Health;
use blkback::queue::{Broken, Parts, Queue};
use blkback::request::Shape;
use blkback::storage::{Done, Storage};
use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::memory::{IoList, Mapping};
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, Guest, Shared};
use ring::{BackRing, FrontRing, Layout};
use rustix::event::{EventfdFlags, eventfd};

/// A disk in the test's hands.
#[derive(Debug, Default)]
struct Held {
    /// What was asked and has not ended: its name, token and memory.
    asked: VecDeque<(&'static str, u32, IoList)>,
    ended: VecDeque<Done>,
}

#[derive(Debug, Clone, Default)]
struct Disk(Rc<RefCell<Held>>);

impl Disk {
    fn ask(&self, what: &'static str, token: u32, memory: IoList) {
        self.0.borrow_mut().asked.push_back((what, token, memory));
    }

    /// What is under way.
    fn asked(&self) -> Vec<&'static str> {
        self.0.borrow().asked.iter().map(|(what, ..)| *what).collect()
    }

    /// Ends the oldest write with no room for more than so many of its bytes. Returns all of them.
    fn end_write_after(&self, done: usize) -> Vec<u8> {
        let mut held = self.0.borrow_mut();
        let (what, token, mut memory) = held.asked.pop_front().unwrap();
        assert_eq!(what, "write");
        let bytes = memory.to_vec();
        memory.advance(done);
        held.ended.push_back(Done { token, memory, result: Err(io::Error::from_raw_os_error(libc::ENOSPC)) });
        bytes
    }

    /// Ends the oldest operation of this kind.
    fn end(&self, what: &str, result: io::Result<()>) {
        let mut held = self.0.borrow_mut();
        let at = held.asked.iter().position(|(asked, ..)| *asked == what).unwrap();
        let (_, token, memory) = held.asked.remove(at).unwrap();
        held.ended.push_back(Done { token, memory, result });
    }
}

impl Storage for Disk {
    fn read(&mut self, _: u64, memory: IoList, token: u32) {
        self.ask("read", token, memory);
    }
    fn write(&mut self, _: u64, memory: IoList, token: u32) {
        self.ask("write", token, memory);
    }
    fn flush(&mut self, token: u32) {
        self.ask("flush", token, IoList::default());
    }
    fn discard(&mut self, _: u64, _: u64, token: u32) {
        self.ask("discard", token, IoList::default());
    }
    fn erase(&mut self, _: u64, _: u64, token: u32) {
        self.ask("erase", token, IoList::default());
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn next(&mut self) -> Option<Done> {
        self.0.borrow_mut().ended.pop_front()
    }
    fn has_completions(&mut self) -> bool {
        !self.0.borrow().ended.is_empty()
    }
}

/// One ring with both its halves.
struct Lane {
    front: FrontRing<Arc<Mapping>>,
    back: Queue<Disk>,
    disk: Disk,
    data: Shared,
    wake: Arc<OwnedFd>,
    health: Arc<Health>,
    _listener: Box<dyn EventChannel>,
}

const PROTOCOL: Protocol = Protocol::X86_64;
const SHAPE: Shape =
    Shape { sectors: 1000, block: 1, read_only: false, discard: true, secure: true, barrier: true, indirect: 0 };

impl Lane {
    fn new(xen: &Arc<dyn Backend>, guest: &GuestSeat, health: &Arc<Health>, barriers: &Arc<Barriers>) -> Self {
        let peer = Guest::domid(guest);
        let Shared { memory, refs } = guest.share(DomId::DOM0, 1, GrantAccess::ReadWrite).unwrap();
        let layout = Layout::new(PROTOCOL.stride(), 1);
        let front = FrontRing::init(Arc::new(memory), layout);
        let ring = BackRing::attach(xen.map(peer, &refs, GrantAccess::ReadWrite).unwrap(), layout, 0);
        // Nobody listens at the guest's end; it only has to stay open.
        let listener = guest.alloc_unbound(DomId::DOM0).unwrap();
        let channel = xen.bind(peer, listener.port()).unwrap();
        let disk = Disk::default();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let back = Queue::new(Parts {
            ring,
            protocol: PROTOCOL,
            grants: Grants::new(Arc::clone(xen), peer, 64, 0).unwrap(),
            channel,
            storage: disk.clone(),
            shape: SHAPE,
            health: Arc::clone(health),
            barriers: Arc::clone(barriers),
            wake: Arc::clone(&wake),
            counters: Arc::default(),
            log: None,
        });
        Self {
            front,
            back,
            disk,
            data: guest.share(DomId::DOM0, 1, GrantAccess::ReadWrite).unwrap(),
            wake,
            health: Arc::clone(health),
            _listener: listener,
        }
    }

    fn ask(&mut self, operation: u8, id: u64, data: bool) {
        let segment = [Segment { gref: self.data.refs[0], first_sect: 0, last_sect: 7 }];
        let slot = Slot::direct(PROTOCOL, operation, id, 8, if data { &segment } else { &[] });
        self.front.request(&slot.bytes);
        let _ = self.front.publish();
    }

    /// A request of as many pages as a slot has.
    fn ask_wide(&mut self, operation: u8, id: u64) {
        let segment = Segment { gref: self.data.refs[0], first_sect: 0, last_sect: 7 };
        let slot = Slot::direct(PROTOCOL, operation, id, 8, &[segment; 11]);
        self.front.request(&slot.bytes);
        let _ = self.front.publish();
    }

    fn turn(&mut self) {
        self.back.turn().unwrap();
    }

    /// Answers since the last look: (id, status).
    fn answers(&mut self) -> Vec<(u64, i16)> {
        let mut record = [0; 12];
        self.front.pending().unwrap();
        std::iter::from_fn(|| self.front.consume(&mut record).then(|| Answer::decode(&record)))
            .map(|answer| (answer.id, answer.status))
            .collect()
    }

    /// A flush of this queue fails.
    fn health_fails(&mut self) {
        assert_eq!(self.health.begin(&self.wake), blkback::health::Permit::Granted);
        self.health.end(false);
    }

    fn rang(&self) -> bool {
        rustix::io::read(&*self.wake, &mut [0; 8]).is_ok()
    }
}

/// Two queues of one disk, and the machine under them.
fn two_queues() -> (Lane, Lane, Arc<GuestSeat>) {
    let machine = Machine::new(Limits::default()).unwrap();
    let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId::DOM0).unwrap());
    let guest = Arc::new(machine.create_guest(GuestOptions { name: "g".into(), ..GuestOptions::default() }).unwrap());
    let (health, barriers) = (Arc::new(Health::default()), Arc::new(Barriers::default()));
    let lane = || Lane::new(&xen, &guest, &health, &barriers);
    (lane(), lane(), guest)
}

fn eio() -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EIO))
}

#[test]
fn one_flush_serves_all_that_came_before_it_began() {
    let (mut one, _two, _guest) = two_queues();
    one.ask(op::FLUSH_DISKCACHE, 1, false);
    one.turn();
    one.ask(op::FLUSH_DISKCACHE, 2, false);
    one.ask(op::FLUSH_DISKCACHE, 3, false);
    one.turn();
    assert_eq!(one.disk.asked(), ["flush"], "what came later must not ride on a flush that has begun");
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, 0)]);
    assert_eq!(one.disk.asked(), ["flush"]);
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(2, 0), (3, 0)]);
    assert!(one.disk.asked().is_empty());
}

#[test]
fn queues_of_a_disk_flush_one_at_a_time() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask(op::FLUSH_DISKCACHE, 1, false);
    two.ask(op::FLUSH_DISKCACHE, 2, false);
    one.turn();
    two.turn();
    assert_eq!((one.disk.asked().len(), two.disk.asked().len()), (1, 0));
    assert!(!two.back.rearm().unwrap() && !two.rang());
    one.disk.end("flush", Ok(()));
    one.turn();
    assert!(two.rang(), "who waits is woken");
    assert!(two.back.rearm().unwrap(), "and does not go back to sleep");
    two.turn();
    assert_eq!(two.disk.asked(), ["flush"]);
    two.disk.end("flush", Ok(()));
    two.turn();
    assert_eq!((one.answers(), two.answers()), (vec![(1, 0)], vec![(2, 0)]));
}

/// The failed flush, those that waited behind it on any queue, and every write from then on stay without an answer;
/// reads go on. Nothing is ever told -1 or -2, which Linux takes for success.
#[test]
fn after_a_failed_flush_no_promise_is_made() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask(op::WRITE, 1, true);
    one.ask(op::FLUSH_DISKCACHE, 2, false);
    two.ask(op::FLUSH_DISKCACHE, 3, false);
    two.ask(op::WRITE, 4, true);
    two.ask(op::READ, 5, true);
    one.turn();
    two.turn();
    one.disk.end("flush", eio());
    assert!(matches!(one.back.turn(), Err(Broken::Flush(_))));
    one.disk.end("write", Ok(()));
    two.disk.end("write", Ok(()));
    two.disk.end("read", Ok(()));
    one.back.drain().unwrap();
    two.turn();
    assert_eq!(one.answers(), [], "a write that no flush will ever cover");
    assert_eq!(two.answers(), [(5, 0)]);
    assert!(two.disk.asked().is_empty(), "no second flush: it would say yes");
    assert_eq!((one.back.in_flight(), two.back.in_flight()), (0, 0), "and nothing holds memory");
}

#[test]
fn a_flush_with_data_writes_after_the_flush() {
    let (mut one, _two, _guest) = two_queues();
    one.ask(op::FLUSH_DISKCACHE, 1, true);
    one.turn();
    assert_eq!(one.disk.asked(), ["flush"]);
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!((one.disk.asked(), one.answers()), (vec!["write"], vec![]));
    one.disk.end("write", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, 0)]);
}

impl Lane {
    fn ask_to_erase(&mut self, id: u64) {
        self.front.request(&Slot::discard(PROTOCOL, id, 8, 8, 1).bytes);
        let _ = self.front.publish();
    }
}

/// OK means: erased, zeros, and both on stable storage.
#[test]
fn a_secure_discard_is_erased_zeroed_and_flushed() {
    let (mut one, _two, _guest) = two_queues();
    one.ask_to_erase(1);
    one.turn();
    for (step, next) in [("erase", "discard"), ("discard", "flush")] {
        assert_eq!((one.disk.asked(), one.answers()), (vec![step], vec![]));
        one.disk.end(step, Ok(()));
        one.turn();
        assert_eq!(one.disk.asked(), [next]);
    }
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, 0)]);
    // What the device cannot do after all is said; what failed behind the erasing is an error, not that.
    let unsupported = || Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    one.ask_to_erase(2);
    one.turn();
    one.disk.end("erase", unsupported());
    one.ask_to_erase(3);
    one.turn();
    one.disk.end("erase", Ok(()));
    one.turn();
    one.disk.end("discard", unsupported());
    one.turn();
    assert_eq!(one.answers(), [(2, -2), (3, -1)]);
}

/// Its own flush, or another queue's before it: no OK. And what waits behind it is let go.
#[test]
fn after_a_failed_flush_nothing_counts_as_erased() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask_to_erase(1);
    one.ask(op::WRITE_BARRIER, 2, true);
    one.turn();
    one.disk.end("erase", Ok(()));
    one.turn();
    two.turn();
    two.health_fails();
    one.disk.end("discard", Ok(()));
    one.back.drain().unwrap();
    assert_eq!((one.answers(), one.back.in_flight()), (vec![], 0));
    assert!(one.disk.asked().is_empty(), "no second flush");
    let (mut one, _two, _guest) = two_queues();
    one.ask_to_erase(1);
    one.turn();
    for step in ["erase", "discard"] {
        one.disk.end(step, Ok(()));
        one.turn();
    }
    one.disk.end("flush", eio());
    assert!(matches!(one.back.turn(), Err(Broken::Flush(_))));
    assert_eq!((one.answers(), one.back.in_flight()), (vec![], 0));
}

#[test]
fn a_write_that_fails_is_one_requests_error() {
    let (mut one, _two, _guest) = two_queues();
    one.ask(op::WRITE, 1, true);
    one.turn();
    one.disk.end("write", eio());
    one.turn();
    one.ask(op::FLUSH_DISKCACHE, 2, false);
    one.turn();
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, -1), (2, 0)]);
}

/// The write waits, or is one request's error, as the administrator wishes; nothing else waits with it.
#[test]
fn a_full_disk_holds_writes_or_reports_them() {
    let full = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
    let (mut one, _two, _guest) = two_queues();
    one.ask(op::WRITE, 1, true);
    one.turn();
    one.disk.end("write", full());
    one.ask(op::FLUSH_DISKCACHE, 2, false);
    one.turn();
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!((one.answers(), one.back.held()), (vec![(2, 0)], 1));
    one.back.retry_held();
    assert_eq!((one.disk.asked(), one.back.held()), (vec!["write"], 0));
    one.disk.end("write", full());
    one.turn();
    assert_eq!(one.back.held(), 1, "still no room");
    one.back.retry_held();
    one.disk.end("write", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, 0)]);
    one.back.hold_when_full(false);
    one.ask(op::WRITE, 3, true);
    one.turn();
    one.disk.end("write", full());
    one.turn();
    assert_eq!((one.answers(), one.back.held()), (vec![(3, -1)], 0));
}

/// Without persistent grants data are copied to pages of ours, of which there are few. Writes that wait for room keep none
/// of them, and have their data copied once more when they are tried again, from where they had got to.
#[test]
fn reads_go_on_while_many_copied_writes_wait_for_room() {
    let (mut one, _two, _guest) = two_queues();
    one.data.memory.copy_in(0, &[7; 4096]);
    // 64 pages of ours; a request is taken only when the largest one, of 11, has some.
    for id in 0..12 {
        one.ask_wide(op::WRITE, id);
        one.turn();
        assert_eq!(one.disk.end_write_after(if id == 0 { 5000 } else { 0 }), [7; 11 * 4096]);
        one.turn();
    }
    assert_eq!((one.back.held(), one.answers()), (12, vec![]));
    one.ask(op::READ, 99, true);
    one.turn();
    assert_eq!(one.disk.asked(), ["read"], "the read passes them");
    one.disk.end("read", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(99, 0)]);
    one.data.memory.copy_in(0, &[7; 4096]);
    // As many as there are pages for; a read still has some.
    one.back.retry_held();
    let tried = one.disk.asked().len();
    assert!((1..12).contains(&tried) && one.back.held() == 12 - tried, "{tried} of 12");
    assert!(!one.back.take_room());
    one.ask(op::READ, 100, true);
    one.turn();
    assert_eq!(one.disk.asked().pop(), Some("read"));
    one.disk.end("read", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(100, 0)]);
    one.data.memory.copy_in(0, &[7; 4096]);
    // The first goes on where it was, and says that there is room.
    assert_eq!(one.disk.end_write_after(1096), vec![7; 11 * 4096 - 5000]);
    let mut answers = Vec::new();
    while answers.len() < 12 {
        while one.disk.asked().contains(&"write") {
            one.disk.end("write", Ok(()));
        }
        one.turn();
        answers.extend(one.answers());
        assert!(one.back.take_room() || answers.len() == 12);
        one.back.retry_held();
    }
    assert!(answers.iter().all(|&(_, status)| status == 0), "{answers:?}");
    assert_eq!(one.back.held(), 0);
}

/// Everything before it on either queue, its flush, its write, its flush; and only then anything after it.
#[test]
fn a_barrier_is_one_over_all_queues() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask(op::WRITE, 1, true);
    two.ask(op::WRITE, 2, true);
    one.turn();
    two.turn();
    one.ask(op::WRITE_BARRIER, 3, true);
    one.ask(op::WRITE, 4, true);
    two.ask(op::READ, 5, true);
    one.turn();
    assert!(two.rang(), "the other queue has to know");
    two.turn();
    assert_eq!((one.disk.asked(), two.disk.asked()), (vec!["write"], vec!["write"]), "nothing overtakes");
    one.disk.end("write", Ok(()));
    one.turn();
    assert_eq!((one.answers(), one.disk.asked()), (vec![(1, 0)], vec![]), "the other queue's write is before it too");
    assert!(!one.rang());
    two.disk.end("write", Ok(()));
    two.turn();
    assert!(one.rang() && !two.back.rearm().unwrap(), "the disk is closed");
    one.turn();
    for step in ["flush", "write", "flush"] {
        assert_eq!((one.disk.asked(), two.disk.asked()), (vec![step], vec![]));
        assert_eq!(one.answers(), []);
        one.disk.end(step, Ok(()));
        one.turn();
    }
    assert!(two.rang());
    two.turn();
    one.turn();
    assert_eq!((one.disk.asked(), two.disk.asked()), (vec!["write"], vec!["read"]));
    assert_eq!((one.answers(), two.answers()), (vec![(3, 0)], vec![(2, 0)]));
}

#[test]
fn two_barriers_take_turns() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask(op::WRITE_BARRIER, 1, false);
    one.turn();
    // Taken before it could see that the disk is closed: what the race between two threads gives.
    assert_eq!(one.disk.asked(), [] as [&str; 0], "the other queue has not said that it is quiet");
    two.ask(op::WRITE_BARRIER, 2, true);
    two.turn();
    assert_eq!(two.back.in_flight(), 0, "closed");
    one.turn();
    one.disk.end("flush", Ok(()));
    one.turn();
    assert_eq!(one.answers(), [(1, 0)], "a barrier without data ends with its flush");
    two.turn();
    one.turn();
    two.turn();
    for step in ["flush", "write", "flush"] {
        two.disk.end(step, Ok(()));
        two.turn();
    }
    assert_eq!(two.answers(), [(2, 0)]);
}

#[test]
fn a_barrier_that_fails_lets_the_others_go_on() {
    let (mut one, mut two, _guest) = two_queues();
    one.ask(op::WRITE_BARRIER, 1, true);
    one.turn();
    two.turn();
    one.turn();
    one.disk.end("flush", Ok(()));
    one.turn();
    one.disk.end("write", eio());
    one.turn();
    assert_eq!(one.answers(), [(1, -1)]);
    two.ask(op::READ, 2, true);
    two.turn();
    assert_eq!(two.disk.asked(), ["read"]);
    // After it, a barrier whose flush fails stays without an answer, as a flush would.
    two.disk.end("read", Ok(()));
    two.turn();
    one.ask(op::WRITE_BARRIER, 3, true);
    one.turn();
    two.turn();
    one.turn();
    one.disk.end("flush", eio());
    assert!(matches!(one.back.turn(), Err(Broken::Flush(_))));
    assert_eq!((one.answers(), one.back.in_flight()), (vec![], 0));
}
