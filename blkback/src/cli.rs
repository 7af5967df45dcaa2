//! The command line.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hypervisor::kernel::XEN_BLKBACK;
use hypervisor::program::{self, Failure, MachineArguments, StopSignals};
use hypervisor::{Backend, DomId, Machine};
use ring::uring::keeper;
use xenstore_client::xenbus::Driver;
use xenstore_client::xenbus::toolstack::{find_domain, find_past_domain};
use xenstore_client::{Client, Store};

use crate::device::{Config, KINDS, VbdKind};
use crate::doubt;
use crate::drive;
use crate::hotplug;
use crate::inflight;
use crate::nbd::Export;
use crate::negotiate::Limits;
use crate::spec;
use crate::toolstack::{self, Attached};
use crate::vdev::Vdev;

/// Xen's block backend in user space.
#[derive(Debug, Parser)]
#[command(name = "blkback", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    machine: MachineArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve every disk that the toolstack gives to this domain, until SIGTERM
    Serve(Serve),
    /// Give a disk to a domain
    #[command(after_help = "Disks are written as in xl.cfg, old spellings included:\n  \
        blkback attach guest /srv/disk.img,raw,xvda,rw\n  \
        blkback attach guest file:/srv/disk.img,xvda,w\n  \
        blkback attach guest phy:/dev/vg/data xvdb 'w!'\n\n\
        Access: r or ro, w or rw (alone), w! (written together with others: every guest must know)")]
    Attach {
        /// The domain, by number or name
        domain: String,
        /// The disk
        #[arg(required = true)]
        disk: Vec<String>,
        /// Seconds to wait for the guest to connect
        #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
        wait: f32,
    },
    /// Take a disk away from a domain
    Detach {
        /// The domain, by number or name
        domain: String,
        /// The disk, as the domain knows it: xvda, hdc, 51712
        vdev: String,
        /// Do not ask the guest
        #[arg(long)]
        force: bool,
    },
    /// Be libxl's hotplug program for the disk in $XENBUS_PATH (what a link named "block" or "block-tap" does)
    Hotplug {
        /// What happened
        event: hotplug::Event,
    },
    /// Have the backend look whether a disk has grown, and tell the guest
    Resize {
        /// The domain, by number or name
        domain: String,
        /// The disk, as the domain knows it: xvda, hdc, 51712
        vdev: String,
    },
    /// Put a disk into a domain's drive, in place of the one in it
    Insert {
        /// The domain, by number or name
        domain: String,
        /// The drive, as the domain knows it: xvdd, hdc
        vdev: String,
        /// The image
        image: String,
    },
    /// Take the disk out of a domain's drive
    Eject {
        /// The domain, by number or name
        domain: String,
        /// The drive, as the domain knows it: xvdd, hdc
        vdev: String,
    },
    /// Say that a disk whose flush had failed has been checked, and may be written again; without one, show them
    Checked {
        /// The image, as it was attached
        image: Option<String>,
    },
    /// Show the disks of domains
    List {
        /// The domains, by number or name
        #[arg(required = true)]
        domains: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Serve {
    /// Processors for the queues' threads, taken in turn (default: the scheduler chooses)
    #[arg(long, value_delimiter = ',', value_name = "CPU,…")]
    cpus: Vec<usize>,
    /// Most queues of one disk (default: one per processor)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    queues: Option<u32>,
    /// Rings of at most 2^ORDER pages
    #[arg(long, default_value_t = Limits::default().ring_page_order, value_name = "ORDER", value_parser = clap::value_parser!(u32).range(0..=4))]
    ring_order: u32,
    /// Most segments of an indirect request; 0 to offer none
    #[arg(long, default_value_t = Limits::default().indirect_segments, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=256))]
    indirect: u32,
    /// Copy always instead of keeping the guest's pages mapped
    #[arg(long)]
    no_persistent: bool,
    /// Do not offer flushes, only barriers (a guest that knows no barriers can then make nothing durable)
    #[arg(long, conflicts_with = "no_barrier")]
    no_flush: bool,
    /// Do not offer barriers (guests that know flushes use those anyway)
    #[arg(long)]
    no_barrier: bool,
    /// Offer discards on no disk
    #[arg(long)]
    no_discard: bool,
    /// Serve only the disks of this folder of XenStore's: vbd3, those with backendtype=tap, beside xen-blkback; or vbd
    #[arg(long, value_name = "KIND", value_parser = KINDS)]
    only: Option<String>,
}

impl Serve {
    /// The folders to serve.
    fn kinds(&self) -> Vec<&'static str> {
        KINDS.into_iter().filter(|kind| self.only.as_ref().is_none_or(|only| only == kind)).collect()
    }
}

