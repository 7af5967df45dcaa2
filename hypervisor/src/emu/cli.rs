//! The program `emu-xen`: keeps an emulated machine, and shows what happens on it.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};

use super::{Counters, DomainInfo, Limits, Machine, Member};
use crate::{DomId, Error, GrantStatus, Result};

/// An emulated Xen machine for backends and frontends on any Linux.
#[derive(Debug, Parser)]
#[command(name = "emu-xen", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keep a machine in a directory until SIGTERM or SIGINT; other programs join it with --hypervisor emu:DIR
    Serve {
        /// The machine's directory; it is created if need be
        #[arg(long)]
        dir: PathBuf,
        /// Pages (4 KiB) of a guest that does not say how many it wants
        #[arg(long, value_name = "PAGES", default_value_t = Limits::default().memory_pages,
              value_parser = clap::value_parser!(u32).range(1..))]
        memory: u32,
    },
    /// Print what the machine has counted
    Stats {
        /// The machine's directory
        #[arg(long)]
        dir: PathBuf,
    },
    /// List the machine's domains
    List {
        /// The machine's directory
        #[arg(long)]
        dir: PathBuf,
    },
}

/// Runs `emu-xen` with these arguments, of which the first is the program's name.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are errors to clap, too; it knows where they go and how they end.
            let printed = error.print();
            return ExitCode::from(if printed.is_ok() && !error.use_stderr() { 0 } else { 2 });
        }
    };
    let done = match arguments.command {
        Command::Serve { dir, memory } => serve(&dir, memory),
        Command::Stats { dir } => stats(&dir),
        Command::List { dir } => list(&dir),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("emu-xen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr() {
    use std::io::IsTerminal;

    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Whoever carries this program along may have a log already, which is then used.
    let _ = log.with_ansi(io::stderr().is_terminal()).try_init();
}

fn serve(dir: &std::path::Path, memory_pages: u32) -> Result<()> {
    // Blocked before the first thread starts, so that all inherit it and only `wait` below sees the signals.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().map_err(|errno| Error::io("blocking signals", errno))?;
    log_to_stderr();
    raise_descriptor_limit();
    let defaults = Limits::default();
    let limits = Limits { memory_pages, memory_pages_max: defaults.memory_pages_max.max(memory_pages), ..defaults };
    let running = Machine::start(dir, limits)?;
    print(&format!("emu-xen: machine ready in {}\n", running.dir().display()))?;
    let signal = signals.wait().map_err(|errno| Error::io("waiting for a signal", errno))?;
    tracing::info!(%signal, "stopping");
    Ok(())
}

/// A machine holds three descriptors for every event channel; the usual soft limit of 1024 is soon used up.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who reads only the first lines has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("writing to standard output", error)),
        _ => Ok(()),
    }
}

fn stats(dir: &std::path::Path) -> Result<()> {
    let member = Member::join(dir, DomId::DOM0)?;
    let mut text = row(&["from".into(), "to".into()], HEADINGS.map(str::to_owned));
    text += &row(&["all".into(), "all".into()], numbers(&member.counters()));
    for (from, to, counters) in member.counters_by_pair() {
        text += &row(&[from.to_string(), to.to_string()], numbers(&counters));
    }
    let total = member.counters();
    for code in 1..=13 {
        let status = GrantStatus::from_raw(-code);
        if total.refused(status) > 0 {
            text += &format!("refused grants: {} {status}\n", total.refused(status));
        }
    }
    if total.torn_copies > 0 {
        text += &format!("copies whose grant changed while they ran: {}\n", total.torn_copies);
    }
    print(&text)
}

const HEADINGS: [&str; 9] =
    ["maps", "unmaps", "copies", "copied-bytes", "binds", "events", "suppressed", "dropped", "refused"];

fn numbers(counters: &Counters) -> [String; 9] {
    [
        counters.maps,
        counters.unmaps,
        counters.copies,
        counters.copied_bytes,
        counters.binds,
        counters.notifications,
        counters.notifications_suppressed,
        counters.notifications_dropped,
        counters.refused_grants() + counters.refused_ports,
    ]
    .map(|number| number.to_string())
}

fn row(pair: &[String; 2], cells: [String; 9]) -> String {
    let cells: String = cells.iter().map(|cell| format!(" {cell:>12}")).collect();
    format!("{:<6}{:<6}{cells}\n", pair[0], pair[1])
}

fn list(dir: &std::path::Path) -> Result<()> {
    let member = Member::join(dir, DomId::DOM0)?;
    let mut text = format!(
        "{:>5} {:<20} {:>9} {:>7} {:>7} {:>10} {:>6} {:>6} state\n",
        "id", "name", "pages", "grants", "mapped", "maps-held", "ports", "seats"
    );
    for domain in member.domains()? {
        let DomainInfo { domid, name, memory_pages, grants, mapped, maps_held, ports, seats, zombie } = domain;
        let state = if zombie { "zombie" } else { "running" };
        text += &format!(
            "{:>5} {name:<20} {memory_pages:>9} {grants:>7} {mapped:>7} {maps_held:>10} {ports:>6} {seats:>6} {state}\n",
            domid.0
        );
    }
    print(&text)
}
