//! Tables of nftables that somebody else has deleted come back.
//!
//! `nft flush ruleset`, the first line of Debian's /etc/nftables.conf, deletes every table of the machine, those of NAT and
//! of routed guests too, and `systemctl reload nftables` does that under running guests. A [`Guard`] listens to what the
//! kernel tells of changes (NFNLGRP_NFTABLES) and puts back what the run directory says should be there.
//!
//! Tables with an owner (NFT_TABLE_F_OWNER) are not flushed by others. They are no way: `nft -f` of a ruleset that was
//! saved while they were there fails as a whole, with the administrator's own rules.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::session::Restored;
use super::watcher::{Stop, Watcher};
use super::{Error, Options, Session};

/// NFNLGRP_NFTABLES of linux/netfilter/nfnetlink_compat.h.
const GROUP: u32 = 7;
/// How long to wait before the next try, when tables could not be put back: the first time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// A thread that keeps our tables in the kernel, until this is dropped.
#[derive(Debug)]
pub struct Guard {
    _watcher: Watcher,
}

impl Guard {
    /// Puts back what is missing now, and from now on what goes missing, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel does not tell of changes: it has no nf_tables, or CAP_NET_ADMIN is missing.
    pub fn start(options: Options) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { _watcher: Watcher::start("nft-guard", move |stop| keep(&options, &socket, stop))? })
    }
}

fn keep(options: &Options, socket: &Socket, stop: &Stop) {
    // All of them, at first: whatever happened while nobody listened.
    let mut missing = Some(Tables::All);
    let mut pause = PAUSE.0;
    loop {
        if let Some(tables) = missing.take() {
            match restore(options, &tables) {
                Ok(restored) => {
                    pause = PAUSE.0;
                    if !restored.is_empty() {
                        tracing::warn!(
                            tables = restored.join(", "),
                            "nftables of guests' interfaces were changed or deleted by somebody else (nft flush ruleset?): \
                             put back"
                        );
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "nftables of guests' interfaces cannot be put back");
                    missing = Some(tables);
                }
            }
        }
        let wait = missing.is_some().then_some(pause);
        if wait.is_some() {
            pause = (pause * 2).min(PAUSE.1);
        }
        if !stop.wait(socket.as_fd(), wait) {
            return;
        }
        missing = Tables::both(missing, read(socket));
    }
}

/// Which tables may have changed.
#[derive(Debug, PartialEq, Eq)]
enum Tables {
    All,
    Named(BTreeSet<String>),
}

impl Tables {
    fn both(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(Self::Named(mut names)), Some(Self::Named(more))) => {
                names.extend(more);
                Some(Self::Named(names))
            }
            (Some(_), Some(_)) => Some(Self::All),
            (one, other) => one.or(other),
        }
    }
}

/// What changed, by everything that has been told until now.
fn read(socket: &Socket) -> Option<Tables> {
    let mut names = BTreeSet::new();
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => names.extend(crate::nft::tables_told(&buffer).filter(|name| name.starts_with("xen-"))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // More was told than there was room for: ENOBUFS.
            Err(_) => return Some(Tables::All),
        }
    }
    (!names.is_empty()).then_some(Tables::Named(names))
}

fn restore(options: &Options, tables: &Tables) -> Result<Vec<String>, Error> {
    let mut session = Session::open(options.clone())?;
    let Restored { names, failed } = session.restore_tables(|name| match tables {
        Tables::All => true,
        Tables::Named(names) => names.contains(name),
    })?;
    match failed {
        None => Ok(names),
        Some(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_adds_up() {
        let named = |names: &[&str]| Some(Tables::Named(names.iter().map(|name| (*name).to_owned()).collect()));
        assert_eq!(Tables::both(None, None), None);
        assert_eq!(Tables::both(named(&["a"]), named(&["b"])), named(&["a", "b"]));
        assert_eq!(Tables::both(named(&["a"]), Some(Tables::All)), Some(Tables::All));
        assert_eq!(Tables::both(Some(Tables::All), None), Some(Tables::All));
    }
}
