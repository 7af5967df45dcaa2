//! The emulated machine and its backends as processes of their own, for as long as a command needs them.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blkback::spec::DiskSpec;
use blkback::toolstack;
use blkback::vdev::Vdev;
use hypervisor::emu::{Counters, GuestOptions, GuestSeat, Member};
use hypervisor::{Backend, DomId};
use xenstore_client::Client;

use crate::Failure;

/// How this program is told to be another one.
pub const EMU_XEN: &str = "emu-xen";
/// See [`EMU_XEN`].
pub const BLKBACK: &str = "blkback";
/// See [`EMU_XEN`].
pub const NETBACK: &str = "netback";
/// See [`EMU_XEN`]; the name of the program that this is to be comes next.
pub const BRIDGE_SCRIPTS: &str = "bridge-scripts";

/// Where bridge-scripts keep their lock and journal: not the host's, which is another network.
pub(crate) const SCRIPTS_FOLDER: &str = "BRIDGE_SCRIPTS_RUN";

/// A running part of the machine; it ends when this is dropped, or when this process dies.
#[derive(Debug)]
struct Part {
    name: &'static str,
    child: Child,
}

impl Part {
    /// Starts a part and waits for the line by which it says that it is ready.
    fn start(name: &'static str, args: &[&str], folder: &Path) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(name)
            .args(args)
            .env(SCRIPTS_FOLDER, folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("starting {name}: {error}"))?;
        let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(format!("{name} has no output").into());
        };
        let mut part = Self { name, child };
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready)?;
        if ready.is_empty() {
            let mut said = String::new();
            stderr.read_to_string(&mut said)?;
            let status = part.child.wait()?;
            return Err(format!("{name} ended ({status}): {}", said.trim()).into());
        }
        // What it has to say later is for the terminal, when it is worth saying.
        std::thread::Builder::new().name(format!("{name} log")).spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("WARN") || line.contains("ERROR") || line.contains("panicked") {
                    eprintln!("{name}: {line}");
                }
            }
        })?;
        Ok(part)
    }

    fn stop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > Duration::from_secs(10) {
                eprintln!("{} does not stop; killing it", self.name);
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An emulated machine with backends in its dom0.
#[derive(Debug)]
pub struct Machine {
    // In this order: the backends leave the machine before the machine ends.
    backends: Vec<Part>,
    _emu_xen: Part,
    dom0: Member,
    store: Client,
    folder: tempfile::TempDir,
}

impl Machine {
    /// Starts the machine, with no backend yet.
    ///
    /// # Errors
    /// When it cannot be started; what it said is in the message.
    pub fn bare() -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("dom0-bench-").tempdir()?;
        let dir = folder.path().join("machine");
        let dir_text = dir.to_str().ok_or("the folder for temporary files has a name that is not UTF-8")?;
        let emu_xen = Part::start(EMU_XEN, &["serve", "--dir", dir_text], folder.path())?;
        let dom0 = Member::join(&dir, DomId::DOM0)?;
        let store = dom0.store()?;
        Ok(Self { backends: Vec::new(), _emu_xen: emu_xen, dom0, store, folder })
    }

    /// Starts the machine and blkback. `serve` are further arguments of `blkback serve`.
    ///
    /// # Errors
    /// When a part cannot be started; what it said is in the message.
    pub fn start(serve: &[&str]) -> Result<Self, Failure> {
        let mut machine = Self::bare()?;
        machine.serve(BLKBACK, serve)?;
        Ok(machine)
    }

    /// Starts a backend in dom0, and in the network namespace of the calling thread. `serve` are further arguments.
    ///
    /// # Errors
    /// When it cannot be started; what it said is in the message.
    pub fn serve(&mut self, backend: &'static str, serve: &[&str]) -> Result<(), Failure> {
        let hypervisor = self.hypervisor();
        let mut args = vec!["serve", "--hypervisor", &hypervisor];
        args.extend(serve);
        let part = Part::start(backend, &args, self.folder.path())?;
        self.backends.push(part);
        Ok(())
    }

    /// Types a command of netback in dom0, and in the network namespace of the calling thread: `attach`, `detach`, `list`.
    /// Returns what it said.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn netback(&self, args: &[&str]) -> Result<String, Failure> {
        self.command(NETBACK, &[args, &["--hypervisor", &self.hypervisor()]].concat())
    }

    /// Types a command of bridge-scripts in dom0, in the network namespace of the calling thread; the first word is the
    /// program's name. Returns what it said.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn bridge_scripts(&self, args: &[&str]) -> Result<String, Failure> {
        self.command(BRIDGE_SCRIPTS, args)
    }

    /// Has dom0 route for guests, and lend them its own address on the way out of this interface.
    ///
    /// # Errors
    /// When it fails; with what it said.
    pub fn start_nat(&self, uplink: &str) -> Result<String, Failure> {
        self.bridge_scripts(&["network-nat", "start", &format!("netdev={uplink}")])
    }

    fn command(&self, part: &str, args: &[&str]) -> Result<String, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        let output =
            command.arg(part).args(args).env(SCRIPTS_FOLDER, self.folder.path()).stdin(Stdio::null()).output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        if output.status.success() { Ok(said) } else { Err(format!("{part} {}: {said}", args.join(" ")).into()) }
    }

    fn hypervisor(&self) -> String {
        format!("emu:{}", self.dir().display())
    }

    /// Where the machine is joined.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("machine")
    }

    /// A folder that goes with the machine.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// dom0's XenStore connection.
    pub fn store(&self) -> &Client {
        &self.store
    }

    /// The process of a backend that was started.
    ///
    /// # Panics
    /// When it was not.
    pub fn pid(&self, backend: &str) -> u32 {
        let part = self.backends.iter().find(|part| part.name == backend);
        part.unwrap_or_else(|| panic!("{backend} was not started")).child.id()
    }

    /// This process becomes a guest with that much memory.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn join_guest(&self, name: &str, memory_pages: u32) -> Result<GuestSeat, Failure> {
        let options = GuestOptions { name: name.into(), memory_pages, ..GuestOptions::default() };
        Ok(GuestSeat::join(self.dir(), options)?)
    }

    /// What the machine has counted.
    pub fn counters(&self) -> Counters {
        self.dom0.counters()
    }

    /// What one domain did to another.
    pub fn counters_between(&self, from: DomId, to: DomId) -> Counters {
        self.dom0.counters_between(from, to)
    }

    /// Pages of guests' that other domains still have mapped.
    ///
    /// # Errors
    /// When the machine does not answer.
    pub fn still_mapped(&self) -> Result<u64, Failure> {
        Ok(self.dom0.domains()?.iter().map(|domain| u64::from(domain.mapped)).sum())
    }

    /// Attaches a disk; the guest's driver comes later.
    ///
    /// # Errors
    /// As `blkback attach`.
    pub fn attach(&self, guest: DomId, spec: &DiskSpec) -> Result<(), Failure> {
        toolstack::attach(&self.store, DomId::DOM0, guest, spec, Duration::ZERO)?;
        Ok(())
    }

    /// Detaches a disk.
    ///
    /// # Errors
    /// As `blkback detach`.
    pub fn detach(&self, guest: DomId, vdev: Vdev) -> Result<(), Failure> {
        Ok(toolstack::detach(&self.store, DomId::DOM0, guest, vdev, false)?)
    }
}
