//! Fields of packets: where they are, what must hold for them to be there, and what nft calls them.

use serde::{Deserialize, Serialize};

/// Something a rule can look at. The names are nft's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "each is nft's own word, given in `name`")]
pub enum Field {
    Iifname,
    Oifname,
    /// The Ethernet type, behind a VLAN tag if there is one.
    Protocol,
    /// The transport protocol; behind IPv6's extension headers. Known only if the IP header is sound.
    L4proto,
    Nfproto,
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
    IpLength,
    IpFragOff,
    IpProtocol,
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
    TcpSport,
    TcpDport,
    UdpSport,
    UdpDport,
    /// Bytes by their place: how many bits, after so many bits from the beginning of a header.
    Raw(Base, u16, u16),
}

/// The beginning of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// Ethernet.
    Link,
    /// ARP, IPv4, IPv6.
    Network,
    /// TCP, UDP, ICMP.
    Transport,
}

impl Base {
    /// enum nft_payload_bases of linux/netfilter/nf_tables.h.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Link => 0,
            Self::Network => 1,
            Self::Transport => 2,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Link => "ll",
            Self::Network => "nh",
            Self::Transport => "th",
        }
    }
}

/// What a packet must be for a field to be in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    /// A device of Ethernet's kind: always so where our rules are.
    Vlan,
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
    /// enum nft_meta_keys, and how many bytes the kernel gives.
    Meta(u32, u16),
    /// From this beginning so many bits on, so many bits long.
    Payload(Base, u16, u16),
}

/// How values of a field are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Number,
    Hex,
    Mac,
    Ipv4,
    Ipv6,
    Name,
}

pub(super) struct Layout {
    pub(super) name: &'static str,
    pub(super) place: Place,
    pub(super) needs: Needs,
    pub(super) style: Style,
}

/// enum nft_meta_keys.
const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

impl Field {
    pub(super) fn layout(self) -> Layout {
        use Base::{Link, Network, Transport};
        use Needs::{Arp, Ip, Ip6, Nothing, Vlan};
        use Style::{Hex, Ipv4, Ipv6, Mac, Name, Number};

        let meta = |name, key, bytes, style| (name, Place::Meta(key, bytes), Nothing, style);
        let at = |name, base, offset, bits, needs, style| (name, Place::Payload(base, offset, bits), needs, style);
        let (name, place, needs, style) = match self {
            Self::Iifname => meta("iifname", META_IIFNAME, 16, Name),
            Self::Oifname => meta("oifname", META_OIFNAME, 16, Name),
            Self::Protocol => meta("meta protocol", META_PROTOCOL, 2, Hex),
            Self::L4proto => meta("meta l4proto", META_L4PROTO, 1, Number),
            Self::Nfproto => meta("meta nfproto", META_NFPROTO, 1, Number),
            Self::EtherDaddr => at("ether daddr", Link, 0, 48, Nothing, Mac),
            Self::EtherSaddr => at("ether saddr", Link, 48, 48, Nothing, Mac),
            Self::EtherType => at("ether type", Link, 96, 16, Nothing, Hex),
            Self::VlanId => at("vlan id", Link, 116, 12, Vlan, Number),
            Self::ArpHtype => at("arp htype", Network, 0, 16, Arp, Number),
            Self::ArpPtype => at("arp ptype", Network, 16, 16, Arp, Hex),
            Self::ArpHlen => at("arp hlen", Network, 32, 8, Arp, Number),
            Self::ArpPlen => at("arp plen", Network, 40, 8, Arp, Number),
            Self::ArpOperation => at("arp operation", Network, 48, 16, Arp, Number),
            Self::ArpSaddrEther => at("arp saddr ether", Network, 64, 48, Arp, Mac),
            Self::ArpSaddrIp => at("arp saddr ip", Network, 112, 32, Arp, Ipv4),
            Self::ArpDaddrIp => at("arp daddr ip", Network, 192, 32, Arp, Ipv4),
            Self::IpVersion => at("ip version", Network, 0, 4, Ip, Number),
            Self::IpLength => at("ip length", Network, 16, 16, Ip, Number),
            Self::IpFragOff => at("ip frag-off", Network, 48, 16, Ip, Hex),
            Self::IpProtocol => at("ip protocol", Network, 72, 8, Ip, Number),
            Self::IpSaddr => at("ip saddr", Network, 96, 32, Ip, Ipv4),
            Self::IpDaddr => at("ip daddr", Network, 128, 32, Ip, Ipv4),
            Self::Ip6Version => at("ip6 version", Network, 0, 4, Ip6, Number),
            Self::Ip6Length => at("ip6 length", Network, 32, 16, Ip6, Number),
            Self::Ip6Nexthdr => at("ip6 nexthdr", Network, 48, 8, Ip6, Number),
            Self::Ip6Hoplimit => at("ip6 hoplimit", Network, 56, 8, Ip6, Number),
            Self::Ip6Saddr => at("ip6 saddr", Network, 64, 128, Ip6, Ipv6),
            Self::Ip6Daddr => at("ip6 daddr", Network, 192, 128, Ip6, Ipv6),
            Self::IcmpType => at("icmp type", Transport, 0, 8, Needs::IpTransport(1), Number),
            Self::IgmpType => at("igmp type", Transport, 0, 8, Needs::IpTransport(2), Hex),
            Self::Icmpv6Type => at("icmpv6 type", Transport, 0, 8, Needs::Ip6Transport(58), Number),
            Self::Icmpv6Code => at("icmpv6 code", Transport, 8, 8, Needs::Ip6Transport(58), Number),
            Self::TcpSport => at("tcp sport", Transport, 0, 16, Needs::Transport(6), Number),
            Self::TcpDport => at("tcp dport", Transport, 16, 16, Needs::Transport(6), Number),
            Self::UdpSport => at("udp sport", Transport, 0, 16, Needs::Transport(17), Number),
            Self::UdpDport => at("udp dport", Transport, 16, 16, Needs::Transport(17), Number),
            Self::Raw(base, offset, bits) => at("", base, offset, bits, Nothing, Hex),
        };
        Layout { name, place, needs, style }
    }

    /// Bits in the field.
    pub(super) fn bits(self) -> u16 {
        match self.layout().place {
            Place::Meta(_, bytes) => bytes * 8,
            Place::Payload(_, _, bits) => bits,
        }
    }
}
