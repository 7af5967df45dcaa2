//! `dom0-bench guest`: an emulated guest whose disk and network real programs can use.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blkback::front::{Frontend, Options};
use blkback::vdev::Vdev;
use hypervisor::emu::{GuestOptions, GuestSeat};
use hypervisor::xen::XenGuest;
use hypervisor::{Guest, Machine};
use xenstore_client::xenbus::{State, toolstack};
use xenstore_client::{Client, Store as _};

use crate::Failure;
use crate::guest_disk::GuestDisk;
use crate::guest_vifs::{self, VifArguments};
use crate::nbd::{Config, Server};
use crate::net::card;
use crate::verify;

/// Be a guest: offer its disk to programs as an NBD server, and be its network in a namespace
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "In one terminal each:\n  \
    emu-xen serve --dir /tmp/xen\n  \
    blkback serve --hypervisor emu:/tmp/xen\n  \
    dom0-bench guest --hypervisor emu:/tmp/xen --name guest --nbd unix:/tmp/disk.sock\n\
    and then:\n  \
    blkback attach guest /srv/disk.img,raw,xvda,rw --hypervisor emu:/tmp/xen\n  \
    fio --name=try --ioengine=nbd --uri='nbd+unix:///?socket=/tmp/disk.sock' --rw=randrw --verify=crc32c --size=64m\n\
    With a network, in its own terminal too:\n  \
    netback serve --hypervisor emu:/tmp/xen\n  \
    dom0-bench guest --hypervisor emu:/tmp/xen --name web --vif 0 --netns web\n\
    and then:\n  \
    netback attach web bridge=xenbr0 --hypervisor emu:/tmp/xen\n  \
    ip -n web address add 10.0.0.2/24 dev eth0")]
pub struct Arguments {
    /// The machine: emu:DIR to be a new guest of it, or xen for this domain itself to play the frontend
    #[arg(long, value_name = "MACHINE")]
    pub hypervisor: Machine,
    /// The guest's name
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// Where to offer the disk: unix:PATH
    #[arg(long, value_name = "unix:PATH", required_unless_present_any = ["verify", "vif"])]
    pub nbd: Option<NbdAddress>,
    /// Instead of offering the disk, overwrite it with a pattern, read it back, compare, and end
    #[arg(long, conflicts_with = "nbd")]
    pub verify: bool,
    /// Which of its disks; it is waited for
    #[arg(long, default_value = "xvda", value_parser = |text: &str| Vdev::parse(text))]
    pub vdev: Vdev,
    /// Queues to ask for
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub queues: u32,
    /// Rings of 2^ORDER pages
    #[arg(long, default_value_t = 0, value_name = "ORDER", value_parser = clap::value_parser!(u32).range(0..=4))]
    pub ring_order: u32,
    /// Have all data copied
    #[arg(long)]
    pub no_persistent: bool,
    /// The layout of the requests: x86_64-abi, x86_32-abi, arm-abi
    #[arg(long, default_value = "x86_64-abi", value_parser = parse_protocol)]
    pub protocol: blkback::abi::Protocol,
    /// End when disk and vifs are taken away, instead of waiting for the next
    #[arg(long)]
    pub once: bool,
    /// Its network
    #[command(flatten)]
    pub network: VifArguments,
}

fn parse_protocol(text: &str) -> Result<blkback::abi::Protocol, String> {
    blkback::abi::Protocol::parse(Some(text)).ok_or_else(|| format!("{text:?} is no protocol"))
}

/// `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdAddress(pub PathBuf);

impl FromStr for NbdAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err(format!("{text:?} is no address: write unix:PATH")),
        }
    }
}

/// Pages of data for each queue: two of the largest requests. /dev/xen/gntalloc gives 1024 pages in all.
const POOL_PAGES: usize = 512;
/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// Runs the guest until SIGTERM or SIGINT.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).try_init()?;
    let vifs = &arguments.network.vif;
    // Before the first thread: see there.
    let namespace = if vifs.is_empty() { None } else { Some(arguments.network.namespace()?) };
    let stop = stop_on_signals()?;
    let disk = arguments.nbd.is_some() || arguments.verify;
    let disk_pages = if disk { (POOL_PAGES + 512 + 16) * arguments.queues as usize } else { 0 };
    let vif_pages = card::QUEUE_PAGES * arguments.network.vif_queues as usize * vifs.len();
    let guest: Arc<dyn Guest> = match &arguments.hypervisor {
        Machine::Emulated(dir) => {
            let memory_pages = (disk_pages + vif_pages + 64) as u32;
            let options = GuestOptions { name: arguments.name.clone(), memory_pages, ..GuestOptions::default() };
            Arc::new(GuestSeat::join(dir, options)?)
        }
        Machine::Xen => Arc::new(XenGuest::open()?),
    };
    let awaited = disk.then(|| format!("disk {}", arguments.vdev.name()));
    let awaited: Vec<String> = awaited.into_iter().chain(vifs.iter().map(|vif| format!("vif {}", vif.devid))).collect();
    println!("domain {} ({}) waits for its {}", guest.domid(), arguments.name, awaited.join(" and its "));
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (vif, namespace) in vifs.iter().zip(namespace.iter().cycle()) {
            let (guest, stop) = (&guest, &stop);
            let work = move || {
                let ended = guest_vifs::run(vif, &arguments.network, guest, namespace, arguments.once, stop);
                // Without its machine no part of the guest can live.
                if ended.is_err() {
                    stop.store(true, Ordering::Release);
                }
                ended
            };
            threads.push(std::thread::Builder::new().name(vif.name.clone()).spawn_scoped(scope, work)?);
        }
        let served = if disk { serve_disk(arguments, &guest, &stop) } else { Ok(()) };
        // Only the disk ends by itself: verified, or failed.
        if disk && !arguments.once {
            stop.store(true, Ordering::Release);
        }
        let vifs = threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a vif's thread panicked")?);
        served.and(vifs)
    })
}

