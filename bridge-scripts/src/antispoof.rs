//! The filter in front of a guest's interface: what it may send.
//!
//! [`filter`] is a pure function from what is known of the interface to a [`Filter`], which becomes programs at the
//! interface's *ingress*, before the bridge and before dom0's own IP: nothing a guest sends gets around it, whatever
//! protocol it is. What no rule accepts is dropped, and every rule that accepts names what it accepts. A header that is cut
//! short cannot be compared, so that no rule accepts it.
//!
//! A guest may send from its own Ethernet address only, and there:
//!
//! * ARP about itself, IPv4 from its own addresses, DHCP's questions; no DHCP answers, no ICMP redirects, no IGMP
//!   queries;
//! * IPv6 from its own addresses and its link-local one, neighbour discovery about itself, MLD reports; no router
//!   advertisements, redirects, MLD queries or DHCPv6 answers, and no extension headers that they could hide behind. Of
//!   those only fragments are let through, whose first must show that it is none of this;
//! * VLAN tags only where `vlan=` gives them, one each; without a VLAN's number (priority tags, IEEE 802.1Q) they count as
//!   none, and everything here holds for what is behind them;
//! * never what switches and access points say to each other (spanning tree, LLDP, pause, 802.1X, PPPoE, ...), nor what
//!   carries whole frames inside.
//!
//! Where no addresses are known (no `ip=`) any unicast address will do as a source, and unknown protocols pass.
//!
//! What this costs honest guests: IPv6 link-local addresses that are not made from the Ethernet address (RFC 7217) must
//! be named in `ip=`; neighbour discovery with more than its one usual option (such as SEND's) is dropped; and so are
//! IPv6's options, routing headers and AH.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::filter::{Action, Base, Chain, Field, Filter, Limit, Match, Op, Rate, Rule, Section};
use crate::ranges;
use crate::state::Mac;

/// How much ARP a guest may send. A busy router asks for some tens a second.
pub const ARP_LIMIT: Limit = Limit { rate: 500, burst: 1000 };
/// The same for IPv6's neighbour discovery.
pub const ND_LIMIT: Limit = Limit { rate: 500, burst: 1000 };
/// The same for all frames to groups and to everybody. A multicast television channel is some 1000.
pub const GROUP_LIMIT: Limit = Limit { rate: 10_000, burst: 20_000 };

/// What an interface may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its addresses, or networks of them, with the lengths of their prefixes; empty if they are not known.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Addresses it must not use though they are in one of its networks: dom0's own end.
    pub except: Vec<IpAddr>,
    /// Its VLANs.
    pub vlans: Vlans,
}

impl Rules {
    /// Rules for an address and nothing else known.
    pub fn new(mac: Mac) -> Self {
        Self { mac, addresses: Vec::new(), except: Vec::new(), vlans: Vlans::default() }
    }
}

/// VLANs of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vlans {
    /// Whether it may send without a tag.
    pub untagged: bool,
    /// The tags it may send, first and last of each range.
    pub tagged: Vec<(u16, u16)>,
}

impl Default for Vlans {
    fn default() -> Self {
        Self { untagged: true, tagged: Vec::new() }
    }
}

/// The link-local address that IPv6 makes of an Ethernet address (RFC 4291, appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

const ARP: u64 = 0x0806;
const IP: u64 = 0x0800;
const IP6: u64 = 0x86dd;
const VLAN: u64 = 0x8100;
/// Other tags: 802.1ad, and what was used for it before.
const OTHER_TAGS: [u64; 4] = [0x88a8, 0x9100, 0x9200, 0x9300];
/// Protocols between switches, and those that carry frames or packets which are not looked into: stream reservation,
/// TRILL, transparent bridging, pause, LACP, MPLS, PPPoE, 802.1X, LLDP, MACsec, provider backbones, MVRP, MMRP, CFM, FCoE,
/// VN-Tag, 1905.1, loop tests.
const FOREIGN: [u64; 21] = [
    0x22ea, 0x22f3, 0x6558, 0x8808, 0x8809, 0x8847, 0x8848, 0x8863, 0x8864, 0x888e, 0x88cc, 0x88e5, 0x88e7, 0x88f5,
    0x88f6, 0x8902, 0x8906, 0x8914, 0x8926, 0x893a, 0x9000,
];

