//! Frames by hand.

use std::net::{Ipv4Addr, Ipv6Addr};

pub(crate) type Mac = [u8; 6];

pub(crate) const EVERYBODY: Mac = [0xff; 6];

pub(crate) fn ether(to: Mac, from: Mac, kind: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), body].concat()
}

/// Puts tags behind the addresses: EtherType and control of each, the outermost first.
pub(crate) fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let tags: Vec<u8> = tags.iter().flat_map(|(kind, tag)| [kind.to_be_bytes(), tag.to_be_bytes()].concat()).collect();
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// 802.3: a length in the EtherType's place.
pub(crate) fn llc(to: Mac, from: Mac, body: &[u8]) -> Vec<u8> {
    ether(to, from, u16::try_from(body.len()).unwrap(), body)
}

#[derive(Clone, Copy)]
pub(crate) struct Arp {
    pub(crate) form: (u16, u16, u8, u8),
    pub(crate) operation: u16,
    pub(crate) sender: (Mac, Ipv4Addr),
    pub(crate) target: (Mac, Ipv4Addr),
}

impl Arp {
    pub(crate) fn new(operation: u16, sender: (Mac, Ipv4Addr), target: Ipv4Addr) -> Self {
        Self { form: (1, 0x0800, 6, 4), operation, sender, target: ([0; 6], target) }
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        let (hardware, protocol, hlen, plen) = self.form;
        [
            &hardware.to_be_bytes()[..],
            &protocol.to_be_bytes(),
            &[hlen, plen],
            &self.operation.to_be_bytes(),
            &self.sender.0,
            &self.sender.1.octets(),
            &self.target.0,
            &self.target.1.octets(),
        ]
        .concat()
    }
}

/// RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

pub(crate) fn ip4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, body: &[u8]) -> Vec<u8> {
    ip4_with(from, to, protocol, fragment, &[], body)
}

pub(crate) fn ip4_with(
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    fragment: u16,
    options: &[u8],
    body: &[u8],
) -> Vec<u8> {
    let words = u8::try_from(5 + options.len() / 4).unwrap();
    let length = u16::try_from(20 + options.len() + body.len()).unwrap();
    let mut packet = vec![0x40 | words, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    let checksum = sum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&checksum);
    packet.extend(body);
    packet
}

/// Without a checksum, which IPv4 allows.
pub(crate) fn udp(from: u16, to: u16, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + body.len()).unwrap();
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &length.to_be_bytes(), &[0, 0], body].concat()
}

pub(crate) fn tcp(from: u16, to: u16, body: &[u8]) -> Vec<u8> {
    let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0];
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &rest, body].concat()
}

/// ICMP of either version, or IGMP: type, code, checksum, the rest. Only ICMP of version 4 gets its checksum.
pub(crate) fn icmp(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0], body].concat();
    let checksum = sum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&checksum);
    message
}

pub(crate) fn ip6(from: Ipv6Addr, to: Ipv6Addr, next: u8, hops: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    [&[0x60, 0, 0, 0][..], &length, &[next, hops], &from.octets(), &to.octets(), body].concat()
}

/// An Ethernet address as an option of neighbour discovery: 1 the source's, 2 the target's.
pub(crate) fn option(kind: u8, mac: Mac) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

/// A neighbour solicitation (135) or advertisement (136).
pub(crate) fn neighbour(kind: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    icmp(kind, &[&[0; 4][..], &target.octets(), options].concat())
}

/// A header of eight bytes that says what comes next: hop-by-hop, destination options, routing.
pub(crate) fn extension(next: u8, rest: [u8; 6], body: &[u8]) -> Vec<u8> {
    [&[next, 0][..], &rest, body].concat()
}

/// IPv6's fragment header: the offset counts bytes, a multiple of eight.
pub(crate) fn fragment(next: u8, offset: u16, more: bool, body: &[u8]) -> Vec<u8> {
    let place = (offset | u16::from(more)).to_be_bytes();
    [&[next, 0, place[0], place[1], 0, 0, 0, 7][..], body].concat()
}
