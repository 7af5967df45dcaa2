//! Filters that somebody changes, as the kernel tells (RTNLGRP_TC).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::filter::{CLSACT, EGRESS};
use super::wire::{u16_at, u32_at};

/// RTNLGRP_TC of linux/rtnetlink.h.
const GROUP: u32 = 4;
const HEADER: usize = 16;
/// struct tcmsg.
const TC_HEADER: usize = 20;

/// Links at whose ingress something may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Touched {
    /// Any of them.
    All,
    /// Those with these indices.
    Links(BTreeSet<u32>),
}

/// Watches what is done at the ingress of links.
#[derive(Debug)]
pub(crate) struct FiltersTold {
    socket: Socket,
}

impl FiltersTold {
    /// Watches the calling thread's network namespace.
    pub(crate) fn watch() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// What was told since the last time.
    pub(crate) fn read(&self) -> Touched {
        let mut links = BTreeSet::new();
        let mut buffer = Vec::with_capacity(super::ROOM);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => links.extend(touched(&buffer)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Touched::Links(links),
                // More was told than there was room for: ENOBUFS.
                Err(_) => return Touched::All,
            }
        }
    }
}

impl AsFd for FiltersTold {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The links whose ingress a datagram tells of: of a clsact or ingress qdisc, of a classifier or a chain of them.
fn touched(mut bytes: &[u8]) -> BTreeSet<u32> {
    /// RTM_NEWCHAIN and RTM_DELCHAIN of linux/rtnetlink.h.
    const CHAINS: [u16; 2] = [100, 101];
    let mut links = BTreeSet::new();
    while let Some(message) = bytes.get(..u32_at(bytes, 0) as usize).filter(|message| message.len() >= HEADER) {
        let (kind, body) = (u16_at(message, 4), &message[HEADER..]);
        bytes = bytes.get(message.len().next_multiple_of(4)..).unwrap_or_default();
        if body.len() < TC_HEADER {
            continue;
        }
        let parent = u32_at(body, 12);
        let concerns = match kind {
            libc::RTM_NEWQDISC | libc::RTM_DELQDISC => parent == CLSACT,
            libc::RTM_NEWTFILTER | libc::RTM_DELTFILTER => parent != EGRESS,
            _ => CHAINS.contains(&kind),
        };
        if concerns {
            links.insert(u32_at(body, 4));
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::wire::Message;

    #[test]
    fn what_concerns_the_ingress_is_told() {
        let told = |kind: u16, index: u32, parent: u32| {
            let mut fixed = [0; TC_HEADER];
            fixed[4..8].copy_from_slice(&index.to_ne_bytes());
            fixed[12..16].copy_from_slice(&parent.to_ne_bytes());
            Message::new(kind, 0, &fixed).finish(7)
        };
        let all = [
            told(libc::RTM_DELQDISC, 1, CLSACT),
            told(libc::RTM_NEWQDISC, 2, u32::MAX),
            told(libc::RTM_DELTFILTER, 3, 0xffff_fff2),
            told(libc::RTM_NEWTFILTER, 4, EGRESS),
            told(libc::RTM_NEWTFILTER, 5, 0xffff_0000),
            told(libc::RTM_NEWLINK, 6, CLSACT),
            told(101, 7, 0xffff_fff2),
        ]
        .concat();
        assert_eq!(touched(&all), BTreeSet::from([1, 3, 5, 7]));
        assert_eq!(touched(&all[..20]), BTreeSet::new());
    }
}