/// Under these names the program is Xen's hotplug script for disks: /etc/xen/scripts/block is a link to it, and
/// block-tap for backendtype=tap.
const HOTPLUG_NAMES: [&str; 2] = ["block", "block-tap"];

/// Runs the program with these arguments, the first being its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let name = args.first().and_then(|name| Path::new(name).file_name()?.to_str());
    if name.is_some_and(|name| HOTPLUG_NAMES.contains(&name)) {
        args.insert(1, "hotplug".into());
    }
    program::run("blkback", args, execute)
}

fn execute(cli: Cli) -> Result<(), Failure> {
    let join = || cli.machine.join();
    match cli.command {
        Command::Serve(serve) => {
            program::log_to_stderr("info");
            let signals = StopSignals::block()?;
            let machine = cli.machine.machine()?;
            if serve.kinds().contains(&XEN_BLKBACK.kind) && XEN_BLKBACK.is_loaded(&machine) {
                let refusal = XEN_BLKBACK.refusal("blkback");
                return Err(format!(
                    "{refusal}; or serve only what it does not take, disks with backendtype=tap (blkback serve --only vbd3)"
                )
                .into());
            }
            let xen = join()?;
            let _claim = cli.machine.claim("blkback")?;
            keeper::start().map_err(|error| {
                format!("cannot start the process that keeps guests' pages mapped while I/O is in flight: {error}")
            })?;
            run_server(machine, xen, serve, &signals)
        }
        Command::Attach { domain, disk, wait } => {
            let words: Vec<&str> = disk.iter().map(String::as_str).collect();
            let spec = spec::parse_xm_args(&words)?;
            let xen = join()?;
            let store = xen.store()?;
            for note in &spec.notes {
                eprintln!("blkback: {note}");
            }
            let frontend = find_domain(&store, &domain)?;
            let wait = Duration::try_from_secs_f32(wait)?;
            let attached = toolstack::attach(&store, xen.domid(), frontend, &spec, wait)?;
            let (name, number) = (spec.vdev.name(), spec.vdev.number());
            match attached {
                Attached::Connected => println!("{name} ({number}) of domain {frontend} is connected"),
                Attached::Waiting => {
                    println!("{name} ({number}) of domain {frontend} is attached and waits for the guest's driver");
                }
            }
            Ok(())
        }
        Command::Detach { domain, vdev, force } => {
            let vdev = Vdev::parse(&vdev)?;
            let xen = join()?;
            let store = xen.store()?;
            let frontend = find_past_domain(&store, &domain, xen.domid(), "vbd")?;
            toolstack::detach(&store, xen.domid(), frontend, vdev, force)?;
            println!("{} of domain {frontend} is detached", vdev.name());
            Ok(())
        }
        Command::Resize { domain, vdev } => {
            let (vdev, xen) = (Vdev::parse(&vdev)?, join()?);
            let store = xen.store()?;
            let frontend = find_domain(&store, &domain)?;
            let (before, after) = drive::resize(&store, xen.domid(), frontend, vdev)?;
            match after == before {
                true => println!("{} of domain {frontend} has {before} sectors, as before", vdev.name()),
                false => println!("{} of domain {frontend} has grown from {before} to {after} sectors", vdev.name()),
            }
            Ok(())
        }
        Command::Insert { domain, vdev, image } => {
            change(&*join()?, &domain, &vdev, Some(&image))?;
            println!("{image} is in {vdev} of domain {domain}");
            Ok(())
        }
        Command::Eject { domain, vdev } => {
            change(&*join()?, &domain, &vdev, None)?;
            println!("{vdev} of domain {domain} is empty");
            Ok(())
        }
        Command::Hotplug { event } => {
            let path = std::env::var("XENBUS_PATH").map_err(|_| "XENBUS_PATH is not set: this is for libxl to run")?;
            Ok(hotplug::run(&cli.machine.machine()?.store()?, &path, event)?)
        }
        Command::Checked { image } => {
            let xen = join()?;
            let (store, backend) = (xen.store()?, xen.domid());
            match image {
                Some(image) => say_checked(&store, backend, &image),
                None => {
                    let all = doubt::all(&store, backend)?;
                    if all.is_empty() {
                        println!("no flush of a disk is known to have failed");
                    }
                    for (image, reason) in all {
                        println!("{image}: {reason}");
                    }
                    Ok(())
                }
            }
        }
        Command::List { domains } => {
            let machine = cli.machine.machine()?;
            let store = machine.store()?;
            let here = match machine {
                Machine::Emulated(_) => cli.machine.backend_domid,
                // Ours: it can be missing in dom0's directory.
                Machine::Xen => store.read_opt("domid")?.and_then(|id| id.parse().ok()).unwrap_or(DomId::DOM0),
            };
            // Also the kernel's disks are below backend/vbd.
            let served = machine.is_claimed("blkback", here)? || XEN_BLKBACK.is_loaded(&machine);
            for domain in domains {
                print!("{}", toolstack::list(&store, find_domain(&store, &domain)?, (!served).then_some(here))?);
            }
            Ok(())
        }
    }
}

