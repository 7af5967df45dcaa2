//! Links that somebody renames, as the kernel tells (RTNLGRP_LINK).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::wire::{attrs, text, u16_at, u32_at};

/// RTNLGRP_LINK of linux/rtnetlink.h.
const GROUP: u32 = 1;
const HEADER: usize = 16;
/// struct ifinfomsg.
const LINK_HEADER: usize = 16;
const IFLA_IFNAME: u16 = 3;

/// A link has another name now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renamed {
    /// The name it had.
    pub from: String,
    /// The name it has.
    pub to: String,
}

/// Watches the names of links that come after this was made.
#[derive(Debug)]
pub struct Renames {
    socket: Socket,
    names: HashMap<u32, String>,
}

impl Renames {
    /// Watches the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn watch() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, names: HashMap::new() })
    }

    /// Those that were told since the last time. Where more was told than there was room for, some are missing.
    pub fn read(&mut self) -> Vec<Renamed> {
        let mut renamed = Vec::new();
        let mut buffer = Vec::with_capacity(super::ROOM);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => renamed.extend(taken(&mut self.names, &buffer)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    tracing::warn!("so many links changed that one may have been renamed unseen");
                }
                Err(_) => return renamed,
            }
        }
    }
}

impl AsFd for Renames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a datagram tells, noted in `names`.
fn taken(names: &mut HashMap<u32, String>, mut bytes: &[u8]) -> Vec<Renamed> {
    let mut renamed = Vec::new();
    while let Some(message) = bytes.get(..u32_at(bytes, 0) as usize).filter(|message| message.len() >= HEADER) {
        let (kind, body) = (u16_at(message, 4), &message[HEADER..]);
        bytes = bytes.get(message.len().next_multiple_of(4)..).unwrap_or_default();
        // A bridge tells of its ports in the same words, with another family.
        if body.len() < LINK_HEADER || body[0] != 0 {
            continue;
        }
        let index = u32_at(body, 4);
        if kind == libc::RTM_DELLINK {
            names.remove(&index);
        }
        let name = attrs(&body[LINK_HEADER..]).find(|(kind, _)| *kind == IFLA_IFNAME).map(|(_, value)| text(value));
        let (libc::RTM_NEWLINK, Some(to)) = (kind, name) else { continue };
        if let Some(from) = names.insert(index, to.clone()).filter(|from| *from != to) {
            renamed.push(Renamed { from, to });
        }
    }
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::wire::Message;

    fn told(kind: u16, family: u8, index: u32, name: &str) -> Vec<u8> {
        let mut fixed = [0; LINK_HEADER];
        fixed[0] = family;
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut message = Message::new(kind, 0, &fixed);
        message.text(IFLA_IFNAME, name);
        message.finish(7)
    }

    #[test]
    fn names_are_followed() {
        let mut names = HashMap::new();
        let new = libc::RTM_NEWLINK;
        let all = [
            told(new, 0, 5, "vif1.0"),
            told(new, 0, 5, "vif1.0"),
            told(new, 7, 5, "port"),
            told(new, 0, 6, "other"),
            told(new, 0, 5, "web"),
        ]
        .concat();
        let renamed = |from: &str, to: &str| Renamed { from: from.into(), to: to.into() };
        assert_eq!(taken(&mut names, &all), [renamed("vif1.0", "web")]);
        assert_eq!(taken(&mut names, &told(new, 0, 5, "shop")), [renamed("web", "shop")]);
        // The number is another link's now.
        let again = [told(libc::RTM_DELLINK, 0, 5, "shop"), told(new, 0, 5, "vif2.0")].concat();
        assert_eq!(taken(&mut names, &again), []);
        assert_eq!(taken(&mut names, &all[..40]), []);
    }
}