const UDP: u64 = 17;
const FRAGMENT: u64 = 44;
const ICMPV6: u64 = 58;
/// IPv6's headers after which others come (and none at all, 59), and those that rules of their own accept.
const NOT_PLAIN: [u64; 11] = [0, UDP, 43, FRAGMENT, 51, ICMPV6, 59, 60, 135, 139, 140];

/// The filter that lets an interface send what `rules` allow.
pub fn filter(rules: &Rules) -> Filter {
    let chain = |name: &'static str, rules: Vec<Rule>| Chain { name, rules };
    Filter {
        rates: rates(),
        chains: vec![
            chain("link", link(rules)),
            chain("station", station(rules)),
            chain("arp", arp(rules)),
            chain("ip4", ip4(rules)),
            chain("ip4_own", ip4_own()),
            chain("ip6", ip6(rules)),
            chain("ip6_nobody", ip6_nobody()),
            chain("ip6_own", ip6_own()),
            chain("icmp6", icmp6(rules)),
            chain("mld", mld()),
            chain("fragment", fragment()),
            chain("target", target(rules)),
        ],
        sections: SECTIONS.to_vec(),
    }
}

const SECTIONS: [Section; 5] = [
    Section { entry: "link", protocol: None, next: None, left: &["arp", "ip4", "ip6"] },
    Section { entry: "arp", protocol: Some(ARP), next: None, left: &[] },
    Section { entry: "ip4", protocol: Some(IP), next: None, left: &[] },
    Section { entry: "ip6", protocol: Some(IP6), next: None, left: &["icmp6"] },
    Section { entry: "icmp6", protocol: Some(IP6), next: Some(ICMPV6), left: &[] },
];

/// What may only come so often.
fn rates() -> Vec<Rate> {
    let group = Match::Masked(Field::Raw(Base::Link, 0, 8), 1, Op::Eq, 1);
    let discovery = vec![Match::is(Field::Ip6Nexthdr, ICMPV6), between(after(0, 8), 133, 136)];
    vec![
        Rate { protocol: None, matches: vec![group], limit: GROUP_LIMIT },
        Rate { protocol: Some(ARP), matches: Vec::new(), limit: ARP_LIMIT },
        Rate { protocol: Some(IP6), matches: discovery, limit: ND_LIMIT },
    ]
}

/// What may stand as a source of IPv4: what was named, or everything that names one station.
fn sources4(rules: &Rules) -> Vec<(IpAddr, IpAddr)> {
    if !rules.addresses.is_empty() {
        return ranges::of(true, rules.addresses.iter().copied());
    }
    let range = |first: [u8; 4], last: [u8; 4]| (IpAddr::from(first), IpAddr::from(last));
    vec![range([1, 0, 0, 0], [126, 255, 255, 255]), range([128, 0, 0, 0], [223, 255, 255, 255])]
}

/// The same for IPv6. Below 100:: are the unspecified address, loopback and IPv4's addresses in disguise.
fn sources6(rules: &Rules) -> Vec<(IpAddr, IpAddr)> {
    if !rules.addresses.is_empty() {
        let own = (link_local(rules.mac).into(), 128);
        return ranges::of(false, rules.addresses.iter().copied().chain([own]));
    }
    let first = Ipv6Addr::from_bits(1 << 120);
    let last = Ipv6Addr::from_bits(u128::MAX >> 8 | 0xfe << 120);
    vec![(first.into(), last.into())]
}

fn drop(matches: impl Into<Vec<Match>>, why: &'static str) -> Rule {
    Rule { matches: matches.into(), action: Action::Drop, why }
}

fn accept(matches: impl Into<Vec<Match>>) -> Rule {
    Rule { matches: matches.into(), action: Action::Accept, why: "" }
}

fn goto(matches: impl Into<Vec<Match>>, chain: &'static str) -> Rule {
    Rule { matches: matches.into(), action: Action::Goto(chain), why: "" }
}

fn between(field: Field, from: u64, to: u64) -> Match {
    Match::Range { field, not: false, from: from.into(), to: to.into() }
}

