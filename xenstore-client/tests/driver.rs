//! The driver against the embedded store, with libxl and guests played by hand.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use xenstore_client::server::Server;
use xenstore_client::xenbus::toolstack::{
    DESTROY_TIMEOUT, DeviceAddress, INIT_TIMEOUT, add_device, create_domain, destroy_domain, remove_device, wait_state,
};
use xenstore_client::xenbus::{Device, DeviceId, Driver, Fault, Keys, Kind, Notifier, Progress, State, StopHandle};
use xenstore_client::{Client, DomId, Error, Result, Store};

const LONG: Duration = Duration::from_secs(60);
const GUEST: DomId = DomId(5);
const VBD: DeviceAddress<'static> =
    DeviceAddress { kind: "vbd", frontend_kind: "vbd", backend: DomId::DOM0, frontend: GUEST, devid: 51712 };

/// What the fake devices did, and how they shall behave.
#[derive(Debug, Default)]
struct Script {
    log: Vec<String>,
    fail_open: bool,
    /// Open and release later: when the test says so.
    slow: bool,
    /// The storage has answered.
    answer: bool,
    /// Do not answer `disconnect`: I/O is in flight.
    hold: bool,
    adopts: bool,
    notifier: Option<Notifier>,
    seen: Vec<(String, String)>,
}

#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

