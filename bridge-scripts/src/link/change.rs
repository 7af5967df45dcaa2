//! Carrying out one step.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::Path;

use super::addresses::{
    BRIDGE_FLAGS, BRIDGE_FLAGS_SELF, BRIDGE_VLAN_INFO, NDA_LLADDR, NDA_VLAN, NO_DUPLICATE_DETECTION, NTF_MASTER,
    NTF_STICKY, NUD_NOARP, VLAN_PVID, VLAN_UNTAGGED, address_message, neighbour_message,
};
use super::links::{
    BACKUP_PORT, BRIDGE_FORWARD_DELAY, BRIDGE_STP_STATE, IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_IFNAME, IFLA_LINK,
    IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_PROTINFO, INFO_DATA, INFO_KIND, PORT_FLAGS, VLAN_ID, flag_values,
};
use super::wire::{Message, link_header, neighbour_header};
use super::{Error, Link, routes};
use crate::state::{Address, BRIDGE_VLAN_FILTERING, BridgeVlan, Fdb, Kind, Mac, Route};
use crate::step::Step;

/// How strictly a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As part of a plan: what is to be made must not exist, what is to be removed must.
    Do,
    /// Taking something back: fine if it is so already, or if the link it is about has gone.
    Undo,
}

const AF_BRIDGE: u8 = 7;
const ACK: i32 = libc::NLM_F_ACK;
const CREATE: i32 = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
/// VETH_INFO_PEER of linux/veth.h.
const VETH_PEER: u16 = 1;

