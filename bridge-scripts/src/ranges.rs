//! Networks as ranges of addresses, in order and apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The ranges of networks of one kind (IPv4 or IPv6), each network with the length of its prefix in bits; both ends of a
/// range are included. Networks of the other kind are left out; those that overlap or touch become one range.
pub(crate) fn of(v4: bool, networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Vec<(IpAddr, IpAddr)> {
    let bits = if v4 { 32 } else { 128 };
    let mut ranges: Vec<(u128, u128)> = networks
        .into_iter()
        .filter(|(address, _)| address.is_ipv4() == v4)
        .map(|(address, prefix)| {
            let host = u128::MAX >> (128 - u32::from(bits)) >> u32::from(prefix).min(127);
            // A shift by all 128 bits does not exist; a whole IPv6 address leaves no host part.
            let host = if prefix >= bits { 0 } else { host };
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
    merged.into_iter().map(|(first, last)| (address(v4, first), address(v4, last))).collect()
}

/// An address as a number, the first byte being the highest.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address of a number.
pub(crate) fn address(v4: bool, number: u128) -> IpAddr {
    if v4 {
        // All numbers of this kind come from 32 bits.
        #[allow(clippy::cast_possible_truncation, reason = "came from 32 bits")]
        return Ipv4Addr::from_bits(number as u32).into();
    }
    Ipv6Addr::from_bits(number).into()
}

/// A network's address, without host bits.
pub(crate) fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let mask = |bits: u8| if prefix == 0 { 0 } else { u128::MAX << (u32::from(bits).saturating_sub(prefix.into())) };
    match address {
        #[allow(clippy::cast_possible_truncation, reason = "the lower 32 bits are the mask")]
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & mask(32) as u32).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & mask(128)).into(),
    }
}

/// The bytes of an address.
pub(crate) fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_become_ranges() {
        let networks = |v4, list: &[(&str, u8)]| {
            let networks = list.iter().map(|(text, prefix)| (text.parse().unwrap(), *prefix));
            of(v4, networks).iter().map(|(first, last)| format!("{first}-{last}")).collect::<Vec<_>>().join(" ")
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
            assert_eq!(networks(true, list), expected, "{list:?}");
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
            assert_eq!(networks(false, list), expected, "{list:?}");
        }
    }
}
