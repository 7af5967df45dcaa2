//! The emulated machine and blkback as processes of their own, for as long as a command needs them.

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

/// A running part of the machine; it ends when this is dropped, or when this process dies.
#[derive(Debug)]
struct Part {
    name: &'static str,
    child: Child,
}

impl Part {
    /// Starts a part and waits for the line by which it says that it is ready.
    fn start(name: &'static str, args: &[&str]) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(name)
            .args(args)
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

/// An emulated machine with blkback in its dom0.
#[derive(Debug)]
pub struct Machine {
    // In this order: blkback leaves the machine before the machine ends.
    blkback: Part,
    _emu_xen: Part,
    dom0: Member,
    store: Client,
    folder: tempfile::TempDir,
}

impl Machine {
    /// Starts both. `serve` are further arguments of `blkback serve`.
    ///
    /// # Errors
    /// When a part cannot be started; what it said is in the message.
    pub fn start(serve: &[&str]) -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("dom0-bench-").tempdir()?;
        let dir = folder.path().join("machine");
        let dir_text = dir.to_str().ok_or("the folder for temporary files has a name that is not UTF-8")?;
        let emu_xen = Part::start(EMU_XEN, &["serve", "--dir", dir_text])?;
        let hypervisor = format!("emu:{dir_text}");
        let mut args = vec!["serve", "--hypervisor", &hypervisor];
        args.extend(serve);
        let blkback = Part::start(BLKBACK, &args)?;
        let dom0 = Member::join(&dir, DomId::DOM0)?;
        let store = dom0.store()?;
        Ok(Self { blkback, _emu_xen: emu_xen, dom0, store, folder })
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

    /// blkback's process.
    pub fn blkback_pid(&self) -> u32 {
        self.blkback.child.id()
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
