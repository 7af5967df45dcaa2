//! `dom0-bench guest`: an emulated guest whose disk real programs can use.

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
use xenstore_client::Client;
use xenstore_client::xenbus::{State, toolstack};

use crate::Failure;
use crate::guest_disk::GuestDisk;
use crate::nbd::{Config, Server};
use crate::verify;

/// Be a guest, and offer its disk to programs as an NBD server
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "In one terminal each:\n  \
    emu-xen serve --dir /tmp/xen\n  \
    blkback serve --hypervisor emu:/tmp/xen\n  \
    dom0-bench guest --hypervisor emu:/tmp/xen --name guest --nbd unix:/tmp/disk.sock\n\
    and then:\n  \
    blkback attach guest /srv/disk.img,raw,xvda,rw --hypervisor emu:/tmp/xen\n  \
    fio --name=try --ioengine=nbd --uri='nbd+unix:///?socket=/tmp/disk.sock' --rw=randrw --verify=crc32c --size=64m")]
pub struct Arguments {
    /// The machine: emu:DIR to be a new guest of it, or xen for this domain itself to play the frontend
    #[arg(long, value_name = "MACHINE")]
    pub hypervisor: Machine,
    /// The guest's name
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// Where to offer the disk: unix:PATH
    #[arg(long, value_name = "unix:PATH", required_unless_present = "verify")]
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
    /// End when the disk is taken away, instead of waiting for the next
    #[arg(long)]
    pub once: bool,
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
    let stop = stop_on_signals()?;
    let memory_pages = ((POOL_PAGES + 512 + 16) * arguments.queues as usize + 64) as u32;
    let guest: Arc<dyn Guest> = match &arguments.hypervisor {
        Machine::Emulated(dir) => {
            let options = GuestOptions { name: arguments.name.clone(), memory_pages, ..GuestOptions::default() };
            Arc::new(GuestSeat::join(dir, options)?)
        }
        Machine::Xen => Arc::new(XenGuest::open()?),
    };
    let (store, domid) = (guest.store()?, guest.domid());
    println!("domain {domid} ({}) waits for its disk {}", arguments.name, arguments.vdev.name());
    let device = format!("{}/device/vbd/{}", domid.home(), arguments.vdev.number());
    while wait_for(&store, &format!("{device}/state"), &[State::Initialising], &stop)? {
        serve(arguments, &guest, &store, &stop)?;
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
    wait_for(store, &state, &[State::Closing, State::Closed], stop)?;
    server.stop();
    Ok(())
}

/// Waits for one of these states; false when the program is to end instead.
fn wait_for(store: &Client, path: &str, wanted: &[State], stop: &AtomicBool) -> Result<bool, Failure> {
    while !stop.load(Ordering::Acquire) {
        match toolstack::wait_state(store, path, wanted, LOOK) {
            Ok(_) => return Ok(true),
            Err(xenstore_client::Error::Timeout { .. }) => {}
            Err(error) => return Err(error.into()),
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
