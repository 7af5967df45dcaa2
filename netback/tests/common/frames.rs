//! Frames made by hand.

/// The hostile guest's address, and everybody else's.
pub const GUEST_MAC: [u8; 6] = [0x00, 0x16, 0x3e, 0x5f, 0x77, 0xfd];
/// Somebody on the network.
pub const PEER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's.
pub const UDP: u8 = 17;

/// Bytes that are easily told apart.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8).wrapping_add(seed)).collect()
}

/// Ethernet around anything.
pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// A frame of `len` bytes of a protocol that nobody looks into (IEEE's experimental one).
pub fn plain(len: usize, seed: u8) -> Vec<u8> {
    ethernet(PEER_MAC, GUEST_MAC, 0x88b5, &pattern(len - 14, seed))
}

/// RFC 1071, the slow way.
pub fn sum(pieces: &[&[u8]]) -> u16 {
    let bytes = pieces.concat();
    let mut sum: u64 =
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IPv4 header without options and what follows.
pub fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    ipv4_with(&[], protocol, payload)
}

/// The same with options, a multiple of four bytes.
pub fn ipv4_with(options: &[u8], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let ihl = 5 + options.len() / 4;
    let len = (4 * ihl + payload.len()) as u16;
    let mut header = vec![0x40 | ihl as u8, 0];
    header.extend(len.to_be_bytes());
    header.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    header.extend(options);
    let checksum = !sum(&[&header]);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&header[..], payload].concat()
}

/// Addresses of [`ipv6`].
pub const V6: [[u8; 16]; 2] =
    [[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]];

/// An IPv6 header and what follows.
pub fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend((payload.len() as u16).to_be_bytes());
    header.extend([next, 64]);
    header.extend(V6[0]);
    header.extend(V6[1]);
    [&header[..], payload].concat()
}

/// The pseudo header's sum of [`ipv4`]'s addresses.
pub fn pseudo4(protocol: u8, len: usize) -> u16 {
    sum(&[&[10, 0, 0, 2, 10, 0, 0, 1], &[0, protocol], &(len as u16).to_be_bytes()])
}

/// The pseudo header's sum of [`ipv6`]'s addresses.
pub fn pseudo6(protocol: u8, len: usize) -> u16 {
    sum(&[&V6[0], &V6[1], &(len as u32).to_be_bytes(), &[0, 0, 0, protocol]])
}

/// A TCP header of 20 bytes with `checksum` and what follows.
pub fn tcp(checksum: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff];
    header.extend(checksum.to_be_bytes());
    header.extend([0, 0]);
    [&header[..], payload].concat()
}

/// A UDP header with `checksum` and what follows.
pub fn udp(checksum: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x12, 0x34, 0, 53];
    header.extend(((8 + payload.len()) as u16).to_be_bytes());
    header.extend(checksum.to_be_bytes());
    [&header[..], payload].concat()
}

/// TCP over IPv4 over Ethernet, with a checksum of which only the pseudo header is summed.
pub fn tcp4(payload: usize) -> Vec<u8> {
    let segment = tcp(pseudo4(TCP, 20 + payload), &pattern(payload, 4));
    ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4(TCP, &segment))
}

/// TCP over IPv6 over Ethernet, in the same way.
pub fn tcp6(payload: usize) -> Vec<u8> {
    let segment = tcp(pseudo6(TCP, 20 + payload), &pattern(payload, 6));
    ethernet(PEER_MAC, GUEST_MAC, 0x86dd, &ipv6(TCP, &segment))
}

/// UDP over IPv4 over Ethernet, in the same way.
pub fn udp4(payload: usize) -> Vec<u8> {
    let datagram = udp(pseudo4(UDP, 8 + payload), &pattern(payload, 5));
    ethernet(PEER_MAC, GUEST_MAC, 0x0800, &ipv4(UDP, &datagram))
}