fn say_checked(store: &Client, backend: DomId, image: &str) -> Result<(), Failure> {
    let path = if Export::is_one(image) { image.into() } else { std::path::absolute(image)? };
    if !doubt::checked(store, backend, &path)? {
        let names: Vec<_> = doubt::all(store, backend)?.into_iter().map(|(image, _)| image).collect();
        let those =
            if names.is_empty() { "there are none".to_owned() } else { format!("these are: {}", names.join(", ")) };
        return Err(format!("no flush of {image} is known to have failed; {those}").into());
    }
    println!("{image} may be written again");
    Ok(())
}

fn change(xen: &dyn Backend, domain: &str, vdev: &str, image: Option<&str>) -> Result<(), Failure> {
    let vdev = Vdev::parse(vdev)?;
    let store = xen.store()?;
    let frontend = find_domain(&store, domain)?;
    Ok(drive::change(&store, xen.domid(), frontend, vdev, image)?)
}

fn run_server(machine: Machine, xen: Arc<dyn Backend>, serve: Serve, signals: &StopSignals) -> Result<(), Failure> {
    let mut limits = Limits {
        ring_page_order: serve.ring_order,
        indirect_segments: serve.indirect,
        persistent: !serve.no_persistent,
        flush: !serve.no_flush,
        barrier: !serve.no_barrier,
        discard: !serve.no_discard,
        ..Limits::default()
    };
    limits.queues = serve.queues.unwrap_or(limits.queues);
    let domid = xen.domid();
    let store = xen.store()?;
    let stop = signals.stop_handle();
    let logs = machine.folder("blkback", domid);
    let exists = |kind: &str, frontend: DomId, devid: u32| {
        let state = format!("{}/backend/{kind}/{frontend}/{devid}/state", domid.home());
        store.read_opt(&state).map(|state| state.is_some()).map_err(std::io::Error::other)
    };
    inflight::sweep(&logs, exists).map_err(|error| format!("logs in {}: {error}", logs.display()))?;
    let config = Config { limits, cpus: serve.cpus.clone(), logs: Some(logs) };
    let kinds = serve.kinds();
    let drivers = kinds
        .iter()
        .map(|name| {
            let kind = VbdKind::new(name, Arc::clone(&xen), config.clone());
            Driver::new(store.clone(), domid, kind)
        })
        .collect::<Result<Vec<_>, _>>()?;
    if kinds.contains(&XEN_BLKBACK.kind) {
        XEN_BLKBACK.watch(machine, "blkback")?;
    }
    let served: Vec<String> = kinds.iter().map(|name| format!("{}/backend/{name}", domid.home())).collect();
    println!("blkback: serving {}", served.join(" and "));
    program::serve(drivers, &stop)
}
