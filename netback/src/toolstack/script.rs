//! The hotplug program of an interface: done in this process where it is one of ours, executed as libxl does where not.

use std::fmt;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use xenstore_client::xenbus::toolstack::DeviceAddress;
use xenstore_client::{Client, Store};

use super::Toolstack;
use crate::spec::SCRIPTS;

/// Where a script is whose name has no path (`XEN_SCRIPT_DIR`).
const FOLDER: &str = "/etc/xen/scripts";
/// How long libxl lets a hotplug program run (`LIBXL_HOTPLUG_TIMEOUT`).
const TIMEOUT: Duration = Duration::from_secs(40);

/// What libxl wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An interface is about to be served: join it to its network.
    Online,
    /// It goes away.
    Offline,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "online",
            Self::Offline => "offline",
        })
    }
}

/// What a hotplug program of ours is told.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The backend's directory, from the root.
    pub backend_path: &'a str,
    /// The script's path.
    pub script: &'a str,
    /// What happened.
    pub event: Event,
    /// The link, before it is renamed: `vif3.0`.
    pub vif: &'a str,
}

/// Does the work of vif-bridge, vif-route and vif-nat, and writes `hotplug-status`; a sentence if it cannot.
pub type Builtin<'a> = &'a dyn Fn(&Client, Call<'_>) -> Result<(), String>;

/// The hotplug program of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Script {
    path: String,
}

impl Script {
    /// The program that `script=` names, as libxl completes it.
    pub(super) fn new(name: Option<&str>) -> Self {
        let name = name.unwrap_or(SCRIPTS[0]);
        Self { path: if name.starts_with('/') { name.to_owned() } else { format!("{FOLDER}/{name}") } }
    }

    /// The value of the key `script`.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    fn is_builtin(&self) -> bool {
        is_builtin(&self.path)
    }

    /// Whether it could be run.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.is_builtin() {
            return Ok(());
        }
        let known = SCRIPTS.join(", ");
        let path = Path::new(&self.path);
        match path.metadata() {
            Err(error) => Err(format!("script {}: {error}; without one of your own, write script={known}", self.path)),
            Ok(found) if !found.is_file() => Err(format!("script {}: this is no file", self.path)),
            Ok(found) if found.permissions().mode() & 0o111 == 0 => {
                Err(format!("script {}: nobody may execute it; chmod +x {0}", self.path))
            }
            Ok(_) => Ok(()),
        }
    }

    /// Runs it to its end.
    pub(super) fn run(&self, on: &Toolstack<'_>, device: &DeviceAddress<'_>, event: Event) -> Result<(), String> {
        let backend = device.backend_path();
        let vif = format!("vif{}.{}", device.frontend, device.devid);
        let outcome = if self.is_builtin() {
            (on.builtin)(on.store, Call { backend_path: &backend, script: &self.path, event, vif: &vif })
        } else {
            let read = |key: &str| on.store.read_opt(&format!("{backend}/{key}")).ok().flatten();
            let environment = environment(&self.path, device, &vif, read("gatewaydev"));
            execute(&self.path, event, &environment, TIMEOUT).map_err(|what| match read("hotplug-error") {
                Some(why) => format!("{}: {why} ({what})", self.path),
                None => format!("{}: {what}", self.path),
            })
        };
        outcome?;
        if event == Event::Offline {
            return Ok(());
        }
        // libxl looks at the exit alone; but the backend waits for this.
        let read = |key: &str| on.store.read_opt(&format!("{backend}/{key}")).map_err(|error| error.to_string());
        match read("hotplug-status")?.as_deref() {
            Some("connected") => Ok(()),
            Some("") | None => Err(format!(
                "{} ended without writing hotplug-status=connected, for which the backend waits",
                self.path
            )),
            Some(status) => {
                let why = read("hotplug-error")?.unwrap_or_else(|| format!("hotplug-status is {status:?}"));
                Err(format!("{}: {why}", self.path))
            }
        }
    }
}

/// Whether the script of this path is one of ours: also where the stock script of that name is installed, which it takes
/// the place of.
pub(crate) fn is_builtin(path: &str) -> bool {
    let name = path.strip_prefix(FOLDER).and_then(|rest| rest.strip_prefix('/'));
    name.is_some_and(|name| SCRIPTS.contains(&name))
}

/// What libxl adds to the environment of a hotplug program (`get_hotplug_env` in `libxl_linux.c`).
pub(super) fn environment(
    script: &str,
    device: &DeviceAddress<'_>,
    vif: &str,
    gatewaydev: Option<String>,
) -> [(&'static str, String); 6] {
    [
        ("script", script.to_owned()),
        ("XENBUS_TYPE", device.kind.to_owned()),
        ("XENBUS_PATH", format!("backend/{}/{}/{}", device.kind, device.frontend, device.devid)),
        ("XENBUS_BASE_PATH", "backend".to_owned()),
        ("netdev", gatewaydev.unwrap_or_default()),
        ("vif", vif.to_owned()),
    ]
}

/// Runs a program as libxl does: nothing to read, and what it prints goes to standard error.
pub(super) fn execute(
    path: &str,
    event: Event,
    environment: &[(&'static str, String)],
    limit: Duration,
) -> Result<(), String> {
    let output = std::io::stderr().as_fd().try_clone_to_owned().map_err(|error| format!("standard error: {error}"))?;
    let mut command = Command::new(path);
    command.args([&event.to_string(), "type_if=vif"]);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    // A group of its own: what a shell script has started ends with it.
    command.stdin(Stdio::null()).stdout(Stdio::from(output)).process_group(0);
    let mut child = command.spawn().map_err(|error| format!("cannot be run: {error}"))?;
    match wait(&mut child, limit) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(format!("{event} failed, {status}")),
        Ok(None) => Err(format!("{event} did not end within {} s, and was killed", limit.as_secs())),
        Err(error) => Err(format!("waiting for its end: {error}")),
    }
}

/// Waits for the end of a child; kills it, and its group, after `limit`, and returns `None` then.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let began = Instant::now();
    loop {
        let left = Timespec::try_from(limit.saturating_sub(began.elapsed())).ok();
        match poll(&mut [PollFd::new(&ended, PollFlags::IN)], left.as_ref()) {
            Ok(0) => {
                kill_process_group(pid, Signal::KILL)?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
