//! A hostile guest beside an honest one, both served by the same netback. Whatever the one does, the other's interface
//! works, nothing panics, and in the end nothing is mapped.
//!
//! In the place of taps there are pairs of sockets that keep frames apart: what the backend would give to the network
//! is read from their other ends, with the header that the kernel would get.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod frames;
pub mod slots;
pub mod taps;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypervisor::emu::{Counters, GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::{Backend, DomId, EventChannel, GrantAccess, Guest, Shared};
use netback::device::{Config, VifKind};
use netback::front::{ControlRing, Frontend, Meta, Options, Queue};
use xenstore_client::xenbus::driver::{Driver, StopHandle};
use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, Store};

use frames::{GUEST_MAC, plain};
use taps::{End, PairTaps};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Queues that are offered, on every machine the same.
pub const QUEUES: u32 = 4;

/// Panics in queues' threads: netback survives them, but they are bugs all the same.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // A queue's thread is called vif3.0-q0.
            if std::thread::current().name().is_some_and(|name| name.starts_with("vif")) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            before(info);
        }));
    });
}

/// The machine, and netback in its dom0.
pub struct Dom0 {
    pub machine: Machine,
    pub store: Client,
    pub taps: PairTaps,
    stop: StopHandle,
    server: Option<JoinHandle<()>>,
}

impl Dom0 {
    pub fn start() -> Self {
        let taps = PairTaps::default();
        let config = Config { queues: QUEUES, taps: Arc::new(taps.clone()), ..Config::default() };
        Self::with(config, taps, |serve| serve())
    }

    /// `inside` runs what it is given on the server's thread, and may prepare that thread before.
    pub fn with(config: Config, taps: PairTaps, inside: impl FnOnce(&mut dyn FnMut()) + Send + 'static) -> Self {
        count_panics();
        let machine = Machine::new(Limits::default()).unwrap();
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId(0)).unwrap());
        let store = xen.store().unwrap();
        let stop = StopHandle::new().unwrap();
        let server = {
            let (stop, driver_store) = (stop.clone(), xen.store().unwrap());
            let mut parts = Some((driver_store, xen, config));
            std::thread::spawn(move || {
                inside(&mut || {
                    let (driver_store, xen, config) = parts.take().unwrap();
                    let mut driver = Driver::new(driver_store, DomId(0), VifKind::new(xen, config)).unwrap();
                    driver.run(&stop).unwrap();
                });
            })
        };
        Self { machine, store, taps, stop, server: Some(server) }
    }

    pub fn guest(&self, name: &str) -> Arc<GuestSeat> {
        Arc::new(self.machine.create_guest(GuestOptions { name: name.into(), ..GuestOptions::default() }).unwrap())
    }

    /// Attaches as the toolstack does once its hotplug program is done; `more` goes into the backend's directory.
    pub fn attach(&self, guest: &GuestSeat, devid: u32, more: &[(&str, &str)]) {
        let handle = devid.to_string();
        let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let mut keys = vec![("mac", mac.as_str()), ("handle", &handle), ("hotplug-status", "connected")];
        keys.retain(|(key, _)| !more.iter().any(|(other, _)| other == key));
        keys.extend(more);
        let front = [("mac", mac.as_str()), ("handle", &handle)];
        toolstack::add_device(&self.store, &address(guest, devid), &keys, &front).unwrap();
    }

    pub fn detach(&self, guest: &GuestSeat, devid: u32) {
        let address = address(guest, devid);
        toolstack::remove_device(&self.store, &address, toolstack::DESTROY_TIMEOUT, false, || Ok(())).unwrap();
    }

    /// A guest with one interface, connected.
    pub fn connected(&self, name: &str, options: &Options) -> Vif {
        let guest = self.guest(name);
        self.attach(&guest, 0, &[]);
        self.connect(&guest, 0, options)
    }

    /// Connects what is attached.
    pub fn connect(&self, guest: &Arc<GuestSeat>, devid: u32, options: &Options) -> Vif {
        let mut front = Frontend::connect(guest.clone(), devid, options).unwrap();
        let (queues, control) = (front.take_queues(), front.take_control());
        let name = format!("vif{}.{devid}", Guest::domid(&**guest));
        Vif { guest: guest.clone(), front, queues, control, name, taps: self.taps.clone() }
    }

    /// Grants of a guest that are mapped.
    pub fn mapped(&self, domid: DomId) -> u32 {
        let domains = self.machine.domains();
        domains.iter().filter(|domain| domain.domid == domid).map(|domain| domain.mapped).sum()
    }
}

