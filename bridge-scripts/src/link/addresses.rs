//! Addresses, neighbours, forwarding entries and bridge VLANs as rtnetlink tells and takes them.

use std::net::IpAddr;

use netlink_packet_core::NLA_F_NESTED;

use super::wire::{Message, u8_at};
use super::wire::{attrs, ip, neighbour_header, text, u16_at, u32_at};
use crate::state::{Address, BridgeVlan, FOREVER, Fdb, Mac, Neighbour};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;
const IFA_BROADCAST: u16 = 4;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_RT_PRIORITY: u16 = 9;
const IFA_PROTO: u16 = 11;

/// The flags one can ask for: no duplicate detection, home address, managed temporary addresses, no prefix route, joins
/// its groups. The others tell of the address's life (linux/if_addr.h).
const KEPT_FLAGS: u32 = 0x02 | 0x10 | 0x100 | 0x200 | 0x400;
/// IFA_F_NODAD.
pub(super) const NO_DUPLICATE_DETECTION: u32 = 0x02;

pub(super) const NDA_DST: u16 = 1;
pub(super) const NDA_LLADDR: u16 = 2;
pub(super) const NDA_VLAN: u16 = 5;
pub(super) const NDA_IFINDEX: u16 = 8;
pub(super) const NTF_MASTER: u8 = 0x04;
pub(super) const NTF_PROXY: u8 = 0x08;
const NTF_SELF: u8 = 0x02;
const NTF_EXT_LEARNED: u8 = 0x10;
pub(super) const NTF_STICKY: u8 = 0x40;
pub(super) const NUD_NOARP: u16 = 0x40;
pub(super) const NUD_PERMANENT: u16 = 0x80;

pub(super) const BRIDGE_FLAGS: u16 = 0;
pub(super) const BRIDGE_VLAN_INFO: u16 = 2;
pub(super) const BRIDGE_FLAGS_SELF: u16 = 2;
pub(super) const VLAN_PVID: u16 = 2;
pub(super) const VLAN_UNTAGGED: u16 = 4;

pub(super) const fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

/// An RTM_NEWADDR's link index and address, whose link is left empty.
pub(super) fn parse_address(body: &[u8]) -> Option<(u32, Address)> {
    let (v6, prefix, index) = (u8_at(body, 0) == 10, u8_at(body, 1), u32_at(body, 4));
    let (mut address, mut local, mut flags) = (None, None, u32::from(u8_at(body, 2)));
    let mut told = Address::new("", IpAddr::from([0, 0, 0, 0]), prefix);
    told.scope = u8_at(body, 3);
    for (kind, value) in attrs(body.get(8..)?) {
        match kind {
            IFA_ADDRESS => address = ip(value),
            IFA_LOCAL => local = ip(value),
            IFA_LABEL => told.label = Some(text(value)),
            IFA_BROADCAST => {
                if let Some(IpAddr::V4(broadcast)) = ip(value) {
                    told.broadcast = Some(broadcast);
                }
            }
            IFA_CACHEINFO => (told.preferred, told.valid) = (u32_at(value, 0), u32_at(value, 4)),
            IFA_FLAGS => flags = u32_at(value, 0),
            IFA_RT_PRIORITY => told.metric = Some(u32_at(value, 0)).filter(|metric| *metric != 0),
            IFA_PROTO => told.protocol = Some(u8_at(value, 0)).filter(|protocol| *protocol != 0),
            _ => (),
        }
    }
    told.local = local.or(address)?;
    told.peer = address.filter(|address| Some(*address) != local && local.is_some());
    told.flags = flags & KEPT_FLAGS;
    if v6 {
        told.label = None;
    }
    Some((index, told))
}

