//! Network namespaces: where dom0, the guests and the outside of an emulated machine live, each with its own
//! interfaces, routes and filters (network_namespaces(7)).
//!
//! A namespace belongs to threads, not to processes: [`Namespace::run`] does its work on a thread that has moved there,
//! and a socket or tap stays where it was made, whoever uses it later. A program started by a thread begins in that
//! thread's namespace.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::link;
use crate::Failure;

/// Where `ip netns` keeps its names (ip-netns(8)).
const NAMED: &str = "/run/netns";

/// Moves this process out of the host's network, into a namespace of its own in which it may do what it likes: as root
/// plainly, otherwise as the root of a user namespace.
///
/// To be called before the first thread starts: a process of several threads cannot enter a user namespace, and threads
/// that run already would stay behind.
///
/// # Errors
/// When this machine forbids it; in words that go behind "no network here:".
pub fn leave_the_host() -> Result<(), Failure> {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {}
        Err(Errno::EPERM) => enter_user_namespace()?,
        Err(error) => return Err(format!("the kernel makes no network namespace ({error})").into()),
    }
    // A user namespace may be granted without its powers, by AppArmor for instance: try one.
    link::up("lo").map_err(|error| format!("in a new network namespace nothing may be configured ({error})"))?;
    Ok(())
}

fn enter_user_namespace() -> Result<(), Failure> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(|error| {
        format!("neither root nor a user namespace ({error}; see /proc/sys/user/max_user_namespaces and AppArmor's kernel.apparmor_restrict_unprivileged_userns)")
    })?;
    // user_namespaces(7): an ordinary user maps only itself, and must give up setgroups(2) before mapping its group.
    let map = |file: &str, text: String| {
        std::fs::write(format!("/proc/self/{file}"), text).map_err(|error| format!("/proc/self/{file}: {error}"))
    };
    map("uid_map", format!("0 {user} 1"))?;
    map("setgroups", "deny".to_owned())?;
    map("gid_map", format!("0 {group} 1"))?;
    Ok(())
}

/// A network namespace. It lasts as long as this, a thread in it, or its name.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    /// The name under [`NAMED`] that goes with this.
    named: Option<PathBuf>,
}

impl Namespace {
    /// A new one, with its lo up.
    ///
    /// # Errors
    /// When the kernel makes none.
    pub fn new() -> Result<Self, Failure> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("no network namespace: {error}"))?;
            link::up("lo")?;
            Self::current()
        })?
    }

    /// That of the calling thread.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn current() -> Result<Self, Failure> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { file, named: None })
    }

    /// Runs `work` inside, on a thread of its own.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `work` panicked.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
        on_a_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("entering a network namespace: {error}"))?;
            Ok::<_, Failure>(work())
        })?
    }

    /// Moves the calling thread inside.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<(), Failure> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|error| format!("entering a network namespace: {error}").into())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let Some(path) = &self.named else { return };
        if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
            eprintln!("dom0-bench: {} stays mounted: {error}", path.display());
        } else if let Err(error) = std::fs::remove_file(path) {
            eprintln!("dom0-bench: {} stays: {error}", path.display());
        }
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("namespace".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| "a thread in another namespace panicked".into())
    })
}

/// Which namespace somebody means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// By the name that `ip netns` has for it.
    Named(String),
    /// That of a process.
    OfProcess(u32),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(pid) = text.strip_prefix("pid:") {
            return pid.parse().map(Self::OfProcess).map_err(|_| format!("{pid:?} is no process number"));
        }
        match text {
            "" | "." | ".." => Err(format!("{text:?} is no name: write one of ip netns list, or pid:NUMBER")),
            _ if text.contains(['/', '\0']) => Err(format!("{text:?}: names of ip netns have no slash in them")),
            _ => Ok(Self::Named(text.to_owned())),
        }
    }
}

impl Place {
    /// Finds it. A name that is not there is made, and goes again with the value returned. To be called before the
    /// first thread starts: the process may belong to another user namespace, which is then entered.
    ///
    /// # Errors
    /// When it is not there, or may not be used.
    pub fn find(&self) -> Result<Namespace, Failure> {
        match self {
            Self::OfProcess(pid) => {
                let (ours, theirs) = (user_namespace("self")?, user_namespace(&pid.to_string())?);
                if ours != theirs {
                    let file = File::open(format!("/proc/{pid}/ns/user"))?;
                    setns(file, CloneFlags::CLONE_NEWUSER)
                        .map_err(|error| format!("entering the user namespace of process {pid}: {error}"))?;
                }
                Namespace::open(Path::new(&format!("/proc/{pid}/ns/net")))
            }
            Self::Named(name) => {
                let path = Path::new(NAMED).join(name);
                if path.exists() { Namespace::open(&path) } else { make_named(path) }
            }
        }
    }
}

fn user_namespace(process: &str) -> Result<PathBuf, Failure> {
    let path = format!("/proc/{process}/ns/user");
    Ok(std::fs::read_link(&path).map_err(|error| format!("{path}: {error}"))?)
}

/// As `ip netns add`: a file over which the namespace is mounted.
fn make_named(path: PathBuf) -> Result<Namespace, Failure> {
    let failed = |error: &dyn std::fmt::Display| -> Failure {
        format!("{}: {error} (names for ip netns need root; without it use pid:NUMBER)", path.display()).into()
    };
    std::fs::create_dir_all(NAMED).map_err(|error| failed(&error))?;
    let none: Option<&str> = None;
    // Others see the name only if the folder is shared between mount namespaces, for which it has to be a mount.
    let share = || mount(none, NAMED, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if share() == Err(Errno::EINVAL) {
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(NAMED), NAMED, none, bind, none).and_then(|()| share()).map_err(|error| failed(&error))?;
    }
    File::options().write(true).create_new(true).open(&path).map_err(|error| failed(&error))?;
    let mounted = on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| failed(&error))?;
        link::up("lo")?;
        mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none).map_err(|error| failed(&error))
    });
    if let Err(error) = mounted.and_then(|outcome| outcome) {
        std::fs::remove_file(&path)?;
        return Err(error);
    }
    let mut made = Namespace::open(&path)?;
    made.named = Some(path);
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        for (text, place) in
            [("web", Place::Named("web".into())), ("pid:17", Place::OfProcess(17)), ("pid", Place::Named("pid".into()))]
        {
            assert_eq!(text.parse(), Ok(place), "{text}");
        }
        for text in ["", "..", "a/b", "pid:", "pid:-1", "pid:x"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
