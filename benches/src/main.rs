//! The program dom0-bench; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    dom0_bench::cli::run(std::env::args_os())
}