/// The message that adds or removes an address.
pub(super) fn address_message(kind: u16, flags: i32, index: u32, address: &Address, dad: bool) -> Message {
    let wanted = if dad { address.flags } else { address.flags | NO_DUPLICATE_DETECTION };
    let short = u8::try_from(wanted & 0xff).unwrap_or(0);
    let mut fixed = [family(address.local), address.prefix, short, address.scope, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut message = Message::new(kind, flags, &fixed);
    message.ip(IFA_LOCAL, address.local).ip(IFA_ADDRESS, address.peer.unwrap_or(address.local));
    if kind == libc::RTM_DELADDR {
        return message;
    }
    message.u32(IFA_FLAGS, wanted);
    if let Some(broadcast) = address.broadcast {
        message.ip(IFA_BROADCAST, broadcast.into());
    }
    if address.local.is_ipv4() {
        message.text(IFA_LABEL, address.label.as_deref().unwrap_or(&address.dev));
    }
    if let Some(metric) = address.metric {
        message.u32(IFA_RT_PRIORITY, metric);
    }
    if let Some(protocol) = address.protocol {
        message.u8(IFA_PROTO, protocol);
    }
    if address.valid != FOREVER || address.preferred != FOREVER {
        let life = [address.preferred, address.valid, 0, 0].map(u32::to_ne_bytes).concat();
        message.attr(IFA_CACHEINFO, &life);
    }
    message
}

/// An RTM_NEWNEIGH's link index and neighbour, if somebody made it.
pub(super) fn parse_neighbour(body: &[u8]) -> Option<(u32, Neighbour)> {
    let (index, state, flags) = (u32_at(body, 4), u16_at(body, 8), u8_at(body, 10));
    let proxy = flags & NTF_PROXY != 0;
    if !proxy && state & NUD_PERMANENT == 0 {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            NDA_DST => address = ip(value),
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            _ => (),
        }
    }
    Some((index, Neighbour { dev: String::new(), address: address?, mac: mac.filter(|_| !proxy), proxy }))
}

/// The message that adds or removes a neighbour.
pub(super) fn neighbour_message(kind: u16, flags: i32, index: u32, neighbour: &Neighbour) -> Message {
    let (state, proxy) = if neighbour.proxy { (0, NTF_PROXY) } else { (NUD_PERMANENT, 0) };
    let mut message = Message::new(kind, flags, &neighbour_header(family(neighbour.address), index, state, proxy));
    message.ip(NDA_DST, neighbour.address);
    if let Some(mac) = neighbour.mac.filter(|_| !neighbour.proxy) {
        message.attr(NDA_LLADDR, &mac.0);
    }
    message
}

/// An AF_BRIDGE RTM_NEWNEIGH's port index and entry, if it is a static one.
pub(super) fn parse_fdb(body: &[u8]) -> Option<(u32, Fdb)> {
    let (index, state, flags) = (u32_at(body, 4), u16_at(body, 8), u8_at(body, 10));
    if state & NUD_NOARP == 0 || state & NUD_PERMANENT != 0 || flags & (NTF_SELF | NTF_EXT_LEARNED) != 0 {
        return None;
    }
    let (mut mac, mut vlan) = (None, None);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            NDA_VLAN => vlan = Some(u16_at(value, 0)),
            _ => (),
        }
    }
    Some((index, Fdb { dev: String::new(), mac: mac?, vlan, sticky: flags & NTF_STICKY != 0 }))
}

/// An AF_BRIDGE RTM_NEWLINK's port index and VLANs.
pub(super) fn parse_bridge_vlans(body: &[u8]) -> (u32, Vec<BridgeVlan>) {
    let spec = attrs(body.get(16..).unwrap_or(&[]))
        .find(|(kind, _)| kind & !NLA_F_NESTED == super::links::IFLA_AF_SPEC)
        .map_or(&[][..], |(_, value)| value);
    let vlans = attrs(spec).filter(|(kind, _)| *kind == BRIDGE_VLAN_INFO).map(|(_, value)| {
        let flags = u16_at(value, 0);
        let (pvid, untagged) = (flags & VLAN_PVID != 0, flags & VLAN_UNTAGGED != 0);
        BridgeVlan { dev: String::new(), id: u16_at(value, 2), pvid, untagged }
    });
    (u32_at(body, 4), vlans.collect())
}
