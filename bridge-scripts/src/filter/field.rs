//! Fields of frames: where they are, and what must hold for them to be there.

use super::Value;
use crate::ranges::bytes_of;

/// Something a rule can look at. The names are nftables' (nft(8), "payload expressions").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is a field of its header by the name that the header's RFC has for it")]
pub enum Field {
    /// The Ethernet type, behind a VLAN tag if there is one.
    Protocol,
    /// The transport protocol. Known only if the IP header is sound.
    L4proto,
    EtherDaddr,
    EtherSaddr,
    /// The Ethernet type; the tag's, if there is one.
    EtherType,
    VlanId,
    ArpHtype,
    ArpPtype,
    ArpHlen,
    ArpPlen,
    ArpOperation,
    ArpSaddrEther,
    ArpSaddrIp,
    ArpDaddrIp,
    IpVersion,
    IpFragOff,
    IpSaddr,
    IpDaddr,
    Ip6Version,
    Ip6Length,
    Ip6Nexthdr,
    Ip6Hoplimit,
    Ip6Saddr,
    Ip6Daddr,
    IcmpType,
    IgmpType,
    Icmpv6Type,
    Icmpv6Code,
    UdpSport,
    UdpDport,
    /// Bytes by their place: how many bits, after so many bits from the beginning of a header.
    Raw(Base, u16, u16),
}

/// The beginning of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Ethernet.
    Link,
    /// ARP, IPv4, IPv6.
    Network,
    /// UDP, ICMP.
    Transport,
}

/// What a frame must be for a field to be in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Arp,
    Ip,
    Ip6,
    /// A transport protocol, whatever carries it.
    Transport(u8),
    /// A transport protocol of IPv4.
    IpTransport(u8),
    /// A transport protocol of IPv6.
    Ip6Transport(u8),
}

/// Where a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// What the kernel knows of the frame beside its bytes.
    Beside,
    /// From this beginning so many bits on, so many bits long.
    Payload(Base, u16, u16),
}

impl Field {
    pub(super) fn place(self) -> (Place, Needs) {
        use Base::{Link, Network, Transport};
        use Needs::{Arp, Ip, Ip6, Nothing};

        let at = |base, offset, bits, needs| (Place::Payload(base, offset, bits), needs);
        match self {
            Self::Protocol | Self::L4proto | Self::EtherType | Self::VlanId => (Place::Beside, Nothing),
            Self::EtherDaddr => at(Link, 0, 48, Nothing),
            Self::EtherSaddr => at(Link, 48, 48, Nothing),
            Self::ArpHtype => at(Network, 0, 16, Arp),
            Self::ArpPtype => at(Network, 16, 16, Arp),
            Self::ArpHlen => at(Network, 32, 8, Arp),
            Self::ArpPlen => at(Network, 40, 8, Arp),
            Self::ArpOperation => at(Network, 48, 16, Arp),
            Self::ArpSaddrEther => at(Network, 64, 48, Arp),
            Self::ArpSaddrIp => at(Network, 112, 32, Arp),
            Self::ArpDaddrIp => at(Network, 192, 32, Arp),
            Self::IpVersion => at(Network, 0, 4, Ip),
            Self::IpFragOff => at(Network, 48, 16, Ip),
            Self::IpSaddr => at(Network, 96, 32, Ip),
            Self::IpDaddr => at(Network, 128, 32, Ip),
            Self::Ip6Version => at(Network, 0, 4, Ip6),
            Self::Ip6Length => at(Network, 32, 16, Ip6),
            Self::Ip6Nexthdr => at(Network, 48, 8, Ip6),
            Self::Ip6Hoplimit => at(Network, 56, 8, Ip6),
            Self::Ip6Saddr => at(Network, 64, 128, Ip6),
            Self::Ip6Daddr => at(Network, 192, 128, Ip6),
            Self::IcmpType => at(Transport, 0, 8, Needs::IpTransport(1)),
            Self::IgmpType => at(Transport, 0, 8, Needs::IpTransport(2)),
            Self::Icmpv6Type => at(Transport, 0, 8, Needs::Ip6Transport(58)),
            Self::Icmpv6Code => at(Transport, 8, 8, Needs::Ip6Transport(58)),
            Self::UdpSport => at(Transport, 0, 16, Needs::Transport(17)),
            Self::UdpDport => at(Transport, 16, 16, Needs::Transport(17)),
            Self::Raw(base, offset, bits) => at(base, offset, bits, Nothing),
        }
    }

    /// The bytes around the field: the first, and how many; and how many bits of the last are not the field's.
    pub(super) fn span(self) -> (u16, u16, u16) {
        match self.place().0 {
            Place::Beside if self == Self::L4proto => (0, 1, 0),
            Place::Beside => (0, 2, 0),
            Place::Payload(_, offset, bits) => {
                let (first, end) = (offset / 8, (offset + bits).div_ceil(8));
                (first, end - first, end * 8 - offset - bits)
            }
        }
    }

    /// A value in the bytes around the field; none where it does not fit.
    pub(super) fn placed(self, value: &Value) -> Option<Vec<u8>> {
        let (_, bytes, shift) = self.span();
        let placed = match value {
            Value::Number(number) => {
                let number = (number << shift).to_be_bytes();
                number[number.len().checked_sub(bytes.into())?..].to_vec()
            }
            Value::Mac(mac) => mac.to_vec(),
            Value::Ip(address) => bytes_of(*address),
        };
        (placed.len() == usize::from(bytes)).then_some(placed)
    }

    /// The bits of a field that does not fill its bytes.
    pub(super) fn mask(self) -> Option<Vec<u8>> {
        match self.place().0 {
            Place::Payload(_, _, bits) if bits % 8 != 0 => {
                self.placed(&Value::Number(u64::MAX >> (64 - u32::from(bits))))
            }
            _ => None,
        }
    }
}