/// Serves the disk, life after life.
fn serve_disk(arguments: &Arguments, guest: &Arc<dyn Guest>, stop: &AtomicBool) -> Result<(), Failure> {
    let store = guest.store()?;
    let device = format!("{}/device/vbd/{}", guest.domid().home(), arguments.vdev.number());
    while wait_for(&store, &format!("{device}/state"), &[State::Initialising], stop)? {
        serve(arguments, guest, &store, stop)?;
        if arguments.once || arguments.verify {
            break;
        }
    }
    Ok(())
}

/// Serves one life of the disk.
fn serve(arguments: &Arguments, guest: &Arc<dyn Guest>, store: &Client, stop: &AtomicBool) -> Result<(), Failure> {
    let options = Options {
        protocol: arguments.protocol,
        ring_order: arguments.ring_order,
        queues: arguments.queues,
        persistent: !arguments.no_persistent,
        pool_pages: POOL_PAGES,
        ..Options::default()
    };
    let mut front = Frontend::connect(Arc::clone(guest), arguments.vdev.number(), &options)?;
    let queues = front.take_queues();
    println!(
        "{} is connected: {} sectors, {} queue(s), {}",
        arguments.vdev.name(),
        front.disk().sectors,
        queues.len(),
        if front.disk().read_only() { "read-only" } else { "writable" },
    );
    let (disk, threads) = GuestDisk::start(front.disk(), queues)?;
    let outcome = match &arguments.nbd {
        Some(address) => offer(arguments, address, &front, &disk, store, stop),
        None => verify::run(&disk, |done| println!("{done}")).map(drop),
    };
    let queues = disk.stop(threads)?;
    outcome?;
    front.close(queues)?;
    println!("{} is gone", arguments.vdev.name());
    Ok(())
}

/// Offers the disk as an NBD server until the backend lets go of it.
fn offer(
    arguments: &Arguments,
    address: &NbdAddress,
    front: &Frontend,
    disk: &Arc<GuestDisk>,
    store: &Client,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let config = Config { name: String::new(), description: arguments.vdev.name(), ..Config::default() };
    let server = Server::listen(&address.0, disk.clone(), config)?;
    println!("{}", server.uri());
    let state = format!("{}/state", front.backend_path());
    let sectors = format!("{}/sectors", front.backend_path());
    // As Linux' driver does, but looking instead of waiting for the backend's state 4 to be written again.
    while !stop.load(Ordering::Acquire)
        && !is_in(toolstack::wait_state(store, &state, &[State::Closing, State::Closed], LOOK))?
    {
        if let Some(count) = store.read_opt(&sectors)?.and_then(|text| text.parse().ok()) {
            disk.resize(count);
        }
    }
    server.stop();
    Ok(())
}

/// Whether the state that was waited for came; its time being over is no error.
fn is_in(waited: xenstore_client::Result<State>) -> Result<bool, Failure> {
    match waited {
        Ok(_) => Ok(true),
        Err(xenstore_client::Error::Timeout { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits for one of these states; false when the program is to end instead.
///
/// # Errors
/// When XenStore refuses, or is gone.
pub(crate) fn wait_for(store: &Client, path: &str, wanted: &[State], stop: &AtomicBool) -> Result<bool, Failure> {
    while !stop.load(Ordering::Acquire) {
        if is_in(toolstack::wait_state(store, path, wanted, LOOK))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn stop_on_signals() -> Result<Arc<AtomicBool>, Failure> {
    use nix::sys::signal::{SigSet, Signal};

    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Err(error) = signals.wait() {
            eprintln!("dom0-bench: cannot wait for signals: {error}");
        }
        told.store(true, Ordering::Release);
    })?;
    Ok(stop)
}
