//! The program bridge-scripts; all of it is in the library, so that others can carry it along.

use std::process::ExitCode;

fn main() -> ExitCode {
    bridge_scripts::cli::run(std::env::args_os())
}