impl Fake {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no panic")
    }

    fn say(&self, word: &str) {
        self.script().log.push(word.to_owned());
    }

    fn log(&self) -> String {
        self.script().log.join(" ")
    }

    fn until(&self, log: &str) {
        let start = Instant::now();
        while self.log() != log {
            assert!(start.elapsed() < LONG, "waiting for {log:?}, got {:?}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Kind for Fake {
    type Device = FakeDevice;

    fn name(&self) -> &str {
        "vbd"
    }

    fn frontend_keys(&self) -> &[&str] {
        &["ring-ref", "ring-ref#", "event-channel", "queue-#/ring-ref", "protocol"]
    }

    fn create(&mut self, id: &DeviceId, backend: &Keys, notifier: Notifier) -> std::result::Result<FakeDevice, Fault> {
        assert_eq!((id.frontend_id, id.kind.as_str()), (GUEST, "vbd"));
        self.say(&format!("create:{}", backend.require("params")?));
        self.script().notifier = Some(notifier.clone());
        Ok(FakeDevice { fake: self.clone(), notifier, mapped: false, open: false })
    }
}

struct FakeDevice {
    fake: Fake,
    notifier: Notifier,
    mapped: bool,
    open: bool,
}

impl Device for FakeDevice {
    fn features(&mut self) -> std::result::Result<Vec<(String, String)>, Fault> {
        Ok(vec![("feature-test".into(), "1".into())])
    }

    fn open(&mut self, backend: &Keys) -> std::result::Result<Progress<Vec<(String, String)>>, Fault> {
        assert!(!self.open);
        assert_eq!(backend.get("hotplug-status"), Some("connected"));
        if self.fake.script().fail_open {
            return Err(Fault::host(2, "no such image"));
        }
        if self.fake.script().slow {
            self.fake.say("opening");
            return Ok(Progress::Later);
        }
        self.open = true;
        self.fake.say("open");
        Ok(Progress::Done(vec![("sectors".into(), "8".into())]))
    }

    fn answered(&mut self) -> Option<std::result::Result<Vec<(String, String)>, Fault>> {
        if !std::mem::take(&mut self.fake.script().answer) {
            return None;
        }
        if self.fake.script().fail_open {
            return Some(Err(Fault::host(2, "no such image")));
        }
        self.open = true;
        self.fake.say("open");
        Some(Ok(vec![("sectors".into(), "8".into())]))
    }

    fn connect(&mut self, frontend: &Keys) -> std::result::Result<Vec<(String, String)>, Fault> {
        assert!(self.open && !self.mapped);
        frontend.require_u32("ring-ref")?;
        self.mapped = true;
        self.fake.say("connect");
        self.fake.script().seen = frontend.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Ok(vec![("sectors".into(), "100".into())])
    }

    fn reattach(&mut self, _: &Keys) -> std::result::Result<(), Fault> {
        if !self.fake.script().adopts {
            return Err(Fault::host(32, "cannot"));
        }
        self.mapped = true;
        self.fake.say("reattach");
        Ok(())
    }

    fn watched_keys(&self) -> &[&str] {
        &["request"]
    }

    fn frontend_changed(&mut self, key: &str, value: Option<&str>) {
        self.fake.say(&format!("{key}={value:?}"));
    }

    fn watched_backend_keys(&self) -> &[&str] {
        &["rate"]
    }

    fn backend_changed(&mut self, key: &str, value: Option<&str>) {
        self.fake.say(&format!("{key}:{value:?}"));
    }

    fn reconfigure(&mut self, frontend: &Keys) -> std::result::Result<(), Fault> {
        assert!(self.mapped);
        self.fake.say(&format!("reconfigure:{}", frontend.require_u32("ring-ref")?));
        Ok(())
    }

    fn disconnect(&mut self) {
        assert!(self.mapped);
        self.mapped = false;
        self.fake.say("disconnect");
        if !self.fake.script().hold {
            self.notifier.disconnected();
        }
    }

    fn release(&mut self) -> Progress<()> {
        assert!(!self.mapped);
        self.fake.say("release");
        if self.fake.script().slow && self.open { Progress::Later } else { Progress::Done(()) }
    }
}

struct Bench {
    server: Server,
    dom0: Client,
    guest: Client,
    fake: Fake,
    stop: StopHandle,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Bench {
    fn new() -> Result<Self> {
        let server = Server::new()?;
        let dom0 = server.connect(DomId::DOM0)?;
        create_domain(&dom0, GUEST, "guest")?;
        server.introduce(GUEST)?;
        let guest = server.connect(GUEST)?;
        let stop = StopHandle::new()?;
        let mut bench = Self { server, dom0, guest, fake: Fake::default(), stop, thread: None };
        bench.start()?;
        Ok(bench)
    }

    fn start(&mut self) -> Result<()> {
        self.stop = StopHandle::new()?;
        let mut driver = Driver::new(self.server.connect(DomId::DOM0)?, DomId::DOM0, self.fake.clone())?;
        let stop = self.stop.clone();
        self.thread = Some(std::thread::spawn(move || driver.run(&stop)));
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.stop();
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("no panic"))
    }

    fn add(&self) -> Result<()> {
        self.dom0.rm_if_exists(&VBD.backend_path())?;
        add_device(&self.dom0, &VBD, &[("params", "image"), ("mode", "w")], &[("virtual-device", "51712")])
    }

    fn back(&self, state: State) {
        let path = format!("{}/state", VBD.backend_path());
        wait_state(&self.dom0, &path, &[state], LONG).expect("backend state");
    }

    fn front(&self, state: &str) {
        self.guest.write("device/vbd/51712/state", state).expect("guest writes");
    }

    fn hotplug(&self) -> Result<()> {
        self.dom0.write(&format!("{}/hotplug-status", VBD.backend_path()), "connected")
    }

    fn ready(&self) -> Result<()> {
        self.guest.transaction(|tx| {
            tx.write("device/vbd/51712/ring-ref", "8")?;
            tx.write("device/vbd/51712/event-channel", "3")?;
            tx.write("device/vbd/51712/queue-0/ring-ref", "9")?;
            tx.write("device/vbd/51712/unknown", &"x".repeat(1500))
        })?;
        self.front("3");
        Ok(())
    }

    /// All the way to state 4.
    fn attach(&self) -> Result<()> {
        self.add()?;
        self.back(State::InitWait);
        self.hotplug()?;
        self.ready()?;
        self.back(State::Connected);
        self.fake.until("create:image open connect request=None");
        self.fake.script().log.clear();
        self.front("4");
        Ok(())
    }

    fn backend(&self, key: &str) -> Option<String> {
        self.dom0.read_opt(&format!("{}/{key}", VBD.backend_path())).expect("read")
    }

    fn error(&self) -> Option<String> {
        self.dom0.read_opt("/local/domain/0/error/backend/vbd/5/51712/error").expect("read")
    }
}

#[test]
fn libxl_attaches_and_detaches() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.add()?;
    let state = format!("{}/state", VBD.backend_path());
    wait_state(&bench.dom0, &state, &[State::InitWait], INIT_TIMEOUT)?;
    assert_eq!(bench.backend("feature-test").as_deref(), Some("1"), "features before state 2");
    // A guest in a hurry does not make us skip the hotplug program.
    bench.ready()?;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.backend("state").as_deref(), Some("2"));
    bench.hotplug()?;
    bench.back(State::Connected);
    assert_eq!(bench.backend("sectors").as_deref(), Some("100"));
    let seen: Vec<_> = bench.fake.script().seen.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(seen, ["event-channel=3", "queue-0/ring-ref=9", "ring-ref=8"], "known keys only");
    bench.front("4");
    let guest = {
        let guest = bench.guest.clone();
        std::thread::spawn(move || {
            wait_state(&guest, &format!("{}/state", VBD.backend_path()), &[State::Closing], LONG)?;
            guest.write("device/vbd/51712/state", "6")
        })
    };
    let mut hotplug = None;
    remove_device(&bench.dom0, &VBD, DESTROY_TIMEOUT, false, || {
        hotplug = bench.backend("state");
        Ok(())
    })?;
    guest.join().expect("no panic")?;
    assert_eq!(hotplug.as_deref(), Some("6"));
    bench.fake.until("create:image open connect request=None disconnect release");
    assert_eq!(bench.dom0.directory("/local/domain/0/backend/vbd")?, Vec::<String>::new());
    assert_eq!(bench.error(), None);
    bench.finish()
}

