//! A virtual block device: what the xenbus driver asks of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::Backend;
use xenstore_client::xenbus::{Device, DeviceId, Fault, Keys, Kind, Notifier};

use crate::barrier::Barriers;
use crate::bounce::Units;
use crate::counters::Counters;
use crate::health::Health;
use crate::hotplug;
use crate::image::{Image, ImageError, Problem};
use crate::negotiate::{self, Agreed, FRONTEND_KEYS, Limits};
use crate::request::Shape;
use crate::spec::Access;
use crate::worker::{Plan, Report, Worker};

/// How this process serves disks.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// What is offered to frontends.
    pub limits: Limits,
    /// Processors for queues, taken in turn; empty to let the scheduler choose.
    pub cpus: Vec<usize>,
}

/// The directories below `backend/` that are ours: `vbd` is what libxl writes for backendtype=phy, `vbd3` for
/// backendtype=tap from Xen 4.19 on, which no kernel driver claims.
pub const KINDS: [&str; 2] = ["vbd", "vbd3"];

/// Block devices of one of [`KINDS`].
#[derive(Debug)]
pub struct VbdKind {
    name: &'static str,
    xen: Arc<dyn Backend>,
    config: Config,
    /// Queues placed so far.
    placed: Arc<Mutex<usize>>,
}

impl VbdKind {
    /// Block devices served by `xen`'s domain.
    pub fn new(name: &'static str, xen: Arc<dyn Backend>, config: Config) -> Self {
        Self { name, xen, config, placed: Arc::default() }
    }
}

impl Kind for VbdKind {
    type Device = Vbd;

    fn name(&self) -> &str {
        self.name
    }

    fn frontend_keys(&self) -> &[&str] {
        FRONTEND_KEYS
    }

    fn create(&mut self, id: &DeviceId, _backend: &Keys, notifier: Notifier) -> Result<Vbd, Fault> {
        Ok(Vbd {
            id: id.clone(),
            xen: Arc::clone(&self.xen),
            config: self.config.clone(),
            placed: Arc::clone(&self.placed),
            notifier,
            medium: None,
            health: Arc::default(),
            workers: Vec::new(),
            counters: Vec::new(),
            running: Arc::default(),
        })
    }
}

/// What is behind a device once it is open.
#[derive(Debug)]
struct Medium {
    image: Arc<Image>,
    read_only: bool,
    cdrom: bool,
    discard: bool,
}

impl Medium {
    fn describe(&self, limits: &Limits) -> Vec<(String, String)> {
        negotiate::describe(&self.image, limits, self.read_only, self.cdrom, self.discard)
    }
}

/// How many queues still run, and whether they were told to stop.
#[derive(Debug, Default)]
struct Running {
    queues: usize,
    stopping: bool,
}

/// One virtual block device.
#[derive(Debug)]
pub struct Vbd {
    id: DeviceId,
    xen: Arc<dyn Backend>,
    config: Config,
    placed: Arc<Mutex<usize>>,
    notifier: Notifier,
    medium: Option<Medium>,
    health: Arc<Health>,
    workers: Vec<Worker>,
    counters: Vec<Arc<Counters>>,
    running: Arc<Mutex<Running>>,
}

/// Where the toolstack and the hotplug program say the disk is.
fn target(backend: &Keys) -> Result<PathBuf, Fault> {
    let named = |key| backend.get(key).filter(|value: &&str| !value.is_empty());
    match (named("physical-device-path"), named("params")) {
        (Some(path), _) => Ok(path.into()),
        (None, Some(params)) => Ok(hotplug::path(params)),
        (None, None) => Err(backend.fault(libc::ENOENT, "neither physical-device-path nor params name a disk")),
    }
}

fn image_fault(error: &ImageError) -> Fault {
    let errno = match &error.problem {
        Problem::Missing => libc::ENOENT,
        Problem::Permission(_) => libc::EACCES,
        Problem::Directory => libc::EISDIR,
        Problem::NotADisk | Problem::Empty(_) => libc::EINVAL,
        Problem::ReadOnlyStorage => libc::EROFS,
        Problem::InUse(_) => libc::EBUSY,
        Problem::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
    };
    Fault::host(errno, error.to_string())
}

