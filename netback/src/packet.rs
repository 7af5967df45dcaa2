//! What the headers of a frame say: Ethernet with VLAN tags, IPv4, IPv6 with its chain of extensions, TCP and UDP.
//!
//! Pure functions over a private copy of a frame's first bytes. Every length comes from a guest or from the wire, so
//! every offset is compared with the bytes that are there (XSA-423, XSA-432), and every loop has a bound.

use crate::hash::{Addresses, Flow};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET: usize = 14;
/// As many of a frame's first bytes as [`parse`] ever needs: Ethernet with two tags, IPv4 or IPv6 with the longest chain
/// of extensions that is followed, TCP with all options.
pub const HEADERS_MAX: usize = ETHERNET + 2 * 4 + EXTENSIONS_MAX + 60;
/// Bytes of IPv6's header and extensions that are followed (Linux' MAX_IPV6_HDR_LEN).
const EXTENSIONS_MAX: usize = 256;
/// Tags that are looked through: one of the provider's, one of the customer's.
const TAGS_MAX: usize = 2;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// Why a frame's headers cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends before its headers do.
    #[error("the frame ends inside its headers")]
    Truncated,
    /// It is neither IPv4 nor IPv6.
    #[error("neither IPv4 nor IPv6")]
    NotIp,
    /// A version, header length or chain of extensions that cannot be.
    #[error("a bad IP header")]
    BadHeader,
    /// A fragment: its transport header stands elsewhere, or its checksum covers more than this frame.
    #[error("a fragment of an IP packet")]
    Fragment,
    /// It carries neither TCP nor UDP.
    #[error("neither TCP nor UDP")]
    NotTcpOrUdp,
}

/// The network layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The transport layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where a TCP or UDP frame's headers are, in bytes from the frame's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    /// The network layer.
    pub network: Network,
    /// The transport layer.
    pub transport: Transport,
    /// Whether VLAN tags come before the network layer.
    pub tagged: bool,
    /// Where the network header starts.
    pub network_at: usize,
    /// Where the transport header starts.
    pub transport_at: usize,
}

