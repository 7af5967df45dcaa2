//! A virtual block device: what the xenbus driver asks of it.

mod hold;
mod opening;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::Backend;
use xenstore_client::LogGate;
use xenstore_client::xenbus::{Device, DeviceId, Fault, Keys, Kind, Notifier, Progress};

use crate::abort::{Abort, Remains};
use crate::barrier::Barriers;
use crate::bounce::Units;
use crate::counters::Counters;
use crate::device_model::DeviceModel;
use crate::doubt;
use crate::health::Health;
use crate::image::Image;
use crate::inflight;
use crate::lookout::Lookout;
use crate::medium::Medium;
use crate::negotiate::{self, Agreed, FRONTEND_KEYS, Limits};
use crate::opener::Openers;
use crate::worker::{Order, Plan, Report, Worker};

use hold::Hold;
use opening::{Measuring, Opening, Purpose};

pub use opening::{OPENING, hung};

/// How this process serves disks.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// What is offered to frontends.
    pub limits: Limits,
    /// Processors for queues, taken in turn; empty to let the scheduler choose.
    pub cpus: Vec<usize>,
    /// The folder for logs of what is in flight, which the next process looks for there.
    pub logs: Option<PathBuf>,
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
    openers: Openers,
}

impl VbdKind {
    /// Block devices served by `xen`'s domain.
    pub fn new(name: &'static str, xen: Arc<dyn Backend>, config: Config) -> Self {
        Self { name, xen, config, placed: Arc::default(), openers: Openers::default() }
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
            openers: self.openers.clone(),
            notifier,
            medium: None,
            health: Arc::default(),
            workers: Vec::new(),
            counters: Vec::new(),
            running: Arc::default(),
            opened_with: None,
            opening: None,
            measuring: None,
            params_meanwhile: None,
            hold: Hold::default(),
            device_model: None,
            lookout: None,
            waiting: None,
            abort: None,
            log: LogGate::default(),
        })
    }
}

/// How many queues still run, what they were told, and what they said.
#[derive(Debug, Default)]
struct Running {
    queues: usize,
    stopping: bool,
    /// Queues with writes that wait for room.
    full: usize,
    /// Orders not yet carried out, and what is published when all are.
    orders: usize,
    publish: Vec<(String, String)>,
    /// What is let go of when all are, and for which domain.
    yields: Option<(Arc<Image>, String)>,
}

impl Running {
    /// Says that all orders are carried out, if they are.
    fn finish_orders(&mut self, notifier: &Notifier) {
        if self.orders > 0 {
            return;
        }
        if !self.publish.is_empty() {
            notifier.publish(std::mem::take(&mut self.publish));
        }
        if let Some((image, domain)) = self.yields.take() {
            image.give_way();
            notifier.tell(YIELDED, Some(domain));
        }
    }
}

/// One virtual block device.
#[derive(Debug)]
pub struct Vbd {
    id: DeviceId,
    xen: Arc<dyn Backend>,
    config: Config,
    placed: Arc<Mutex<usize>>,
    openers: Openers,
    notifier: Notifier,
    medium: Option<Medium>,
    health: Arc<Health>,
    workers: Vec<Worker>,
    counters: Vec<Arc<Counters>>,
    running: Arc<Mutex<Running>>,
    /// Our directory's keys, as the medium was opened with.
    opened_with: Option<Keys>,
    /// What is being opened.
    opening: Option<Opening>,
    /// The image whose size is being looked at.
    measuring: Option<Measuring>,
    /// What `params` became while the disk was opened.
    params_meanwhile: Option<String>,
    /// How far the disk is this guest's.
    hold: Hold,
    /// Who else may have it until the guest's driver comes.
    device_model: Option<DeviceModel>,
    /// Looks for what has to come before the disk is this guest's alone.
    lookout: Option<Lookout>,
    /// The guest, connected, waits for that.
    waiting: Option<Agreed>,
    /// The rings of a killed predecessor, whose requests get an error.
    abort: Option<Abort>,
    /// For lines that a guest can cause by connecting again and again.
    log: LogGate,
}