/// The packet is long enough to have the field.
fn is_there(field: Field) -> Match {
    Match::Is(field, Op::Ge, 0.into())
}

/// Addresses and tags.
fn link(rules: &Rules) -> Vec<Rule> {
    let groups = |first: [u8; 6], last: [u8; 6]| Match::Range {
        field: Field::EtherDaddr,
        not: false,
        from: first.into(),
        to: last.into(),
    };
    let mut list = vec![
        drop([Match::not(Field::EtherSaddr, rules.mac.0)], "not its Ethernet address"),
        drop(
            [groups([0x01, 0x80, 0xc2, 0, 0, 0], [0x01, 0x80, 0xc2, 0xff, 0xff, 0xff])],
            "for switches: spanning tree, LLDP, pause, LACP, MVRP",
        ),
        drop(
            [groups([0x01, 0x00, 0x0c, 0xcc, 0xcc, 0xcc], [0x01, 0x00, 0x0c, 0xcd, 0xcd, 0xcd])],
            "for switches: CDP, VTP, PVST",
        ),
    ];
    for &(first, last) in &rules.vlans.tagged {
        let tag = match first == last {
            true => Match::is(Field::VlanId, u64::from(first)),
            false => between(Field::VlanId, first.into(), last.into()),
        };
        list.push(goto([tag], "station"));
    }
    if rules.vlans.untagged {
        // A priority tag is in no VLAN.
        list.push(goto([Match::is(Field::VlanId, 0)], "station"));
    }
    // Here the tag is seen even though the kernel has taken it off already.
    list.push(drop([Match::is(Field::EtherType, VLAN)], "not its VLAN"));
    list.extend(OTHER_TAGS.map(|tag| drop([Match::is(Field::EtherType, tag)], "no tag of 802.1Q")));
    if rules.vlans.untagged {
        list.push(goto([Match::not(Field::EtherType, VLAN)], "station"));
    }
    list
}

/// Protocols, behind the tag that was allowed.
fn station(rules: &Rules) -> Vec<Rule> {
    let mut list: Vec<Rule> = [VLAN]
        .into_iter()
        .chain(OTHER_TAGS)
        .map(|tag| drop([Match::is(Field::Protocol, tag)], "a tag in a tag"))
        .collect();
    list.push(drop([Match::Is(Field::Protocol, Op::Lt, 0x600.into())], "802.3 with LLC or SNAP"));
    list.push(goto([Match::is(Field::Protocol, ARP)], "arp"));
    list.push(goto([Match::is(Field::Protocol, IP)], "ip4"));
    list.push(goto([Match::is(Field::Protocol, IP6)], "ip6"));
    if rules.addresses.is_empty() {
        list.extend(FOREIGN.map(|foreign| drop([Match::is(Field::Protocol, foreign)], "not for guests")));
        list.push(accept([Match::Is(Field::Protocol, Op::Ge, 0x600.into())]));
    }
    list
}

fn arp(rules: &Rules) -> Vec<Rule> {
    // RFC 826 for Ethernet and IPv4: the one form there is, as a question or an answer.
    let sound = |operation: Match| {
        vec![
            Match::is(Field::ArpHtype, 1),
            Match::is(Field::ArpPtype, IP),
            Match::is(Field::ArpHlen, 6),
            Match::is(Field::ArpPlen, 4),
            operation,
            Match::is(Field::ArpSaddrEther, rules.mac.0),
        ]
    };
    let mut list = Vec::new();
    for address in rules.except.iter().filter(|address| address.is_ipv4()) {
        list.push(drop([Match::is(Field::ArpSaddrIp, *address)], "the gateway's address"));
    }
    // Who may have an address may ask whether somebody has it (RFC 5227).
    let mut probe = sound(Match::is(Field::ArpOperation, 1));
    probe.push(Match::is(Field::ArpSaddrIp, Ipv4Addr::UNSPECIFIED));
    probe.push(Match::Within(Field::ArpDaddrIp, sources4(rules)));
    list.push(accept(probe));
    let mut own = sound(between(Field::ArpOperation, 1, 2));
    own.push(Match::Within(Field::ArpSaddrIp, sources4(rules)));
    own.push(Match::Is(Field::ArpDaddrIp, Op::Ge, Ipv4Addr::UNSPECIFIED.into()));
    list.push(accept(own));
    list
}