#[test]
fn a_detach_waits_for_the_guest() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    let removed = remove_device(&bench.dom0, &VBD, Duration::from_millis(100), false, || Ok(()));
    assert!(matches!(removed, Err(Error::Timeout { .. })));
    assert_eq!(bench.fake.log(), "", "still serving: the guest has it mounted");
    // Later the guest lets go.
    bench.front("5");
    bench.back(State::Closed);
    bench.fake.until("disconnect release");
    remove_device(&bench.dom0, &VBD, LONG, false, || Ok(()))?;
    // By force.
    bench.fake.script().log.clear();
    bench.attach()?;
    remove_device(&bench.dom0, &VBD, Duration::from_millis(50), true, || Ok(()))?;
    bench.fake.until("disconnect release");
    assert_eq!(bench.backend("state"), None, "nothing is written into what was removed");
    bench.finish()
}

#[test]
fn guests_come_back() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    for closes in [true, false] {
        if closes {
            bench.front("5");
            bench.back(State::Closing);
            bench.front("6");
            bench.back(State::Closed);
        }
        // The second time a kernel was started over the old one, without a goodbye.
        bench.front("1");
        bench.back(State::InitWait);
        bench.front("4");
        bench.back(State::Connected);
        bench.fake.until("disconnect connect request=None");
        bench.fake.script().log.clear();
    }
    bench.guest.write("device/vbd/51712/request", "1")?;
    bench.fake.until("request=Some(\"1\")");
    bench.guest.rm("device/vbd/51712")?;
    bench.back(State::Closed);
    bench.fake.until("request=Some(\"1\") disconnect");
    destroy_domain(&bench.dom0, GUEST, &[DomId::DOM0])?;
    bench.server.release(GUEST)?;
    bench.fake.until("request=Some(\"1\") disconnect release");
    bench.finish()
}

#[test]
fn the_toolstack_changes_its_mind() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    let rate = format!("{}/rate", VBD.backend_path());
    bench.dom0.write(&rate, "1000,1000")?;
    bench.fake.until("rate:Some(\"1000,1000\")");
    // Keys that the device does not watch are not its business.
    bench.dom0.write(&format!("{}/bridge", VBD.backend_path()), "br0")?;
    bench.dom0.rm(&rate)?;
    bench.fake.until("rate:Some(\"1000,1000\") rate:None");
    bench.finish()
}

#[test]
fn a_frontend_reconfigures() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    for _ in 0..2 {
        bench.front("7");
        bench.back(State::Reconfigured);
        bench.front("4");
        bench.back(State::Connected);
    }
    bench.fake.until("reconfigure:8 reconfigure:8");
    // What cannot be closes the device.
    bench.guest.write("device/vbd/51712/ring-ref", "none")?;
    bench.front("7");
    bench.back(State::Closing);
    assert!(bench.error().is_some_and(|error| error.contains("ring-ref")));
    bench.front("6");
    bench.back(State::Closed);
    bench.fake.until("reconfigure:8 reconfigure:8 disconnect");
    bench.finish()
}

#[test]
fn the_same_number_again_at_once() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    bench.fake.script().hold = true;
    let old = bench.fake.script().notifier.clone().expect("made");
    // Removed and made anew before anybody looks; the old one still has I/O in flight.
    bench.dom0.transaction(|tx| tx.rm(&VBD.backend_path()))?;
    bench.add()?;
    bench.fake.until("disconnect");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.backend("state").as_deref(), Some("1"), "the successor waits for the I/O to end");
    old.disconnected();
    bench.back(State::InitWait);
    bench.fake.until("disconnect release create:image");
    bench.fake.script().hold = false;
    // What the old one says now concerns nobody.
    old.fault(Fault::host(5, "late"));
    old.disconnected();
    bench.hotplug()?;
    bench.ready()?;
    bench.back(State::Connected);
    assert_eq!(bench.error(), None);
    bench.finish()
}

