//! A disk as guests have it, on storage that fails on command: blkback's driver, device and queues over the file of
//! [`fuse`](super::fuse), attached with the toolstack's own functions.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blkback::abi::op;
use blkback::device::{Config, VbdKind};
use blkback::front::{Frontend, Options, Piece, Queue};
use blkback::spec::DiskSpec;
use blkback::toolstack::{self, Attached};
use blkback::vdev::Vdev;
use hypervisor::emu::{GuestOptions, GuestSeat, Limits, Machine, Member};
use hypervisor::{Backend, DomId, Guest};
use xenstore_client::xenbus::driver::{Driver, StopHandle};
use xenstore_client::{Client, Store};

use super::fuse::Mounted;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// blkback in the dom0 of a machine, and the file.
#[derive(Debug)]
pub struct Served {
    /// The file.
    pub mounted: Mounted,
    /// Dom0's way to XenStore.
    pub store: Client,
    machine: Machine,
    stop: StopHandle,
    server: Option<JoinHandle<()>>,
}

impl Served {
    /// Mounts a file of `len` bytes in a mount namespace of the calling thread's own, and serves.
    ///
    /// # Errors
    /// When this process may not mount.
    pub fn new(len: usize) -> io::Result<Self> {
        let mounted = Mounted::new(len)?;
        let machine = Machine::new(Limits::default()).map_err(other)?;
        let store = Member::local(&machine, DomId::DOM0).and_then(|dom0| dom0.store()).map_err(other)?;
        let (stop, server) = serve(&machine)?;
        Ok(Self { mounted, store, machine, stop, server: Some(server) })
    }

