//! The command line: one program with many names, as busybox is.

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use crate::apply::{self, Options, Session};
use crate::network::{self, Program};
use crate::{vif, xend};

const USAGE: &str = "\
Bridges, VLANs, routes, NAT and filters for Xen's virtual interfaces.

usage: bridge-scripts PROGRAM WORDS...     or a link to bridge-scripts that has the program's name

  network-bridge start|stop|status|confirm [netdev=eth0] [bridge=xenbr0] [vifnum=0] [layout=bridge|xen3] [antispoof=yes|no]
  network-vlan   start|stop|status [netdev=eth0] vlan=411,412 [bridge=xenbr]
  network-dummy  start|stop|status bridge=NAME [address=192.168.17.254/24]
  network-route  start|stop|status [netdev=eth0]
  network-nat    start|stop|status [netdev=eth0] [network=10.0.0.0/16] [dhcp=yes|no]
  vif-bridge, vif-route, vif-nat           Xen's hotplug scripts: online|offline|add|remove
  from-xend FILE                           what xend-config.sxp means now

start and stop take --plan (say what would be done) and --confirm SECONDS (take it back unless `network-bridge confirm` comes).
State is kept in /run/bridge-scripts, or in $BRIDGE_SCRIPTS_RUN.
";

/// Runs the program with these arguments, the first being its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter().map(|arg| arg.to_string_lossy().into_owned());
    let own = args.next().unwrap_or_default();
    let own = Path::new(&own).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut words: Vec<String> = args.collect();
    let name = if is_program(&own) {
        own
    } else if words.is_empty() {
        "help".to_owned()
    } else {
        words.remove(0)
    };
    let outcome = match name.as_str() {
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        "--version" => {
            println!("bridge-scripts {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        apply::WAITER => wait(&words),
        "from-xend" => from_xend(&words),
        _ => match Program::by_name(&name) {
            _ if words.iter().any(|word| word == "--help" || word == "-h") => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            Some(program) => {
                let options = Options { say: |line| eprintln!("{line}"), ..Options::default() };
                network::run(program, &words, options, &mut |line| println!("{line}"))
                    .map_err(|error| error.to_string())
            }
            None if VIF.contains(&name.as_str()) => {
                return vif::main(&name, &words, &|variable| env::var(variable).ok());
            }
            None => {
                eprintln!("bridge-scripts: there is no program {name:?}\n\n{USAGE}");
                return ExitCode::FAILURE;
            }
        },
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_program(name: &str) -> bool {
    name == "from-xend" || Program::by_name(name).is_some() || VIF.contains(&name)
}

const VIF: [&str; 3] = ["vif-bridge", "vif-route", "vif-nat"];

fn from_xend(words: &[String]) -> Result<(), String> {
    let [file] = words else { return Err("which file? Usually it is /etc/xen/xend-config.sxp".to_owned()) };
    let text = xend::explain(Path::new(file)).map_err(|error| error.to_string())?;
    print!("{text}");
    Ok(())
}

/// Waits until a change that was not confirmed is due, and takes it back: by opening a session, as everybody would.
fn wait(words: &[String]) -> Result<(), String> {
    let deadline: u64 =
        words.first().and_then(|word| word.parse().ok()).ok_or("a deadline in seconds since boot is missing")?;
    let options = Options::default();
    apply::leave_terminal(&options.run);
    while apply::is_due_later(&options.run, deadline) {
        sleep(Duration::from_millis(200));
    }
    Session::open(options).map(drop).map_err(|error| error.to_string())
}