#[test]
fn faults() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    let notifier = bench.fake.script().notifier.clone().expect("made");
    notifier.publish(vec![("sectors".into(), "200".into())]);
    notifier.fault(Fault::guest(22, "request beyond the ring"));
    bench.back(State::Closing);
    assert_eq!(bench.backend("sectors").as_deref(), Some("200"));
    assert_eq!(bench.error().as_deref(), Some("22 request beyond the ring"));
    assert_eq!(bench.backend("error").as_deref(), Some("22 request beyond the ring"));
    bench.fake.until("disconnect");
    bench.front("6");
    bench.back(State::Closed);
    bench.front("1");
    bench.back(State::InitWait);
    // Keys that are not what they should be.
    for bad in ["", "-1", "4294967296", "0x8", "8 ", &"9".repeat(1000), "\u{663}"] {
        bench.guest.write("device/vbd/51712/ring-ref", bad)?;
        bench.front("3");
        bench.back(State::Closing);
        bench.front("6");
        bench.back(State::Closed);
        bench.front("1");
        bench.back(State::InitWait);
    }
    bench.guest.write_bytes("device/vbd/51712/ring-ref", b"8\xff")?;
    bench.front("3");
    bench.back(State::Closing);
    for state in ["6", "1"] {
        bench.front(state);
    }
    bench.back(State::InitWait);
    bench.ready()?;
    bench.back(State::Connected);
    bench.front("abc");
    bench.back(State::Closed);
    assert!(bench.error().is_some_and(|error| error.starts_with("71 ")));
    bench.finish()
}

#[test]
fn an_image_that_does_not_open() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.fake.script().fail_open = true;
    bench.add()?;
    bench.back(State::InitWait);
    bench.hotplug()?;
    bench.back(State::Closed);
    assert_eq!(bench.error().as_deref(), Some("2 no such image"));
    bench.fake.script().fail_open = false;
    let state = format!("{}/state", VBD.backend_path());
    let began = Instant::now();
    // The two writes may be seen as one, and then the guest has to try once more.
    loop {
        bench.front("6");
        std::thread::sleep(Duration::from_millis(20));
        bench.front("1");
        match wait_state(&bench.dom0, &state, &[State::InitWait], Duration::from_secs(2)) {
            Ok(_) => break,
            Err(error) => assert!(began.elapsed() < LONG, "{error}"),
        }
    }
    bench.fake.until("create:image open");
    bench.finish()
}

/// Storage that hangs while it is opened or closed: its own device waits, and goes when it is told to.
#[test]
fn storage_that_answers_late() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.fake.script().slow = true;
    let notifier = || bench.fake.script().notifier.clone().expect("a device");
    let answer = || {
        bench.fake.script().answer = true;
        notifier().answered();
    };
    let begin = || -> Result<()> {
        bench.fake.script().log.clear();
        bench.add()?;
        bench.back(State::InitWait);
        bench.hotplug()?;
        bench.fake.until("create:image opening");
        Ok(())
    };

    begin()?;
    bench.ready()?;
    notifier().answered();
    assert_eq!(bench.backend("state").as_deref(), Some("2"));
    answer();
    bench.back(State::Connected);
    bench.fake.until("create:image opening open connect request=None");
    bench.front("6");
    bench.back(State::Closed);
    remove_device(&bench.dom0, &VBD, LONG, false, || Ok(()))?;
    bench.fake.until("create:image opening open connect request=None disconnect release");
    begin()?;
    answer();
    bench.fake.until("create:image opening open");
    // Whoever sees the 6 of a disk that was taken away may have the medium: it comes when that is closed.
    let removed = remove_device(&bench.dom0, &VBD, Duration::from_millis(50), false, || Ok(()));
    assert!(matches!(removed, Err(Error::Timeout { .. })), "6 before the medium is closed");
    notifier().released();
    remove_device(&bench.dom0, &VBD, LONG, false, || Ok(()))?;

    // Taken away while it is opened: at once, and the late answer is nobody's.
    begin()?;
    remove_device(&bench.dom0, &VBD, LONG, false, || Ok(()))?;
    bench.fake.until("create:image opening release");
    let late = notifier();
    begin()?;
    late.answered();
    answer();
    bench.fake.until("create:image opening open");
    destroy_domain(&bench.dom0, GUEST, &[DomId::DOM0])?;
    bench.fake.until("create:image opening open release");
    create_domain(&bench.dom0, GUEST, "guest")?;

    // A failure that comes late, and a stop while the next one is opened.
    begin()?;
    bench.fake.script().fail_open = true;
    answer();
    bench.back(State::Closed);
    assert!(bench.error().is_some_and(|error| error.contains("no such image")));
    bench.fake.script().fail_open = false;
    remove_device(&bench.dom0, &VBD, LONG, false, || Ok(()))?;
    bench.fake.until("create:image opening release");
    begin()?;
    bench.finish()
}

