//! Routes as rtnetlink tells and takes them (RTM_NEWROUTE).

use std::net::IpAddr;

use netlink_packet_core::NLA_F_NESTED;

use super::wire::{Message, attrs, ip, u8_at, u16_at, u32_at};
use crate::state::{Hop, Route};

const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
pub(super) const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
pub(super) const RTA_TABLE: u16 = 15;
const RTA_EXPIRES: u16 = 23;
const RTA_UID: u16 = 25;

/// RTM_F_CLONED of linux/rtnetlink.h: an entry of the cache.
const CLONED: u32 = 0x200;
/// RTNH_F_ONLINK; the other flags tell of the link.
const ONLINK: u32 = 4;
/// The local table.
const TABLE_LOCAL: u32 = 255;
/// RTPROT_KERNEL.
const KERNEL: u8 = 2;
/// Ticks of a second in what the kernel tells (USER_HZ of asm/param.h, on every architecture Xen runs on).
const TICKS: u32 = 100;

/// A route with indices of links in place of their names: of its own, and of its ways.
pub(super) struct Told {
    pub(super) route: Route,
    pub(super) dev: Option<u32>,
    pub(super) ways: Vec<u32>,
}

/// Takes an RTM_NEWROUTE's body apart. `None` for what the kernel keeps by itself: its cache, its own entries in the local
/// table (an address, a broadcast address, multicast).
pub(super) fn parse(body: &[u8]) -> Option<Told> {
    let family = u8_at(body, 0);
    if !matches!(family, 2 | 10) {
        return None;
    }
    let (v6, prefix, from_prefix, flags) = (family == 10, u8_at(body, 1), u8_at(body, 2), u32_at(body, 8));
    let mut route = Route::new(None, v6, "");
    (route.tos, route.table) = (u8_at(body, 3), u32::from(u8_at(body, 4)));
    (route.protocol, route.scope, route.kind) = (u8_at(body, 5), u8_at(body, 6), u8_at(body, 7));
    (route.flags, route.dev) = (flags & ONLINK, None);
    let (mut to, mut from, mut dev, mut ways) = (None, None, None, Vec::new());
    for (raw, value) in attrs(body.get(12..)?) {
        match raw & !NLA_F_NESTED {
            RTA_DST => to = ip(value),
            RTA_SRC => from = ip(value),
            RTA_OIF => dev = Some(u32_at(value, 0)),
            RTA_GATEWAY => route.gateway = ip(value),
            RTA_PRIORITY => route.metric = Some(u32_at(value, 0)),
            RTA_PREFSRC => route.source = ip(value),
            RTA_TABLE => route.table = u32_at(value, 0),
            RTA_MULTIPATH => (route.ways, ways) = parse_ways(value).into_iter().unzip(),
            RTA_CACHEINFO => {
                // struct rta_cacheinfo: clntref, lastuse, expires...
                let expires = u32_at(value, 8).cast_signed() / TICKS.cast_signed();
                route.expires = u32::try_from(expires).ok().filter(|seconds| *seconds > 0);
            }
            RTA_IIF | RTA_UID | RTA_EXPIRES => (),
            _ => route.rest.push((raw, value.to_vec())),
        }
    }
    let any = |v6: bool| if v6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
    route.to = (prefix > 0).then(|| (to.unwrap_or(any(v6)), prefix));
    route.from = (from_prefix > 0).then(|| (from.unwrap_or(any(v6)), from_prefix));
    if flags & CLONED != 0 || (route.table == TABLE_LOCAL && route.protocol == KERNEL) {
        return None;
    }
    Some(Told { route, dev, ways })
}

/// The array of struct rtnexthop: length, flags, hops, index, attributes.
fn parse_ways(mut bytes: &[u8]) -> Vec<(Hop, u32)> {
    let mut ways = Vec::new();
    loop {
        let length = usize::from(u16_at(bytes, 0));
        let Some(way) = bytes.get(..length).filter(|way| way.len() >= 8) else { return ways };
        let (flags, hops) = (u8_at(way, 2) & 4, u8_at(way, 3));
        let mut hop = Hop { dev: String::new(), flags, hops, gateway: None, rest: Vec::new() };
        for (kind, value) in attrs(&way[8..]) {
            match kind {
                RTA_GATEWAY => hop.gateway = ip(value),
                _ => hop.rest.push((kind, value.to_vec())),
            }
        }
        ways.push((hop, u32_at(way, 4)));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
}

/// The message that adds or removes a route, with the indices of the links it names.
pub(super) fn message(kind: u16, flags: i32, route: &Route, dev: Option<u32>, ways: &[u32]) -> Message {
    let prefix = |end: Option<(IpAddr, u8)>| end.map_or(0, |(_, prefix)| prefix);
    let table = u8::try_from(route.table).unwrap_or(0);
    let family = if route.v6 { 10 } else { 2 };
    let (to, from) = (prefix(route.to), prefix(route.from));
    let mut fixed = vec![family, to, from, route.tos, table, route.protocol, route.scope, route.kind];
    fixed.extend_from_slice(&route.flags.to_ne_bytes());
    let mut message = Message::new(kind, flags, &fixed);
    message.u32(RTA_TABLE, route.table);
    if let Some((to, _)) = route.to {
        message.ip(RTA_DST, to);
    }
    if let Some((from, _)) = route.from {
        message.ip(RTA_SRC, from);
    }
    if let Some(dev) = dev {
        message.u32(RTA_OIF, dev);
    }
    if let Some(gateway) = route.gateway {
        message.ip(RTA_GATEWAY, gateway);
    }
    if let Some(metric) = route.metric {
        message.u32(RTA_PRIORITY, metric);
    }
    if let Some(source) = route.source {
        message.ip(RTA_PREFSRC, source);
    }
    if let Some(seconds) = route.expires.filter(|_| kind == libc::RTM_NEWROUTE) {
        message.u32(RTA_EXPIRES, seconds);
    }
    if !ways.is_empty() {
        message.nest(RTA_MULTIPATH, |message| {
            for (way, index) in route.ways.iter().zip(ways) {
                let start = message.position();
                message.raw(&[0, 0, way.flags, way.hops]).raw(&index.to_ne_bytes());
                if let Some(gateway) = way.gateway {
                    message.ip(RTA_GATEWAY, gateway);
                }
                for (kind, value) in &way.rest {
                    message.attr(*kind, value);
                }
                let length = u16::try_from(message.position() - start).unwrap_or(0);
                message.patch(start, &length.to_ne_bytes());
            }
        });
    }
    for (kind, value) in &route.rest {
        message.attr(*kind, value);
    }
    message
}
