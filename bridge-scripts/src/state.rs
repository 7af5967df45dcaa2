//! What a machine's network looks like, as plain values: the parts of it that our programs read or change.
//!
//! A [`State`] is read from the kernel by [`crate::link::Link::read`], and changed on paper by [`State::take`], so that a
//! plan can be checked, and its undo computed, without a kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use crate::antispoof::Rules;
use crate::nft;

mod link;
mod take;
mod text;

pub use link::{BadMac, Kind, LinkState, Mac, PortFlags};
pub(crate) use take::BRIDGE_VLAN_FILTERING;

/// No end to an address's life (INFINITY_LIFE_TIME of linux/if_addr.h).
pub const FOREVER: u32 = u32::MAX;

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The link.
    pub dev: String,
    /// The address.
    pub local: IpAddr,
    /// How many bits of it name the network.
    pub prefix: u8,
    /// The other end's address, on a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The broadcast address, for IPv4.
    pub broadcast: Option<Ipv4Addr>,
    /// An IPv4 address's label, where it is not just the link's name.
    pub label: Option<String>,
    /// 0 global, 253 link, 254 host (RT_SCOPE_* of linux/rtnetlink.h).
    pub scope: u8,
    /// Those IFA_F_* that can be asked for: no prefix route, home, managed temporary addresses, no duplicate detection...
    pub flags: u32,
    /// Seconds until it goes, or [`FOREVER`].
    pub valid: u32,
    /// Seconds until no new connection uses it, or [`FOREVER`].
    pub preferred: u32,
    /// Metric of the route to its network, where it is not the kernel's own.
    pub metric: Option<u32>,
    /// Who made it (IFAPROT_*).
    pub protocol: Option<u8>,
}

impl Address {
    /// Whether the kernel made it from a router's advertisement (IFAPROT_KERNEL_RA of linux/if_addr.h), for a time.
    #[must_use]
    pub const fn is_advertised(&self) -> bool {
        self.valid != FOREVER && matches!(self.protocol, Some(2))
    }

    /// An ordinary address that stays.
    pub fn new(dev: &str, local: IpAddr, prefix: u8) -> Self {
        Self {
            dev: dev.to_owned(),
            local,
            prefix,
            peer: None,
            broadcast: None,
            label: None,
            scope: 0,
            flags: 0,
            valid: FOREVER,
            preferred: FOREVER,
            metric: None,
            protocol: None,
        }
    }

    /// Whether both are the same address of the same link, whatever else differs.
    pub fn same_place(&self, other: &Self) -> bool {
        self.dev == other.dev && self.local == other.local && self.prefix == other.prefix && self.peer == other.peer
    }
}

/// One of several ways of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The link.
    pub dev: String,
    /// RTNH_F_ONLINK and the like.
    pub flags: u8,
    /// Weight less one.
    pub hops: u8,
    /// The gateway.
    pub gateway: Option<IpAddr>,
    /// Further attributes, as the kernel's bytes.
    pub rest: Vec<(u16, Vec<u8>)>,
}

/// A route (rtnetlink(7), struct rtmsg).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Whether it is an IPv6 route.
    pub v6: bool,
    /// Where to, and how many bits of it count; nothing for the default route.
    pub to: Option<(IpAddr, u8)>,
    /// Where from (IPv6).
    pub from: Option<(IpAddr, u8)>,
    /// 254 is the main table, 255 the local one.
    pub table: u32,
    /// Who made it (RTPROT_*): 2 the kernel, 3 at boot, 4 the administrator, 9 a router's advertisement, 16 DHCP.
    pub protocol: u8,
    /// 0 global, 253 link, 254 host (RT_SCOPE_*).
    pub scope: u8,
    /// 1 unicast, 2 local, 3 broadcast... (RTN_*).
    pub kind: u8,
    /// Type of service.
    pub tos: u8,
    /// RTNH_F_ONLINK; flags that tell of the link's state are left out.
    pub flags: u32,
    /// The link, for a route with one way.
    pub dev: Option<String>,
    /// The gateway, for a route with one way.
    pub gateway: Option<IpAddr>,
    /// The address to send from.
    pub source: Option<IpAddr>,
    /// The metric.
    pub metric: Option<u32>,
    /// Seconds until it goes.
    pub expires: Option<u32>,
    /// The ways, if there are several.
    pub ways: Vec<Hop>,
    /// Further attributes (metrics, preference, encapsulation...), as the kernel's bytes.
    pub rest: Vec<(u16, Vec<u8>)>,
}

impl Route {
    /// Whether a router's advertisement made it: then the kernel takes it back, too, whenever a router or its life ends.
    #[must_use]
    pub const fn is_advertised(&self) -> bool {
        /// RTPROT_RA of linux/rtnetlink.h.
        const ADVERTISED: u8 = 9;
        self.v6 && self.protocol == ADVERTISED
    }

    /// The route as somebody else than the kernel may add it. Of a router's advertisement the kernel has to be able to make
    /// its own: where one from user space is in its place (the same metric, and no RTF_ADDRCONF, which only the kernel can
    /// set), ndisc_router_discovery of Linux' net/ipv6/ndisc.c gives up before it comes to the prefixes, and the addresses
    /// that the router has given are not kept alive any more. So ours comes right behind.
    #[must_use]
    pub fn by_hand(&self) -> Self {
        /// IP6_RT_PRIO_USER of the kernel's ip6_fib.h.
        const USUAL: u32 = 1024;
        let behind = self.is_advertised() && self.gateway.is_some();
        let metric = if behind { Some(self.metric.unwrap_or(USUAL).saturating_add(1)) } else { self.metric };
        Self { metric, ..self.clone() }
    }

