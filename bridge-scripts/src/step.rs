//! One change of the machine's network, how it reads, and what takes it back.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::antispoof::Rules;
use crate::nft;
use crate::state::{Address, BridgeVlan, Fdb, Kind, LinkState, Mac, Neighbour, PortFlags, Route, State};

/// One change. Links are named as they are called at that point of the plan.
///
/// A step that finds its change made already fails when a plan is applied (somebody else was at work), and is fine when
/// a plan is undone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// Make a bridge: no spanning tree, no forwarding delay, down.
    CreateBridge {
        /// Its name.
        name: String,
        /// Its address; the lowest of its ports' if none is given.
        mac: Option<Mac>,
        /// Whether it looks at VLAN tags.
        vlan_filtering: bool,
    },
    /// Make a link again that was deleted, with the settings it had. Plans do not use it; undoing [`Step::DeleteLink`] does.
    Recreate {
        /// Its name.
        name: String,
        /// What it was.
        kind: Kind,
        /// Its address.
        mac: Option<Mac>,
        /// Its MTU.
        mtu: u32,
    },
    /// Make a VLAN of a link, down.
    CreateVlan {
        /// Its name.
        name: String,
        /// The link below.
        link: String,
        /// The VLAN's number, 1 to 4094.
        id: u16,
    },
    /// Make a device with nothing behind it, down.
    CreateDummy {
        /// Its name.
        name: String,
    },
    /// Make a pair of devices, each the other's cable, both down.
    CreateVeth {
        /// One end.
        name: String,
        /// The other.
        peer: String,
    },
    /// Delete a link. Its addresses, routes and ports should have been taken away by steps of their own before.
    DeleteLink(String),
    /// Give a link another name. It has to be down.
    Rename {
        /// The name it has.
        from: String,
        /// The name it gets.
        to: String,
    },
    /// Switch a link on or off.
    SetUp {
        /// The link.
        link: String,
        /// On or off.
        up: bool,
    },
    /// Give a link another address.
    SetMac {
        /// The link.
        link: String,
        /// The address.
        mac: Mac,
    },
    /// Give a link another MTU.
    SetMtu {
        /// The link.
        link: String,
        /// The largest payload of a frame, in bytes.
        mtu: u32,
    },
    /// Put a link into a bridge or bond, or take it out.
    SetMaster {
        /// The link.
        link: String,
        /// The bridge or bond; none to take it out.
        master: Option<String>,
    },
    /// Switch ARP on or off.
    SetArp {
        /// The link.
        link: String,
        /// On or off.
        arp: bool,
    },
    /// Whether a bridge looks at VLAN tags.
    VlanFiltering {
        /// The bridge.
        bridge: String,
        /// On or off.
        on: bool,
    },
    /// Add an address.
    AddAddress(Address),
    /// Remove an address.
    RemoveAddress(Address),
    /// Add a route.
    AddRoute(Route),
    /// Remove a route.
    RemoveRoute(Route),
    /// Add a permanent neighbour, or a proxy entry.
    AddNeighbour(Neighbour),
    /// Remove one.
    RemoveNeighbour(Neighbour),
    /// Set how a bridge treats a port, all flags at once.
    PortFlags {
        /// The port.
        link: String,
        /// The flags.
        flags: PortFlags,
    },
    /// Which port of the same bridge gets a port's frames while it has no carrier.
    BackupPort {
        /// The port.
        link: String,
        /// The one that stands in for it; none for no such port.
        backup: Option<String>,
    },
    /// Let a VLAN through at a port.
    AddBridgeVlan(BridgeVlan),
    /// Let it through no more.
    RemoveBridgeVlan(BridgeVlan),
    /// Add a static entry to a bridge's forwarding table.
    AddFdb(Fdb),
    /// Remove it.
    RemoveFdb(Fdb),
    /// Filter what a link receives.
    Filter {
        /// The link.
        link: String,
        /// What it may send; none to take the filter away.
        rules: Option<Rules>,
    },
    /// Let the machine's firewall (iptables' FORWARD chain) accept what is forwarded within a bridge.
    AcceptWithin {
        /// The bridge.
        bridge: String,
        /// IPv4 or IPv6.
        family: nft::Family,
        /// Whether the rule is put there or taken away.
        on: bool,
    },
    /// Write a sysctl.
    Sysctl {
        /// Its path below /proc/sys, with slashes (a link's name may have dots): `net/ipv4/conf/eth0.411/proxy_arp`.
        path: String,
        /// What to write.
        value: String,
    },
    /// Put an nftables table of ours in place, instead of one of the same name.
    Table(nft::Table),
    /// Delete an nftables table of ours.
    DropTable(nft::Family, String),
    /// Keep a record: a small file in the run directory.
    Record {
        /// Its name, without slashes.
        name: String,
        /// What is in it; none to delete it.
        content: Option<String>,
    },
}

