//! What is kept about an interface follows it when somebody renames it.
//!
//! `ip link set vif5.0 name web` leaves the filter where it is, at the device; but the record of what it should be, and the
//! tables of routed guests, name the interface. A [`Follower`] listens to what the kernel tells of links, and lets both name
//! it as it is called now. Until then a routed guest's packets are dropped, as if they came by another device.

use std::io;
use std::os::fd::AsFd as _;

use super::watcher::{Stop, Watcher};
use super::{Error, Options, Session};
use crate::link::{Renamed, Renames};

/// A thread that follows renamed interfaces, until this is dropped.
#[derive(Debug)]
pub struct Follower {
    _watcher: Watcher,
}

impl Follower {
    /// Follows the interfaces that come from now on in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no socket, or there can be no thread.
    pub fn start(options: Options) -> io::Result<Self> {
        let renames = Renames::watch()?;
        Ok(Self { _watcher: Watcher::start("rename-watch", move |stop| watch(&options, renames, stop))? })
    }
}

fn watch(options: &Options, mut renames: Renames, stop: &Stop) {
    while stop.wait(renames.as_fd(), None) {
        for renamed in renames.read() {
            let Renamed { from, to } = &renamed;
            match follow(options, &renamed) {
                Ok(false) => {}
                Ok(true) => tracing::warn!(from, to, "an interface was renamed: what is kept about it follows"),
                Err(error) => {
                    tracing::error!(from, to, %error, "an interface was renamed, and what is kept about it does not follow");
                }
            }
        }
    }
}

/// Whether there was something to do.
fn follow(options: &Options, renamed: &Renamed) -> Result<bool, Error> {
    let Renamed { from, to } = renamed;
    let filtered = super::filter::kept(&options.run, from)?.is_some();
    if !filtered && !super::session::is_named_in_tables(&options.run, from)? {
        return Ok(false);
    }
    Session::open(options.clone())?.rename_kept(from, to)
}
