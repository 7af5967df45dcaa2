//! A hostile guest beside an honest one, both served by the same blkback. Whatever the one does, the other's disk
//! works, nothing panics, and in the end nothing is mapped.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use blkback::abi::{Answer, Protocol, Segment, Slot, op};
use blkback::device::Config;
use blkback::front::{Frontend, Options, Piece, Queue};
use blkback::negotiate::Limits;
use hypervisor::emu::{Counters, GuestSeat, Member};
use hypervisor::{DomId, EventChannel, GrantAccess, GrantRef, Guest, Shared};
use xenstore_client::Store;
use xenstore_client::xenbus::State;

use super::{Disk, Dom0, PATIENCE, XVDA, status, until};

/// Bytes of the hostile guest's disk.
pub const DISK: u64 = 4 << 20;
/// Its sectors.
pub const SECTORS: u64 = DISK / 512;

/// Panics in queues' threads: blkback survives them, but they are bugs all the same.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name().is_some_and(|name| name.contains(".vbd")) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            before(info);
        }));
    });
}

/// What blkback offers in these tests, on every machine the same.
pub fn config() -> Config {
    let limits = Limits {
        queues: 4,
        ring_page_order: 4,
        indirect_segments: 256,
        persistent: true,
        flush: true,
        barrier: true,
        discard: true,
    };
    Config { limits, ..Config::default() }
}

pub struct Scene {
    pub hostile: Arc<GuestSeat>,
    neighbour: Disk,
    round: u64,
    observer: Member,
    pub dom0: Dom0,
}

impl Scene {
    pub fn new() -> Self {
        count_panics();
        let dom0 = Dom0::with(config());
        let image = dom0.image("neighbour.img", 1 << 20);
        let neighbour = dom0.connected(&image, "w", &Options::default());
        let hostile = dom0.guest("hostile");
        dom0.image("hostile.img", DISK);
        let observer = Member::local(&dom0.machine, DomId(0)).unwrap();
        Self { hostile, neighbour, round: 0, observer, dom0 }
    }

    /// A scene, and the hostile guest's disk connected as an honest one would.
    pub fn connected(access: &str, options: &Options) -> (Self, Disk) {
        let scene = Self::new();
        scene.attach(access);
        let disk = scene.connect(options);
        (scene, disk)
    }

    pub fn domid(&self) -> DomId {
        Guest::domid(&*self.hostile)
    }

    pub fn attach(&self, access: &str) {
        let image = self.image();
        self.dom0.attach(&self.hostile, &format!("{},raw,xvda,{access}", image.display())).unwrap();
    }

    pub fn image(&self) -> std::path::PathBuf {
        self.dom0.folder.path().join("hostile.img")
    }

    pub fn connect(&self, options: &Options) -> Disk {
        let mut front = Frontend::connect(self.hostile.clone(), XVDA, options).unwrap();
        let queues = front.take_queues();
        Disk { guest: self.hostile.clone(), front, queues }
    }

    pub fn front_path(&self) -> String {
        format!("{}/device/vbd/{XVDA}", self.domid().home())
    }

    pub fn back_path(&self) -> String {
        format!("/local/domain/0/backend/vbd/{}/{XVDA}", self.domid())
    }

    /// The hostile guest's own connection to the store.
    pub fn store(&self) -> xenstore_client::Client {
        Guest::store(&*self.hostile).unwrap()
    }

    pub fn say(&self, state: &str) {
        self.store().write(&format!("{}/state", self.front_path()), state).unwrap();
    }

    pub fn back_state(&self) -> Option<State> {
        let text = self.dom0.store.read_opt(&format!("{}/state", self.back_path())).unwrap();
        text.and_then(|text| State::parse(&text))
    }

    pub fn wait_state(&self, wanted: &[State]) {
        until(&format!("state {wanted:?}"), || self.back_state().is_some_and(|state| wanted.contains(&state)));
    }

    pub fn error(&self) -> Option<String> {
        self.dom0.store.read_opt(&format!("{}/error", self.back_path())).unwrap()
    }

    /// The device was given up, and both error nodes say why.
    pub fn gave_up(&self, why: &str) {
        self.wait_state(&[State::Closing, State::Closed]);
        let error = self.error().expect("an error node");
        assert!(error.contains(why), "{error:?} does not say {why:?}");
        let other = format!("/local/domain/0/error/backend/vbd/{}/{XVDA}/error", self.domid());
        assert_eq!(self.dom0.store.read_opt(&other).unwrap().as_deref(), Some(error.as_str()));
        assert!(!error.contains("panicked"), "{error}");
    }

    /// Grants of the hostile guest that are mapped.
    pub fn mapped(&self) -> u32 {
        let domains = self.dom0.machine.domains();
        domains.iter().filter(|domain| domain.domid == self.domid()).map(|domain| domain.mapped).sum()
    }

    /// What blkback's domain did to the hostile guest, and the other way round.
    pub fn counters(&self) -> (Counters, Counters) {
        let between = |from, to| self.observer.counters_between(from, to);
        (between(DomId(0), self.domid()), between(self.domid(), DomId(0)))
    }

    /// Events that blkback has raised at the hostile guest.
    pub fn events_to_guest(&self) -> u64 {
        let (to, _) = self.counters();
        to.notifications + to.notifications_suppressed + to.notifications_dropped
    }

    /// Publishes `keys` and state 3, as an honest frontend would its rings; returns the state the backend answers with.
    pub fn offer(&self, keys: &[(&str, String)]) -> State {
        self.wait_state(&[State::InitWait]);
        let (store, front) = (self.store(), self.front_path());
        store
            .transaction(|tx| {
                keys.iter().try_for_each(|(key, value)| tx.write(&format!("{front}/{key}"), value))?;
                tx.write(&format!("{front}/state"), "3")
            })
            .unwrap();
        let moved = [State::Connected, State::Closing, State::Closed];
        self.wait_state(&moved);
        self.back_state().unwrap()
    }

