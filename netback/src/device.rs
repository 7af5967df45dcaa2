//! A virtual network interface: what the xenbus driver asks of it.
//!
//! The tap is made with the first features, before state 2, because the hotplug program that runs then wants to put
//! it into a bridge; it stays when the frontend leaves and goes when the device does. It has a carrier only while a
//! frontend is connected and has pages to receive into.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::memory::{IoList, Mapping};
use hypervisor::{Backend, PAGE_SIZE};
use xenstore_client::xenbus::{Device, DeviceId, Fault, Keys, Kind, Notifier};

use crate::counters::Counters;
use crate::credit::Rate;
use crate::hash::HashState;
use crate::multicast::Multicast;
use crate::negotiate::{self, Agreed, FRONTEND_KEYS};
use crate::queue::Live;
use crate::tap::{Features, KernelTaps, Tap, TapError, Taps};
use crate::worker::{Plan, Report, Shared, Worker};

/// How this process serves network interfaces.
#[derive(Debug, Clone)]
pub struct Config {
    /// Most queues of one vif; at least 1.
    pub queues: u32,
    /// Processors for queues, taken in turn; empty to let the scheduler choose.
    pub cpus: Vec<usize>,
    /// Where taps come from.
    pub taps: Arc<dyn Taps>,
}

impl Default for Config {
    /// What Linux' backend offers: a queue per processor, at most eight.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { queues: processors.min(8) as u32, cpus: Vec::new(), taps: Arc::new(KernelTaps) }
    }
}

/// Network interfaces.
#[derive(Debug)]
pub struct VifKind {
    xen: Arc<dyn Backend>,
    config: Config,
    /// Queues placed so far.
    placed: Arc<Mutex<usize>>,
}

impl VifKind {
    /// Network interfaces served by `xen`'s domain.
    pub fn new(xen: Arc<dyn Backend>, config: Config) -> Self {
        Self { xen, config, placed: Arc::default() }
    }
}

impl Kind for VifKind {
    type Device = Vif;

    fn name(&self) -> &str {
        "vif"
    }

    fn frontend_keys(&self) -> &[&str] {
        FRONTEND_KEYS
    }

    fn create(&mut self, id: &DeviceId, backend: &Keys, notifier: Notifier) -> Result<Vif, Fault> {
        check_mac(backend)?;
        let rate = read_rate(backend)?;
        Ok(Vif {
            id: id.clone(),
            xen: Arc::clone(&self.xen),
            config: self.config.clone(),
            placed: Arc::clone(&self.placed),
            notifier,
            tap: None,
            rate,
            plugged: backend.get("hotplug-status") == Some("connected"),
            connection: None,
            running: Arc::default(),
        })
    }
}

/// The toolstack's `rate`. One that does not parse is refused: ignored it would be no limit at all.
fn read_rate(backend: &Keys) -> Result<Option<Rate>, Fault> {
    backend.get("rate").map(|text| parse_rate(text).map_err(|text| backend.fault(libc::EINVAL, &text))).transpose()
}

fn parse_rate(text: &str) -> Result<Rate, String> {
    text.parse().map_err(|error: crate::credit::BadRate| error.to_string())
}

/// The toolstack's `mac` means nothing to us; but whoever filters by it, and found it to be none, would filter nothing.
fn check_mac(backend: &Keys) -> Result<(), Fault> {
    let Some(mac) = backend.get("mac") else { return Ok(()) };
    let good = mac.split(':').count() == 6
        && mac.split(':').all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if good {
        Ok(())
    } else {
        Err(backend.fault(libc::EINVAL, &format!("mac is {mac:?}, not six bytes like 00:16:3e:00:00:01")))
    }
}

/// What there is while a frontend is connected.
#[derive(Debug)]
struct Connection {
    workers: Vec<Worker>,
    counters: Vec<Arc<Counters>>,
    multicast: Arc<Multicast>,
    headroom: Arc<AtomicU16>,
    live: Arc<Live>,
}

/// How many queues still run, and whether they were told to stop.
#[derive(Debug, Default)]
struct Running {
    queues: usize,
    stopping: bool,
}

/// One virtual network interface.
#[derive(Debug)]
pub struct Vif {
    id: DeviceId,
    xen: Arc<dyn Backend>,
    config: Config,
    placed: Arc<Mutex<usize>>,
    notifier: Notifier,
    /// The tap's first queue: while it is open there is a tap.
    tap: Option<Tap>,
    rate: Option<Rate>,
    /// The hotplug program had run before there was a tap of ours: it was for another process's.
    plugged: bool,
    connection: Option<Connection>,
    running: Arc<Mutex<Running>>,
}

fn tap_fault(error: &TapError) -> Fault {
    Fault::host(error.source.raw_os_error().unwrap_or(libc::EIO), error.to_string())
}

impl Vif {
    fn name(&self) -> String {
        format!("vif{}.{}", self.id.frontend_id, self.id.devid)
    }

    fn tap(&self) -> Result<&Tap, Fault> {
        self.tap.as_ref().ok_or_else(|| Fault::host(libc::ENODEV, "there is no tap"))
    }