impl Link {
    /// Carries out a step that is about links, addresses, routes, ports, or a sysctl.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn take(&mut self, step: &Step, mode: Mode) -> Result<(), Error> {
        self.names.clear();
        let taken = self.take_strictly(step, mode);
        match (taken, mode) {
            (Err(error), Mode::Undo) if is_so_already(&error, step) => Ok(()),
            // It may go by itself between our looking and now.
            (Err(error), Mode::Do) if error.errno() == Some(libc::ESRCH) && removes_advertised(step) => Ok(()),
            (other, _) => other,
        }
    }

    fn take_strictly(&mut self, step: &Step, mode: Mode) -> Result<(), Error> {
        match step {
            Step::CreateBridge { name, mac, vlan_filtering } => self.create(name, *mac, |info| {
                info.text(INFO_KIND, "bridge").nest(INFO_DATA, |data| {
                    data.u32(BRIDGE_FORWARD_DELAY, 0).u32(BRIDGE_STP_STATE, 0);
                    if *vlan_filtering {
                        data.u8(BRIDGE_VLAN_FILTERING, 1);
                    }
                });
            }),
            Step::Recreate { name, kind, mac, mtu } => self.recreate(name, kind, *mac, *mtu),
            Step::CreateVlan { name, link, id } => self.create_vlan(name, link, *id, None),
            Step::CreateDummy { name } => self.create(name, None, |info| {
                info.text(INFO_KIND, "dummy");
            }),
            Step::CreateVeth { name, peer } => self.create_veth(name, peer, None),
            Step::DeleteLink(name) => {
                let index = self.index(name)?;
                self.change(Message::new(libc::RTM_DELLINK, ACK, &link_header(0, index, 0, 0)))
            }
            Step::Rename { from, to } => self.rename(from, to, mode),
            Step::SetUp { link, up } => self.set_flag(link, libc::IFF_UP, *up),
            Step::SetArp { link, arp } => self.set_flag(link, libc::IFF_NOARP, !arp),
            Step::SetMac { link, mac } => self.set(link, |message| message.attr(IFLA_ADDRESS, &mac.0)),
            Step::SetMtu { link, mtu } => self.set(link, |message| message.u32(IFLA_MTU, *mtu)),
            Step::SetMaster { link, master } => {
                let master = master.as_ref().map_or(Ok(0), |master| self.index(master))?;
                self.set(link, |message| message.u32(IFLA_MASTER, master))
            }
            Step::VlanFiltering { bridge, on } => {
                let index = self.index(bridge)?;
                let mut message = Message::new(libc::RTM_NEWLINK, ACK, &link_header(0, index, 0, 0));
                message.nest(IFLA_LINKINFO, |info| {
                    info.text(INFO_KIND, "bridge").nest(INFO_DATA, |data| {
                        data.u8(BRIDGE_VLAN_FILTERING, u8::from(*on));
                    });
                });
                self.change(message)
            }
            Step::AddAddress(address) => self.add_address(address, mode),
            Step::RemoveAddress(address) => {
                let index = self.index(&address.dev)?;
                self.change(address_message(libc::RTM_DELADDR, ACK, index, address, true))
            }
            Step::AddRoute(route) => {
                // Routes of one destination and metric may lie side by side, through several links: every link has
                // fe80::/64, and two cards in one network both have its routes. The very same route is refused all the
                // same (EEXIST).
                self.route(libc::RTM_NEWROUTE, ACK | libc::NLM_F_CREATE | libc::NLM_F_APPEND, route)
            }
            Step::RemoveRoute(route) => self.route(libc::RTM_DELROUTE, ACK, route),
            Step::AddNeighbour(neighbour) => {
                let index = self.index(&neighbour.dev)?;
                let flags = ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
                self.change(neighbour_message(libc::RTM_NEWNEIGH, flags, index, neighbour))
            }
            Step::RemoveNeighbour(neighbour) => {
                let index = self.index(&neighbour.dev)?;
                self.change(neighbour_message(libc::RTM_DELNEIGH, ACK, index, neighbour))
            }
            Step::PortFlags { link, flags } => {
                let index = self.index(link)?;
                let mut message = Message::new(libc::RTM_SETLINK, ACK, &link_header(AF_BRIDGE, index, 0, 0));
                message.nest(IFLA_PROTINFO, |port| {
                    for (kind, on) in PORT_FLAGS.into_iter().zip(flag_values(flags)) {
                        port.u8(kind, u8::from(on));
                    }
                });
                self.change(message)
            }
            Step::BackupPort { link, backup } => {
                let index = self.index(link)?;
                let backup = backup.as_ref().map_or(Ok(0), |backup| self.index(backup))?;
                let mut message = Message::new(libc::RTM_SETLINK, ACK, &link_header(AF_BRIDGE, index, 0, 0));
                message.nest(IFLA_PROTINFO, |port| {
                    port.u32(BACKUP_PORT, backup);
                });
                self.change(message)
            }
            Step::AddBridgeVlan(vlan) => self.bridge_vlan(libc::RTM_SETLINK, vlan),
            Step::RemoveBridgeVlan(vlan) => self.bridge_vlan(libc::RTM_DELLINK, vlan),
            Step::AddFdb(entry) => self.fdb(libc::RTM_NEWNEIGH, ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE, entry),
            Step::RemoveFdb(entry) => self.fdb(libc::RTM_DELNEIGH, ACK, entry),
            Step::Sysctl { path, value } => write_sysctl(path, value),
            Step::Filter { .. }
            | Step::AcceptWithin { .. }
            | Step::Table(_)
            | Step::DropTable(..)
            | Step::Record { .. } => Err(Error::NotOurs(step.to_string())),
        }
    }

    fn create(&mut self, name: &str, mac: Option<Mac>, info: impl FnOnce(&mut Message)) -> Result<(), Error> {
        let mut message = Message::new(libc::RTM_NEWLINK, CREATE, &link_header(0, 0, 0, 0));
        message.text(IFLA_IFNAME, name);
        if let Some(mac) = mac {
            message.attr(IFLA_ADDRESS, &mac.0);
        }
        message.nest(IFLA_LINKINFO, info);
        self.change(message)
    }

    fn create_vlan(&mut self, name: &str, link: &str, id: u16, mac: Option<Mac>) -> Result<(), Error> {
        let below = self.index(link)?;
        let mut message = Message::new(libc::RTM_NEWLINK, CREATE, &link_header(0, 0, 0, 0));
        message.text(IFLA_IFNAME, name).u32(IFLA_LINK, below);
        if let Some(mac) = mac {
            message.attr(IFLA_ADDRESS, &mac.0);
        }
        message.nest(IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "vlan").nest(INFO_DATA, |data| {
                data.u16(VLAN_ID, id);
            });
        });
        self.change(message).map_err(|error| match error {
            Error::Kernel { errno: errno @ libc::EOPNOTSUPP, .. } => {
                let text = "it has no VLANs; the module is named 8021q, the option CONFIG_VLAN_8021Q";
                Error::Kernel { errno, text: Some(text.to_owned()) }
            }
            other => other,
        })
    }

    fn create_veth(&mut self, name: &str, peer: &str, mac: Option<Mac>) -> Result<(), Error> {
        self.create(name, mac, |info| {
            info.text(INFO_KIND, "veth").nest(INFO_DATA, |data| {
                data.nest(VETH_PEER, |end| {
                    end.raw(&link_header(0, 0, 0, 0)).text(IFLA_IFNAME, peer);
                });
            });
        })
    }

    fn recreate(&mut self, name: &str, kind: &Kind, mac: Option<Mac>, mtu: u32) -> Result<(), Error> {
        match kind {
            Kind::Bridge(settings) => {
                self.create(name, mac, |info| {
                    info.text(INFO_KIND, "bridge");
                })?;
                self.settle_bridge(name, settings)?;
            }
            Kind::Vlan { link, id } => self.create_vlan(name, link, *id, mac)?,
            Kind::Veth { peer: Some(peer) } => self.create_veth(name, peer, mac)?,
            Kind::Dummy => self.create(name, mac, |info| {
                info.text(INFO_KIND, "dummy");
            })?,
            // The kernel deletes no card, and we no device whose other end is elsewhere.
            Kind::Physical | Kind::Veth { peer: None } | Kind::Bond | Kind::Tun | Kind::Other(_) => {
                return Err(Error::NotOurs(format!("making {name} again")));
            }
        }
        self.set(name, |message| message.u32(IFLA_MTU, mtu))
    }

    /// Gives a bridge the settings that it does not have yet. Those it has are not written: a kernel may tell of some that
    /// it cannot set.
    fn settle_bridge(&mut self, name: &str, settings: &BTreeMap<u16, Vec<u8>>) -> Result<(), Error> {
        let index = self.index(name)?;
        let reply = self.get(Message::new(libc::RTM_GETLINK, 0, &link_header(0, index, 0, 0)))?;
        let has = match reply.as_deref().and_then(super::links::parse).map(|told| told.state.kind) {
            Some(Kind::Bridge(has)) => has,
            _ => BTreeMap::new(),
        };
        let differing: Vec<_> = settings.iter().filter(|(kind, value)| has.get(kind) != Some(*value)).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let mut message = Message::new(libc::RTM_NEWLINK, ACK, &link_header(0, index, 0, 0));
        message.nest(IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "bridge").nest(INFO_DATA, |data| {
                for (kind, value) in differing {
                    data.attr(*kind, value);
                }
            });
        });
        self.change(message)
    }

    fn rename(&mut self, from: &str, to: &str, mode: Mode) -> Result<(), Error> {
        let Some(index) = self.find(from)? else {
            let done = mode == Mode::Undo && self.find(to)?.is_some();
            return if done { Ok(()) } else { Err(Error::NoLink(from.to_owned())) };
        };
        let mut message = Message::new(libc::RTM_NEWLINK, ACK, &link_header(0, index, 0, 0));
        message.text(IFLA_IFNAME, to);
        self.change(message)
    }

    fn set_flag(&mut self, link: &str, flag: i32, on: bool) -> Result<(), Error> {
        let (index, flag) = (self.index(link)?, flag.cast_unsigned());
        let flags = if on { flag } else { 0 };
        self.change(Message::new(libc::RTM_NEWLINK, ACK, &link_header(0, index, flags, flag)))
    }

    fn set(&mut self, link: &str, attr: impl FnOnce(&mut Message) -> &mut Message) -> Result<(), Error> {
        let index = self.index(link)?;
        let mut message = Message::new(libc::RTM_NEWLINK, ACK, &link_header(0, index, 0, 0));
        attr(&mut message);
        self.change(message)
    }

    /// An IPv6 address first comes without duplicate detection, which would keep it unusable for a second and cut
    /// connections: it is the machine's own already. Then it gets the flags it shall have.
    fn add_address(&mut self, address: &Address, mode: Mode) -> Result<(), Error> {
        let index = self.index(&address.dev)?;
        if address.local.is_ipv4() {
            return self.change(address_message(libc::RTM_NEWADDR, CREATE, index, address, true));
        }
        // The kernel makes a link-local address by itself when a link comes up, and others when it hears a router there.
        let made_by_kernel = address.scope == 253 || address.is_advertised();
        match self.change(address_message(libc::RTM_NEWADDR, CREATE, index, address, false)) {
            Err(error) if error.errno() == Some(libc::EEXIST) && (mode == Mode::Undo || made_by_kernel) => (),
            other => other?,
        }
        if address.flags & NO_DUPLICATE_DETECTION != 0 {
            return Ok(());
        }
        let replace = ACK | libc::NLM_F_REPLACE;
        self.change(address_message(libc::RTM_NEWADDR, replace, index, address, true))
    }

    fn route(&mut self, kind: u16, flags: i32, route: &Route) -> Result<(), Error> {
        let dev = route.dev.as_ref().map(|dev| self.index(dev)).transpose()?;
        let ways = route.ways.iter().map(|way| self.index(&way.dev)).collect::<Result<Vec<_>, _>>()?;
        self.change(routes::message(kind, flags, route, dev, &ways))
    }

    fn bridge_vlan(&mut self, kind: u16, vlan: &BridgeVlan) -> Result<(), Error> {
        let index = self.index(&vlan.dev)?;
        let is_bridge = self.is_bridge(index)?;
        let mut message = Message::new(kind, ACK, &link_header(AF_BRIDGE, index, 0, 0));
        message.nest(IFLA_AF_SPEC, |spec| {
            if is_bridge {
                spec.u16(BRIDGE_FLAGS, BRIDGE_FLAGS_SELF);
            }
            let mut flags = 0;
            if vlan.pvid {
                flags |= VLAN_PVID;
            }
            if vlan.untagged {
                flags |= VLAN_UNTAGGED;
            }
            spec.attr(BRIDGE_VLAN_INFO, &[flags, vlan.id].map(u16::to_ne_bytes).concat());
        });
        self.change(message)
    }

    fn is_bridge(&mut self, index: u32) -> Result<bool, Error> {
        let reply = self.get(Message::new(libc::RTM_GETLINK, 0, &link_header(0, index, 0, 0)))?;
        Ok(reply.as_deref().and_then(super::links::parse).is_some_and(|told| told.state.is_bridge()))
    }

    fn fdb(&mut self, kind: u16, flags: i32, entry: &Fdb) -> Result<(), Error> {
        let index = self.index(&entry.dev)?;
        let sticky = if entry.sticky { NTF_STICKY } else { 0 };
        let fixed = neighbour_header(AF_BRIDGE, index, NUD_NOARP, NTF_MASTER | sticky);
        let mut message = Message::new(kind, flags, &fixed);
        message.attr(NDA_LLADDR, &entry.mac.0);
        if let Some(vlan) = entry.vlan {
            message.u16(NDA_VLAN, vlan);
        }
        self.change(message)
    }
}