impl Step {
    /// What takes this step back, in order, given the network as it is before the step.
    ///
    /// Nothing where the step changes nothing, and nothing where the link it changes does not exist before it: what
    /// made the link takes it away again.
    pub fn undo(&self, before: &State) -> Vec<Self> {
        let link = |name: &String| before.links.get(name);
        match self {
            Self::CreateBridge { name, .. }
            | Self::CreateVlan { name, .. }
            | Self::CreateDummy { name }
            | Self::CreateVeth { name, .. }
            | Self::Recreate { name, .. } => match link(name) {
                Some(_) => Vec::new(),
                None => vec![Self::DeleteLink(name.clone())],
            },
            Self::DeleteLink(name) => self.undo_delete(name, before),
            Self::Rename { from, to } => vec![Self::Rename { from: to.clone(), to: from.clone() }],
            Self::SetUp { link: name, up } => match link(name) {
                Some(was) if was.up != *up => vec![Self::SetUp { link: name.clone(), up: was.up }],
                _ => Vec::new(),
            },
            Self::SetMac { link: name, mac } => match link(name).and_then(|was| was.mac) {
                Some(was) if was != *mac => vec![Self::SetMac { link: name.clone(), mac: was }],
                _ => Vec::new(),
            },
            Self::SetMtu { link: name, mtu } => match link(name) {
                Some(was) if was.mtu != *mtu => vec![Self::SetMtu { link: name.clone(), mtu: was.mtu }],
                _ => Vec::new(),
            },
            Self::SetMaster { link: name, master } => match link(name) {
                Some(was) if was.master != *master => {
                    let mut undo = vec![Self::SetMaster { link: name.clone(), master: was.master.clone() }];
                    // A port that leaves its bridge loses its flags, and a new port has the kernel's.
                    if let Some(flags) = was.port.filter(|flags| *flags != PortFlags::default()) {
                        undo.push(Self::PortFlags { link: name.clone(), flags });
                    }
                    if was.master.is_some() {
                        undo.extend(Self::backups_of(name, before));
                    }
                    undo
                }
                _ => Vec::new(),
            },
            Self::SetArp { link: name, arp } => match link(name) {
                Some(was) if was.arp != *arp => vec![Self::SetArp { link: name.clone(), arp: was.arp }],
                _ => Vec::new(),
            },
            Self::VlanFiltering { bridge, on } => match link(bridge).and_then(|was| was.vlan_filtering()) {
                Some(was) if was != *on => vec![Self::VlanFiltering { bridge: bridge.clone(), on: was }],
                _ => Vec::new(),
            },
            Self::AddAddress(address) => match before.addresses.iter().find(|had| had.same_place(address)) {
                Some(_) => Vec::new(),
                None => vec![Self::RemoveAddress(address.clone())],
            },
            Self::RemoveAddress(address) => match before.addresses.iter().find(|had| had.same_place(address)) {
                Some(had) => vec![Self::AddAddress(had.clone())],
                None => Vec::new(),
            },
            Self::AddRoute(route) => match before.routes.iter().find(|had| had.same_place(route)) {
                Some(_) => Vec::new(),
                None => vec![Self::RemoveRoute(route.clone())],
            },
            Self::RemoveRoute(route) => match before.routes.iter().find(|had| had.same_place(route)) {
                Some(had) => vec![Self::AddRoute(had.by_hand())],
                None => Vec::new(),
            },
            Self::AddNeighbour(new) => {
                let had = before
                    .neighbours
                    .iter()
                    .find(|had| had.dev == new.dev && had.address == new.address && had.proxy == new.proxy);
                match had {
                    Some(had) if had == new => Vec::new(),
                    Some(had) => vec![Self::AddNeighbour(had.clone())],
                    None => vec![Self::RemoveNeighbour(new.clone())],
                }
            }
            Self::RemoveNeighbour(old) => present(&before.neighbours, old, Self::AddNeighbour),
            Self::PortFlags { link: name, flags } => match link(name).and_then(|was| was.port) {
                Some(was) if was != *flags => vec![Self::PortFlags { link: name.clone(), flags: was }],
                _ => Vec::new(),
            },
            Self::BackupPort { link: name, backup } => match link(name) {
                Some(was) if was.backup != *backup => {
                    vec![Self::BackupPort { link: name.clone(), backup: was.backup.clone() }]
                }
                _ => Vec::new(),
            },
            Self::AddBridgeVlan(new) => match before.vlans.iter().find(|had| had.dev == new.dev && had.id == new.id) {
                Some(had) if had == new => Vec::new(),
                Some(had) => vec![Self::AddBridgeVlan(had.clone())],
                None => vec![Self::RemoveBridgeVlan(new.clone())],
            },
            Self::RemoveBridgeVlan(old) => match before.vlans.iter().find(|had| had.dev == old.dev && had.id == old.id)
            {
                Some(had) => vec![Self::AddBridgeVlan(had.clone())],
                None => Vec::new(),
            },
            Self::AddFdb(new) if before.fdb.contains(new) => Vec::new(),
            // A station is behind one port, and adding an entry moves it there.
            Self::AddFdb(new) => match before.fdb.iter().find(|had| had.same_place(new)) {
                Some(had) => vec![Self::AddFdb(had.clone())],
                None => vec![Self::RemoveFdb(new.clone())],
            },
            Self::RemoveFdb(old) => present(&before.fdb, old, Self::AddFdb),
            Self::AcceptWithin { bridge, family, on } => {
                let chains = before.forward.iter().filter(|chain| chain.family == *family && chain.is_iptables());
                let had = chains.flat_map(|chain| &chain.ours).any(|(name, _)| name == bridge);
                if had == *on {
                    return Vec::new();
                }
                vec![Self::AcceptWithin { bridge: bridge.clone(), family: *family, on: had }]
            }
            Self::Filter { link: name, .. } => undo_filter(name, before),
            Self::Sysctl { path, value } => match before.sysctls.get(path) {
                Some(was) if was != value => {
                    let mut undo = vec![Self::Sysctl { path: path.clone(), value: was.clone() }];
                    undo.extend(after_forwarding(path, was, before));
                    undo
                }
                _ => Vec::new(),
            },
            Self::Table(table) => undo_table(table.family, &table.name, before),
            Self::DropTable(family, name) => match before.table(*family, name) {
                Some(_) => undo_table(*family, name, before),
                None => Vec::new(),
            },
            Self::Record { name, .. } => {
                vec![Self::Record { name: name.clone(), content: before.records.get(name).cloned() }]
            }
        }
    }

