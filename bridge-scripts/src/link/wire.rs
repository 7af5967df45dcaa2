//! Netlink messages as bytes (netlink(7), rtnetlink(7)): building requests, taking replies apart.
//!
//! Attributes are handled one by one and not through typed messages: what a later kernel adds to a route or to a bridge
//! has to be put back as it was, without being understood.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLA_F_NESTED, NlasIterator};

/// Length of struct nlmsghdr.
const HEADER: usize = 16;

/// A request being built.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A request of this kind (RTM_*) with flags (NLM_F_*) and the fixed part that belongs to it.
    pub(super) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or(0);
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        let mut message = Self(bytes);
        message.pad();
        message
    }

    /// Appends an attribute.
    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
        self
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(super) fn u64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(super) fn u16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(super) fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.attr(kind, &[value])
    }

    pub(super) fn ip(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(value) => self.attr(kind, &value.octets()),
            IpAddr::V6(value) => self.attr(kind, &value.octets()),
        }
    }

    /// Appends an attribute that has attributes in it.
    pub(super) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.0.len();
        self.attr(kind | NLA_F_NESTED, &[]);
        inside(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Appends bytes that are no attribute, inside of one.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Where the next attribute will begin.
    pub(super) fn position(&self) -> usize {
        self.0.len()
    }

    /// Writes into what was appended before.
    pub(super) fn patch(&mut self, position: usize, bytes: &[u8]) {
        self.0[position..position + bytes.len()].copy_from_slice(bytes);
    }

    /// The finished request.
    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// struct ifinfomsg.
pub(super) fn link_header(family: u8, index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[0] = family;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&change.to_ne_bytes());
    fixed
}

/// struct ndmsg.
pub(super) fn neighbour_header(family: u8, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut fixed = [0; 12];
    fixed[0] = family;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&state.to_ne_bytes());
    fixed[10] = flags;
    fixed
}

/// One attribute of a reply. The kind keeps the flag of nested attributes, the value is without padding.
pub(super) type Attr<'a> = (u16, &'a [u8]);

/// The attributes in these bytes; what is cut off at the end is left out.
pub(super) fn attrs(bytes: &[u8]) -> impl Iterator<Item = Attr<'_>> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|attr| {
        let nested = if attr.nested_flag() { NLA_F_NESTED } else { 0 };
        (attr.kind() | nested, attr.value_of())
    })
}

/// An attribute's value, with the buffer's lifetime.
trait ValueOf<'a> {
    fn value_of(self) -> &'a [u8];
}

impl<'a> ValueOf<'a> for netlink_packet_core::NlaBuffer<&'a [u8]> {
    fn value_of(self) -> &'a [u8] {
        let length = usize::from(self.length());
        self.into_inner().get(4..length).unwrap_or(&[])
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

pub(super) fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn nested_attributes_come_back_as_they_went() {
        let mut message = Message::new(16, 0, &link_header(0, 7, 0, 0));
        message.text(3, "eth0").nest(18, |inside| {
            inside.text(1, "bridge").u8(5, 9);
        });
        let bytes = message.finish(1);
        assert_eq!(u32_at(&bytes, 0) as usize, bytes.len());
        let outer: Vec<Attr<'_>> = attrs(&bytes[32..]).collect();
        assert_eq!(outer[0], (3, &b"eth0\0"[..]));
        assert_eq!(outer[1].0, 18 | NLA_F_NESTED);
        let inner: Vec<Attr<'_>> = attrs(outer[1].1).collect();
        assert_eq!(inner, [(1, &b"bridge\0"[..]), (5, &[9][..])]);
    }

    #[test]
    fn attributes_that_are_cut_off_are_left_out() {
        assert_eq!(attrs(&[5, 0, 1, 0, 7, 0, 0, 0, 200, 0, 1, 0]).collect::<Vec<_>>(), [(1, &[7][..])]);
        assert_eq!(attrs(&[1, 0]).count(), 0);
        assert_eq!(ip(&[1, 2, 3]), None);
    }
}