fn write_sysctl(path: &str, value: &str) -> Result<(), Error> {
    let open = fs::OpenOptions::new().write(true).open(Path::new("/proc/sys").join(path));
    open.and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| Error::Sysctl { path: path.to_owned(), source })
}

fn removes_advertised(step: &Step) -> bool {
    matches!(step, Step::RemoveRoute(route) if route.is_advertised())
}

/// Whether an error means that nothing is left to take back.
fn is_so_already(error: &Error, step: &Step) -> bool {
    let gone = matches!(error.errno(), Some(libc::ENODEV | libc::ENXIO));
    match step {
        Step::CreateBridge { .. }
        | Step::CreateVlan { .. }
        | Step::CreateDummy { .. }
        | Step::CreateVeth { .. }
        | Step::Recreate { .. }
        | Step::AddAddress(_)
        | Step::AddRoute(_)
        | Step::AddNeighbour(_)
        | Step::AddBridgeVlan(_)
        | Step::AddFdb(_) => error.errno() == Some(libc::EEXIST),
        Step::DeleteLink(_) => gone,
        Step::RemoveAddress(_) => gone || error.errno() == Some(libc::EADDRNOTAVAIL),
        Step::RemoveRoute(_) => gone || error.errno() == Some(libc::ESRCH),
        Step::RemoveNeighbour(_) | Step::RemoveFdb(_) | Step::RemoveBridgeVlan(_) => {
            gone || matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH))
        }
        Step::SetUp { .. }
        | Step::SetMac { .. }
        | Step::SetMtu { .. }
        | Step::SetArp { .. }
        | Step::SetMaster { master: None, .. } => gone,
        Step::PortFlags { .. } | Step::BackupPort { .. } => gone || error.errno() == Some(libc::EOPNOTSUPP),
        Step::Sysctl { .. } => {
            matches!(error, Error::Sysctl { source, .. } if source.kind() == ErrorKind::NotFound)
        }
        Step::SetMaster { .. }
        | Step::Rename { .. }
        | Step::VlanFiltering { .. }
        | Step::Filter { .. }
        | Step::AcceptWithin { .. }
        | Step::Table(_)
        | Step::DropTable(..)
        | Step::Record { .. } => false,
    }
}