impl Vbd {
    /// Builds all queues, or none.
    fn start_queues(&mut self, agreed: &Agreed, image: &Arc<Image>, shape: Shape) -> Result<(), Fault> {
        let mut workers = Vec::with_capacity(agreed.queues.len());
        self.counters = agreed.queues.iter().map(|_| Arc::default()).collect();
        let (barriers, units) = (Arc::new(Barriers::default()), Arc::new(Units::default()));
        for (index, keys) in agreed.queues.iter().enumerate() {
            let plan = Plan {
                xen: Arc::clone(&self.xen),
                peer: self.id.frontend_id,
                // As Linux names its threads: "3.xvda-0"; the kernel keeps 15 characters.
                name: format!("{}.vbd{}-{index}", self.id.frontend_id, self.id.devid),
                keys: keys.clone(),
                protocol: agreed.protocol,
                persistent: agreed.persistent,
                image: Arc::clone(image),
                shape,
                health: Arc::clone(&self.health),
                barriers: Arc::clone(&barriers),
                units: Arc::clone(&units),
                counters: Arc::clone(&self.counters[index]),
                cpu: self.next_cpu(),
            };
            let (running, notifier) = (Arc::clone(&self.running), self.notifier.clone());
            workers.push(Worker::prepare(plan, move |report| match report {
                Report::Broken(fault) => notifier.fault(fault),
                Report::Ended => {
                    let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
                    running.queues -= 1;
                    if running.queues == 0 && running.stopping {
                        notifier.disconnected();
                    }
                }
            })?);
        }
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Running { queues: workers.len(), stopping: false };
        workers.iter_mut().for_each(Worker::serve);
        self.workers = workers;
        Ok(())
    }

    fn next_cpu(&self) -> Option<usize> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let cpu = self.config.cpus.get(*placed % self.config.cpus.len().max(1)).copied();
        *placed = placed.wrapping_add(1);
        cpu
    }

    fn log_totals(&self) {
        let sum = |pick: fn(&Counters) -> u64| self.counters.iter().map(|counters| pick(counters)).sum::<u64>();
        tracing::info!(
            device = %self.id.backend_path,
            reads = sum(|c| c.reads.get()),
            writes = sum(|c| c.writes.get()),
            flushes = sum(|c| c.flushes.get()),
            discards = sum(|c| c.discards.get()),
            mib_read = sum(|c| c.bytes_read.get()) >> 20,
            mib_written = sum(|c| c.bytes_written.get()) >> 20,
            io_errors = sum(|c| c.io_errors.get()),
            refused = sum(Counters::refusals),
            "disconnected"
        );
    }
}

impl Device for Vbd {
    fn features(&mut self) -> Result<Vec<(String, String)>, Fault> {
        Ok(negotiate::offer(&self.config.limits))
    }

    fn open(&mut self, backend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        let cdrom = backend.get("device-type") == Some("cdrom");
        let access = if cdrom { Access::ReadOnly } else { hotplug::access(backend.require("mode")?) };
        let image = Image::open(&target(backend)?, access).map_err(|error| image_fault(&error))?;
        let read_only = access == Access::ReadOnly;
        let discard = image.discard && !read_only && backend.get("discard-enable") != Some("0");
        tracing::info!(
            device = %self.id.backend_path,
            image = %image.path().display(),
            sectors = image.sectors,
            direct = image.direct,
            unit = image.unit,
            discard,
            "opened"
        );
        for note in &image.notes {
            tracing::warn!(device = %self.id.backend_path, image = %image.path().display(), "{note}");
        }
        let medium = Medium { image: Arc::new(image), read_only, cdrom, discard };
        let keys = medium.describe(&self.config.limits);
        self.medium = Some(medium);
        Ok(keys)
    }

    fn connect(&mut self, frontend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        let Some(medium) = &self.medium else {
            return Err(Fault::host(libc::ENODEV, "connect without a medium"));
        };
        if self.health.flush_failed() {
            return Err(Fault::host(libc::EIO, "a flush has failed: detach this disk and check its storage"));
        }
        let limits = self.config.limits;
        let agreed = negotiate::agree(frontend, &limits)?;
        let image = Arc::clone(&medium.image);
        let shape = Shape {
            sectors: image.sectors,
            block: u64::from(image.sector_size / 512),
            read_only: medium.read_only,
            discard: medium.discard,
            barrier: limits.barrier && !medium.read_only,
            indirect: limits.indirect_segments as usize,
        };
        let keys = medium.describe(&limits);
        self.start_queues(&agreed, &image, shape)?;
        tracing::info!(
            device = %self.id.backend_path,
            queues = agreed.queues.len(),
            ring_pages = agreed.queues[0].ring.len(),
            protocol = agreed.protocol.name(),
            persistent = agreed.persistent,
            "connected"
        );
        Ok(keys)
    }

    fn disconnect(&mut self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.stopping = true;
        if running.queues == 0 {
            self.notifier.disconnected();
        }
        drop(running);
        self.workers.iter().for_each(Worker::stop);
    }

    fn release(&mut self) {
        if !self.workers.is_empty() {
            self.log_totals();
        }
        self.workers.clear();
        self.medium = None;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn where_the_disk_is() {
        let keys = |pairs: &[(&str, &str)]| Keys::from_pairs(pairs.iter().copied());
        assert_eq!(target(&keys(&[("params", "aio:/x.img")])).unwrap(), Path::new("/x.img"));
        let both = keys(&[("params", "/x.img"), ("physical-device-path", "/dev/vg/x")]);
        assert_eq!(target(&both).unwrap(), Path::new("/dev/vg/x"));
        assert!(target(&keys(&[("params", "")])).is_err());
    }
}