    /// A route of the main table through a link, as the administrator would add it.
    pub fn new(to: Option<(IpAddr, u8)>, v6: bool, dev: &str) -> Self {
        Self {
            v6,
            to,
            from: None,
            table: 254,
            protocol: 4,
            scope: if v6 { 0 } else { 253 },
            kind: 1,
            tos: 0,
            flags: 0,
            dev: Some(dev.to_owned()),
            gateway: None,
            source: None,
            metric: None,
            expires: None,
            ways: Vec::new(),
            rest: Vec::new(),
        }
    }

    /// Whether the kernel would take one for the other: same destination, table, metric and link.
    pub fn same_place(&self, other: &Self) -> bool {
        self.v6 == other.v6
            && self.to == other.to
            && self.from == other.from
            && self.table == other.table
            && self.tos == other.tos
            && self.metric.unwrap_or(0) == other.metric.unwrap_or(0)
            && self.dev == other.dev
            && self.gateway == other.gateway
            && self.ways.len() == other.ways.len()
    }

    /// Whether it goes through this link.
    pub fn uses(&self, dev: &str) -> bool {
        self.dev.as_deref() == Some(dev) || self.ways.iter().any(|way| way.dev == dev)
    }
}

/// An entry of the ARP or ND table that somebody made: permanent, or answered for others (proxy).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The link.
    pub dev: String,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its Ethernet address; none for a proxy entry.
    pub mac: Option<Mac>,
    /// Whether this machine answers in its place.
    pub proxy: bool,
}

/// A static entry of a bridge's forwarding table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fdb {
    /// The port.
    pub dev: String,
    /// The station behind it.
    pub mac: Mac,
    /// The VLAN it is in, with VLAN filtering.
    pub vlan: Option<u16>,
    /// Whether it stays at this port when its station is heard at another one that learns.
    #[serde(default)]
    pub sticky: bool,
}

impl Fdb {
    /// Whether both are about one station, wherever it is: a bridge has one entry for it (in each VLAN).
    pub fn same_place(&self, other: &Self) -> bool {
        self.mac == other.mac && self.vlan == other.vlan
    }
}

/// A VLAN that a bridge lets through at a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeVlan {
    /// The port, or the bridge itself.
    pub dev: String,
    /// The VLAN's number.
    pub id: u16,
    /// Untagged frames belong to it.
    pub pvid: bool,
    /// Its frames leave untagged.
    pub untagged: bool,
}

/// What is to be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct What {
    /// The links; `None` for all of them.
    pub links: Option<Vec<String>>,
    /// Addresses of these links.
    pub addresses: bool,
    /// Routes through these links, of all tables.
    pub routes: bool,
    /// Permanent and proxy neighbours of these links.
    pub neighbours: bool,
    /// Static forwarding entries of these links.
    pub fdb: bool,
    /// Bridge VLANs of these links.
    pub vlans: bool,
    /// Links whose filters are looked at.
    pub filters: Vec<String>,
    /// Which of our tables nftables has, and what is in them.
    pub tables: bool,
    /// Sysctls, as paths below /proc/sys: `net/ipv4/ip_forward`.
    pub sysctls: Vec<String>,
    /// Our records, by name.
    pub records: Vec<String>,
}

impl What {
    /// Everything about all links.
    pub fn everything() -> Self {
        Self {
            links: None,
            addresses: true,
            routes: true,
            neighbours: true,
            fdb: true,
            vlans: true,
            tables: true,
            filters: Vec::new(),
            sysctls: Vec::new(),
            records: Vec::new(),
        }
    }

    /// Nothing but these links.
    pub fn links<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { links: Some(names.into_iter().map(Into::into).collect()), ..Self::default() }
    }
}

/// A machine's network, or what was asked of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The links, by name.
    pub links: BTreeMap<String, LinkState>,
    /// Addresses, in the kernel's order: of two in one network the first is the primary one.
    pub addresses: Vec<Address>,
    /// Routes, in the kernel's order. Routes of the local table that the kernel makes are left out.
    pub routes: Vec<Route>,
    /// Permanent and proxy neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Static forwarding entries.
    pub fdb: Vec<Fdb>,
    /// Bridge VLANs.
    pub vlans: Vec<BridgeVlan>,
    /// Our nftables tables (named `xen-...`) with their content, where it is known: we keep what we put in.
    pub tables: Vec<OurTable>,
    /// Links that were asked for and have a filter of ours, or should have: the rules it is made of; none where it is not as
    /// we made it.
    #[serde(default)]
    pub filters: BTreeMap<String, Option<Rules>>,
    /// Whether what bridges forward passes IPv4's and IPv6's firewall hooks too (br_netfilter). Looked at with the tables.
    #[serde(default)]
    pub bridge_netfilter: [bool; 2],
    /// Other people's chains that drop it there.
    #[serde(default)]
    pub forward: Vec<nft::ForwardChain>,
    /// The sysctls that were asked for and exist.
    pub sysctls: BTreeMap<String, String>,
    /// Our records (small files in the run directory) that were asked for and exist.
    pub records: BTreeMap<String, String>,
    /// Whether the root file system comes over the network. Only looked at together with all links.
    pub root_on_network: bool,
}

/// One of our nftables tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OurTable {
    /// Its family.
    pub family: nft::Family,
    /// Its name.
    pub name: String,
    /// What is in it, where we know.
    pub content: Option<nft::Table>,
}
