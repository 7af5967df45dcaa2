//! `emu-xen`: see `emu-xen --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    hypervisor::emu::cli::run(std::env::args_os())
}