/// What the queues' threads speak to.
struct Listener {
    xen: Arc<dyn Backend>,
    running: Arc<Mutex<Running>>,
    notifier: Notifier,
}

impl Listener {
    /// Notes a failed flush where the disk's detachment and the end of this process do not reach. On the queue's thread,
    /// and before anybody can learn of the failure and attach the disk anew.
    fn remember(&self, image: &Image, reason: &str) {
        let noted = self.xen.store().map_err(|error| error.to_string()).and_then(|store| {
            doubt::note(&store, self.xen.domid(), image.identity(), image.path(), reason)
                .map_err(|error| error.to_string())
        });
        match noted {
            Ok(()) => tracing::error!(image = %image.path().display(), "{reason}"),
            Err(error) => {
                tracing::error!(image = %image.path().display(), %error, "{reason}; this could not be noted in XenStore");
            }
        }
    }

    fn hear(&self, report: Report) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        match report {
            Report::Broken(fault) => self.notifier.fault(fault),
            Report::Ended => {
                running.queues -= 1;
                if running.queues == 0 && running.stopping {
                    self.notifier.disconnected();
                }
            }
            Report::Changed => {
                running.orders = running.orders.saturating_sub(1);
                running.finish_orders(&self.notifier);
            }
            Report::Full(full) => {
                running.full = if full { running.full + 1 } else { running.full.saturating_sub(1) };
                match (full, running.full) {
                    (true, 1) => self.notifier.tell(ON_HOLD, Some(NO_ROOM.to_owned())),
                    (false, 0) => self.notifier.tell(ON_HOLD, None),
                    _ => {}
                }
            }
            Report::FlushFailed(image, reason) => self.remember(&image, &reason),
            // Heard again as a change of our own key, on the driver's thread, where it can be dealt with.
            Report::Resized => self.notifier.tell(RESIZE, Some("changed".to_owned())),
        }
    }
}

/// Our key that is there while writes wait for room, for `blkback list` and other tools.
pub const ON_HOLD: &str = "on-hold";
const NO_ROOM: &str = "ENOSPC no room left on the storage: writes wait and go on by themselves when there is some";
const NOT_YET: &str =
    "EBUSY the guest arrives by a migration and waits: its disk is not let go of yet where it comes from";
/// Our key that is written, by ourselves, when the disk may be this guest's alone.
const TAKEOVER: &str = "takeover";
/// Our key with which the hotplug program asks the disk of a departing guest to make way: the number of the arriving
/// domain, whose device model is about to open the image.
pub const YIELD: &str = "yield-to";
/// Our key with the same number once it has.
pub const YIELDED: &str = "yielded-to";
/// Our key that is written when the disk may have grown: by `blkback resize`, or by us.
pub const RESIZE: &str = "resize";
/// Our key that says what came of it: how many sectors the guest has, or what is wrong.
pub const RESIZE_STATUS: &str = "resize-status";
/// The key that names the disk; written anew, it changes the disk in a drive.
const PARAMS: &str = "params";
/// Our key that says how a change of the disk ended: `inserted`, `empty`, or an error.
pub const MEDIUM_STATUS: &str = "medium-status";

impl Vbd {
    /// Tells all queues something, and publishes `keys` when all have done it.
    fn order(&self, order: &Order, keys: Vec<(String, String)>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.publish.extend(keys);
        running.orders += self.workers.iter().filter(|worker| worker.order(order.clone())).count();
        running.finish_orders(&self.notifier);
    }

    /// Whether this is what `params` said when the disk was opened.
    fn is_opened_with(&self, params: Option<&str>) -> bool {
        self.opened_with.as_ref().is_some_and(|keys| keys.get(PARAMS) == params)
    }

