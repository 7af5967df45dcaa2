//! The command line.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bridge_scripts::apply::{FilterGuard, Follower, Guard, Options};
use bridge_scripts::vif;
use clap::{Args, Parser, Subcommand};
use hypervisor::Backend;
use hypervisor::kernel::XEN_NETBACK;
use hypervisor::program::{self, Failure, MachineArguments, StopSignals};
use xenstore_client::Client;
use xenstore_client::xenbus::Driver;
use xenstore_client::xenbus::toolstack::{find_domain, find_past_domain};

use crate::device::{Config, VifKind};
use crate::preflight;
use crate::spec;
use crate::toolstack::script::{Call, Event};
use crate::toolstack::{self, Toolstack, Which};

/// Xen's network backend in user space.
#[derive(Debug, Parser)]
#[command(name = "netback", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    machine: MachineArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve every interface that the toolstack gives to this domain, until SIGTERM
    Serve(Serve),
    /// Give an interface to a domain
    #[command(
        visible_alias = "network-attach",
        after_help = "Interfaces are written as in xl.cfg, in one word or in several:\n  \
            netback attach guest bridge=xenbr0\n  \
            netback attach guest mac=00:16:3e:3f:a9:06,bridge=xenbr0,ip=10.0.0.7,rate=10Mb/s\n  \
            netback attach guest script=vif-route ip=192.168.17.1 gatewaydev=eth0\n\n\
            Without a word everything is chosen: the next number, a random address, the bridge xenbr0."
    )]
    Attach {
        /// The domain, by number or name
        domain: String,
        /// The interface
        vif: Vec<String>,
        /// Seconds to wait for the guest to connect
        #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
        wait: f32,
    },
    /// Take an interface away from a domain
    #[command(visible_alias = "network-detach")]
    Detach {
        /// The domain, by number or name
        domain: String,
        /// The interface, by number or address
        #[arg(value_name = "DEVID|MAC")]
        vif: Which,
        /// Even if the guest does not let go of it
        #[arg(long)]
        force: bool,
    },
    /// Show the interfaces of domains
    #[command(visible_alias = "network-list")]
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
    /// Most queues of one interface (default: one per processor, at most 8)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    queues: Option<u32>,
}

/// Runs the program with these arguments, the first being its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    program::run("netback", args, execute)
}

fn execute(cli: Cli) -> Result<(), Failure> {
    program::log_to_stderr(if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" });
    match cli.command {
        Command::Serve(serve) => {
            let signals = StopSignals::block()?;
            let machine = cli.machine.machine()?;
            preflight::check(&machine)?;
            let xen = cli.machine.join()?;
            let _claim = cli.machine.claim("netback")?;
            XEN_NETBACK.watch(machine, "netback")?;
            run_server(xen, serve, &signals)
        }
        Command::Attach { domain, vif, wait } => {
            let words: Vec<&str> = vif.iter().map(String::as_str).collect();
            let spec = spec::parse_words(&words)?;
            let wait = Duration::try_from_secs_f32(wait).map_err(|error| format!("--wait {wait}: {error}"))?;
            let xen = cli.machine.join()?;
            let store = xen.store()?;
            for note in &spec.notes {
                eprintln!("netback: {note}");
            }
            let frontend = find_domain(&store, &domain)?;
            let attached = on(&store, xen.as_ref()).attach(frontend, &spec, wait)?;
            let state = if attached.connected { "connected" } else { "attached and waits for the guest's driver" };
            println!("vif{frontend}.{} ({}) is {state}", attached.devid, attached.mac);
            Ok(())
        }
        Command::Detach { domain, vif, force } => {
            let xen = cli.machine.join()?;
            let store = xen.store()?;
            let frontend = find_past_domain(&store, &domain, xen.domid(), "vif")?;
            let (devid, complaint) = on(&store, xen.as_ref()).detach(frontend, vif, force)?;
            if let Some(complaint) = complaint {
                eprintln!("netback: {complaint}");
            }
            println!("vif{frontend}.{devid} is detached");
            Ok(())
        }
        Command::List { domains } => {
            let store = cli.machine.machine()?.store()?;
            let domains = domains.iter().map(|name| find_domain(&store, name)).collect::<Result<Vec<_>, _>>()?;
            print!("{}", toolstack::list(&store, &domains)?);
            Ok(())
        }
    }
}

fn on<'a>(store: &'a Client, xen: &dyn Backend) -> Toolstack<'a> {
    Toolstack { store, backend: xen.domid(), builtin: &hotplug }
}

/// vif-bridge, vif-route and vif-nat, without another process.
fn hotplug(store: &Client, call: Call<'_>) -> Result<(), String> {
    let event = match call.event {
        Event::Online => vif::Event::Online,
        Event::Offline => vif::Event::Offline,
    };
    vif::hotplug(store, call.backend_path, call.script, event, call.vif).map_err(|error| error.to_string())
}

/// What looks after what the hotplug programs have made, until it is dropped. Interfaces are filtered, routed and NATed
/// without it too, until somebody else changes something.
fn watch() -> (Option<FilterGuard>, Option<Guard>, Option<Follower>) {
    fn started<T>(watcher: io::Result<T>, what: &str) -> Option<T> {
        watcher.inspect_err(|error| tracing::warn!(%error, "{what}")).ok()
    }
    (
        started(
            FilterGuard::start(Options::default()),
            "changes of filters cannot be watched: what somebody deletes by tc does not come back",
        ),
        started(
            Guard::start(Options::default()),
            "changes of nftables cannot be watched: tables of routed and NATed guests do not come back after nft flush ruleset",
        ),
        started(
            Follower::start(Options::default()),
            "names of links cannot be watched: a routed interface that is renamed by hand is cut off",
        ),
    )
}

fn run_server(xen: Arc<dyn Backend>, serve: Serve, signals: &StopSignals) -> Result<(), Failure> {
    let defaults = Config::default();
    let config = Config { queues: serve.queues.unwrap_or(defaults.queues), cpus: serve.cpus, ..defaults };
    let (domid, store) = (xen.domid(), xen.store()?);
    let stop = signals.stop_handle();
    let _watchers = watch();
    let driver = Driver::new(store, domid, VifKind::new(xen, config))?;
    println!("netback: serving {}/backend/vif", domid.home());
    program::serve(vec![driver], &stop)
}