    /// What a port's bridge forgets when it leaves: who stands in for it, and for whom it stands in.
    fn backups_of(name: &str, before: &State) -> Vec<Self> {
        let concerned = |(port, link): &(&String, &LinkState)| {
            link.backup.is_some() && (*port == name || link.backup.as_deref() == Some(name))
        };
        let links = before.links.iter().filter(concerned);
        links.map(|(port, link)| Self::BackupPort { link: port.clone(), backup: link.backup.clone() }).collect()
    }

    fn undo_delete(&self, name: &str, before: &State) -> Vec<Self> {
        let Some(was) = before.links.get(name) else { return Vec::new() };
        let mut undo =
            vec![Self::Recreate { name: name.to_owned(), kind: was.kind.clone(), mac: was.mac, mtu: was.mtu }];
        if let Kind::Veth { peer: Some(peer) } = &was.kind
            && let Some(end) = before.links.get(peer)
        {
            undo.extend(end.mac.map(|mac| Self::SetMac { link: peer.clone(), mac }));
            undo.push(Self::SetMtu { link: peer.clone(), mtu: end.mtu });
            Self::undo_details(peer, before, &mut undo);
        }
        Self::undo_details(name, before, &mut undo);
        undo
    }

    /// What a link that was made again needs besides its kind, address and MTU.
    fn undo_details(name: &str, before: &State, undo: &mut Vec<Self>) {
        let Some(was) = before.links.get(name) else { return };
        let link = || name.to_owned();
        if !was.arp {
            undo.push(Self::SetArp { link: link(), arp: false });
        }
        let conf = [format!("net/ipv4/conf/{name}/"), format!("net/ipv6/conf/{name}/")];
        for (path, value) in &before.sysctls {
            if conf.iter().any(|conf| path.starts_with(conf)) {
                undo.push(Self::Sysctl { path: path.clone(), value: value.clone() });
            }
        }
        if let Some(master) = &was.master {
            undo.push(Self::SetMaster { link: link(), master: Some(master.clone()) });
            if let Some(flags) = was.port.filter(|flags| *flags != PortFlags::default()) {
                undo.push(Self::PortFlags { link: link(), flags });
            }
        }
        if was.up {
            undo.push(Self::SetUp { link: link(), up: true });
        }
    }
}

