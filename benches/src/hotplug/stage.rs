//! Where Xen's stock scripts run: a mount namespace that has the system they belong to, and our XenStore in the place of
//! theirs. Nothing of it is seen outside, and the system is not written to.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::Failure;

/// Where a system has them (`XEN_SCRIPT_DIR`).
const SCRIPTS: &str = "/etc/xen/scripts";
/// The same folder inside under another name: of the usual one netback knows that it need not execute anything.
const STOCK: &str = "/run/stock";
/// Where the scripts' standard error goes, as they have it themselves.
pub(super) const LOG: &str = "/var/log/xen/xen-hotplug.log";

/// Stock scripts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stock {
    /// The system they belong to.
    root: PathBuf,
    /// Their folder, inside of it.
    scripts: PathBuf,
}

impl FromStr for Stock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let folder = Path::new(text).canonicalize().map_err(|error| format!("{text}: {error}"))?;
        let inside = SCRIPTS.trim_start_matches('/');
        if folder.join(inside).join("vif-bridge").is_file() {
            Ok(Self { root: folder, scripts: SCRIPTS.into() })
        } else if folder.join("vif-bridge").is_file() {
            Ok(Self { root: "/".into(), scripts: folder })
        } else {
            Err(format!(
                "{text} is no folder of Xen's scripts (no vif-bridge there), nor a system with {SCRIPTS}/vif-bridge"
            ))
        }
    }
}

impl std::fmt::Display for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.root == Path::new("/") {
            write!(f, "{}", self.scripts.display())
        } else {
            write!(f, "{} of {}", self.scripts.display(), self.root.display())
        }
    }
}

impl Stock {
    /// The path by which the script of this name is executed, once [`enter`](Self::enter) was called.
    pub fn path(&self, name: &str) -> String {
        format!("{STOCK}/{name}")
    }

    /// Moves the calling thread, and what it will start, to where the scripts run. `socket` is XenStore's; `folder` is
    /// empty, and ours.
    ///
    /// # Errors
    /// When the kernel refuses; it takes root, or a user namespace's.
    pub fn enter(&self, socket: &Path, folder: &Path) -> Result<(), Failure> {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("no mount namespace: {error}"))?;
        attach(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        let here = self.root == Path::new("/");
        let root = if here {
            PathBuf::from("/")
        } else {
            bind(&self.root, folder, MsFlags::MS_REC)?;
            attach(None, folder, None, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
            bind(Path::new("/proc"), &folder.join("proc"), MsFlags::MS_REC)?;
            memory(&folder.join("tmp"))?;
            devices(&folder.join("dev"))?;
            folder.to_path_buf()
        };
        // A mounted sysfs shows the network namespace in which it was mounted.
        attach(Some("sysfs"), &root.join("sys"), Some("sysfs"), MsFlags::empty())?;
        // Held, because what is mounted next may hide it.
        let socket = File::options().read(true).custom_flags(libc::O_PATH).open(socket)?;
        let run = root.join("run");
        memory(&run)?;
        fs::create_dir(run.join("xenstored"))?;
        let place = run.join("xenstored/socket");
        touch(&place)?;
        bind(Path::new(&format!("/proc/self/fd/{}", socket.as_raw_fd())), &place, MsFlags::empty())?;
        symlink(&self.scripts, root.join(STOCK.trim_start_matches('/')))?;
        memory(&root.join("var/log"))?;
        fs::create_dir(root.join("var/log/xen"))?;
        if !here {
            nix::unistd::chroot(&root).map_err(|error| format!("chroot {}: {error}", root.display()))?;
            std::env::set_current_dir("/")?;
        }
        Ok(())
    }
}

fn attach(what: Option<&str>, at: &Path, kind: Option<&str>, flags: MsFlags) -> Result<(), Failure> {
    let none: Option<&str> = None;
    mount(what, at, kind, flags, none).map_err(|error| format!("mounting {}: {error}", at.display()).into())
}

fn bind(what: &Path, at: &Path, flags: MsFlags) -> Result<(), Failure> {
    let none: Option<&str> = None;
    mount(Some(what), at, none, MsFlags::MS_BIND | flags, none)
        .map_err(|error| format!("mounting {} on {}: {error}", what.display(), at.display()).into())
}

fn memory(at: &Path) -> Result<(), Failure> {
    attach(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty())
}

fn touch(path: &Path) -> Result<(), Failure> {
    File::create_new(path).map(drop).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The devices that any program may want. There is no log among them, so that nothing reaches this machine's.
fn devices(dev: &Path) -> Result<(), Failure> {
    memory(dev)?;
    for name in ["null", "zero", "full", "random", "urandom"] {
        let place = dev.join(name);
        touch(&place)?;
        bind(&Path::new("/dev").join(name), &place, MsFlags::empty())?;
    }
    for (name, to) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlink(to, dev.join(name))?;
    }
    Ok(())
}