impl Drop for Dom0 {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(server) = self.server.take() {
            let outcome = server.join();
            if !std::thread::panicking() {
                outcome.expect("netback panicked");
            }
        }
    }
}

fn address(guest: &GuestSeat, devid: u32) -> toolstack::DeviceAddress<'static> {
    toolstack::DeviceAddress {
        kind: "vif",
        frontend_kind: "vif",
        backend: DomId(0),
        frontend: Guest::domid(guest),
        devid,
    }
}

/// A connected interface, as its guest sees it.
pub struct Vif {
    pub guest: Arc<GuestSeat>,
    pub front: Frontend,
    pub queues: Vec<Queue>,
    pub control: Option<ControlRing>,
    pub name: String,
    taps: PairTaps,
}

impl Vif {
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    /// The network's side of the first queue.
    pub fn end(&self) -> Arc<End> {
        self.end_of(0)
    }

    pub fn end_of(&self, queue: u32) -> Arc<End> {
        self.taps.end(&self.name, queue)
    }

    pub fn close(self) {
        self.front.close(self.queues, self.control).unwrap();
    }

    /// Frames go both ways, on every queue.
    pub fn works(&mut self) {
        for at in 0..self.queues.len() {
            let end = self.end_of(at as u32);
            works(&mut self.queues[at], &end);
        }
    }
}

/// Frames go both ways: one of a page and a bit, and one as small as can be.
pub fn works(queue: &mut Queue, end: &End) {
    for (round, len) in [60, 5000].into_iter().enumerate() {
        let frame = plain(len, round as u8);
        queue.pump().unwrap();
        assert!(queue.tx.send_bytes(&[&frame], &Meta::default()), "room for an honest frame");
        queue.publish().unwrap();
        assert_eq!(end.frame(), frame, "an honest frame to the network");
        end.send(&frame);
        assert_eq!(receive(queue).0, frame, "an honest frame to the guest");
    }
    until("responses", || {
        queue.pump().unwrap();
        queue.tx.outstanding() == 0
    });
}

/// Waits for a frame to the guest.
pub fn receive(queue: &mut Queue) -> (Vec<u8>, Meta) {
    let began = Instant::now();
    let mut frame = Vec::new();
    loop {
        if let Some(meta) = queue.rx.receive_bytes(&mut frame).unwrap() {
            queue.pump().unwrap();
            return (frame, meta);
        }
        assert!(began.elapsed() < PATIENCE, "no frame came to the guest");
        queue.wait(None, Duration::from_millis(100)).unwrap();
    }
}

pub struct Scene {
    pub hostile: Arc<GuestSeat>,
    neighbour: Vif,
    observer: Member,
    pub dom0: Dom0,
}

impl Scene {
    pub fn new() -> Self {
        let dom0 = Dom0::start();
        let neighbour = dom0.connected("neighbour", &Options::default());
        let hostile = dom0.guest("hostile");
        let observer = Member::local(&dom0.machine, DomId(0)).unwrap();
        Self { hostile, neighbour, observer, dom0 }
    }

    /// A scene, and the hostile guest's interface connected as an honest one would.
    pub fn connected(options: &Options) -> (Self, Vif) {
        let scene = Self::new();
        scene.attach();
        let vif = scene.connect(options);
        (scene, vif)
    }

    pub fn domid(&self) -> DomId {
        Guest::domid(&*self.hostile)
    }

    pub fn attach(&self) {
        self.dom0.attach(&self.hostile, 0, &[]);
    }

    pub fn detach(&self) {
        self.dom0.detach(&self.hostile, 0);
    }

    pub fn connect(&self, options: &Options) -> Vif {
        self.dom0.connect(&self.hostile, 0, options)
    }

    pub fn front_path(&self) -> String {
        format!("{}/device/vif/0", self.domid().home())
    }

    pub fn back_path(&self) -> String {
        format!("/local/domain/0/backend/vif/{}/0", self.domid())
    }