fn ip4(rules: &Rules) -> Vec<Rule> {
    let mut list = vec![
        // The second eight bytes of TCP's header would replace flags that were looked at (RFC 3128).
        drop([Match::Masked(Field::IpFragOff, 0x1fff, Op::Eq, 1)], "a fragment inside the header"),
        // DHCP, without an address yet.
        accept([
            Match::is(Field::IpVersion, 4),
            Match::is(Field::IpSaddr, Ipv4Addr::UNSPECIFIED),
            Match::is(Field::IpDaddr, Ipv4Addr::BROADCAST),
            Match::Masked(Field::IpFragOff, 0x3fff, Op::Eq, 0),
            Match::is(Field::UdpSport, 68),
            Match::is(Field::UdpDport, 67),
        ]),
    ];
    for address in rules.except.iter().filter(|address| address.is_ipv4()) {
        list.push(drop([Match::is(Field::IpSaddr, *address)], "the gateway's address"));
    }
    list.push(goto([Match::is(Field::IpVersion, 4), Match::Within(Field::IpSaddr, sources4(rules))], "ip4_own"));
    list
}

/// IPv4 from an address the guest may use.
fn ip4_own() -> Vec<Rule> {
    vec![
        // The transport header is in the first fragment, which is looked at like a whole packet.
        accept([Match::Masked(Field::IpFragOff, 0x1fff, Op::Ne, 0)]),
        drop([Match::is(Field::UdpSport, 67)], "DHCP answers"),
        drop([Match::is(Field::UdpDport, 68)], "DHCP answers"),
        accept([is_there(Field::UdpDport)]),
        drop([Match::is(Field::L4proto, UDP)], "UDP without ports"),
        accept([Match::not(Field::IcmpType, 5), Match::not(Field::IcmpType, 9)]),
        drop([Match::is(Field::L4proto, 1)], "ICMP redirects and router advertisements"),
        accept([Match::not(Field::IgmpType, 0x11)]),
        drop([Match::is(Field::L4proto, 2)], "IGMP queries"),
        // Known only where the header is sound, so that an unsound one is not accepted.
        accept([Match::not(Field::L4proto, 1), Match::not(Field::L4proto, 2), Match::not(Field::L4proto, UDP)]),
    ]
}

fn ip6(rules: &Rules) -> Vec<Rule> {
    let mut list =
        vec![goto([Match::is(Field::Ip6Version, 6), Match::is(Field::Ip6Saddr, Ipv6Addr::UNSPECIFIED)], "ip6_nobody")];
    for address in rules.except.iter().filter(|address| address.is_ipv6()) {
        list.push(drop([Match::is(Field::Ip6Saddr, *address)], "the gateway's address"));
    }
    list.push(goto([Match::is(Field::Ip6Version, 6), Match::Within(Field::Ip6Saddr, sources6(rules))], "ip6_own"));
    list
}

/// Places in a packet of IPv6 without extension headers: ICMPv6 begins behind the 40 bytes of IPv6's header.
const fn after(bytes: u16, bits: u16) -> Field {
    Field::Raw(Base::Network, (40 + bytes) * 8, bits)
}

/// The address that a neighbour solicitation or advertisement is about (RFC 4861, 4.3 and 4.4).
const TARGET: Field = after(8, 128);

/// A message of neighbour discovery: of this type, with so many bytes, from the same link.
fn discovery(kind: u64, bytes: u64) -> Vec<Match> {
    vec![
        Match::is(Field::Ip6Length, bytes),
        Match::is(Field::Ip6Nexthdr, ICMPV6),
        Match::is(Field::Ip6Hoplimit, 255),
        Match::is(Field::Icmpv6Type, kind),
        Match::is(Field::Icmpv6Code, 0),
    ]
}

fn with(mut matches: Vec<Match>, more: impl IntoIterator<Item = Match>) -> Rule {
    matches.extend(more);
    accept(matches)
}

