//! A step carried out on paper, and questions to a [`State`].

use super::{Address, Kind, LinkState, OurTable, PortFlags, State};
use crate::nft;
use crate::step::Step;

/// IFLA_BR_VLAN_FILTERING of linux/if_link.h.
pub(crate) const BRIDGE_VLAN_FILTERING: u16 = 7;

impl LinkState {
    /// Whether this bridge looks at VLAN tags; `None` where the kernel cannot, or where it is no bridge.
    pub fn vlan_filtering(&self) -> Option<bool> {
        match &self.kind {
            Kind::Bridge(settings) => settings.get(&BRIDGE_VLAN_FILTERING).map(|value| value.first() == Some(&1)),
            _ => None,
        }
    }
}

impl State {
    /// The addresses of a link, in the kernel's order.
    pub fn addresses_of<'a>(&'a self, dev: &'a str) -> impl DoubleEndedIterator<Item = &'a Address> + 'a {
        self.addresses.iter().filter(move |address| address.dev == dev)
    }

    /// The ports of a bridge, or the slaves of a bond.
    pub fn ports_of<'a>(&'a self, master: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        let belongs = move |link: &LinkState| link.master.as_deref() == Some(master);
        self.links.iter().filter(move |(_, link)| belongs(link)).map(|(name, _)| name.as_str())
    }

    /// One of our nftables tables.
    pub fn table(&self, family: nft::Family, name: &str) -> Option<&OurTable> {
        self.tables.iter().find(|table| table.family == family && table.name == name)
    }

    /// Changes this state as the step would change the network. What the kernel does by itself is left out, except
    /// where a plan would go wrong without it: a link that is renamed or deleted takes along what hangs on it.
    pub fn take(&mut self, step: &Step) {
        match step {
            Step::CreateBridge { name, mac, vlan_filtering } => {
                let settings = [(BRIDGE_VLAN_FILTERING, vec![u8::from(*vlan_filtering)])];
                let kind = Kind::Bridge(settings.into_iter().filter(|_| *vlan_filtering).collect());
                self.create(name, LinkState { mac: *mac, ..LinkState::new(kind) });
            }
            Step::Recreate { name, kind, mac, mtu } => {
                self.create(name, LinkState { mac: *mac, mtu: *mtu, ..LinkState::new(kind.clone()) });
                if let Kind::Veth { peer: Some(peer) } = kind {
                    self.create(peer, LinkState::new(Kind::Veth { peer: Some(name.clone()) }));
                }
            }
            Step::CreateVlan { name, link, id } => {
                let below = self.links.get(link);
                let mtu = below.map_or(1500, |below| below.mtu);
                let mac = below.and_then(|below| below.mac);
                let kind = Kind::Vlan { link: link.clone(), id: *id };
                self.create(name, LinkState { mac, mtu, ..LinkState::new(kind) });
            }
            Step::CreateDummy { name } => self.create(name, LinkState::new(Kind::Dummy)),
            Step::CreateVeth { name, peer } => {
                self.create(name, LinkState::new(Kind::Veth { peer: Some(peer.clone()) }));
                self.create(peer, LinkState::new(Kind::Veth { peer: Some(name.clone()) }));
            }
            Step::DeleteLink(name) => self.delete(name),
            Step::Rename { from, to } => self.rename(from, to),
            Step::SetUp { link, up } => self.change(link, |link| link.up = *up),
            Step::SetMac { link, mac } => self.change(link, |link| link.mac = Some(*mac)),
            Step::SetMtu { link, mtu } => self.change(link, |link| link.mtu = *mtu),
            Step::SetMaster { link, master } => {
                let bridge =
                    master.as_ref().and_then(|master| self.links.get(master)).is_some_and(LinkState::is_bridge);
                self.change(link, |link| {
                    if link.master != *master {
                        link.master.clone_from(master);
                        link.port = bridge.then(PortFlags::default);
                        link.backup = None;
                    }
                });
                let name = link;
                let stands_in = |link: &&mut LinkState| link.backup.as_ref() == Some(name) && link.master != *master;
                self.links.values_mut().filter(stands_in).for_each(|link| link.backup = None);
            }
            Step::SetArp { link, arp } => self.change(link, |link| link.arp = *arp),
            Step::VlanFiltering { bridge, on } => self.change(bridge, |link| {
                if let Kind::Bridge(settings) = &mut link.kind {
                    settings.insert(BRIDGE_VLAN_FILTERING, vec![u8::from(*on)]);
                }
            }),
            Step::AddAddress(new) => {
                self.addresses.retain(|had| !had.same_place(new));
                self.addresses.push(new.clone());
            }
            Step::RemoveAddress(old) => self.addresses.retain(|had| !had.same_place(old)),
            Step::AddRoute(new) => {
                self.routes.retain(|had| !had.same_place(new));
                self.routes.push(new.clone());
            }
            Step::RemoveRoute(old) => self.routes.retain(|had| !had.same_place(old)),
            Step::AddNeighbour(new) => {
                self.neighbours
                    .retain(|had| had.dev != new.dev || had.address != new.address || had.proxy != new.proxy);
                self.neighbours.push(new.clone());
            }
            Step::RemoveNeighbour(old) => {
                self.neighbours
                    .retain(|had| had.dev != old.dev || had.address != old.address || had.proxy != old.proxy);
            }
            Step::PortFlags { link, flags } => self.change(link, |link| link.port = Some(*flags)),
            Step::BackupPort { link, backup } => self.change(link, |link| link.backup.clone_from(backup)),
            Step::AddBridgeVlan(new) => {
                self.vlans.retain(|had| had.dev != new.dev || had.id != new.id);
                self.vlans.push(new.clone());
            }
            Step::RemoveBridgeVlan(old) => self.vlans.retain(|had| had.dev != old.dev || had.id != old.id),
            Step::AddFdb(new) => {
                self.fdb.retain(|had| !had.same_place(new));
                self.fdb.push(new.clone());
            }
            Step::RemoveFdb(old) => self.fdb.retain(|had| had != old),
            Step::AcceptWithin { bridge, family, on } => {
                for chain in self.forward.iter_mut().filter(|chain| chain.family == *family && chain.is_iptables()) {
                    chain.ours.retain(|(name, _)| name != bridge);
                    if *on {
                        // Its number is the kernel's to give.
                        chain.ours.push((bridge.clone(), 0));
                    }
                }
            }
            Step::Filter { link, rules: Some(rules) } => {
                self.filters.insert(link.clone(), Some(rules.clone()));
            }
            Step::Filter { link, rules: None } => {
                self.filters.remove(link);
            }
            Step::Sysctl { path, value } => {
                self.sysctls.insert(path.clone(), value.clone());
            }
            Step::Table(table) => {
                self.tables.retain(|had| had.family != table.family || had.name != table.name);
                let (family, name) = (table.family, table.name.clone());
                self.tables.push(OurTable { family, name, content: Some(table.clone()) });
            }
            Step::DropTable(family, name) => self.tables.retain(|had| had.family != *family || had.name != *name),
            Step::Record { name, content: Some(content) } => {
                self.records.insert(name.clone(), content.clone());
            }
            Step::Record { name, content: None } => {
                self.records.remove(name);
            }
        }
    }

    fn create(&mut self, name: &str, link: LinkState) {
        self.links.entry(name.to_owned()).or_insert(link);
    }

    fn change(&mut self, name: &str, change: impl FnOnce(&mut LinkState)) {
        if let Some(link) = self.links.get_mut(name) {
            change(link);
        }
    }

    fn delete(&mut self, name: &str) {
        let gone = self.links.remove(name);
        if let Some(Kind::Veth { peer: Some(peer) }) = gone.map(|link| link.kind) {
            self.links.remove(&peer);
            self.forget(&peer);
        }
        self.links.retain(|_, link| !matches!(&link.kind, Kind::Vlan { link, .. } if link == name));
        self.forget(name);
    }

    fn forget(&mut self, name: &str) {
        self.addresses.retain(|address| address.dev != name);
        self.routes.retain(|route| !route.uses(name));
        self.neighbours.retain(|neighbour| neighbour.dev != name);
        self.fdb.retain(|entry| entry.dev != name);
        self.vlans.retain(|vlan| vlan.dev != name);
        self.filters.remove(name);
        self.sysctls.retain(|path, _| path.split('/').nth(3) != Some(name));
        for link in self.links.values_mut() {
            if link.master.as_deref() == Some(name) {
                (link.master, link.port, link.backup) = (None, None, None);
            }
            if link.backup.as_deref() == Some(name) {
                link.backup = None;
            }
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        let Some(link) = self.links.remove(from) else { return };
        self.links.insert(to.to_owned(), link);
        let change = |name: &mut String| {
            if name == from {
                to.clone_into(name);
            }
        };
        for link in self.links.values_mut() {
            link.master.as_mut().map(change);
            link.backup.as_mut().map(change);
            match &mut link.kind {
                Kind::Vlan { link, .. } => change(link),
                Kind::Veth { peer: Some(peer) } => change(peer),
                _ => (),
            }
        }
        self.addresses.iter_mut().for_each(|address| change(&mut address.dev));
        for route in &mut self.routes {
            route.dev.as_mut().map(change);
            route.ways.iter_mut().for_each(|way| change(&mut way.dev));
        }
        self.neighbours.iter_mut().for_each(|neighbour| change(&mut neighbour.dev));
        self.fdb.iter_mut().for_each(|entry| change(&mut entry.dev));
        self.vlans.iter_mut().for_each(|vlan| change(&mut vlan.dev));
        if let Some(rules) = self.filters.remove(from) {
            self.filters.insert(to.to_owned(), rules);
        }
        let renamed = |path: String| {
            let mut parts: Vec<&str> = path.split('/').collect();
            if let Some(name) = parts.get_mut(3).filter(|name| **name == from) {
                *name = to;
            }
            parts.join("/")
        };
        self.sysctls =
            std::mem::take(&mut self.sysctls).into_iter().map(|(path, value)| (renamed(path), value)).collect();
    }
}