    /// The hostile guest's own connection to the store.
    pub fn store(&self) -> Client {
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
        let began = Instant::now();
        while !self.back_state().is_some_and(|state| wanted.contains(&state)) {
            let (state, error) = (self.back_state(), self.error());
            assert!(began.elapsed() < PATIENCE, "state {wanted:?} did not come; it is {state:?}, {error:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn error(&self) -> Option<String> {
        self.dom0.store.read_opt(&format!("{}/error", self.back_path())).unwrap()
    }

    /// The device was given up, and both error nodes say why.
    pub fn gave_up(&self, why: &str) {
        self.wait_state(&[State::Closing, State::Closed]);
        let error = self.error().expect("an error node");
        assert!(error.contains(why), "{error:?} does not say {why:?}");
        let other = format!("/local/domain/0/error/backend/vif/{}/0/error", self.domid());
        assert_eq!(self.dom0.store.read_opt(&other).unwrap().as_deref(), Some(error.as_str()));
        assert!(!error.contains("panicked"), "{error}");
    }

    /// Grants of the hostile guest that are mapped.
    pub fn mapped(&self) -> u32 {
        self.dom0.mapped(self.domid())
    }

    /// What netback's domain did to the hostile guest, and the other way round.
    pub fn counters(&self) -> (Counters, Counters) {
        let between = |from, to| self.observer.counters_between(from, to);
        (between(DomId(0), self.domid()), between(self.domid(), DomId(0)))
    }

    /// Events that netback has raised at the hostile guest.
    pub fn events_to_guest(&self) -> u64 {
        let (to, _) = self.counters();
        to.notifications + to.notifications_suppressed + to.notifications_dropped
    }

    /// Publishes `keys` and state 4, as an honest frontend would its rings; returns the state the backend answers with.
    pub fn offer(&self, keys: &[(&str, String)]) -> State {
        self.wait_state(&[State::InitWait]);
        let (store, front) = (self.store(), self.front_path());
        store
            .transaction(|tx| {
                keys.iter().try_for_each(|(key, value)| tx.write(&format!("{front}/{key}"), value))?;
                tx.write(&format!("{front}/state"), "4")
            })
            .unwrap();
        self.wait_state(&[State::Connected, State::Closing, State::Closed]);
        self.back_state().unwrap()
    }

    /// Publishes `keys`, which must be refused with `why`, and nothing may stay mapped. Afterwards the frontend starts
    /// anew, as a guest's next kernel would.
    pub fn refused(&self, keys: &[(&str, String)], why: &str) {
        assert_ne!(self.offer(keys), State::Connected, "{keys:?}");
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

    /// Ring pages and a channel that would be good.
    pub fn rings(&self, pages: usize) -> (Shared, Box<dyn EventChannel>) {
        let shared = self.hostile.share(DomId(0), pages, GrantAccess::ReadWrite).unwrap();
        (shared, self.hostile.alloc_unbound(DomId(0)).unwrap())
    }

    /// The neighbour sends and receives.
    pub fn neighbour_works(&mut self) {
        self.neighbour.works();
    }

    /// The hostile guest closes its interface in order and gets all its pages back; then everything ends.
    pub fn close(mut self, vif: Vif) {
        self.neighbour_works();
        vif.close();
        assert_eq!(self.mapped(), 0, "pages of a closed interface are mapped");
        self.detach();
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
        self.neighbour_works();
        let Self { dom0, neighbour, .. } = self;
        let guest = neighbour.guest.clone();
        neighbour.close();
        dom0.detach(&guest, 0);
        let left = |domain: &hypervisor::emu::DomainInfo| domain.mapped + domain.maps_held;
        assert_eq!(dom0.machine.domains().iter().map(left).sum::<u32>(), 0, "pages still mapped");
        drop(dom0);
        assert_eq!(PANICS.load(Ordering::Relaxed), 0, "queues' threads panicked");
    }
}

/// Waits until `done` says so.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
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

/// Random numbers, the same in every run.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Closes an interface in order; nothing of it may be left.
pub fn close(dom0: &Dom0, vif: Vif) {
    let guest = vif.guest.clone();
    vif.close();
    assert_eq!(dom0.mapped(Guest::domid(&*guest)), 0, "pages of a closed interface are mapped");
    dom0.detach(&guest, 0);
}
