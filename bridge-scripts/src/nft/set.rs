//! Sets of addresses, which rules ask for by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Addresses that a rule can ask for by one name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Set {
    /// The name.
    pub name: String,
    /// What is in it.
    pub kind: SetKind,
    /// The ranges, both ends included.
    pub ranges: Vec<(IpAddr, IpAddr)>,
}

impl Set {
    /// A set of networks of one kind, each with the length of its prefix in bits. Those of the other kind are left
    /// out; those that overlap or touch become one range, because the kernel refuses overlaps.
    pub fn of(name: &str, kind: SetKind, networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        let mut ranges: Vec<(u128, u128)> = networks
            .into_iter()
            .filter(|(address, _)| address.is_ipv4() == (kind == SetKind::Ipv4))
            .map(|(address, prefix)| {
                let host = u128::MAX >> (128 - u32::from(kind.bits())) >> u32::from(prefix).min(127);
                // A shift by all 128 bits does not exist; a whole IPv6 address leaves no host part.
                let host = if prefix >= kind.bits() { 0 } else { host };
                let first = number(address) & !host;
                (first, first | host)
            })
            .collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        let address = |number: u128| kind.address(number);
        Self {
            name: name.to_owned(),
            kind,
            ranges: merged.into_iter().map(|(first, last)| (address(first), address(last))).collect(),
        }
    }
}

/// What a set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SetKind {
    /// IPv4 addresses.
    Ipv4,
    /// IPv6 addresses.
    Ipv6,
}

impl SetKind {
    /// Bits in one element.
    pub(super) fn bits(self) -> u8 {
        match self {
            Self::Ipv4 => 32,
            Self::Ipv6 => 128,
        }
    }

    pub(super) fn address(self, number: u128) -> IpAddr {
        match self {
            // All numbers of this kind come from 32 bits.
            #[allow(clippy::cast_possible_truncation, reason = "came from 32 bits")]
            Self::Ipv4 => Ipv4Addr::from_bits(number as u32).into(),
            Self::Ipv6 => Ipv6Addr::from_bits(number).into(),
        }
    }
}

/// An address as a number, the first byte being the highest.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_become_ranges() {
        let networks = |kind, list: &[(&str, u8)]| {
            let networks = list.iter().map(|(text, prefix)| (text.parse().unwrap(), *prefix));
            let set = Set::of("x", kind, networks);
            set.ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect::<Vec<_>>().join(" ")
        };
        let cases4: [(&[(&str, u8)], &str); 6] = [
            (&[("10.0.0.1", 32)], "10.0.0.1-10.0.0.1"),
            (&[("10.1.2.3", 8)], "10.0.0.0-10.255.255.255"),
            (&[("0.0.0.0", 0)], "0.0.0.0-255.255.255.255"),
            (&[("10.0.0.2", 32), ("10.0.0.1", 32), ("10.0.0.1", 32)], "10.0.0.1-10.0.0.2"),
            (&[("10.0.0.0", 24), ("10.0.0.7", 32), ("fe80::1", 64)], "10.0.0.0-10.0.0.255"),
            (&[("255.255.255.255", 32), ("10.0.0.1", 31)], "10.0.0.0-10.0.0.1 255.255.255.255-255.255.255.255"),
        ];
        for (list, expected) in cases4 {
            assert_eq!(networks(SetKind::Ipv4, list), expected, "{list:?}");
        }
        let cases6: [(&[(&str, u8)], &str); 4] = [
            (&[("2001:db8::5", 128)], "2001:db8::5-2001:db8::5"),
            (&[("2001:db8::5", 64)], "2001:db8::-2001:db8::ffff:ffff:ffff:ffff"),
            (&[("::", 0)], "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            (
                &[("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 128), ("10.0.0.1", 32)],
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ),
        ];
        for (list, expected) in cases6 {
            assert_eq!(networks(SetKind::Ipv6, list), expected, "{list:?}");
        }
    }
}
