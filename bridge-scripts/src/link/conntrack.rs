//! Connections that the kernel tracks (linux/netfilter/nfnetlink_conntrack.h): forgetting those of an address.

use std::io::ErrorKind;
use std::net::IpAddr;

use netlink_packet_core::NLA_F_NESTED;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::wire::{Message, attrs, ip};
use super::{Error, Link};

/// NFNL_SUBSYS_CTNETLINK of linux/netfilter/nfnetlink.h, in a message's type.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
/// How many there are, of this network namespace.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Forgets the connections that begin or end at one of these networks, in either direction, and says how many those were.
/// One that is translated counts by its addresses on both sides.
///
/// # Errors
///
/// When the kernel has no ctnetlink, or refuses.
pub fn forget_connections(of: &[(IpAddr, u8)]) -> Result<usize, Error> {
    if of.is_empty() {
        return Ok(0);
    }
    // Where none are tracked, nothing is asked. The file is missing where nothing is tracked yet, and where the kernel cannot.
    match std::fs::read_to_string(COUNT) {
        Ok(count) if count.trim() == "0" => return Ok(0),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        _ => (),
    }
    let mut link = Link::open_to(NETLINK_NETFILTER)?;
    let mut found: Vec<Message> = Vec::new();
    // struct nfgenmsg: family, version, resource. All families at once: the kernel goes through its whole table.
    let request = || Message::new(GET, libc::NLM_F_DUMP, &[0; 4]);
    link.dump(request, |body| found.extend(deletion(body, of)))?;
    let mut forgotten = 0;
    for message in found {
        match link.change(message) {
            Ok(()) => forgotten += 1,
            // It ended by itself.
            Err(error) if error.errno() == Some(libc::ENOENT) => (),
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// The message that deletes a connection of the dump, if it is one of those.
fn deletion(body: &[u8], of: &[(IpAddr, u8)]) -> Option<Message> {
    let general = [*body.first()?, 0, 0, 0];
    let parts: Vec<(u16, &[u8])> = attrs(body.get(4..)?).map(|(kind, value)| (kind & !NLA_F_NESTED, value)).collect();
    let tuples = parts.iter().filter(|(kind, _)| [TUPLE_ORIGINAL, TUPLE_REPLY].contains(kind));
    let mut ends = tuples.flat_map(|(_, tuple)| ends(tuple));
    if !ends.any(|end| of.iter().any(|network| inside(end, *network))) {
        return None;
    }
    let mut message = Message::new(DELETE, libc::NLM_F_ACK, &general);
    for (kind, value) in parts {
        match kind {
            TUPLE_ORIGINAL => message.attr(kind | NLA_F_NESTED, value),
            // With its number, so that a new connection between the same ends stays.
            ID | ZONE => message.attr(kind, value),
            _ => continue,
        };
    }
    Some(message)
}

/// The two addresses of a tuple.
fn ends(tuple: &[u8]) -> Vec<IpAddr> {
    let of = attrs(tuple).find(|(kind, _)| kind & !NLA_F_NESTED == TUPLE_IP);
    of.map(|(_, addresses)| attrs(addresses).filter_map(|(_, value)| ip(value)).collect()).unwrap_or_default()
}

fn inside(address: IpAddr, (network, prefix): (IpAddr, u8)) -> bool {
    let (bits, differ) = match (address, network) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (32, u128::from(one.to_bits() ^ other.to_bits())),
        (IpAddr::V6(one), IpAddr::V6(other)) => (128, one.to_bits() ^ other.to_bits()),
        _ => return false,
    };
    differ.checked_shr(bits - u32::from(prefix)).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let inside =
            |address: &str, network: &str, prefix| inside(address.parse().unwrap(), (network.parse().unwrap(), prefix));
        assert!(inside("10.0.0.1", "10.0.0.1", 32) && !inside("10.0.0.1", "10.0.0.0", 32));
        assert!(inside("10.0.0.1", "10.0.0.0", 24) && inside("10.0.0.1", "0.0.0.0", 0));
        assert!(inside("fd00::1", "fd00::", 64) && inside("fd00::1", "::", 0) && !inside("fd00::1", "0.0.0.0", 0));
    }
}