impl Layers {
    /// Where the checksum is, from the transport header's start.
    pub fn checksum_offset(&self) -> usize {
        match self.transport {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }

    /// Where the headers end: all of what has to be in one piece.
    ///
    /// # Errors
    /// When the frame ends first, or TCP's own length cannot be.
    pub fn headers_len(&self, frame: &[u8]) -> Result<usize, Malformed> {
        let len = match self.transport {
            Transport::Udp => 8,
            Transport::Tcp => match usize::from(byte(frame, self.transport_at + 12)? >> 4) * 4 {
                len @ 20.. => len,
                _ => return Err(Malformed::BadHeader),
            },
        };
        let end = self.transport_at + len;
        if end <= frame.len() { Ok(end) } else { Err(Malformed::Truncated) }
    }

    /// The sum over the pseudo header: what stands in the checksum's place while the rest has not been added.
    /// `frame` holds the network header; `len` is the whole frame's length in bytes.
    pub fn pseudo_sum(&self, frame: &[u8], len: usize) -> u16 {
        let addresses = match self.network {
            Network::V4 => self.network_at + 12..self.network_at + 20,
            Network::V6 => self.network_at + 8..self.network_at + 40,
        };
        let protocol = match self.transport {
            Transport::Tcp => PROTOCOL_TCP,
            Transport::Udp => PROTOCOL_UDP,
        };
        let mut sum = Sum::default();
        sum.add(&frame[addresses]);
        sum.add_number(u32::from(protocol));
        // Less than 2^17: a frame is read from 16 bits of length, or from a tap.
        sum.add_number((len - self.transport_at) as u32);
        sum.folded()
    }
}

fn byte(frame: &[u8], at: usize) -> Result<u8, Malformed> {
    frame.get(at).copied().ok_or(Malformed::Truncated)
}

fn word(frame: &[u8], at: usize) -> Result<u16, Malformed> {
    match frame.get(at..at + 2) {
        Some(bytes) => Ok(u16::from_be_bytes([bytes[0], bytes[1]])),
        None => Err(Malformed::Truncated),
    }
}

/// The type of what a frame carries, and where that begins; tags are skipped.
fn ethertype(frame: &[u8]) -> Result<(u16, usize), Malformed> {
    let mut at = ETHERNET;
    for _ in 0..=TAGS_MAX {
        match word(frame, at - 2)? {
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => at += 4,
            kind => return Ok((kind, at)),
        }
    }
    Err(Malformed::NotIp)
}

/// Finds the transport header of a TCP or UDP frame. `frame` is its beginning: all of it, or at least
/// [`HEADERS_MAX`] bytes.
///
/// # Errors
/// When there is none, or not all of it.
pub fn parse(frame: &[u8]) -> Result<Layers, Malformed> {
    let (kind, network_at) = ethertype(frame)?;
    let tagged = network_at > ETHERNET;
    let (network, protocol, transport_at) = match kind {
        ETHERTYPE_IPV4 => {
            let (protocol, at) = ipv4(frame, network_at)?;
            (Network::V4, protocol, at)
        }
        ETHERTYPE_IPV6 => {
            let (protocol, at) = ipv6(frame, network_at)?;
            (Network::V6, protocol, at)
        }
        _ => return Err(Malformed::NotIp),
    };
    let transport = match protocol {
        PROTOCOL_TCP => Transport::Tcp,
        PROTOCOL_UDP => Transport::Udp,
        _ => return Err(Malformed::NotTcpOrUdp),
    };
    let layers = Layers { network, transport, tagged, network_at, transport_at };
    // All of a UDP header, and of TCP's what does not vary.
    let least = match transport {
        Transport::Tcp => 20,
        Transport::Udp => 8,
    };
    if transport_at + least > frame.len() {
        return Err(Malformed::Truncated);
    }
    Ok(layers)
}

/// What of a frame is hashed, if it is IP: the addresses, and the ports of TCP that is no fragment.
pub fn flow(frame: &[u8]) -> Option<Flow> {
    let (kind, at) = ethertype(frame).ok()?;
    let tcp_ports = match parse(frame) {
        Ok(Layers { transport: Transport::Tcp, transport_at, .. }) => {
            Some((word(frame, transport_at).ok()?, word(frame, transport_at + 2).ok()?))
        }
        _ => None,
    };
    let addresses = match kind {
        ETHERTYPE_IPV4 => {
            let address = |at: usize| frame.get(at..at + 4)?.try_into().ok().map(|bytes: [u8; 4]| bytes.into());
            Addresses::V4 { source: address(at + 12)?, destination: address(at + 16)? }
        }
        ETHERTYPE_IPV6 => {
            let address = |at: usize| frame.get(at..at + 16)?.try_into().ok().map(|bytes: [u8; 16]| bytes.into());
            Addresses::V6 { source: address(at + 8)?, destination: address(at + 24)? }
        }
        _ => return None,
    };
    Some(Flow { addresses, tcp_ports })
}

fn ipv4(frame: &[u8], at: usize) -> Result<(u8, usize), Malformed> {
    let first = byte(frame, at)?;
    let len = usize::from(first & 15) * 4;
    if first >> 4 != 4 || len < 20 {
        return Err(Malformed::BadHeader);
    }
    if at + len > frame.len() {
        return Err(Malformed::Truncated);
    }
    // "More fragments", or an offset.
    if word(frame, at + 6)? & 0x3fff != 0 {
        return Err(Malformed::Fragment);
    }
    Ok((byte(frame, at + 9)?, at + len))
}

fn ipv6(frame: &[u8], at: usize) -> Result<(u8, usize), Malformed> {
    if byte(frame, at)? >> 4 != 6 {
        return Err(Malformed::BadHeader);
    }
    let mut next = byte(frame, at + 6)?;
    let mut here = at + 40;
    loop {
        let len = match next {
            // Hop-by-hop, routing, destination options.
            0 | 43 | 60 => (usize::from(byte(frame, here + 1)?) + 1) * 8,
            // Authentication counts in words of four bytes.
            51 => (usize::from(byte(frame, here + 1)?) + 2) * 4,
            44 => {
                if word(frame, here + 2)? & 0xfff9 != 0 {
                    return Err(Malformed::Fragment);
                }
                8
            }
            _ => return Ok((next, here)),
        };
        next = byte(frame, here)?;
        here += len;
        if here - at > EXTENSIONS_MAX {
            return Err(Malformed::BadHeader);
        }
    }
}

/// The Internet checksum (RFC 1071), added up piece by piece.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    sum: u64,
    /// The bytes so far were odd in number.
    odd: bool,
}

impl Sum {
    /// Adds bytes that follow those added before.
    pub fn add(&mut self, bytes: &[u8]) {
        let bytes = match (self.odd, bytes.split_first()) {
            (true, Some((&first, rest))) => {
                self.sum += u64::from(first);
                self.odd = false;
                rest
            }
            _ => bytes,
        };
        let (words, tail) = bytes.as_chunks::<4>();
        // Half a frame of 64 KiB is 2^14 words of less than 2^32: no overflow in sight.
        self.sum += words.iter().map(|&word| u64::from(u32::from_be_bytes(word))).sum::<u64>();
        let (halves, last) = tail.as_chunks::<2>();
        for &half in halves {
            self.sum += u64::from(u16::from_be_bytes(half));
        }
        if let &[last] = last {
            self.sum += u64::from(last) << 8;
            self.odd = true;
        }
    }

    /// Adds a number as if it stood there in network order.
    pub fn add_number(&mut self, number: u32) {
        self.sum += u64::from(number);
    }

    /// The sum in 16 bits, not inverted.
    pub fn folded(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum: the inverted sum.
    pub fn checksum(self) -> u16 {
        !self.folded()
    }
}

#[cfg(test)]
pub(crate) mod tests;
