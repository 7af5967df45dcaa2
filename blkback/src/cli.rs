//! The command line.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hypervisor::{Backend, DomId, Machine};
use nix::sys::signal::{SigSet, Signal};
use xenstore_client::xenbus::driver::{Driver, StopHandle};

use crate::device::{Config, KINDS, VbdKind};
use crate::hotplug;
use crate::negotiate::Limits;
use crate::spec;
use crate::toolstack::{self, Attached};
use crate::vdev::Vdev;

/// Xen's block backend in user space.
#[derive(Debug, Parser)]
#[command(name = "blkback", version, about, max_term_width = 100)]
struct Cli {
    /// The machine to work on: xen, or emu:DIR where `emu-xen serve --dir DIR` runs (default: xen, in a domain of it)
    #[arg(long, global = true, value_name = "MACHINE")]
    hypervisor: Option<Machine>,
    /// The domain the backend runs in on an emulated machine: 0, or a driver domain
    #[arg(long, global = true, default_value_t = DomId(0), value_name = "DOMID")]
    backend_domid: DomId,
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
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, mistakes to standard error; a closed pipe is nobody's loss.
            let _ = error.print();
            return ExitCode::from(error.exit_code().clamp(0, 255) as u8);
        }
    };
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blkback: {error}");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn execute(cli: Cli) -> Result<(), Failure> {
    let machine = cli.hypervisor.or_else(Machine::find).ok_or(
        "this is no domain of Xen (no /dev/xen here): name an emulated machine with --hypervisor emu:DIR, \
         where emu-xen serve --dir DIR runs",
    )?;
    let join = || machine.join_backend(cli.backend_domid);
    match cli.command {
        Command::Serve(serve) => {
            log_to_stderr();
            // Before the first thread starts, so that all inherit the block and only one waits.
            let signals = block_signals()?;
            run_server(join()?, serve, signals)
        }
        Command::Attach { domain, disk, wait } => {
            let words: Vec<&str> = disk.iter().map(String::as_str).collect();
            let spec = spec::parse_xm_args(&words)?;
            let xen = join()?;
            let store = xen.store()?;
            for note in &spec.notes {
                eprintln!("blkback: {note}");
            }
            let frontend = toolstack::find_domain(&store, &domain)?;
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
            let frontend = toolstack::find_domain(&store, &domain)?;
            toolstack::detach(&store, xen.domid(), frontend, vdev, force)?;
            println!("{} of domain {frontend} is detached", vdev.name());
            Ok(())
        }
        Command::Hotplug { event } => {
            let path = std::env::var("XENBUS_PATH").map_err(|_| "XENBUS_PATH is not set: this is for libxl to run")?;
            Ok(hotplug::run(&machine.store()?, &path, event)?)
        }
        Command::List { domains } => {
            let store = machine.store()?;
            for domain in domains {
                print!("{}", toolstack::list(&store, toolstack::find_domain(&store, &domain)?)?);
            }
            Ok(())
        }
    }
}

fn log_to_stderr() {
    use std::io::IsTerminal;

    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Whoever carries this program along may have a log already, which is then used.
    let _ = log.with_ansi(std::io::stderr().is_terminal()).try_init();
}

fn run_server(xen: Arc<dyn Backend>, serve: Serve, signals: SigSet) -> Result<(), Failure> {
    let mut limits = Limits {
        ring_page_order: serve.ring_order,
        indirect_segments: serve.indirect,
        persistent: !serve.no_persistent,
        ..Limits::default()
    };
    limits.queues = serve.queues.unwrap_or(limits.queues);
    let domid = xen.domid();
    let store = xen.store()?;
    let stop = StopHandle::new()?;
    stop_on(signals, &stop)?;
    let config = Config { limits, cpus: serve.cpus };
    let drivers = KINDS
        .map(|name| {
            let kind = VbdKind::new(name, Arc::clone(&xen), config.clone());
            Driver::new(store.clone(), domid, kind)
        })
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    println!("blkback: serving {}", KINDS.map(|name| format!("{}/backend/{name}", domid.home())).join(" and "));
    // A control thread for each kind; when one ends, all do.
    std::thread::scope(|scope| {
        let run = |mut driver: Driver<VbdKind>| {
            let stop = &stop;
            scope.spawn(move || {
                let outcome = driver.run(stop);
                stop.stop();
                outcome
            })
        };
        let threads: Vec<_> = drivers.into_iter().map(run).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(outcome) => outcome.map_err(Failure::from),
            Err(_) => Err("a control thread panicked; see the log".into()),
        })
    })
}

/// Blocks SIGTERM and SIGINT, which end the service in order.
fn block_signals() -> Result<SigSet, Failure> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    Ok(signals)
}

/// Stops the service when one of the blocked signals comes.
fn stop_on(signals: SigSet, stop: &StopHandle) -> Result<(), Failure> {
    let stop = stop.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || match signals.wait() {
        Ok(signal) => {
            tracing::info!(%signal, "stopping");
            stop.stop();
        }
        Err(error) => tracing::error!(%error, "cannot wait for signals"),
    })?;
    Ok(())
}
