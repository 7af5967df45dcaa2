//! The program netback; all of it is in the library, so that others can carry it along.

use std::process::ExitCode;

fn main() -> ExitCode {
    netback::cli::run(std::env::args_os())
}
