//! Frames that a guest must not send, and frames that it must be able to send.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::vif_common::cable::has;
use super::vif_common::frames::{
    Arp, EVERYBODY, Mac, ether, extension, fragment, icmp, ip4, ip4_with, ip6, llc, neighbour, option, tagged, tcp, udp,
};

pub(crate) const GUEST: Mac = [0x00, 0x16, 0x3e, 0, 0, 1];
pub(crate) const OTHER: Mac = [0x00, 0x16, 0x3e, 0, 0, 2];
pub(crate) const OUTSIDE: Mac = [0x00, 0x50, 0x56, 0, 0, 9];
pub(crate) const DOM0: Mac = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

/// The addresses of a scene.
#[derive(Clone, Copy)]
pub(crate) struct World {
    pub(crate) own: Ipv4Addr,
    pub(crate) own6: Ipv6Addr,
    pub(crate) own_link: Ipv6Addr,
    /// Another guest's.
    pub(crate) other: Ipv4Addr,
    pub(crate) other6: Ipv6Addr,
    pub(crate) gateway: Ipv4Addr,
    /// Where a frame for everything else is sent.
    pub(crate) next: Mac,
}

/// A frame, what it is, and whether it is recognised only where the guest's addresses are known.
pub(crate) struct Kind {
    pub(crate) name: String,
    pub(crate) by_address: bool,
    pub(crate) frame: Vec<u8>,
}

/// So that a frame is known where it arrives.
fn tag(number: usize) -> [u8; 8] {
    let [high, low] = u16::try_from(number).unwrap().to_be_bytes();
    [b'x', b'e', b'n', b's', b'p', b'f', high, low]
}

/// Whether this is the frame of that number. A tag behind a packet of IPv6 is cut off by bridges.
pub(crate) fn is(got: &[u8], frame: &[u8], number: usize) -> bool {
    let whole = &frame[..frame.len() - tag(number).len()];
    // A packet socket gives the VLAN tag beside the frame.
    has(got, &tag(number)) || got == whole || is_tagged(whole) && *got == [&whole[..12], &whole[16..]].concat()
}

fn is_tagged(frame: &[u8]) -> bool {
    matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8] | [0x91 | 0x92, 0])
}

/// The frame number `was` behind a priority tag, as number `number`.
fn with_priority(frame: &[u8], was: usize, number: usize, priority: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let at = frame.windows(8).position(|window| window == tag(was)).unwrap();
    frame[at..at + 8].copy_from_slice(&tag(number));
    tagged(&frame, &[(0x8100, priority << 13)])
}