    /// The process that serves ends, and another takes its place.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn restart(&mut self) -> io::Result<()> {
        self.end();
        let (stop, server) = serve(&self.machine)?;
        (self.stop, self.server) = (stop, Some(server));
        Ok(())
    }

    fn end(&mut self) {
        self.stop.stop();
        if let Some(server) = self.server.take()
            && server.join().is_err()
            && !std::thread::panicking()
        {
            panic!("blkback panicked");
        }
    }

    /// A guest of this name.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn guest(&self, name: &str) -> io::Result<Arc<GuestSeat>> {
        let options = GuestOptions { name: name.into(), ..GuestOptions::default() };
        self.machine.create_guest(options).map(Arc::new).map_err(other)
    }

    /// The end of a guest, as its toolstack has it.
    ///
    /// # Errors
    /// When there is no such guest.
    pub fn destroy(&self, guest: &GuestSeat) -> io::Result<()> {
        self.machine.destroy(Guest::domid(guest)).map_err(other)
    }

    /// Attaches a disk as an administrator would.
    ///
    /// # Errors
    /// What the administrator is told.
    pub fn attach(&self, guest: &GuestSeat, image: &Path, rest: &str) -> Result<Attached, String> {
        let spec: DiskSpec = format!("{},raw,{rest}", image.display()).parse().map_err(|error| format!("{error}"))?;
        let attached = toolstack::attach(&self.store, DomId::DOM0, Guest::domid(guest), &spec, Duration::ZERO);
        attached.map_err(|error| error.to_string())
    }

    /// Takes a disk away, whatever its guest says.
    ///
    /// # Errors
    /// What the administrator is told.
    pub fn detach(&self, guest: &GuestSeat, vdev: Vdev) -> Result<(), String> {
        let detached = toolstack::detach(&self.store, DomId::DOM0, Guest::domid(guest), vdev, true);
        detached.map_err(|error| error.to_string())
    }

    /// Attaches a disk and connects the guest's driver.
    ///
    /// # Errors
    /// What the administrator, or the guest, is told.
    pub fn connect(&self, guest: &Arc<GuestSeat>, image: &Path, vdev: &str, rest: &str) -> Result<Disk, String> {
        self.attach(guest, image, &format!("{vdev}{rest}"))?;
        let vdev = Vdev::parse(vdev).map_err(|error| error.to_string())?;
        let front = Frontend::connect(guest.clone(), vdev.number(), &Options::default());
        let mut front = front.map_err(|error| error.to_string())?;
        let queue = front.take_queues().remove(0);
        Ok(Disk { guest: Guest::domid(&**guest), vdev, store: self.store.clone(), front, queue })
    }

    /// What `blkback list` says of a guest's disks.
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn list(&self, guest: &GuestSeat) -> Result<String, String> {
        toolstack::list(&self.store, Guest::domid(guest), None).map_err(|error| error.to_string())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(machine: &Machine) -> io::Result<(StopHandle, JoinHandle<()>)> {
    let xen: Arc<dyn Backend> = Arc::new(Member::local(machine, DomId::DOM0).map_err(other)?);
    let stop = StopHandle::new().map_err(other)?;
    let store = xen.store().map_err(other)?;
    let mut driver = Driver::new(store, DomId::DOM0, VbdKind::new("vbd", xen, Config::default())).map_err(other)?;
    let told = stop.clone();
    let server = std::thread::spawn(move || driver.run(&told).expect("XenStore"));
    Ok((stop, server))
}

/// A connected disk.
#[derive(Debug)]
pub struct Disk {
    /// Whose it is.
    pub guest: DomId,
    /// Which.
    pub vdev: Vdev,
    store: Client,
    front: Frontend,
    queue: Queue,
}

impl Disk {
    /// A key of the backend's directory.
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn key(&self, name: &str) -> Result<Option<String>, String> {
        let path = format!("{}/{name}", self.front.backend_path());
        self.store.read_opt(&path).map_err(|error| error.to_string())
    }

    /// Writes a key of the backend's directory.
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn tell(&self, name: &str, value: &str) -> Result<(), String> {
        self.store.write(&format!("{}/{name}", self.front.backend_path()), value).map_err(|error| error.to_string())
    }

    /// Waits until a key is as `is_it` wants it.
    ///
    /// # Errors
    /// When it does not become so in time.
    pub fn wait(&self, name: &str, is_it: impl Fn(Option<&str>) -> bool) -> Result<(), String> {
        let began = Instant::now();
        loop {
            let value = self.key(name)?;
            if is_it(value.as_deref()) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("the key {name} stays {value:?}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Makes a request of one page (a flush has none), and waits `longest` for its status.
    ///
    /// # Errors
    /// When the backend breaks the protocol.
    pub fn ask(&mut self, operation: u8, sector: u64, longest: Duration) -> Result<Option<i16>, String> {
        let page = [Piece { page: 0, first: 0, last: 7 }];
        let pieces = if operation == op::FLUSH_DISKCACHE { &[][..] } else { &page[..] };
        self.queue.submit(operation, sector, pieces, 0);
        self.queue.publish().map_err(|error| error.to_string())?;
        let began = Instant::now();
        loop {
            if let Some(outcome) = self.queue.outcome().map_err(|error| error.to_string())? {
                return Ok(Some(outcome.status));
            }
            let left = longest.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.queue.wait(None, left).map_err(|error| error.to_string())?;
        }
    }

    /// Reads a page's worth of sectors: the first byte, or the status.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn read(&mut self, sector: u64) -> Result<Result<u8, i16>, String> {
        let Some(status) = self.ask(op::READ, sector, PATIENCE)? else { return Err("no answer".to_owned()) };
        let mut byte = [0];
        self.queue.data().copy_out(0, &mut byte);
        Ok(if status == 0 { Ok(byte[0]) } else { Err(status) })
    }

    /// Writes a page's worth of sectors.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn write(&mut self, sector: u64, byte: u8) -> Result<i16, String> {
        self.queue.data().copy_in(0, &[byte; 4096]);
        self.ask(op::WRITE, sector, PATIENCE)?.ok_or_else(|| "no answer".to_owned())
    }

    /// The guest lets go.
    ///
    /// # Errors
    /// When the backend does not follow.
    pub fn close(self) -> Result<(), String> {
        self.front.close(vec![self.queue]).map_err(|error| error.to_string())
    }
}
