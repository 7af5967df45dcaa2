//! A whole machine in one process: blkback serving on a thread, and guests that the tests play.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod scene;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkback::device::{Config, VbdKind};
use blkback::front::{Frontend, Options, Outcome, Queue};
use blkback::spec::DiskSpec;
use blkback::toolstack::{self, Attached};
use blkback::vdev::Vdev;
use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::{Backend, DomId, Guest};
use xenstore_client::Client;
use xenstore_client::xenbus::driver::{Driver, StopHandle};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The machine, blkback in its dom0, and a folder for images.
pub struct Dom0 {
    pub machine: Machine,
    pub store: Client,
    pub folder: tempfile::TempDir,
    stop: StopHandle,
    server: Option<JoinHandle<()>>,
}

fn serve(xen: Arc<dyn Backend>, config: Config) -> (StopHandle, JoinHandle<()>) {
    let stop = StopHandle::new().unwrap();
    let (stopped, store) = (stop.clone(), xen.store().unwrap());
    let server = std::thread::spawn(move || {
        let mut driver = Driver::new(store, DomId(0), VbdKind::new("vbd", xen, config)).unwrap();
        driver.run(&stopped).unwrap();
    });
    (stop, server)
}

impl Dom0 {
    pub fn start() -> Self {
        Self::with(Config::default())
    }

    pub fn with(config: Config) -> Self {
        let machine = Machine::new(Limits::default()).unwrap();
        let xen: Arc<dyn Backend> = Arc::new(Member::local(&machine, DomId(0)).unwrap());
        let store = xen.store().unwrap();
        let (stop, server) = serve(xen, config);
        Self { machine, store, folder: tempfile::tempdir().unwrap(), stop, server: Some(server) }
    }

    /// Ends the backend as SIGTERM does, and starts another.
    pub fn restart(&mut self) {
        self.stop.stop();
        self.server.take().unwrap().join().unwrap();
        let xen = Arc::new(Member::local(&self.machine, DomId(0)).unwrap());
        let (stop, server) = serve(xen, Config::default());
        (self.stop, self.server) = (stop, Some(server));
    }

    /// A new image of `bytes` bytes, all holes.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.folder.path().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    pub fn guest(&self, name: &str) -> Arc<GuestSeat> {
        Arc::new(self.machine.create_guest(GuestOptions { name: name.into(), ..GuestOptions::default() }).unwrap())
    }

    /// Attaches as an administrator would; the guest's driver comes later.
    pub fn attach(&self, guest: &GuestSeat, spec: &str) -> Result<Attached, toolstack::Error> {
        let spec: DiskSpec = spec.parse().unwrap();
        toolstack::attach(&self.store, DomId(0), Guest::domid(guest), &spec, Duration::ZERO)
    }

    pub fn detach(&self, guest: &GuestSeat, vdev: &str) {
        let vdev = Vdev::parse(vdev).unwrap();
        toolstack::detach(&self.store, DomId(0), Guest::domid(guest), vdev, false).unwrap();
    }

    /// A guest with one disk, connected.
    pub fn connected(&self, image: &Path, access: &str, options: &Options) -> Disk {
        let guest = self.guest("guest");
        self.attach(&guest, &format!("{},raw,xvda,{access}", image.display())).unwrap();
        let mut front = Frontend::connect(guest.clone(), XVDA, options).unwrap();
        let queues = front.take_queues();
        Disk { guest, front, queues }
    }
}

impl Drop for Dom0 {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(server) = self.server.take() {
            let outcome = server.join();
            if !std::thread::panicking() {
                outcome.expect("blkback panicked");
            }
        }
    }
}

/// The number of xvda.
pub const XVDA: u32 = 51712;

/// A connected disk, as its guest sees it.
pub struct Disk {
    pub guest: Arc<GuestSeat>,
    pub front: Frontend,
    pub queues: Vec<Queue>,
}

impl Disk {
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    pub fn close(self) {
        self.front.close(self.queues).unwrap();
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

/// Shows what is in the ring and waits for `count` answers.
pub fn outcomes(queue: &mut Queue, count: usize) -> Vec<Outcome> {
    queue.publish().unwrap();
    let began = Instant::now();
    let mut outcomes = Vec::new();
    while outcomes.len() < count {
        while let Some(outcome) = queue.outcome().unwrap() {
            outcomes.push(outcome);
        }
        if outcomes.len() < count {
            assert!(began.elapsed() < PATIENCE, "{} of {count} answers came", outcomes.len());
            queue.wait(None, Duration::from_millis(100)).unwrap();
        }
    }
    outcomes
}

/// The status of the one request that was put into the ring.
pub fn status(queue: &mut Queue) -> i16 {
    outcomes(queue, 1)[0].status
}

/// A loop device over an image, detached when dropped.
pub struct LoopDevice(String);

impl LoopDevice {
    /// None where there is no losetup, no free loop device, or no right to one.
    pub fn on(image: &Path, sector_size: u32) -> Option<Self> {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector_size.to_string()])
            .arg(image)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(Self(String::from_utf8(output.stdout).ok()?.trim().to_owned()))
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.0);
        }
    }
}