pub(crate) fn six(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// What must not arrive.
pub(crate) fn forged(w: &World) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = Vec::new();
    let World { own, own6, own_link, other, other6, gateway, next } = *w;
    // A tag of its own in each, in the payload or behind it.
    let mut add = |name: &'static str, by_address: bool, make: &dyn Fn(&[u8]) -> Vec<u8>| {
        let tag = tag(kinds.len());
        let mut frame = make(&tag);
        if !has(&frame, &tag) {
            frame.extend(tag);
        }
        kinds.push(Kind { name: name.to_owned(), by_address, frame });
    };
    let far = Ipv4Addr::new(198, 51, 100, 7);
    let far6 = six("2001:db8:9::7");
    let all = six("ff02::1");
    let plain = |from: Mac, tag: &[u8]| ether(next, from, 0x0800, &ip4(own, far, 17, 0, &udp(1000, 2000, tag)));

    // Ethernet.
    add("another guest's Ethernet address", false, &|t| plain(OTHER, t));
    add("Ethernet source zero", false, &|t| plain([0; 6], t));
    add("Ethernet source broadcast", false, &|t| plain(EVERYBODY, t));
    add("Ethernet source multicast", false, &|t| plain([1, 0, 0x5e, 0, 0, 1], t));
    add("dom0's Ethernet address", false, &|t| plain(DOM0, t));
    add("the network's gateway's Ethernet address", false, &|t| plain(OUTSIDE, t));
    add("own address with one bit changed", false, &|t| plain([0x02, 0x16, 0x3e, 0, 0, 1], t));
    let bridges = |last| [0x01, 0x80, 0xc2, 0, 0, last];
    add("spanning tree", false, &|t| llc(bridges(0), GUEST, &[&[0x42, 0x42, 3, 0, 0, 0, 0][..], t].concat()));
    add("spanning tree of providers", false, &|t| {
        llc(bridges(8), GUEST, &[&[0x42, 0x42, 3, 0, 0, 2, 2][..], t].concat())
    });
    add("spanning tree to a station", false, &|t| llc(next, GUEST, &[&[0x42, 0x42, 3, 0, 0, 0, 0][..], t].concat()));
    add("pause", false, &|t| ether(bridges(1), GUEST, 0x8808, &[&[0, 1, 0xff, 0xff][..], t].concat()));
    add("pause to a station", false, &|t| ether(next, GUEST, 0x8808, &[&[0, 1, 0xff, 0xff][..], t].concat()));
    add("LACP", false, &|t| ether(bridges(2), GUEST, 0x8809, &[&[1, 1][..], t].concat()));
    add("802.1X", false, &|t| ether(bridges(3), GUEST, 0x888e, &[&[1, 1][..], t].concat()));
    add("802.1X to a station", false, &|t| ether(next, GUEST, 0x888e, &[&[1, 1][..], t].concat()));
    add("LLDP", false, &|t| ether(bridges(0x0e), GUEST, 0x88cc, t));
    add("LLDP to everybody", false, &|t| ether(EVERYBODY, GUEST, 0x88cc, t));
    add("MVRP", false, &|t| ether(bridges(0x21), GUEST, 0x88f5, t));
    add("MMRP", false, &|t| ether(bridges(0x20), GUEST, 0x88f6, t));
    add("MVRP to a station", false, &|t| ether(next, GUEST, 0x88f5, t));
    add("PPPoE discovery", false, &|t| ether(EVERYBODY, GUEST, 0x8863, &[&[0x11, 9, 0, 0, 0, 0][..], t].concat()));
    add("PPPoE session", false, &|t| ether(next, GUEST, 0x8864, &[&[0x11, 0, 0, 1, 0, 0, 0, 0x21][..], t].concat()));
    let snap = |to, kind: [u8; 2], t: &[u8]| llc(to, GUEST, &[&[0xaa, 0xaa, 3, 0, 0, 0x0c][..], &kind, t].concat());
    add("CDP", false, &|t| snap([1, 0, 0x0c, 0xcc, 0xcc, 0xcc], [0x20, 0], t));
    add("PVST", false, &|t| snap([1, 0, 0x0c, 0xcc, 0xcc, 0xcd], [1, 0x0b], t));
    add("IPv4 in SNAP", false, &|t| {
        let packet = ip4(other, far, 17, 0, &udp(1, 2, t));
        llc(next, GUEST, &[&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &packet].concat())
    });
    add("802.3 with raw IPX", false, &|t| llc(EVERYBODY, GUEST, &[&[0xff, 0xff][..], t].concat()));
    let kinds_of: [(&'static str, u16); 11] = [
        ("MACsec", 0x88e5),
        ("MPLS", 0x8847),
        ("MPLS multicast", 0x8848),
        ("frames in frames", 0x6558),
        ("provider backbone", 0x88e7),
        ("CFM", 0x8902),
        ("loop test", 0x9000),
        ("FCoE", 0x8906),
        ("FCoE initialisation", 0x8914),
        ("TRILL", 0x22f3),
        ("1905.1", 0x893a),
    ];
    for (name, kind) in kinds_of {
        add(name, false, &|t| ether(next, GUEST, kind, t));
    }
    for (name, kind) in [("an experimental protocol", 0x88b5), ("RARP", 0x8035), ("IPX", 0x8137), ("AoE", 0x88a2)] {
        add(name, true, &|t| ether(EVERYBODY, GUEST, kind, t));
    }

    // VLANs.
    add("a tag", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 5)]));
    add("a priority tag before another's address", true, &|t| {
        tagged(&ether(next, GUEST, 0x0800, &ip4(other, far, 17, 0, &udp(1, 2, t))), &[(0x8100, 0)])
    });
    add("VLAN 4095", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 4095)]));
    add("a tag in a tag", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 1), (0x8100, 5)]));
    add("a priority tag in a priority tag", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 0xe000), (0x8100, 0)]));
    add("a priority tag around 802.1ad", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 0), (0x88a8, 0)]));
    add("a priority tag around the tag of old", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 0), (0x9100, 5)]));
    add("802.1ad around a priority tag", false, &|t| tagged(&plain(GUEST, t), &[(0x88a8, 0), (0x8100, 0)]));
    add("a priority tag and nothing in it", false, &|t| {
        tagged(&ether(next, GUEST, 0x8100, t), &[(0x8100, 0xe000)])[..18].to_vec()
    });
    add("a priority tag around a tag", false, &|t| tagged(&plain(GUEST, t), &[(0x8100, 0), (0x8100, 5)]));
    add("802.1ad", false, &|t| tagged(&plain(GUEST, t), &[(0x88a8, 5)]));
    add("802.1ad around a tag", false, &|t| tagged(&plain(GUEST, t), &[(0x88a8, 5), (0x8100, 6)]));
    add("802.1ad priority around IPv4", false, &|t| tagged(&plain(GUEST, t), &[(0x88a8, 0)]));
    add("the tag of old, 9100", false, &|t| tagged(&plain(GUEST, t), &[(0x9100, 5)]));
    add("the tag of old, 9200", false, &|t| tagged(&plain(GUEST, t), &[(0x9200, 5)]));
    let question = Arp::new(1, (GUEST, own), gateway);
    add("ARP with a tag", false, &|_| tagged(&ether(EVERYBODY, GUEST, 0x0806, &question.bytes()), &[(0x8100, 7)]));

    // ARP.
    let mut arp = |name, by_address, arp: Arp| {
        add(name, by_address, &|_| ether(EVERYBODY, GUEST, 0x0806, &arp.bytes()));
    };
    arp("ARP: answers for another guest", true, Arp::new(2, (GUEST, other), far));
    arp("ARP: asks as the gateway", true, Arp::new(1, (GUEST, gateway), other));
    arp("ARP: announces the gateway's address", true, Arp::new(1, (GUEST, gateway), gateway));
    arp("ARP: another's Ethernet address", false, Arp::new(2, (OTHER, own), far));
    arp("ARP: both are another's", false, Arp::new(2, (OTHER, other), far));
    arp("ARP: probes another's address", true, Arp::new(1, (GUEST, Ipv4Addr::UNSPECIFIED), other));
    arp("ARP: answers from nobody", false, Arp::new(2, (GUEST, Ipv4Addr::UNSPECIFIED), own));
    arp("ARP: from loopback", false, Arp::new(1, (GUEST, Ipv4Addr::LOCALHOST), far));
    arp("ARP: from a group", false, Arp::new(1, (GUEST, Ipv4Addr::new(224, 0, 0, 1)), far));
    arp("ARP: from everybody", false, Arp::new(1, (GUEST, Ipv4Addr::BROADCAST), far));
    for (name, form) in [
        ("ARP: another kind of hardware", (6, 0x0800, 6, 4)),
        ("ARP: another protocol", (1, 0x86dd, 6, 4)),
        ("ARP: longer hardware addresses", (1, 0x0800, 8, 4)),
        ("ARP: longer protocol addresses", (1, 0x0800, 6, 16)),
    ] {
        arp(name, false, Arp { form, ..question });
    }
    for (name, operation) in [("ARP: operation 0", 0), ("ARP: reverse", 3), ("ARP: inverse", 8)] {
        arp(name, false, Arp { operation, ..question });
    }
    add("ARP: cut short", false, &|t| ether(EVERYBODY, GUEST, 0x0806, &[&question.bytes()[..8], t].concat()));

    // IPv4.
    let mut v4 = |name, by_address, packet: &dyn Fn(&[u8]) -> Vec<u8>| {
        add(name, by_address, &|t| ether(next, GUEST, 0x0800, &packet(t)));
    };
    let from = |source: Ipv4Addr| move |t: &[u8]| ip4(source, far, 17, 0, &udp(1000, 2000, t));
    v4("IPv4: another guest's address", true, &from(other));
    v4("IPv4: the gateway's address", true, &from(gateway));
    v4("IPv4: any other address", true, &from(Ipv4Addr::new(8, 8, 8, 8)));
    v4("IPv4: from nobody", false, &from(Ipv4Addr::UNSPECIFIED));
    v4("IPv4: from loopback", false, &from(Ipv4Addr::LOCALHOST));
    v4("IPv4: from a group", false, &from(Ipv4Addr::new(224, 0, 0, 5)));
    v4("IPv4: from everybody", false, &from(Ipv4Addr::BROADCAST));
    v4("IPv4: from the class without a use", false, &from(Ipv4Addr::new(240, 0, 0, 1)));
    v4("IPv4: TCP as another guest", true, &|t| ip4(other, far, 6, 0, &tcp(1, 2, t)));
    v4("IPv4: ICMP as another guest", true, &|t| ip4(other, far, 1, 0, &icmp(8, t)));
    v4("IPv4: version 6 inside", false, &|t| {
        let mut packet = ip4(own, far, 17, 0, &udp(1, 2, t));
        packet[0] = 0x65;
        packet
    });
    v4("IPv4: header too short", false, &|t| {
        let mut packet = ip4(own, far, 17, 0, &udp(1, 2, t));
        packet[0] = 0x43;
        packet
    });
    v4("IPv4: cut short", false, &|t| [&ip4(own, far, 17, 0, &[])[..10], t].concat()[..10].to_vec());
    let dhcp = |from: u16, to: u16, t: &[u8]| udp(from, to, &[&[2, 1, 6, 0][..], t, &[0; 240]].concat());
    v4("DHCP offer", false, &|t| ip4(own, Ipv4Addr::BROADCAST, 17, 0, &dhcp(67, 68, t)));
    v4("DHCP offer from another port", false, &|t| ip4(own, Ipv4Addr::BROADCAST, 17, 0, &dhcp(53, 68, t)));
    v4("DHCP from server to relay", false, &|t| ip4(own, far, 17, 0, &dhcp(67, 67, t)));
    v4("DHCP offer as the gateway", false, &|t| ip4(gateway, Ipv4Addr::BROADCAST, 17, 0, &dhcp(67, 68, t)));
    v4("DHCP offer in a first fragment", false, &|t| ip4(own, far, 17, 0x2000, &dhcp(67, 68, t)[..32]));
    v4("DHCP offer behind IP options", false, &|t| ip4_with(own, far, 17, 0, &[1; 8], &dhcp(67, 68, t)));
    v4("DHCP offer that claims to be longer", false, &|t| {
        let mut packet = ip4(own, far, 17, 0, &dhcp(67, 68, t));
        packet[2..4].copy_from_slice(&1400u16.to_be_bytes());
        packet
    });
    v4("DHCP question to one station", false, &|t| ip4(Ipv4Addr::UNSPECIFIED, far, 17, 0, &dhcp(68, 67, t)));
    v4("DHCP question in fragments", false, &|t| {
        ip4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, 0x2000, &dhcp(68, 67, t)[..64])
    });
    v4("from nobody, not DHCP", false, &|t| ip4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, 0, &udp(68, 53, t)));
    v4("a fragment inside the header", false, &|t| ip4(own, far, 6, 1, &[t, &[0; 8]].concat()));
    v4("a later fragment as another guest", true, &|t| ip4(other, far, 17, 4, &[t, &[0; 8]].concat()));
    v4("UDP's ports cut off", false, &|_| ip4(own, far, 17, 0x2000, &[0, 67]));
    v4("ICMP redirect", false, &|t| ip4(own, far, 1, 0, &icmp(5, &[&gateway.octets()[..], t].concat())));
    v4("ICMP router advertisement", false, &|t| ip4(own, far, 1, 0, &icmp(9, t)));
    v4("IGMP query", false, &|t| ip4(own, Ipv4Addr::new(224, 0, 0, 1), 2, 0, &icmp(0x11, &[&[0; 4][..], t].concat())));
    add("IPv4 as IPv6", false, &|t| {
        ether(next, GUEST, 0x86dd, &ip4(own, far, 17, 0, &udp(1, 2, &[t, &[0; 40]].concat())))
    });

    // IPv6.
    let mut v6 = |name, by_address, packet: &dyn Fn(&[u8]) -> Vec<u8>| {
        add(name, by_address, &|t| ether([0x33, 0x33, 0, 0, 0, 1], GUEST, 0x86dd, &packet(t)));
    };
    let router = |_: &[u8]| icmp(134, &[64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    let pad = [1, 4, 0, 0, 0, 0];
    v6("router advertisement", false, &|t| ip6(own_link, all, 58, 255, &router(t)));
    v6("router advertisement as a global address", false, &|t| ip6(own6, all, 58, 255, &router(t)));
    v6("router advertisement as the gateway", false, &|t| {
        ip6(six("fe80::fcff:ffff:feff:ffff"), all, 58, 255, &router(t))
    });
    for (name, kind) in [
        ("router advertisement behind hop-by-hop", 0),
        ("router advertisement behind destination options", 60),
        ("router advertisement behind routing", 43),
        ("router advertisement behind mobility", 135),
        ("router advertisement behind HIP", 139),
    ] {
        v6(name, false, &move |t| ip6(own_link, all, kind, 255, &extension(58, pad, &router(t))));
    }
    v6("router advertisement behind AH", false, &|t| {
        ip6(own_link, all, 51, 255, &[&[58, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1][..], &router(t)].concat())
    });
    v6("router advertisement with router alert", false, &|t| {
        ip6(own_link, all, 0, 1, &extension(58, [5, 2, 0, 0, 1, 0], &router(t)))
    });
    v6("router advertisement in a fragment", false, &|t| {
        ip6(own_link, all, 44, 255, &fragment(58, 0, true, &router(t)))
    });
    v6("router advertisement in a whole fragment", false, &|t| {
        ip6(own_link, all, 44, 255, &fragment(58, 0, false, &router(t)))
    });
    v6("router advertisement behind options in a fragment", false, &|t| {
        ip6(own_link, all, 44, 255, &fragment(60, 0, true, &extension(58, pad, &router(t))))
    });
    v6("a fragment in a fragment", false, &|t| {
        ip6(own_link, all, 44, 255, &fragment(44, 0, false, &fragment(58, 0, false, &router(t))))
    });
    v6("redirect", false, &|t| ip6(own_link, all, 58, 255, &icmp(137, &[&[0; 36][..], t].concat())));
    v6("router renumbering", false, &|t| ip6(own_link, all, 58, 255, &icmp(138, &[&[0; 12][..], t].concat())));
    v6("MLD query", false, &|t| {
        ip6(own_link, all, 0, 1, &extension(58, [5, 2, 0, 0, 1, 0], &icmp(130, &[&[0; 20][..], t].concat())))
    });
    v6("MLD report without router alert", false, &|t| ip6(own_link, six("ff02::16"), 58, 1, &icmp(143, t)));
    v6("MLD report with another option", false, &|t| {
        ip6(own_link, six("ff02::16"), 0, 1, &extension(58, [0xc2, 4, 0, 1, 0, 0], &icmp(143, t)))
    });
    v6("advertises another guest's address", true, &|_| {
        ip6(own_link, all, 58, 255, &neighbour(136, other6, &option(2, GUEST)))
    });
    v6("advertises another's Ethernet address", false, &|_| {
        ip6(own_link, all, 58, 255, &neighbour(136, own6, &option(2, OTHER)))
    });
    v6("advertises with two options", false, &|_| {
        ip6(own_link, all, 58, 255, &neighbour(136, own6, &[option(2, GUEST), option(2, OTHER)].concat()))
    });
    v6("advertises from nobody", false, &|_| {
        ip6(Ipv6Addr::UNSPECIFIED, all, 58, 255, &neighbour(136, own6, &option(2, GUEST)))
    });
    v6("advertises in a fragment", false, &|_| {
        ip6(own_link, all, 44, 255, &fragment(58, 0, false, &neighbour(136, other6, &option(2, GUEST))))
    });
    v6("advertises from far away", false, &|_| ip6(own_link, all, 58, 64, &neighbour(136, own6, &option(2, GUEST))));
    v6("solicits with another's Ethernet address", false, &|_| {
        ip6(own_link, all, 58, 255, &neighbour(135, far6, &option(1, OTHER)))
    });
    v6("solicits with two options", false, &|_| {
        ip6(own_link, all, 58, 255, &neighbour(135, far6, &[option(1, GUEST), option(1, OTHER)].concat()))
    });
    v6("solicits routers with another's Ethernet address", false, &|_| {
        ip6(own_link, six("ff02::2"), 58, 255, &icmp(133, &[&[0; 4][..], &option(1, OTHER)].concat()))
    });
    let solicited = |target: Ipv6Addr| {
        let [.., a, b, c] = target.octets();
        Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
    };
    v6("looks whether another's address is free", true, &|_| {
        ip6(Ipv6Addr::UNSPECIFIED, solicited(other6), 58, 255, &neighbour(135, other6, &[]))
    });
    v6("UDP from nobody", false, &|t| ip6(Ipv6Addr::UNSPECIFIED, all, 17, 64, &udp(1, 2, t)));
    let from6 = |source: Ipv6Addr| move |t: &[u8]| ip6(source, far6, 17, 64, &udp(1000, 2000, t));
    v6("IPv6: another guest's address", true, &from6(other6));
    v6("IPv6: any other address", true, &from6(six("2001:db8:5::5")));
    v6("IPv6: another link-local address", true, &from6(six("fe80::5")));
    v6("IPv6: from a group", false, &from6(six("ff02::5")));
    v6("IPv6: from loopback", false, &from6(Ipv6Addr::LOCALHOST));
    v6("IPv6: from IPv4 in disguise", false, &from6(six("::ffff:10.0.0.12")));
    v6("DHCPv6 answer", false, &|t| ip6(own_link, all, 17, 64, &udp(547, 546, t)));
    v6("DHCPv6 answer from another port", false, &|t| ip6(own_link, all, 17, 64, &udp(53, 546, t)));
    v6("DHCPv6 between servers and relays", false, &|t| ip6(own_link, all, 17, 64, &udp(547, 547, t)));
    v6("DHCPv6 answer in a fragment", false, &|t| {
        ip6(own_link, all, 44, 64, &fragment(17, 0, true, &udp(547, 546, t)))
    });
    v6("DHCPv6 answer behind options", false, &|t| ip6(own_link, all, 60, 64, &extension(17, pad, &udp(547, 546, t))));
    v6("a second fragment inside the header", false, &|t| ip6(own6, far6, 44, 64, &fragment(6, 8, false, t)));
    v6("a later fragment as another guest", true, &|t| ip6(other6, far6, 44, 64, &fragment(17, 64, false, t)));
    v6("no next header", false, &|t| ip6(own6, far6, 59, 64, t));
    v6("IPv6: version 4 inside", false, &|t| {
        let mut packet = ip6(own6, far6, 17, 64, &udp(1, 2, t));
        packet[0] = 0x40;
        packet
    });
    v6("IPv6: cut short", false, &|_| ip6(own6, far6, 17, 64, &[])[..20].to_vec());
    // What is forged without a tag is forged behind a priority tag.
    for was in 0..kinds.len() {
        let Kind { name, by_address, frame } = &kinds[was];
        if !is_tagged(frame) {
            let frame = with_priority(frame, was, kinds.len(), 5);
            kinds.push(Kind { name: format!("{name}, with a priority tag"), by_address: *by_address, frame });
        }
    }
    kinds
}

/// What must arrive, and the tag in it.
pub(crate) fn legal(w: &World) -> Vec<(String, Vec<u8>)> {
    let mut list: Vec<(String, Vec<u8>)> = Vec::new();
    let World { own, own6, own_link, gateway, next, .. } = *w;
    let mut add = |name: &'static str, make: &dyn Fn(&[u8]) -> Vec<u8>| {
        let tag = tag(1000 + list.len());
        let mut frame = make(&tag);
        if !has(&frame, &tag) {
            frame.extend(tag);
        }
        list.push((name.to_owned(), frame));
    };
    let far = Ipv4Addr::new(198, 51, 100, 7);
    let far6 = six("2001:db8:9::7");
    let nobody = Ipv4Addr::UNSPECIFIED;
    for (name, arp) in [
        ("ARP question", Arp::new(1, (GUEST, own), gateway)),
        ("ARP answer", Arp::new(2, (GUEST, own), gateway)),
        ("ARP announcement", Arp::new(1, (GUEST, own), own)),
        ("ARP probe", Arp::new(1, (GUEST, nobody), own)),
    ] {
        add(name, &|_| ether(EVERYBODY, GUEST, 0x0806, &arp.bytes()));
    }
    let mut v4 =
        |name, to: Mac, packet: &dyn Fn(&[u8]) -> Vec<u8>| add(name, &|t| ether(to, GUEST, 0x0800, &packet(t)));
    v4("DHCP discover", EVERYBODY, &|t| {
        ip4(nobody, Ipv4Addr::BROADCAST, 17, 0, &udp(68, 67, &[t, &[0; 240]].concat()))
    });
    v4("DHCP renewal", next, &|t| ip4(own, far, 17, 0, &udp(68, 67, t)));
    v4("UDP", next, &|t| ip4(own, far, 17, 0x4000, &udp(1000, 53, t)));
    v4("TCP", next, &|t| ip4(own, far, 6, 0x4000, &tcp(1000, 80, t)));
    v4("ping", next, &|t| ip4(own, far, 1, 0, &icmp(8, t)));
    v4("a first fragment", next, &|t| ip4(own, far, 17, 0x2000, &udp(1000, 2000, &[t, &[0; 56]].concat())));
    v4("a later fragment", next, &|t| ip4(own, far, 17, 9, &[t, &[0; 24]].concat()));
    v4("GRE", next, &|t| ip4(own, far, 47, 0, t));
    v4("broadcast", EVERYBODY, &|t| ip4(own, Ipv4Addr::BROADCAST, 17, 0, &udp(1000, 2000, t)));
    let group = |last| [0x01, 0x00, 0x5e, 0, 0, last];
    v4("mDNS", group(251), &|t| ip4(own, Ipv4Addr::new(224, 0, 0, 251), 17, 0, &udp(5353, 5353, t)));
    v4("IGMP report", group(22), &|t| {
        ip4_with(own, Ipv4Addr::new(224, 0, 0, 22), 2, 0, &[0x94, 4, 0, 0], &icmp(0x22, &[&[0; 4][..], t].concat()))
    });
    let mut v6 =
        |name, to: Mac, packet: &dyn Fn(&[u8]) -> Vec<u8>| add(name, &|t| ether(to, GUEST, 0x86dd, &packet(t)));
    let all = [0x33, 0x33, 0, 0, 0, 1];
    let free = Ipv6Addr::UNSPECIFIED;
    let [.., a, b, c] = own6.octets();
    let solicited = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    let report = |t: &[u8]| extension(58, [5, 2, 0, 0, 1, 0], &icmp(143, &[&[0; 4][..], t].concat()));
    v6("UDP over IPv6", next, &|t| ip6(own6, far6, 17, 64, &udp(1000, 53, t)));
    v6("TCP over IPv6", next, &|t| ip6(own6, far6, 6, 64, &tcp(1000, 80, t)));
    v6("link-local UDP", next, &|t| ip6(own_link, six("fe80::9"), 17, 64, &udp(1000, 2000, t)));
    v6("ping over IPv6", next, &|t| ip6(own6, far6, 58, 64, &icmp(128, &[&[0; 4][..], t].concat())));
    v6("packet too big", next, &|t| ip6(own6, far6, 58, 64, &icmp(2, &[&[0; 4][..], t].concat())));
    v6("looks whether its address is free", all, &|_| ip6(free, solicited, 58, 255, &neighbour(135, own6, &[])));
    v6("looks with a nonce", all, &|_| {
        ip6(free, solicited, 58, 255, &neighbour(135, own6, &[14, 1, 1, 2, 3, 4, 5, 6]))
    });
    v6("solicits a neighbour", all, &|_| ip6(own6, solicited, 58, 255, &neighbour(135, far6, &option(1, GUEST))));
    v6("solicits without an option", next, &|_| ip6(own_link, far6, 58, 255, &neighbour(135, far6, &[])));
    v6("advertises its address", all, &|_| {
        ip6(own6, six("ff02::1"), 58, 255, &neighbour(136, own6, &option(2, GUEST)))
    });
    v6("advertises without an option", next, &|_| ip6(own_link, far6, 58, 255, &neighbour(136, own_link, &[])));
    v6("solicits routers", all, &|_| {
        ip6(own_link, six("ff02::2"), 58, 255, &icmp(133, &[&[0; 4][..], &option(1, GUEST)].concat()))
    });
    v6("solicits routers without an address", all, &|_| ip6(free, six("ff02::2"), 58, 255, &icmp(133, &[0; 4])));
    v6("MLD report", all, &|t| ip6(own_link, six("ff02::16"), 0, 1, &report(t)));
    v6("MLD report without an address", all, &|t| ip6(free, six("ff02::16"), 0, 1, &report(t)));
    v6("MLD report of version 1", all, &|t| {
        ip6(own_link, six("ff05::7"), 0, 1, &extension(58, [1, 0, 5, 2, 0, 0], &icmp(131, &[&[0; 20][..], t].concat())))
    });
    v6("DHCPv6 question", all, &|t| ip6(own_link, six("ff02::1:2"), 17, 1, &udp(546, 547, t)));
    v6("a first fragment of UDP", next, &|t| ip6(own6, far6, 44, 64, &fragment(17, 0, true, &udp(1, 2, t))));
    v6("a later fragment of UDP", next, &|t| ip6(own6, far6, 44, 64, &fragment(17, 1280, false, t)));
    v6("a large ping", next, &|t| {
        ip6(own6, far6, 44, 64, &fragment(58, 0, true, &icmp(128, &[&[0; 4][..], t].concat())))
    });
    v6("a later fragment of TCP", next, &|t| ip6(own6, far6, 44, 64, &fragment(6, 64, false, t)));
    v6("multicast", all, &|t| ip6(own6, six("ff0e::5"), 17, 9, &udp(1, 2, t)));
    // From a port without VLANs, a tag without a VLAN's number is none. All eight priorities.
    for was in 0..list.len() {
        let (name, frame) = &list[was];
        let frame = with_priority(frame, 1000 + was, 1000 + list.len(), (was % 8) as u16);
        list.push((format!("{name}, with a priority tag"), frame));
    }
    list
}
