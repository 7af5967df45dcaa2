//! Links as rtnetlink tells them (RTM_NEWLINK, linux/if_link.h).

use netlink_packet_core::NLA_F_NESTED;

use super::wire::{attrs, text, u8_at, u16_at, u32_at};
use crate::state::{Kind, LinkState, Mac, PortFlags};

pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_LINK: u16 = 5;
pub(super) const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_PROTINFO: u16 = 12;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_AF_SPEC: u16 = 26;
pub(super) const IFLA_EXT_MASK: u16 = 29;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_PERM_ADDRESS: u16 = 54;
pub(super) const INFO_KIND: u16 = 1;
pub(super) const INFO_DATA: u16 = 2;
const INFO_SLAVE_KIND: u16 = 4;
const INFO_SLAVE_DATA: u16 = 5;
pub(super) const VLAN_ID: u16 = 1;
pub(super) const BRIDGE_FORWARD_DELAY: u16 = 1;
pub(super) const BRIDGE_STP_STATE: u16 = 5;

/// The bridge settings that can be set (IFLA_BR_*); the others tell of timers and of the spanning tree.
const SETTINGS: [std::ops::RangeInclusive<u16>; 4] = [1..=9, 22..=39, 41..=45, 49..=49];

/// The port flags we set, in the order of [`flag_values`] (IFLA_BRPORT_*).
pub(super) const PORT_FLAGS: [u16; 9] = [33, 5, 6, 8, 9, 27, 30, 39, 4];
pub(super) const BACKUP_PORT: u16 = 34;

/// The flags' values in the order of [`PORT_FLAGS`].
pub(super) fn flag_values(flags: &PortFlags) -> [bool; 9] {
    [
        flags.isolated,
        flags.guard,
        flags.root_block,
        flags.learning,
        flags.flood,
        flags.multicast_flood,
        flags.broadcast_flood,
        flags.locked,
        flags.hairpin,
    ]
}

/// What one RTM_NEWLINK tells, with indices where names are wanted.
pub(super) struct Told {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) state: LinkState,
    pub(super) master: Option<u32>,
    /// The link below a VLAN, or a veth's peer in the same namespace.
    pub(super) below: Option<u32>,
    /// The port that stands in for this one.
    pub(super) backup: Option<u32>,
}

/// Takes an RTM_NEWLINK's body apart.
pub(super) fn parse(body: &[u8]) -> Option<Told> {
    let flags = u32_at(body, 8);
    let has = |flag: i32| flags & flag.cast_unsigned() != 0;
    let mut state = LinkState::new(Kind::Physical);
    state.up = has(libc::IFF_UP);
    state.arp = !has(libc::IFF_NOARP);
    state.running = has(libc::IFF_RUNNING) && has(libc::IFF_UP);
    state.loopback = has(libc::IFF_LOOPBACK);
    let mut told = Told { index: u32_at(body, 4), name: String::new(), state, master: None, below: None, backup: None };
    let (mut elsewhere, mut info) = (false, None);
    for (kind, value) in attrs(body.get(16..)?) {
        match kind & !NLA_F_NESTED {
            IFLA_IFNAME => told.name = text(value),
            IFLA_ADDRESS => told.state.mac = value.try_into().ok().map(Mac),
            IFLA_PERM_ADDRESS => told.state.permanent_mac = value.try_into().ok().map(Mac),
            IFLA_MTU => told.state.mtu = u32_at(value, 0),
            IFLA_MASTER => told.master = Some(u32_at(value, 0)),
            IFLA_LINK => told.below = Some(u32_at(value, 0)).filter(|index| *index != 0),
            IFLA_LINK_NETNSID => elsewhere = true,
            IFLA_LINKINFO => info = Some(value),
            _ => (),
        }
    }
    if elsewhere {
        told.below = None;
    }
    if let Some(info) = info {
        told.backup = link_info(info, &mut told.state);
    }
    Some(told)
}

/// Fills in what kind of link it is and how its bridge treats it; the index of its backup port.
fn link_info(info: &[u8], state: &mut LinkState) -> Option<u32> {
    let (mut name, mut data, mut slave, mut slave_data) = (String::new(), &[][..], String::new(), &[][..]);
    for (kind, value) in attrs(info) {
        match kind & !NLA_F_NESTED {
            INFO_KIND => name = text(value),
            INFO_DATA => data = value,
            INFO_SLAVE_KIND => slave = text(value),
            INFO_SLAVE_DATA => slave_data = value,
            _ => (),
        }
    }
    state.kind = match name.as_str() {
        "" => Kind::Physical,
        "bridge" => Kind::Bridge(
            attrs(data)
                .filter(|(kind, _)| SETTINGS.iter().any(|range| range.contains(kind)))
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect(),
        ),
        "vlan" => {
            let id = attrs(data).find(|(kind, _)| *kind == VLAN_ID).map_or(0, |(_, value)| u16_at(value, 0));
            Kind::Vlan { link: String::new(), id }
        }
        "veth" => Kind::Veth { peer: None },
        "bond" => Kind::Bond,
        "dummy" => Kind::Dummy,
        "tun" => Kind::Tun,
        other => Kind::Other(other.to_owned()),
    };
    let mut backup = None;
    if slave == "bridge" {
        let mut flags = PortFlags::default();
        for (kind, value) in attrs(slave_data) {
            let on = u8_at(value, 0) != 0;
            match kind {
                33 => flags.isolated = on,
                5 => flags.guard = on,
                6 => flags.root_block = on,
                8 => flags.learning = on,
                9 => flags.flood = on,
                27 => flags.multicast_flood = on,
                30 => flags.broadcast_flood = on,
                39 => flags.locked = on,
                4 => flags.hairpin = on,
                BACKUP_PORT => backup = Some(u32_at(value, 0)).filter(|index| *index != 0),
                _ => (),
            }
        }
        state.port = Some(flags);
    }
    backup
}