/// The same, if the target is the guest's too.
fn about_target(mut matches: Vec<Match>, more: impl IntoIterator<Item = Match>) -> Rule {
    matches.extend(more);
    goto(matches, "target")
}

/// Neighbour discovery about the guest's own addresses.
fn target(rules: &Rules) -> Vec<Rule> {
    vec![accept([Match::Within(TARGET, sources6(rules))]), drop([], "neighbour discovery about another's address")]
}

/// IPv6 without an address: a guest that looks whether the address it wants is free, asks for routers, joins groups.
fn ip6_nobody() -> Vec<Rule> {
    let solicited = || Match::Network(Field::Ip6Daddr, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).into(), 104);
    let routers = Match::is(Field::Ip6Daddr, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2));
    vec![
        about_target(discovery(135, 24), [solicited()]),
        // With a nonce of six bytes (RFC 7527), as Linux has it.
        about_target(discovery(135, 32), [solicited(), Match::is(after(24, 16), 0x0e01)]),
        with(discovery(133, 8), [routers]),
        goto([Match::is(Field::Ip6Nexthdr, 0)], "mld"),
    ]
}

/// IPv6 from an address the guest may use.
fn ip6_own() -> Vec<Rule> {
    let plain: Vec<Match> = NOT_PLAIN.into_iter().map(|next| Match::not(Field::Ip6Nexthdr, next)).collect();
    vec![
        goto([Match::is(Field::Ip6Nexthdr, ICMPV6)], "icmp6"),
        drop([Match::is(Field::Ip6Nexthdr, UDP), Match::is(Field::UdpSport, 547)], "DHCPv6 answers"),
        drop([Match::is(Field::Ip6Nexthdr, UDP), Match::is(Field::UdpDport, 546)], "DHCPv6 answers"),
        accept([Match::is(Field::Ip6Nexthdr, UDP), is_there(Field::UdpDport)]),
        goto([Match::is(Field::Ip6Nexthdr, 0)], "mld"),
        goto([Match::is(Field::Ip6Nexthdr, FRAGMENT)], "fragment"),
        with(plain, [Match::not(Field::L4proto, ICMPV6)]),
        drop([], "options, routing headers"),
    ]
}

fn icmp6(rules: &Rules) -> Vec<Rule> {
    // An option with an Ethernet address: type, length 1 (eight bytes), and the address (RFC 4861, 4.6.1).
    let [a, b, c, d, e, f] = rules.mac.0;
    let mac = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    let option = |at: u16, kind: u64| [Match::is(after(at, 64), kind << 56 | 1 << 48 | mac)];
    // Messages for routers (130 to 134, 143, 151 to 153) and about neighbours, redirects, renumbering.
    let apart =
        |from: u64, to: u64| Match::Range { field: Field::Icmpv6Type, not: true, from: from.into(), to: to.into() };
    vec![
        with(discovery(135, 24), []),
        with(discovery(135, 32), option(24, 1)),
        about_target(discovery(136, 24), []),
        about_target(discovery(136, 32), option(24, 2)),
        with(discovery(133, 8), []),
        with(discovery(133, 16), option(8, 1)),
        accept([apart(130, 138), Match::not(Field::Icmpv6Type, 143), apart(151, 153)]),
        drop([], "advertises routers, redirects, asks for groups, or speaks for others"),
    ]
}

