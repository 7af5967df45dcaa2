//! The programs vif-bridge, vif-route and vif-nat.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use hypervisor::Machine;

use super::{Error, Event, Request, Script};
use crate::apply::{Options, Session};

/// The log of Xen's hotplug scripts; `XEN_HOTPLUG_LOG` names another file.
const LOG: &str = "/var/log/xen/xen-hotplug.log";

const USAGE: &str = "usage: vif-bridge|vif-route|vif-nat online|offline|add|remove [type_if=vif|tap] [KEY=VALUE...] [--plan]\n\
    Run by xl with XENBUS_PATH and vif (or INTERFACE) in the environment. Keys that XenStore does not have: bridge, ip, \
    netdev, antispoof.";

/// Runs the program `name` with these arguments (without its name); `env` looks up a variable.
///
/// The machine's XenStore is Xen's own, or that of an emulated machine which `HYPERVISOR=emu:DIR` names.
pub fn main(name: &str, args: &[String], env: &dyn Fn(&str) -> Option<String>) -> ExitCode {
    match run(name, args, env) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            say(name, &text, env);
            ExitCode::FAILURE
        }
    }
}

/// To standard error, which libxl logs, and to the log of hotplug scripts where there is one.
fn say(name: &str, text: &str, env: &dyn Fn(&str) -> Option<String>) {
    let text = format!("{name}: {text}");
    eprintln!("{text}");
    let path = env("XEN_HOTPLUG_LOG").map_or_else(|| PathBuf::from(LOG), PathBuf::from);
    // The folder is Xen's; where it is missing, standard error has to do.
    if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        let _ = writeln!(file, "{text}");
    }
}

fn run(name: &str, args: &[String], env: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    let script = Script::of(name).ok_or_else(|| Error::NoScript(name.to_owned()).to_string())?;
    let (mut event, mut plan_only) = (None, false);
    let mut words: Vec<(&str, &str)> = Vec::new();
    for arg in args {
        match (arg.as_str(), arg.split_once('=')) {
            ("--plan", _) => plan_only = true,
            ("-h" | "--help", _) => {
                println!("{USAGE}");
                return Ok(());
            }
            (_, Some((key, value))) => words.push((key, value)),
            (word, None) if event.is_none() => {
                event = Some(match word {
                    "online" => Event::Online,
                    "offline" => Event::Offline,
                    "add" => Event::Add,
                    "remove" => Event::Remove,
                    other => return Err(format!("unknown command {other:?}\n{USAGE}")),
                });
            }
            (word, None) => return Err(format!("unexpected {word:?}\n{USAGE}")),
        }
    }
    let event = event.ok_or_else(|| format!("no command\n{USAGE}"))?;
    let word = |key: &str| {
        let typed = words.iter().rev().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned());
        typed.or_else(|| env(key))
    };
    let tap = match word("type_if").as_deref() {
        None | Some("" | "vif") => false,
        Some("tap") => true,
        Some(other) => return Err(format!("type_if={other} is neither vif nor tap")),
    };
    if tap != event.is_tap() {
        // As in the stock scripts: udev and libxl both tell, each its own way.
        return Ok(());
    }
    let variable = if tap { "INTERFACE" } else { "vif" };
    let vif = word(variable).filter(|vif| !vif.is_empty());
    let vif = vif.ok_or_else(|| format!("{variable} is not set: this is for libxl to run\n{USAGE}"))?;
    let backend = match word("XENBUS_PATH").filter(|path| !path.is_empty()) {
        Some(path) => path,
        // The tap's name tells: vif1.0-emu.
        None if tap => {
            backend_of(&vif).ok_or_else(|| format!("{vif} is not named like vif1.0-emu, and XENBUS_PATH is not set"))?
        }
        None => return Err(format!("XENBUS_PATH is not set: this is for libxl to run\n{USAGE}")),
    };
    let machine = match env("HYPERVISOR").filter(|machine| !machine.is_empty()) {
        Some(machine) => machine.parse::<Machine>()?,
        None => Machine::find().ok_or("this is no domain of Xen (no /dev/xen here)")?,
    };
    let store = machine.store().map_err(|error| error.to_string())?;
    let mut options = Options { say: |line| eprintln!("{line}"), ..Options::default() };
    if let Some(run) = env("BRIDGE_SCRIPTS_RUN").filter(|run| !run.is_empty()) {
        options.run = run.into();
    }
    let request = Request { backend: &backend, event, vif: &vif, options, words: &word };
    if plan_only {
        let mut session = Session::open(request.options.clone()).map_err(|error| error.to_string())?;
        let (plan, ..) = request.plan(&store, script, &mut session).map_err(|error| error.to_string())?;
        print!("{plan}");
        return Ok(());
    }
    let outcome = request.run(&store, script);
    let told = request.tell(&store, &outcome);
    let notes = outcome.map_err(|error| error.to_string())?;
    told.map_err(|error| error.to_string())?;
    notes.iter().for_each(|note| say(name, note, env));
    Ok(())
}

/// The backend's directory of the interface that a tap belongs to.
fn backend_of(tap: &str) -> Option<String> {
    let (domid, handle) = tap.strip_prefix("vif")?.strip_suffix("-emu")?.split_once('.')?;
    let number = |text: &str| text.parse::<u32>().is_ok();
    (number(domid) && number(handle)).then(|| format!("/local/domain/0/backend/vif/{domid}/{handle}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_belong_to_interfaces() {
        assert_eq!(backend_of("vif62.2-emu").as_deref(), Some("/local/domain/0/backend/vif/62/2"));
        for other in ["vif62.2", "tap0", "vif-1.0-emu", "vif1.-emu", "vif1.0/../2-emu"] {
            assert_eq!(backend_of(other), None, "{other}");
        }
    }
}