#[test]
fn a_frontend_elsewhere_is_not_followed() -> Result<()> {
    let mut bench = Bench::new()?;
    for (key, value) in [("frontend", "/local/domain/6/device/vbd/51712"), ("frontend-id", "6")] {
        bench.dom0.rm_if_exists(&VBD.backend_path())?;
        add_device(&bench.dom0, &VBD, &[("params", "image"), (key, value)], &[])?;
        bench.back(State::Closed);
        assert!(bench.error().is_some_and(|error| error.contains("correct the toolstack")));
    }
    assert_eq!(bench.fake.log(), "");
    bench.finish()
}

#[test]
fn a_stop_leaves_a_clean_picture_and_the_next_process_goes_on() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    let other = DeviceAddress { devid: 51728, ..VBD };
    add_device(&bench.dom0, &other, &[("params", "other")], &[])?;
    let other_state = format!("{}/state", other.backend_path());
    wait_state(&bench.dom0, &other_state, &[State::InitWait], LONG)?;
    bench.finish()?;
    assert_eq!(bench.backend("state").as_deref(), Some("6"));
    assert!(bench.error().is_some_and(|error| error.contains("told to stop")));
    assert_eq!(bench.dom0.read_str(&other_state)?, "2", "was not connected: waits for the next process");
    assert_eq!(bench.fake.log(), "create:other disconnect release release");
    bench.fake.script().log.clear();
    bench.front("6");
    bench.start()?;
    bench.front("1");
    bench.back(State::InitWait);
    bench.ready()?;
    bench.back(State::Connected);
    bench.finish()
}

#[test]
fn after_a_crash_in_state_4() -> Result<()> {
    for adopts in [true, false] {
        let mut bench = Bench::new()?;
        bench.finish()?;
        bench.fake.script().adopts = adopts;
        bench.add()?;
        bench.hotplug()?;
        bench.ready()?;
        bench.dom0.write(&format!("{}/state", VBD.backend_path()), "4")?;
        bench.start()?;
        if adopts {
            bench.fake.until("create:image open reattach request=None");
            assert_eq!(bench.backend("state").as_deref(), Some("4"));
        } else {
            bench.back(State::Closing);
            bench.front("6");
            bench.back(State::Closed);
        }
        bench.finish()?;
    }
    Ok(())
}

#[test]
fn a_lost_store_ends_the_driver() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.attach()?;
    bench.server.shutdown();
    let thread = bench.thread.take().expect("running");
    assert!(matches!(thread.join().expect("no panic"), Err(Error::Disconnected)));
    Ok(())
}

/// Guests and toolstacks doing anything in any order: in the end the toolstack always gets its 6.
#[test]
fn any_order_of_events() -> Result<()> {
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).expect("small")
    };
    let mut bench = Bench::new()?;
    let (back, front) = (VBD.backend_path(), VBD.frontend_path());
    let states = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "99", "", "abc", "4", "3", "1"];
    for round in 0..60 {
        bench.add()?;
        bench.hotplug()?;
        // Every other time the disorder begins in the middle.
        if round % 2 == 0 {
            bench.ready()?;
            bench.back(State::Connected);
        }
        for _ in 0..random(40) {
            if random(3) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            match random(14) {
                0 => bench.dom0.write(&format!("{back}/online"), ["0", "1"][random(2)])?,
                1 if bench.dom0.read_opt(&format!("{back}/state"))?.is_some() => {
                    bench.dom0.write(&format!("{back}/state"), "5")?;
                }
                2 => bench.dom0.rm_if_exists(&back)?,
                3 => bench.add()?,
                4 => bench.dom0.rm_if_exists(&front)?,
                5 => bench.hotplug()?,
                6 => {
                    if let Some(notifier) = bench.fake.script().notifier.clone() {
                        notifier.fault(Fault::guest(5, "random"));
                    }
                }
                _ if bench.dom0.directory_opt(&front)?.is_some() => {
                    bench.guest.write("device/vbd/51712/ring-ref", "8")?;
                    bench.front(states[random(states.len())]);
                }
                _ => {}
            }
        }
        bench.dom0.rm_if_exists(&front)?;
        remove_device(&bench.dom0, &VBD, LONG, false, || Ok(())).unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
    bench.finish()?;
    let count = |word: &str| bench.fake.script().log.iter().filter(|said| said.starts_with(word)).count();
    assert_eq!(count("create"), count("release"));
    assert_eq!(count("connect"), count("disconnect"));
    assert!(count("connect") >= 30);
    Ok(())
}
