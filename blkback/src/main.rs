//! The program blkback; all of it is in the library, so that others can carry it along.

use std::process::ExitCode;

fn main() -> ExitCode {
    blkback::cli::run(std::env::args_os())
}