/// The switches that make a router of the machine, each with the directory whose values it overwrites
/// (Documentation/networking/ip-sysctl.rst).
const FORWARDING: [(&str, &str); 2] =
    [("net/ipv4/ip_forward", "net/ipv4/conf/"), ("net/ipv6/conf/all/forwarding", "net/ipv6/conf/")];

/// What else has to be written after one of the two switches for forwarding went back: they overwrite the setting of every
/// link, and IPv4's the acceptance of redirects.
pub(crate) fn after_forwarding(path: &str, value: &str, before: &State) -> Vec<Step> {
    let Some((_, conf)) = FORWARDING.iter().find(|(switch, _)| *switch == path) else { return Vec::new() };
    let differs = |(path, was): &(&String, &String)| {
        path.starts_with(conf)
            && (path.ends_with("/forwarding") && *was != value || path.ends_with("/all/accept_redirects"))
    };
    let others = before.sysctls.iter().filter(|(other, _)| *other != path).filter(differs);
    others.map(|(path, value)| Step::Sysctl { path: path.clone(), value: value.clone() }).collect()
}

/// The undo of a removal: nothing if it was not there.
fn present<T: PartialEq + Clone>(had: &[T], old: &T, add: impl Fn(T) -> Step) -> Vec<Step> {
    if had.contains(old) { vec![add(old.clone())] } else { Vec::new() }
}

fn undo_filter(name: &str, before: &State) -> Vec<Step> {
    let back = |rules| vec![Step::Filter { link: name.to_owned(), rules }];
    match before.filters.get(name) {
        None => back(None),
        Some(Some(rules)) => back(Some(rules.clone())),
        // Somebody else's doing, or an older release's: it cannot be made again, and ours is better than none.
        Some(None) => Vec::new(),
    }
}

