//! The command line.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::machine::{BLKBACK, BRIDGE_SCRIPTS, EMU_XEN, NETBACK};
use crate::{Failure, disk, guest, hotplug, net, tour};

/// See, use and measure Xen's backends on any Linux machine. Without a command: the tour.
#[derive(Debug, Parser)]
#[command(name = "dom0-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a disk to an emulated guest, check every byte of it, and say how fast it was
    Tour,
    Disk(disk::Arguments),
    Net(net::measure::Arguments),
    Hotplug(hotplug::Arguments),
    Guest(guest::Arguments),
}

/// How this program is told to be the half of `hotplug` that measures.
pub(crate) const HOTPLUG_ROUNDS: &str = "hotplug-rounds";

/// Runs the program with these arguments, the first being its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    // A link to this program that has the name of a hotplug program is that.
    let own = args.first().and_then(|name| Path::new(name).file_name()?.to_str());
    if own.is_some_and(|own| netback::spec::SCRIPTS.contains(&own)) {
        return bridge_scripts::cli::run(args);
    }
    // The parts of the machine are this program under another name: one file to copy, and cargo run builds it all.
    match args.get(1).and_then(|name| name.to_str()) {
        Some(EMU_XEN) => return as_part(|| hypervisor::emu::cli::run(args.into_iter().skip(1))),
        Some(BLKBACK) => return as_part(|| blkback::cli::run(args.into_iter().skip(1))),
        Some(NETBACK) => return as_part(|| netback::cli::run(args.into_iter().skip(1))),
        Some(BRIDGE_SCRIPTS) => return as_part(|| bridge_scripts::cli::run(args.into_iter().skip(1))),
        Some(HOTPLUG_ROUNDS) => return as_rounds(args),
        _ => {}
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, mistakes to standard error; a closed pipe is nobody's loss.
            let _ = error.print();
            return ExitCode::from(error.exit_code().clamp(0, 255) as u8);
        }
    };
    let outcome: Result<(), Failure> = match cli.command {
        None | Some(Command::Tour) => tour::run(),
        Some(Command::Disk(arguments)) => disk::run(&arguments).map(|report| print!("{report}")),
        Some(Command::Net(arguments)) => net::measure::run(&arguments).map(|report| print!("{report}")),
        Some(Command::Hotplug(arguments)) => hotplug::run(&arguments),
        Some(Command::Guest(arguments)) => guest::run(&arguments),
    };
    finish(outcome)
}

fn finish(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dom0-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What `hotplug` starts: the first of its process namespace, which a milder signal does not end.
fn as_rounds(args: Vec<OsString>) -> ExitCode {
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL) {
        eprintln!("dom0-bench: this part may outlive its parent: {error}");
    }
    match hotplug::rounds::Inner::try_parse_from(args.into_iter().skip(1)) {
        Ok(inner) => finish(hotplug::rounds::run(&inner)),
        Err(error) => finish(Err(error.to_string().into())),
    }
}

/// A part ends with the process that started it, however that ends.
fn as_part(part: impl FnOnce() -> ExitCode) -> ExitCode {
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM) {
        eprintln!("dom0-bench: this part may outlive its parent: {error}");
    }
    part()
}