    /// Publishes `keys`, which must be refused with `why`, and nothing may stay mapped. Afterwards the frontend starts
    /// anew, as a guest's next kernel would.
    pub fn refused(&self, keys: &[(&str, String)], why: &str) {
        assert_eq!(self.offer(keys), State::Closing, "{keys:?}");
        self.gave_up(why);
        until("unmapping", || self.mapped() == 0);
        let (store, front) = (self.store(), self.front_path());
        for (key, _) in keys {
            store.rm_if_exists(&format!("{front}/{}", key.split('/').next().unwrap())).unwrap();
        }
        self.reset();
    }

    /// The hostile guest's driver goes away and comes back.
    pub fn reset(&self) {
        self.say("6");
        self.wait_state(&[State::Closed]);
        self.say("1");
        self.wait_state(&[State::InitWait]);
    }

    /// A ring page and a channel that would be good.
    pub fn rings(&self, pages: usize) -> (Shared, Box<dyn EventChannel>) {
        let shared = self.hostile.share(DomId(0), pages, GrantAccess::ReadWrite).unwrap();
        (shared, self.hostile.alloc_unbound(DomId(0)).unwrap())
    }

    /// The neighbour writes and reads.
    pub fn neighbour_works(&mut self) {
        self.round += 1;
        let data: Vec<u8> = (0..4096).map(|at| (at as u64 ^ self.round) as u8).collect();
        let piece = |page| Piece { page, first: 0, last: 7 };
        let queue = self.neighbour.queue();
        queue.data().copy_in(0, &data);
        queue.submit(op::WRITE, self.round % 256 * 8, &[piece(0)], 1);
        assert_eq!(status(queue), 0, "the neighbour's write");
        queue.submit(op::READ, self.round % 256 * 8, &[piece(1)], 2);
        assert_eq!(status(queue), 0, "the neighbour's read");
        let mut back = vec![0; 4096];
        queue.data().copy_out(4096, &mut back);
        assert!(back == data, "the neighbour's data");
    }

    /// The hostile guest closes its disk in order and gets all its pages back; then everything ends.
    pub fn close(mut self, disk: Disk) {
        self.neighbour_works();
        disk.close();
        assert_eq!(self.mapped(), 0, "pages of a closed disk are mapped");
        self.dom0.detach(&self.hostile, "xvda");
        self.end();
    }

    /// The hostile guest is destroyed, the neighbour closes; nothing may be left.
    pub fn end(mut self) {
        self.neighbour_works();
        let domid = self.domid();
        self.dom0.machine.destroy(domid).unwrap();
        // A domain whose pages are mapped stays in the list as a zombie.
        until("the end of the hostile guest", || {
            self.dom0.machine.domains().iter().all(|domain| domain.domid != domid)
        });
        let Self { dom0, mut neighbour, .. } = self;
        neighbour.queue().submit(op::FLUSH_DISKCACHE, 0, &[], 3);
        assert_eq!(status(neighbour.queue()), 0, "the neighbour's flush");
        let guest = neighbour.guest.clone();
        neighbour.close();
        dom0.detach(&guest, "xvda");
        let left = |domain: &hypervisor::emu::DomainInfo| domain.mapped + domain.maps_held;
        assert_eq!(dom0.machine.domains().iter().map(left).sum::<u32>(), 0, "pages still mapped");
        drop(dom0);
        assert_eq!(PANICS.load(Ordering::Relaxed), 0, "queues' threads panicked");
    }
}

/// Runs `harass` again and again on a thread of its own while `work` is done; also when that panics, it ends.
pub fn during(mut harass: impl FnMut() + Send, work: impl FnOnce()) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                harass();
            }
        });
        let _stop = Stop(&stop);
        work();
    });
}

/// A whole page.
pub fn whole(gref: GrantRef) -> Segment {
    Segment { gref, first_sect: 0, last_sect: 7 }
}

/// A read or write of these segments in the 64-bit layout.
pub fn direct(operation: u8, id: u64, sector: u64, segments: &[Segment]) -> Slot {
    Slot::direct(Protocol::X86_64, operation, id, sector, segments)
}

/// Shows what is in the ring and takes `count` answers as they stand there.
pub fn answers(queue: &mut Queue, count: usize) -> Vec<Answer> {
    queue.publish().unwrap();
    let began = std::time::Instant::now();
    let mut answers = Vec::new();
    while answers.len() < count {
        match queue.raw_outcome().unwrap() {
            Some(answer) => answers.push(answer),
            None => {
                assert!(began.elapsed() < PATIENCE, "{} of {count} answers came", answers.len());
                queue.wait(None, std::time::Duration::from_millis(100)).unwrap();
            }
        }
    }
    answers
}

/// Makes one request, whose answer must carry its id and its operation; returns the status.
pub fn ask(queue: &mut Queue, slot: &Slot) -> i16 {
    queue.submit_raw(slot);
    let answer = answers(queue, 1)[0];
    let operation = if slot.operation() == op::INDIRECT { slot.indirect_operation() } else { slot.operation() };
    assert_eq!((answer.id, answer.operation), (slot.id(), operation), "{slot:?}");
    answer.status
}

/// The disk still does what it is asked for.
pub fn works(queue: &mut Queue) {
    let gref = queue.data_refs()[0];
    assert_eq!(ask(queue, &direct(op::WRITE, 1, 0, &[whole(gref)])), 0, "an honest write");
    assert_eq!(ask(queue, &direct(op::READ, 2, 0, &[whole(gref)])), 0, "an honest read");
}