fn undo_table(family: nft::Family, name: &str, before: &State) -> Vec<Step> {
    match before.table(family, name) {
        Some(had) => had.content.iter().cloned().map(Step::Table).collect(),
        None => vec![Step::DropTable(family, name.to_owned())],
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on: &bool| if *on { "on" } else { "off" };
        match self {
            Self::CreateBridge { name, mac, vlan_filtering } => {
                write!(f, "make the bridge {name}")?;
                if let Some(mac) = mac {
                    write!(f, ", address {mac}")?;
                }
                if *vlan_filtering {
                    write!(f, ", VLAN filtering on")?;
                }
                Ok(())
            }
            Self::Recreate { name, .. } => write!(f, "make {name} again"),
            Self::CreateVlan { name, link, id } => write!(f, "make {name}, VLAN {id} of {link}"),
            Self::CreateDummy { name } => write!(f, "make the dummy device {name}"),
            Self::CreateVeth { name, peer } => write!(f, "make the pair {name} and {peer}"),
            Self::DeleteLink(name) => write!(f, "delete {name}"),
            Self::Rename { from, to } => write!(f, "rename {from} to {to}"),
            Self::SetUp { link, up: true } => write!(f, "switch {link} on"),
            Self::SetUp { link, up: false } => write!(f, "switch {link} off"),
            Self::SetMac { link, mac } => write!(f, "give {link} the address {mac}"),
            Self::SetMtu { link, mtu } => write!(f, "set the MTU of {link} to {mtu}"),
            Self::SetMaster { link, master: Some(master) } => write!(f, "put {link} into {master}"),
            Self::SetMaster { link, master: None } => write!(f, "take {link} out of its bridge"),
            Self::SetArp { link, arp } => write!(f, "switch ARP {} on {link}", on(arp)),
            Self::VlanFiltering { bridge, on: filtering } => {
                write!(f, "switch VLAN filtering {} on {bridge}", on(filtering))
            }
            Self::AddAddress(address) => write!(f, "add {address}"),
            Self::RemoveAddress(address) => write!(f, "remove {address}"),
            Self::AddRoute(route) => write!(f, "add {route}"),
            Self::RemoveRoute(route) => write!(f, "remove {route}"),
            Self::AddNeighbour(neighbour) => write!(f, "add {neighbour}"),
            Self::RemoveNeighbour(neighbour) => write!(f, "remove {neighbour}"),
            Self::PortFlags { link, flags } => write!(f, "port {link}: {flags}"),
            Self::BackupPort { link, backup: Some(backup) } => {
                write!(f, "send the frames for {link} to {backup} while it has no carrier")
            }
            Self::BackupPort { link, backup: None } => write!(f, "let no other port stand in for {link}"),
            Self::AddBridgeVlan(vlan) => write!(f, "let {vlan}"),
            Self::RemoveBridgeVlan(vlan) => write!(f, "no longer let {vlan}"),
            Self::AddFdb(entry) => write!(f, "add {entry}"),
            Self::RemoveFdb(entry) => write!(f, "remove {entry}"),
            Self::AcceptWithin { bridge, family, on: true } => {
                write!(f, "let {family} filter FORWARD accept what is forwarded within {bridge}")
            }
            Self::AcceptWithin { bridge, family, on: false } => {
                write!(f, "take back that {family} filter FORWARD accepts what is forwarded within {bridge}")
            }
            Self::Filter { link, rules: Some(_) } => write!(f, "filter what {link} receives"),
            Self::Filter { link, rules: None } => write!(f, "filter what {link} receives no longer"),
            Self::Sysctl { path, value } => write!(f, "write {value} to /proc/sys/{path}"),
            Self::Table(table) => write!(f, "put the nftables table {} {} in place", table.family.name(), table.name),
            Self::DropTable(family, name) => write!(f, "delete the nftables table {} {name}", family.name()),
            Self::Record { name, content: Some(_) } => write!(f, "keep the record {name}"),
            Self::Record { name, content: None } => write!(f, "delete the record {name}"),
        }
    }
}
