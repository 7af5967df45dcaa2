//! A virtual network interface: what the xenbus driver asks of it.
//!
//! The tap is made with the first features, before state 2, because the hotplug program that runs then wants to put
//! it into a bridge; it stays when the frontend leaves and goes when the device does. It has a carrier only while a
//! frontend is connected and has pages to receive into.

mod interface;

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hypervisor::Backend;

use xenstore_client::xenbus::{Device, DeviceId, Fault, Keys, Kind, Notifier, Progress};

use crate::counters::Counters;
use crate::credit::Rate;
use crate::hash::HashState;
use crate::multicast::Multicast;
use crate::negotiate::{self, Agreed, FRONTEND_KEYS};
use crate::queue::Live;
use crate::spec;
use crate::steer::Post;
use crate::tap::{KernelTaps, Tap, TapError, Taps};
use crate::worker::{Plan, Report, Shared, Worker};
use interface::{drop_frames, tap_fault};

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
            mtu_before: None,
            plugged: (backend.get("hotplug-status") == Some("connected"))
                .then(|| backend.get("script").unwrap_or_default().to_owned()),
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
    match spec::mac(mac) {
        Ok(_) => Ok(()),
        Err(error) => Err(backend.fault(libc::EINVAL, &format!("mac: {error}"))),
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
    /// The groups that the guest has joined were known to a process that died: all are delivered, until the guest turns
    /// filtering off and on.
    groups_lost: bool,
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
    /// The hotplug program, where it had run before there was a tap of ours: it was for another process's.
    plugged: Option<String>,
    /// The MTU of the tap before it was lowered for a driver.
    mtu_before: Option<u32>,
    connection: Option<Connection>,
    running: Arc<Mutex<Running>>,
}

impl Vif {
    /// A driver that takes no frames in pieces gets Ethernet's MTU; the next one, which may, the one there was.
    fn fit_mtu(&mut self, sg: bool) -> Result<(), Fault> {
        let failed = |error: TapError| tap_fault(&error);
        let device = &self.id.backend_path;
        if sg {
            if let Some(mtu) = self.mtu_before.take() {
                self.tap()?.give_mtu_back(ETHERNET_MTU, mtu).map_err(failed)?;
            }
        } else if let Some(mtu) = self.tap()?.limit_mtu(ETHERNET_MTU).map_err(failed)? {
            tracing::warn!(%device, "the guest takes no frames in pieces: MTU {ETHERNET_MTU} in the place of {mtu}");
            self.mtu_before = Some(mtu);
        }
        Ok(())
    }

    /// Builds all queues, or none.
    fn start_queues(&mut self, agreed: &Agreed, resume: bool) -> Result<(), Fault> {
        let taps = self.tap_queues(agreed.queues.len())?;
        let receives = agreed.receives;
        self.tap()?.set_features(receives.features()).map_err(|error| tap_fault(&error))?;
        self.fit_mtu(receives.sg)?;
        // What came for a frontend that has left, cut and summed for it, is nobody's any more.
        taps.iter().try_for_each(drop_frames)?;
        let stalled = if receives.notifies { taps.len() as u32 } else { 0 };
        let multicast = Arc::new(Multicast::default());
        let groups_lost = resume && agreed.multicast_control;
        multicast.set_filtering(agreed.multicast_control && !groups_lost);
        let mut connection = Connection {
            workers: Vec::with_capacity(taps.len()),
            counters: taps.iter().map(|_| Arc::default()).collect(),
            multicast,
            headroom: Arc::new(AtomicU16::new(agreed.headroom)),
            live: Arc::new(Live::new(self.rate, stalled)),
            groups_lost,
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
        let queues = agreed.queues.len() as u32;
        let posts = if queues > 1 { Post::between(queues) } else { Ok(Vec::new()) };
        let mut posts = posts.map_err(|error| Fault::host(libc::EMFILE, format!("eventfd: {error}")))?.into_iter();
        for (index, (keys, tap)) in agreed.queues.iter().zip(taps).enumerate() {
            let plan = Plan {
                shared: shared.clone(),
                // As Linux names its threads: "vif3.0-q0"; the kernel keeps 15 characters.
                name: format!("{}-q{index}", self.name()),
                keys: *keys,
                control: agreed.control.filter(|_| index == 0).map(|(gref, port)| (gref, port, queues)),
                tap,
                post: posts.next(),
                counters: Arc::clone(&connection.counters[index]),
                cpu: self.next_cpu(),
                resume,
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

    fn start(&mut self, frontend: &Keys, resume: bool) -> Result<(), Fault> {
        self.bury();
        let agreed = negotiate::agree(frontend, self.config.queues.max(1))?;
        self.start_queues(&agreed, resume)?;
        tracing::info!(
            device = %self.id.backend_path,
            queues = agreed.queues.len(),
            control = agreed.control.is_some(),
            receives = ?agreed.receives,
            resumed = resume,
            "connected"
        );
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

    fn filter_groups(&mut self, value: Option<&str>) {
        let Some(connection) = &mut self.connection else { return };
        match Keys::from_pairs([(MULTICAST_KEY, value.unwrap_or("0"))]).parse_bool(MULTICAST_KEY) {
            Ok(on) => {
                connection.groups_lost &= on;
                connection.multicast.set_filtering(on && !connection.groups_lost);
            }
            Err(fault) => self.notifier.fault(fault),
        }
    }
}

/// Most bytes of the packets of a guest whose frames have to fit into a page, as with Linux (xenvif_carrier_on:
/// ETH_DATA_LEN).
const ETHERNET_MTU: u16 = 1500;
const MULTICAST_KEY: &str = "request-multicast-control";
const HEADROOM_KEY: &str = "xdp-headroom";
const RATE_KEY: &str = "rate";

impl Device for Vif {
    fn features(&mut self) -> Result<Vec<(String, String)>, Fault> {
        self.make_tap()?;
        Ok(negotiate::offer(self.config.queues.max(1)))
    }

    fn open(&mut self, backend: &Keys) -> Result<Progress<Vec<(String, String)>>, Fault> {
        // There is none in a device that was found in state 4: it went with the process that served it.
        self.make_tap()?;
        let tap = self.tap()?;
        let name = tap.name().map_err(|error| tap_fault(&error))?.unwrap_or_else(|| self.name());
        self.rate = read_rate(backend)?;
        tracing::info!(device = %self.id.backend_path, interface = %name, rate = ?self.rate, "opened");
        Ok(Progress::Done(Vec::new()))
    }

    fn connect(&mut self, frontend: &Keys) -> Result<Vec<(String, String)>, Fault> {
        self.start(frontend, false)?;
        // netif.h, "Link state": the cable is in. Whether anything is at its other end nobody tells.
        Ok(vec![("carrier".to_owned(), "1".to_owned())])
    }

    /// The rings say where to go on: see [`Tx::resume`](crate::tx::Tx::resume) and
    /// [`Rx::resume`](crate::rx::Rx::resume).
    fn reattach(&mut self, frontend: &Keys) -> Result<(), Fault> {
        self.start(frontend, true)
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

    fn release(&mut self) -> Progress<()> {
        self.bury();
        let name = self.tap.take().and_then(|tap| tap.name().ok().flatten());
        if let Some(name) = name {
            self.forget_filter(&name);
        }
        Progress::Done(())
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