    /// The tap's queues for the connection's; the tap may have been renamed meanwhile.
    fn tap_queues(&self, count: usize) -> Result<Vec<Tap>, Fault> {
        let tap = self.tap()?;
        let first =
            tap.try_clone().map_err(|error| Fault::host(libc::EMFILE, format!("the tap's descriptor: {error}")))?;
        let name = tap.name().map_err(|error| tap_fault(&error))?.unwrap_or_else(|| self.name());
        let others = (1..count).map(|queue| self.config.taps.open(&name, queue as u32));
        std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>().map_err(|error| tap_fault(&error))
    }

    /// Builds all queues, or none.
    fn start_queues(&mut self, agreed: &Agreed) -> Result<(), Fault> {
        let taps = self.tap_queues(agreed.queues.len())?;
        let receives = agreed.receives;
        self.tap()?.set_features(receives.features()).map_err(|error| tap_fault(&error))?;
        // What came for a frontend that has left, cut and summed for it, is nobody's any more.
        taps.iter().try_for_each(drop_frames)?;
        let stalled = if receives.notifies { taps.len() as u32 } else { 0 };
        let multicast = Arc::new(Multicast::default());
        multicast.set_filtering(agreed.multicast_control);
        let mut connection = Connection {
            workers: Vec::with_capacity(taps.len()),
            counters: taps.iter().map(|_| Arc::default()).collect(),
            multicast,
            headroom: Arc::new(AtomicU16::new(agreed.headroom)),
            live: Arc::new(Live::new(self.rate, stalled)),
        };
        let shared = Shared {
            xen: Arc::clone(&self.xen),
            peer: self.id.frontend_id,
            receives,
            headroom: Arc::clone(&connection.headroom),
            hash: Arc::new(HashState::default()),
            multicast: Arc::clone(&connection.multicast),
            live: Arc::clone(&connection.live),
        };
        for (index, (keys, tap)) in agreed.queues.iter().zip(taps).enumerate() {
            let queues = agreed.queues.len() as u32;
            let plan = Plan {
                shared: shared.clone(),
                // As Linux names its threads: "vif3.0-q0"; the kernel keeps 15 characters.
                name: format!("{}-q{index}", self.name()),
                keys: *keys,
                control: agreed.control.filter(|_| index == 0).map(|(gref, port)| (gref, port, queues)),
                tap,
                counters: Arc::clone(&connection.counters[index]),
                cpu: self.next_cpu(),
            };
            let (running, notifier) = (Arc::clone(&self.running), self.notifier.clone());
            connection.workers.push(Worker::prepare(plan, move |report| match report {
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
        if stalled == 0 {
            self.tap()?.set_carrier(true).map_err(|error| tap_fault(&error))?;
        }
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Running { queues: connection.workers.len(), stopping: false };
        connection.workers.iter_mut().for_each(Worker::serve);
        self.connection = Some(connection);
        Ok(())
    }

    fn next_cpu(&self) -> Option<usize> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let cpu = self.config.cpus.get(*placed % self.config.cpus.len().max(1)).copied();
        *placed = placed.wrapping_add(1);
        cpu
    }

    /// Ends what is left of a connection whose queues have ended.
    fn bury(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        let counters = &connection.counters;
        let sum = |pick: fn(&Counters) -> u64| counters.iter().map(|counters| pick(counters)).sum::<u64>();
        tracing::info!(
            device = %self.id.backend_path,
            tx_packets = sum(|c| c.tx_packets.get()),
            tx_mib = sum(|c| c.tx_bytes.get()) >> 20,
            tx_dropped = sum(|c| c.tx_dropped.get()),
            tx_refused = sum(Counters::refusals),
            rx_packets = sum(|c| c.rx_packets.get()),
            rx_mib = sum(|c| c.rx_bytes.get()) >> 20,
            rx_dropped = sum(|c| c.rx_dropped.get()),
            rx_errors = sum(|c| c.rx_errors.get()),
            "disconnected"
        );
    }

    fn filter_groups(&self, value: Option<&str>) {
        let Some(connection) = &self.connection else { return };
        let mut keys = Keys::from_pairs(value.map(|value| (MULTICAST_KEY, value)));
        if value.is_none() {
            keys = Keys::from_pairs([(MULTICAST_KEY, "0")]);
        }
        match keys.parse_bool(MULTICAST_KEY) {
            Ok(on) => connection.multicast.set_filtering(on),
            Err(fault) => self.notifier.fault(fault),
        }
    }
}

const MULTICAST_KEY: &str = "request-multicast-control";
const HEADROOM_KEY: &str = "xdp-headroom";
const RATE_KEY: &str = "rate";

/// Reads and forgets what is in a tap's queue.
fn drop_frames(tap: &Tap) -> Result<(), Fault> {
    let failed = |error| Fault::host(libc::ENOMEM, format!("memory for frames: {error}"));
    let memory = std::rc::Rc::new(Mapping::anonymous(PAGE_SIZE).map_err(failed)?);
    let mut list = IoList::with_capacity(1);
    list.push(&memory, 0, PAGE_SIZE);
    // More than any tap's queue holds: somebody who sends without pause does not keep us here.
    for _ in 0..65_536 {
        if tap.read(&list).is_err() {
            // There are none; or what is wrong will be found when the queue reads.
            break;
        }
    }
    Ok(())
}

impl Device for Vif {
    fn features(&mut self) -> Result<Vec<(String, String)>, Fault> {
        if self.tap.is_none() {
            let tap = self.config.taps.open(&self.name(), 0).map_err(|error| tap_fault(&error))?;
            tap.set_features(Features::default()).map_err(|error| tap_fault(&error))?;
            if std::mem::take(&mut self.plugged) {
                tracing::warn!(
                    device = %self.id.backend_path,
                    interface = %self.name(),
                    "made anew, and the hotplug program has run already: put it where it belongs, or detach and attach it"
                );
            }
            self.tap = Some(tap);
        }
        Ok(negotiate::offer(self.config.queues.max(1)))
    }

    fn open(&mut self, backend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        let Some(tap) = &self.tap else {
            // Found in state 4: the tap went with the process before us.
            return Err(Fault::host(
                libc::EPIPE,
                "the backend process that served this device has died; the device has to reconnect",
            ));
        };
        let name = tap.name().map_err(|error| tap_fault(&error))?.unwrap_or_else(|| self.name());
        self.rate = read_rate(backend)?;
        tracing::info!(device = %self.id.backend_path, interface = %name, rate = ?self.rate, "opened");
        Ok(Vec::new())
    }

    fn connect(&mut self, frontend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        self.bury();
        let agreed = negotiate::agree(frontend, self.config.queues.max(1))?;
        self.start_queues(&agreed)?;
        tracing::info!(
            device = %self.id.backend_path,
            queues = agreed.queues.len(),
            control = agreed.control.is_some(),
            receives = ?agreed.receives,
            "connected"
        );
        Ok(Vec::new())
    }

    fn watched_keys(&self) -> &[&str] {
        &[MULTICAST_KEY, HEADROOM_KEY]
    }

    fn frontend_changed(&mut self, key: &str, value: Option<&str>) {
        match key {
            MULTICAST_KEY => self.filter_groups(value),
            // Linux' netfront goes to Reconfiguring first and writes this key afterwards: at that state it may be the
            // old one that is read.
            HEADROOM_KEY => {
                let keys = Keys::from_pairs(value.map(|value| (HEADROOM_KEY, value)));
                if let Err(fault) = self.reconfigure(&keys) {
                    self.notifier.fault(fault);
                }
            }
            _ => {}
        }
    }

    fn watched_backend_keys(&self) -> &[&str] {
        &[RATE_KEY]
    }

    fn backend_changed(&mut self, key: &str, value: Option<&str>) {
        if key != RATE_KEY {
            return;
        }
        match value.map(parse_rate).transpose() {
            Ok(rate) if rate == self.rate => {}
            Ok(rate) => {
                self.rate = rate;
                tracing::info!(device = %self.id.backend_path, ?rate, "rate changed");
                if let Some(connection) = &self.connection {
                    connection.live.set_rate(rate);
                    connection.workers.iter().for_each(Worker::wake);
                }
            }
            Err(text) => self.notifier.fault(Fault::host(libc::EINVAL, format!("{}: {text}", self.id.backend_path))),
        }
    }

    fn reconfigure(&mut self, frontend: &Keys) -> Result<(), Fault> {
        let headroom = negotiate::read_headroom(frontend)?;
        if let Some(connection) = &self.connection {
            connection.headroom.store(headroom, Ordering::Relaxed);
        }
        Ok(())
    }

    fn disconnect(&mut self) {
        if let Some(Err(error)) = self.tap.as_ref().map(|tap| tap.set_carrier(false)) {
            // It may have been deleted under us; then there is no carrier either.
            tracing::debug!(device = %self.id.backend_path, %error, "carrier");
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.stopping = true;
        if running.queues == 0 {
            self.notifier.disconnected();
        }
        drop(running);
        if let Some(connection) = &self.connection {
            connection.workers.iter().for_each(Worker::stop);
        }
    }

    fn release(&mut self) {
        self.bury();
        self.tap = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_toolstack_wrote_is_checked() {
        let keys = |key: &str, value: &str| Keys::from_pairs([(key, value)]);
        assert!(check_mac(&keys("mac", "00:16:3e:AA:bb:01")).is_ok());
        for wrong in ["", "00:16:3e:aa:bb", "00:16:3e:aa:bb:1", "00:16:3e:aa:bb:01:02", "00:16:3e:aa:bb:g1", "random"] {
            assert!(check_mac(&keys("mac", wrong)).is_err(), "{wrong:?}");
        }
        assert_eq!(read_rate(&keys("other", "1")), Ok(None));
        assert!(read_rate(&keys("rate", "1250,50000")).unwrap().is_some());
        assert!(read_rate(&keys("rate", "10Mb/s")).is_err());
    }
}
