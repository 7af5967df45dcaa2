//! The command line.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::machine::{BLKBACK, BRIDGE_SCRIPTS, EMU_XEN, NETBACK};
use crate::{Failure, disk, guest, net, tour};

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
    Guest(guest::Arguments),
}

/// Runs the program with these arguments, the first being its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    // The parts of the machine are this program under another name: one file to copy, and cargo run builds it all.
    match args.get(1).and_then(|name| name.to_str()) {
        Some(EMU_XEN) => return as_part(|| hypervisor::emu::cli::run(args.into_iter().skip(1))),
        Some(BLKBACK) => return as_part(|| blkback::cli::run(args.into_iter().skip(1))),
        Some(NETBACK) => return as_part(|| netback::cli::run(args.into_iter().skip(1))),
        Some(BRIDGE_SCRIPTS) => return as_part(|| bridge_scripts::cli::run(args.into_iter().skip(1))),
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
        Some(Command::Guest(arguments)) => guest::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dom0-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A part ends with the process that started it, however that ends.
fn as_part(part: impl FnOnce() -> ExitCode) -> ExitCode {
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM) {
        eprintln!("dom0-bench: this part may outlive its parent: {error}");
    }
    part()
}