/// Reports of groups: a hop-by-hop header with the router alert that they must have (RFC 2710, RFC 3810), padded as
/// it comes, and nothing else in it.
fn mld() -> Vec<Rule> {
    let report = |options: u64, kind: Match| {
        accept([
            Match::is(after(0, 64), options),
            Match::is(Field::Ip6Hoplimit, 1),
            Match::Network(Field::Ip6Daddr, Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
            kind,
        ])
    };
    let mut list = Vec::new();
    for options in [0x3a00_0502_0000_0100, 0x3a00_0100_0502_0000] {
        list.push(report(options, between(after(8, 8), 131, 132)));
        list.push(report(options, Match::is(after(8, 8), 143)));
    }
    list.push(drop([], "options"));
    list
}

/// Fragments of IPv6. What a packet is, its first fragment says.
fn fragment() -> Vec<Rule> {
    let next = after(0, 8);
    let place = after(2, 16);
    let plain =
        || NOT_PLAIN.into_iter().filter(|next| ![UDP, ICMPV6].contains(next)).map(|kind| Match::not(next, kind));
    let first = || Match::Masked(place, 0xfff8, Op::Eq, 0);
    vec![
        drop([Match::Masked(place, 0xfff8, Op::Eq, 8)], "a fragment inside the header"),
        with(plain().collect(), [Match::Masked(place, 0xfff8, Op::Ne, 0)]),
        accept([first(), Match::is(next, ICMPV6), between(after(8, 8), 128, 129)]),
        drop([first(), Match::is(next, UDP), Match::is(after(8, 16), 547)], "DHCPv6 answers"),
        drop([first(), Match::is(next, UDP), Match::is(after(10, 16), 546)], "DHCPv6 answers"),
        accept([first(), Match::is(next, UDP), is_there(after(10, 16))]),
        with(plain().collect(), [first(), Match::not(next, UDP), Match::not(next, ICMPV6), is_there(after(8, 8))]),
        drop([], "fragments of what must not be fragmented"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x00, 0x16, 0x3e, 0x5f, 0x77, 0xfd]);

    #[test]
    fn link_local_addresses() {
        assert_eq!(link_local(MAC).to_string(), "fe80::216:3eff:fe5f:77fd");
    }

    #[test]
    fn every_filter_can_be_said_in_bpf() {
        let addresses: Vec<(IpAddr, u8)> = vec![("10.0.0.1".parse().unwrap(), 32), ("2001:db8::".parse().unwrap(), 64)];
        for addresses in [Vec::new(), addresses] {
            for tagged in [Vec::new(), vec![(411, 411), (500, 599)]] {
                let except = vec!["10.0.0.254".parse().unwrap(), "fe80::1".parse().unwrap()];
                let vlans = Vlans { untagged: tagged.is_empty(), tagged };
                let rules = Rules { mac: MAC, addresses: addresses.clone(), except, vlans };
                let classifiers = filter(&rules).classifiers().unwrap();
                // In a dump there is room for 32 KiB.
                assert!(classifiers.iter().all(|one| one.code.len() < 1000), "too long to be read back");
                println!("{:?}", classifiers.iter().map(|one| one.code.len()).collect::<Vec<_>>());
                // What nobody decided about is dropped.
                assert_eq!(classifiers.last().unwrap().code.len(), 1);
            }
        }
    }

    #[test]
    fn rules_survive_being_stored() {
        let rules = Rules {
            addresses: vec![("10.0.0.0".parse().unwrap(), 24), ("2001:db8::1".parse().unwrap(), 128)],
            except: vec!["10.0.0.254".parse().unwrap()],
            vlans: Vlans { untagged: false, tagged: vec![(5, 9)] },
            ..Rules::new(MAC)
        };
        assert_eq!(serde_json::from_str::<Rules>(&serde_json::to_string(&rules).unwrap()).unwrap(), rules);
    }

    #[test]
    fn sources() {
        let sets = |addresses: &[(&str, u8)]| {
            let addresses = addresses.iter().map(|(text, prefix)| (text.parse().unwrap(), *prefix)).collect();
            let rules = Rules { addresses, ..Rules::new(MAC) };
            let all = sources4(&rules).into_iter().chain(sources6(&rules));
            all.map(|(first, last)| format!("{first}-{last}")).collect::<Vec<_>>().join(" ")
        };
        let any = sets(&[]);
        assert!(any.contains("1.0.0.0-126.255.255.255 128.0.0.0-223.255.255.255"), "{any}");
        assert!(any.contains("100::-feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), "{any}");
        let own = "fe80::216:3eff:fe5f:77fd-fe80::216:3eff:fe5f:77fd";
        assert_eq!(sets(&[("10.0.0.5", 32)]), format!("10.0.0.5-10.0.0.5 {own}"));
        // No IPv4 at all.
        assert_eq!(sets(&[("2001:db8::5", 128)]), format!("2001:db8::5-2001:db8::5 {own}"));
    }
}
