//! Filters follow an interface that somebody renames.
//!
//! Since Linux 6.16 nftables find a device by its name at any time: `ip link set vif5.0 name web` takes the interface's
//! chain away. A [`Follower`] listens to what the kernel tells of links, switches such an interface off, lets our tables
//! name it as it is called now, and switches it on again. For the milliseconds between the new name and that there are only
//! the programs at the interface's clsact qdisc, where the kernel has those; `vifname=` has no such moment.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{Error, Options, Session};
use crate::link::{Link, Mode, Renamed, Renames};
use crate::step::Step;

/// A thread that lets filters follow renamed interfaces, until this is dropped.
#[derive(Debug)]
pub struct Follower {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Follows the interfaces that come from now on in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no socket, or there can be no thread.
    pub fn start(options: Options) -> io::Result<Self> {
        let renames = Renames::watch()?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = std::thread::Builder::new().name("rename-watch".to_owned());
        let thread = thread.spawn(move || watch(&options, renames, stopped.as_fd()))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // The counter of an eventfd takes far more than one.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed, and there is nothing to clean up after it.
            let _ = thread.join();
        }
    }
}

fn watch(options: &Options, mut renames: Renames, stop: BorrowedFd<'_>) {
    loop {
        let mut fds = [PollFd::new(&renames, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "names of links are no longer watched");
                return;
            }
        }
        for renamed in renames.read() {
            let Renamed { from, to, .. } = &renamed;
            match follow(options, &renamed) {
                Ok(0) => {}
                Ok(tables) => tracing::warn!(from, to, tables, "an interface was renamed: its filter follows"),
                Err(error) => {
                    tracing::error!(from, to, %error, "an interface was renamed and has no filter: it stays switched off");
                }
            }
        }
    }
}

/// Returns how many tables know the new name now.
fn follow(options: &Options, renamed: &Renamed) -> Result<usize, Error> {
    if !super::session::is_named_in_tables(&options.run, &renamed.from)? {
        return Ok(0);
    }
    // At once, and not only when no other program is at work.
    let mut link = Link::open().map_err(|error| Error::Read(Box::new(error.into())))?;
    let mut switch = |up| {
        let step = Step::SetUp { link: renamed.to.clone(), up };
        // It may have gone meanwhile, or have its next name.
        link.take(&step, Mode::Undo).map_err(|error| Error::Read(Box::new(error.into())))
    };
    if renamed.up {
        switch(false)?;
    }
    let tables = Session::open(options.clone())?.rename_in_tables(&renamed.from, &renamed.to)?;
    if renamed.up {
        switch(true)?;
    }
    Ok(tables)
}
