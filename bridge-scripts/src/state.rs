//! What a machine's network looks like, as plain values: the parts of it that our programs read or change.
//!
//! A [`State`] is read from the kernel by [`crate::link::Link::read`], and changed on paper by [`State::take`], so that a
//! plan can be checked, and its undo computed, without a kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::nft;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// What Xen gives to dom0's side of guests' interfaces: no bridge prefers it, since the lowest address wins.
    pub const XEN: Self = Self([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);

    /// Whether it names a group of stations (the lowest bit of the first byte, IEEE 802).
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no Ethernet address: six hexadecimal bytes with colons are meant, as in 00:16:3e:5f:77:fd")]
pub struct BadMac(pub String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| matches!(part.len(), 1 | 2)).ok_or_else(bad)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(mac)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// What kind of device a link is (IFLA_INFO_KIND of rtnetlink(7)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A card: the kernel names no kind.
    Physical,
    /// A bridge, with those of its settings that can be set (IFLA_BR_*, as the kernel's bytes).
    Bridge(BTreeMap<u16, Vec<u8>>),
    /// A VLAN of another link.
    Vlan {
        /// The link below.
        link: String,
        /// The VLAN's number, 1 to 4094.
        id: u16,
    },
    /// One end of a pair.
    Veth {
        /// The other end, where it is in the same namespace.
        peer: Option<String>,
    },
    /// A bond.
    Bond,
    /// A device without anything behind it.
    Dummy,
    /// A tap or tun device.
    Tun,
    /// Anything else, as the kernel calls it.
    Other(String),
}

/// How a bridge treats a port (IFLA_BRPORT_*, bridge(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFlags {
    /// No traffic to other isolated ports.
    pub isolated: bool,
    /// A BPDU from this port blocks it ("guard").
    pub guard: bool,
    /// This port never becomes the way to the root bridge ("root_block").
    pub root_block: bool,
    /// Source addresses are learnt.
    pub learning: bool,
    /// Frames for unknown stations are sent here ("flood").
    pub flood: bool,
    /// Frames for unknown groups are sent here ("mcast_flood").
    pub multicast_flood: bool,
    /// Broadcasts are sent here ("bcast_flood").
    pub broadcast_flood: bool,
    /// Frames from stations without an entry in the forwarding table are dropped.
    pub locked: bool,
    /// Frames may leave by the port they came from.
    pub hairpin: bool,
}

impl Default for PortFlags {
    /// As the kernel makes a port.
    fn default() -> Self {
        Self {
            isolated: false,
            guard: false,
            root_block: false,
            learning: true,
            flood: true,
            multicast_flood: true,
            broadcast_flood: true,
            locked: false,
            hairpin: false,
        }
    }
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkState {
    /// What it is.
    pub kind: Kind,
    /// Its Ethernet address, where it has one.
    pub mac: Option<Mac>,
    /// The address that is burnt in, where the driver tells.
    pub permanent_mac: Option<Mac>,
    /// The largest payload of a frame, in bytes.
    pub mtu: u32,
    /// Whether it is switched on (IFF_UP).
    pub up: bool,
    /// Whether it answers ARP (no IFF_NOARP).
    pub arp: bool,
    /// Whether it has a carrier and is up (IFF_RUNNING). No plan depends on it.
    pub running: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// Whether it is a wireless card. A station cannot be bridged: the access point drops others' addresses.
    pub wireless: bool,
    /// The bridge or bond it belongs to.
    pub master: Option<String>,
    /// Its flags as a port, where its master is a bridge.
    pub port: Option<PortFlags>,
}

impl LinkState {
    /// A link of this kind as it comes from the kernel: down, with ARP, 1500 bytes.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            mac: None,
            permanent_mac: None,
            mtu: 1500,
            up: false,
            arp: true,
            running: false,
            loopback: false,
            wireless: false,
            master: None,
            port: None,
        }
    }

    /// Whether it is a bridge.
    pub fn is_bridge(&self) -> bool {
        matches!(self.kind, Kind::Bridge(_))
    }
}

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
    /// The sysctls that were asked for and exist.
    pub sysctls: BTreeMap<String, String>,
    /// Our records (small files in the run directory) that were asked for and exist.
    pub records: BTreeMap<String, String>,
    /// Whether the root file system comes over the network.
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

mod take;

pub(crate) use take::BRIDGE_VLAN_FILTERING;
mod text;
