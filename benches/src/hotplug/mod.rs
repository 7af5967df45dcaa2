//! `dom0-bench hotplug`: how long an interface takes from attach to Connected with our hotplug programs, beside Xen's stock
//! scripts, in one run and by turns.
//!
//! The emulated machine with its XenStore, netback and a guest's netfront are the same for all; what differs is the
//! hotplug program. Two processes: the one that is typed keeps machine and netback, and the other, which [`rounds`]
//! describes, attaches and measures. That one has a process namespace of its own, so that the numbers of processes tell how
//! many were started.

mod report;
pub mod rounds;
mod stage;
mod subject;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

pub use self::report::Report;
pub use self::stage::Stock;
use crate::Failure;
use crate::cli::HOTPLUG_ROUNDS;
use crate::machine::{Machine, NETBACK, SCRIPTS_FOLDER};
use crate::net::netns::{self, Namespace};
use crate::net::plan::{Topology, UPLINK};
use crate::net::scene::Scene;
use crate::placement;

/// Measure how long an interface takes from attach to Connected, and of it the hotplug program, beside Xen's stock scripts
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "--stock takes a folder with Xen's own scripts, or the root of a system that has them in /etc/xen/scripts:\n  \
    dom0-bench hotplug --stock /               a machine with Debian's xen-utils-common and xenstore-utils\n  \
    dom0-bench hotplug --stock FOLDER          that root, made elsewhere, for example by\n    \
    debootstrap --include=xen-utils-common,xenstore-utils,bridge-utils bookworm FOLDER\n    \
    or by tests/xen-lab/run.py build, which leaves one in target/xen-lab/4.17/dom0-root\n\
    The scripts run inside that root, in a mount namespace of their own; nothing is written to it. They find the emulated \
    machine's XenStore at /run/xenstored/socket."
)]
pub struct Arguments {
    /// Xen's stock scripts: their folder, or the root of a system that has them (default: they are not measured)
    #[arg(long, value_name = "FOLDER")]
    pub stock: Option<Stock>,
    /// Which script: bridge, route, nat
    #[arg(long, default_value = "bridge", value_name = "TOPOLOGY")]
    pub topology: Topology,
    /// Rounds that count, after one that does not
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: u32,
    /// The program that is executed as our script (default: bridge-scripts beside this program, else this program itself)
    #[arg(long, value_name = "FILE")]
    pub ours: Option<PathBuf>,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// The variable that tells a program where the emulated machine is.
const HYPERVISOR: &str = "HYPERVISOR";
/// Where libxenstore looks for the socket if these are not set is where it is put.
const XENSTORED: [&str; 2] = ["XENSTORED_PATH", "XENSTORED_RUNDIR"];

/// Runs the measurement, and prints what it finds.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let ours = our_program(arguments)?;
    netns::leave_the_host().map_err(|error| format!("nothing can be measured: {error}"))?;
    let (toolstack, others) = processors();
    // What is started from here on inherits it.
    placement::pin(others);
    let mut machine = Machine::bare()?;
    machine.serve(NETBACK, &[])?;
    let _scene = Scene::new(Namespace::current()?, &[arguments.topology], 1500)?;
    // As on a real dom0, where /run is in memory.
    let memory = Some("/dev/shm").filter(|path| Path::new(path).is_dir());
    let run = tempfile::Builder::new().prefix("dom0-bench-run-").tempdir_in(memory.unwrap_or("/tmp"))?;
    if arguments.topology == Topology::Nat {
        machine.start_nat(UPLINK)?;
    }
    let script = machine.folder().join(format!("vif-{}", arguments.topology));
    symlink(&ours, &script).map_err(|error| format!("{}: {error}", script.display()))?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(HOTPLUG_ROUNDS)
        .args(["--dir".as_ref(), machine.dir().as_os_str()])
        .args(["--script".as_ref(), script.as_os_str()])
        .args(["--cpus".to_owned(), format!("{toolstack},{others}")])
        // As they were typed.
        .args(std::env::args_os().skip(2))
        .env(HYPERVISOR, format!("emu:{}", machine.dir().display()))
        .env(SCRIPTS_FOLDER, run.path())
        .stdin(Stdio::null());
    for name in XENSTORED {
        command.env_remove(name);
    }
    let status = std::thread::scope(|scope| {
        let work = || {
            // Whoever may not have one has no figures for processes.
            let _ = unshare(CloneFlags::CLONE_NEWPID);
            command.status()
        };
        let thread = std::thread::Builder::new().name("rounds".into()).spawn_scoped(scope, work)?;
        Ok::<_, Failure>(thread.join().map_err(|_| "the thread that measures panicked")??)
    })?;
    if status.success() { Ok(()) } else { Err("nothing was measured".into()) }
}

/// The processor of the toolstack and the hotplug programs, and that of everything else.
fn processors() -> (usize, usize) {
    let all = placement::processors();
    (all.last().copied().unwrap_or(0), all.first().copied().unwrap_or(0))
}

/// The program behind our scripts' names.
fn our_program(arguments: &Arguments) -> Result<PathBuf, Failure> {
    let itself = std::env::current_exe()?;
    let beside = itself.with_file_name("bridge-scripts");
    let program = match &arguments.ours {
        Some(program) => program.clone(),
        None if beside.is_file() => beside,
        None => itself,
    };
    program.canonicalize().map_err(|error| format!("{}: {error}", program.display()).into())
}
