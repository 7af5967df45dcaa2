//! Network devices: their kinds, Ethernet addresses, and how bridges treat them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
    /// The port of the same bridge that gets its frames while it has no carrier (IFLA_BRPORT_BACKUP_PORT).
    #[serde(default)]
    pub backup: Option<String>,
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
            backup: None,
        }
    }

    /// Whether it is a bridge.
    pub fn is_bridge(&self) -> bool {
        matches!(self.kind, Kind::Bridge(_))
    }
}