    /// Says what is in a drive.
    fn say_medium(&self) {
        let Some(medium) = self.medium.as_ref().filter(|medium| medium.kind.cdrom || medium.kind.removable) else {
            return;
        };
        let said = if medium.image.path().as_os_str().is_empty() { "empty" } else { "inserted" };
        self.notifier.tell(MEDIUM_STATUS, Some(said.to_owned()));
    }

    /// Builds all queues, or none.
    fn start_queues(&mut self, agreed: &Agreed, medium: &Medium) -> Result<(), Fault> {
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
                persistent: agreed.persistent && medium.pages_stay,
                image: Arc::clone(&medium.image),
                shape: medium.shape(&self.config.limits),
                health: Arc::clone(&self.health),
                barriers: Arc::clone(&barriers),
                units: Arc::clone(&units),
                counters: Arc::clone(&self.counters[index]),
                cpu: self.next_cpu(),
                measures: index == 0,
                hold_when_full: medium.hold_when_full,
                log: self.log(index),
            };
            let listener = Listener {
                xen: Arc::clone(&self.xen),
                running: Arc::clone(&self.running),
                notifier: self.notifier.clone(),
            };
            workers.push(Worker::prepare(plan, move |report| listener.hear(report))?);
        }
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Running { queues: workers.len(), ..Running::default() };
        workers.iter_mut().for_each(Worker::serve);
        self.workers = workers;
        Ok(())
    }

    /// Where what is in flight on a queue is logged.
    fn log(&self, queue: usize) -> Option<PathBuf> {
        let DeviceId { kind, frontend_id, devid, .. } = &self.id;
        self.config.logs.as_ref().map(|folder| folder.join(inflight::name(kind, *frontend_id, *devid, queue)))
    }

    fn next_cpu(&self) -> Option<usize> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let cpu = self.config.cpus.get(*placed % self.config.cpus.len().max(1)).copied();
        *placed = placed.wrapping_add(1);
        cpu
    }

    fn log_totals(&mut self) {
        let Some(unsaid) = self.log.admit() else { return };
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
            unsaid,
            "disconnected"
        );
    }
}

impl Device for Vbd {
    fn features(&mut self) -> Result<Vec<(String, String)>, Fault> {
        Ok(negotiate::offer(&self.config.limits))
    }

    fn open(&mut self, backend: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault> {
        self.begin_opening(Purpose::Attach, backend.clone()).map(|()| Progress::Later)
    }

    fn answered(&mut self) -> Option<Result<Vec<(String, String)>, Fault>> {
        self.opener_answered()
    }

    /// A killed predecessor's disk is not served on: its guest may have got errors, and whoever wanted the image meanwhile
    /// could have it. It is opened when the guest comes back.
    fn reopen(&mut self, backend: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault> {
        self.opened_with = Some(backend.clone());
        Ok(Progress::Done(Vec::new()))
    }

    fn reattach(&mut self, frontend: &Keys) -> Result<(), Fault> {
        // The dead process may have been started with other limits.
        let agreed = negotiate::agree(frontend, &Limits { queues: 64, ring_page_order: 4, ..self.config.limits })?;
        let rings = agreed.queues.iter().enumerate().map(|(index, keys)| {
            Remains::of(&*self.xen, self.id.frontend_id, keys, agreed.protocol, self.log(index).as_ref())
        });
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        let store = self.xen.store().map_err(|error| Fault::host(libc::EIO, error.to_string()))?;
        let logs: Vec<PathBuf> = (0..rings.len()).filter_map(|index| self.log(index)).collect();
        let notifier = self.notifier.clone();
        let ended = move || {
            for log in logs {
                if let Err(error) = inflight::remove(&log) {
                    tracing::warn!(log = %log.display(), %error, "removing the log of requests in flight");
                }
            }
            notifier.disconnected();
        };
        let name = format!("{}.vbd{}-end", self.id.frontend_id, self.id.devid);
        self.abort = Some(Abort::begin(rings, name, (store, self.id.frontend_path.clone()), ended)?);
        let text = "the process that served this disk was killed: the guest's requests end with errors, and the disk \
                    closes; detach it and attach it again, or restart the guest";
        self.notifier.fault(Fault::host(libc::EPIPE, text));
        Ok(())
    }

    fn may_connect(&mut self) -> Result<bool, Fault> {
        // After `reopen`: connect publishes what an opener finds.
        if self.medium.is_none()
            && let Some(keys) = self.opened_with.clone()
        {
            if !self.is_opening(&Purpose::Return) {
                self.begin_opening(Purpose::Return, keys)?;
            }
            return Ok(false);
        }
        self.may_use()
    }

    fn connect(&mut self, frontend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        let Some(medium) = self.medium.clone() else {
            return Err(Fault::host(libc::ENODEV, "connect without a medium"));
        };
        if self.health.flush_failed() {
            return Err(Fault::host(libc::EIO, "a flush has failed: detach this disk and check its storage"));
        }
        let agreed = negotiate::agree(frontend, &self.config.limits)?;
        let keys = medium.describe(&self.config.limits);
        if self.hold == Hold::Awaited {
            self.waiting = Some(agreed);
            return Ok(keys);
        }
        self.start_queues(&agreed, &medium)?;
        if let Some(unsaid) = self.log.admit() {
            tracing::info!(
                device = %self.id.backend_path,
                queues = agreed.queues.len(),
                ring_pages = agreed.queues[0].ring.len(),
                protocol = agreed.protocol.name(),
                persistent = agreed.persistent && medium.pages_stay,
                unsaid,
                "connected"
            );
        }
        Ok(keys)
    }

    fn watched_backend_keys(&self) -> &[&str] {
        &[PARAMS, RESIZE, TAKEOVER, YIELD]
    }

    fn backend_changed(&mut self, key: &str, value: Option<&str>) {
        match key {
            TAKEOVER if value.is_some() => self.look_again(),
            YIELD => self.yield_to(value.unwrap_or_default()),
            RESIZE if value.is_some() && self.hold == Hold::Awaited => {
                self.notifier.tell(RESIZE_STATUS, Some(NOT_YET.to_owned()));
            }
            PARAMS if self.hold == Hold::Awaited && !self.is_opened_with(value) => {
                self.notifier.tell(MEDIUM_STATUS, Some(NOT_YET.to_owned()));
            }
            RESIZE if value.is_some() => self.resize(),
            PARAMS => match &self.opened_with {
                // The directory's first contents come this way too, and so does who asks for what is there already.
                Some(keys) if keys.get(PARAMS) == value => {
                    if self.is_opening(&Purpose::Change) {
                        self.give_up_opening();
                    }
                    self.say_medium();
                }
                _ if self.opening.is_some() && !self.is_opening(&Purpose::Change) => {
                    self.params_meanwhile = value.map(str::to_owned);
                }
                Some(_) => self.change_medium(value.unwrap_or_default()),
                None => {}
            },
            _ => {}
        }
    }

    fn disconnect(&mut self) {
        self.waiting = None;
        if let Some(abort) = &self.abort {
            return abort.close();
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.stopping = true;
        if running.queues == 0 {
            self.notifier.disconnected();
        }
        drop(running);
        self.workers.iter().for_each(Worker::stop);
    }

    fn release(&mut self) -> Progress<()> {
        if !self.workers.is_empty() {
            self.log_totals();
        }
        self.workers.clear();
        self.abort = None;
        self.lookout = None;
        self.running.lock().unwrap_or_else(PoisonError::into_inner).yields = None;
        self.hold = Hold::default();
        self.give_up_opening();
        (self.measuring, self.params_meanwhile) = (None, None);
        let notifier = self.notifier.clone();
        match self.medium.take() {
            Some(medium) => self.close(medium, move || notifier.released()),
            None => Progress::Done(()),
        }
    }
}
