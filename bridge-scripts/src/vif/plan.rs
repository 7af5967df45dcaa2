//! What has to be done for one interface, as a pure function of what is asked and what there is.
//!
//! The interface is switched on last, after its filter is in place, and stays off if anything fails. A plan for what is
//! as it should be already is empty.

use std::net::IpAddr;

use super::settings::Settings;
use super::{Error, Script, dnsmasq, forward, nat, pair, route};
use crate::antispoof::Rules;
use crate::nft::{Family, Table};
use crate::plan::Plan;
use crate::state::{BridgeVlan, Fdb, LinkState, Mac, PortFlags, Route, State};
use crate::step::Step;

/// Who made a route: the kernel (RTPROT_KERNEL).
const KERNEL: u8 = 2;

/// Where the settings of an interface are kept while it is online: offline, XenStore may have forgotten them.
pub(super) fn record_name(vif: &str) -> String {
    format!("vif-{vif}.json")
}

/// A plan that grows, and the network as it will be.
pub(super) struct Draft<'a> {
    pub(super) settings: &'a Settings,
    pub(super) before: &'a State,
    /// The device's name in `before`.
    pub(super) was: String,
    pub(super) steps: Vec<Step>,
    pub(super) notes: Vec<String>,
    /// What was asked when it came online last, if it did.
    pub(super) old: Option<Settings>,
}

impl Draft<'_> {
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(super) fn link(&self) -> Option<&LinkState> {
        self.before.links.get(&self.was)
    }

    pub(super) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// A sysctl of this interface, if the kernel has it and it is not so already. `of` is `net/ipv4/conf` and the like.
    pub(super) fn sysctl(&mut self, of: &str, leaf: &str, value: &str) {
        let old = format!("{of}/{}/{leaf}", self.was);
        if self.before.sysctls.get(&old).is_some_and(|was| was != value) {
            let path = format!("{of}/{}/{leaf}", self.settings.name);
            self.push(Step::Sysctl { path, value: value.to_owned() });
        }
    }

    /// A sysctl of the machine, likewise.
    pub(super) fn machine_sysctl(&mut self, path: &str, value: &str) {
        if self.before.sysctls.get(path).is_some_and(|was| was != value) {
            self.push(Step::Sysctl { path: path.to_owned(), value: value.to_owned() });
        }
    }

    pub(super) fn table(&mut self, table: Table) {
        let had = self.before.table(table.family, &table.name).and_then(|had| had.content.as_ref());
        if had != Some(&table) {
            self.push(Step::Table(table));
        }
    }

    /// Takes away the filter of the interface, which is called `name` by now.
    fn drop_filter(&mut self, name: &str) {
        if self.before.filters.contains_key(&self.was) {
            self.push(Step::Filter { link: name.to_owned(), rules: None });
        }
    }

    /// Takes away the table in which former versions had the filter.
    fn drop_filter_table(&mut self) {
        for name in [self.settings.name.clone(), self.settings.vif.clone()] {
            let name = format!("xen-{name}");
            if !self.steps.contains(&Step::DropTable(Family::Netdev, name.clone())) {
                self.drop_table(Family::Netdev, &name);
            }
        }
    }

    pub(super) fn drop_table(&mut self, family: Family, name: &str) {
        if self.before.table(family, name).is_some() {
            self.push(Step::DropTable(family, name.to_owned()));
        }
    }
}

/// Sysctls of an interface that plans look at.
pub(super) const SYSCTLS: [(&str, &str); 5] = [
    ("net/ipv4/conf", "proxy_arp"),
    ("net/ipv4/conf", "rp_filter"),
    ("net/ipv6/conf", "disable_ipv6"),
    ("net/ipv6/conf", "accept_ra"),
    ("net/ipv6/conf", "accept_dad"),
];
/// Sysctls of the machine that plans look at.
pub(super) const MACHINE_SYSCTLS: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Brings an interface online. The settings name the bridge, see [`bridge_of`].
///
/// # Errors
/// When what is asked cannot be done here, and why.
pub fn online(settings: &Settings, before: &State) -> Result<Plan, Error> {
    let (vif, name) = (&settings.vif, &settings.name);
    let renamed = vif != name;
    let was = match (before.links.contains_key(vif), renamed && before.links.contains_key(name)) {
        (true, true) => return Err(Error::Taken { vif: vif.clone(), name: name.clone() }),
        (true, false) => vif.clone(),
        // This program ran before: only then has the other name our record.
        (false, true) if before.records.contains_key(&record_name(vif)) => name.clone(),
        _ => return Err(Error::NoVif(vif.clone())),
    };
    let old = before.records.get(&record_name(vif)).and_then(|text| serde_json::from_str(text).ok());
    let mut draft = Draft { settings, before, was, steps: Vec::new(), notes: Vec::new(), old };
    if draft.was != *name {
        draft.push(Step::Rename { from: draft.was.clone(), to: name.clone() });
    }
    filter(&mut draft);
    if draft.link().is_some_and(|link| link.mac != Some(Mac::XEN)) {
        draft.push(Step::SetMac { link: name.clone(), mac: Mac::XEN });
    }
    match settings.script {
        Script::Bridge => bridge(&mut draft)?,
        Script::Route | Script::Nat => {
            if settings.vlans.is_some() {
                return Err(Error::Refused("vlan= is about ports of a bridge: use the script vif-bridge".to_owned()));
            }
            if let Some(mtu) = settings.mtu {
                set_mtu(&mut draft, mtu);
            }
            if draft.link().is_some_and(|link| link.master.is_some()) {
                draft.push(Step::SetMaster { link: name.clone(), master: None });
            }
            if settings.script == Script::Nat { nat::online(&mut draft)? } else { route::online(&mut draft)? }
        }
    }
    let up = draft.link().is_some_and(|link| link.up);
    let switched = draft.steps.iter().any(|step| matches!(step, Step::SetUp { .. }));
    let routed = settings.script != Script::Bridge;
    let mut first = if routed && switched { clear(&draft) } else { Vec::new() };
    if up && (switched || !routed && !draft.steps.is_empty()) {
        // Nothing is changed under a guest that sends.
        first.push(Step::SetUp { link: draft.was.clone(), up: false });
    }
    draft.steps.splice(0..0, first);
    if !switched && (!up || settings.script == Script::Bridge && !draft.steps.is_empty()) {
        draft.push(Step::SetUp { link: name.clone(), up: true });
    }
    let content = serde_json::to_string(settings).map_err(|error| Error::Refused(error.to_string()))?;
    let record = record_name(vif);
    if before.records.get(&record) != Some(&content) {
        draft.push(Step::Record { name: record, content: Some(content) });
    }
    Ok(finish(draft, "online"))
}

/// Takes an interface offline; one that is gone already leaves rules, routes of others and records behind, which are
/// removed too.
pub fn offline(settings: &Settings, before: &State) -> Plan {
    let names = [&settings.name, &settings.vif];
    let name = names.into_iter().find(|name| before.links.contains_key(*name));
    let was = name.unwrap_or(&settings.name).clone();
    let mut draft = Draft { settings, before, was: was.clone(), steps: Vec::new(), notes: Vec::new(), old: None };
    if let Some(link) = before.links.get(&was) {
        if settings.script != Script::Bridge {
            draft.steps = clear(&draft);
        }
        if link.up {
            draft.push(Step::SetUp { link: was.clone(), up: false });
        }
        if settings.script == Script::Bridge {
            let entries = before.fdb.iter().filter(|entry| entry.dev == was && entry.mac == settings.mac).cloned();
            draft.steps.extend(entries.map(Step::RemoveFdb));
            if link.master.is_some() {
                draft.push(Step::SetMaster { link: was, master: None });
            }
        }
    }
    for name in names.into_iter().filter(|name| before.filters.contains_key(*name)) {
        let step = Step::Filter { link: name.clone(), rules: None };
        if !draft.steps.contains(&step) {
            draft.push(step);
        }
    }
    if draft.was == settings.name && settings.name != settings.vif && before.links.contains_key(&settings.name) {
        // As the backend knows it, so that it can come online again.
        draft.push(Step::Rename { from: settings.name.clone(), to: settings.vif.clone() });
    }
    if settings.script != Script::Bridge {
        route::forget(&mut draft, &settings.addresses);
        nat::forget(&mut draft);
        dnsmasq::forget(&mut draft);
    }
    for name in names {
        let table = route::own_table_name(name);
        if !draft.steps.contains(&Step::DropTable(Family::Inet, table.clone())) {
            draft.drop_table(Family::Inet, &table);
        }
    }
    draft.drop_filter_table();
    forward::offline(&mut draft);
    let record = record_name(&settings.vif);
    if before.records.contains_key(&record) {
        draft.push(Step::Record { name: record, content: None });
    }
    finish(draft, "offline")
}

/// Takes away what is routed through the interface, before it is switched off: that would take it away too, but behind the
/// journal's back.
fn clear(draft: &Draft<'_>) -> Vec<Step> {
    let Draft { before, was, .. } = draft;
    let own = |route: &&Route| route.uses(was) && route.table == 254 && route.protocol != KERNEL;
    let mut steps: Vec<Step> = before.routes.iter().filter(own).cloned().map(Step::RemoveRoute).collect();
    let entries = before.neighbours.iter().filter(|entry| entry.dev == *was).cloned();
    steps.extend(entries.map(Step::RemoveNeighbour));
    // The last first: the first of a network takes the others with it, and they shall come back in their order.
    let addresses = before.addresses.iter().rev().filter(|own| own.dev == *was && !is_link_local(own.local)).cloned();
    steps.extend(addresses.map(Step::RemoveAddress));
    steps
}

fn finish(draft: Draft<'_>, event: &str) -> Plan {
    let settings = draft.settings;
    let mut plan = Plan::new(format!("{} {event} {}", settings.script.name(), settings.vif));
    plan.steps = draft.steps;
    plan.notes = draft.notes;
    plan
}

pub(super) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn set_mtu(draft: &mut Draft<'_>, mtu: u32) {
    if draft.link().is_some_and(|link| link.mtu != mtu) {
        let link = draft.name().to_owned();
        draft.push(Step::SetMtu { link, mtu });
    }
}

/// The addresses the guest may send from, and those it must not use though they are among them.
pub(super) fn sources(settings: &Settings) -> (Vec<(IpAddr, u8)>, Vec<IpAddr>) {
    match settings.script {
        Script::Bridge => (settings.addresses.iter().map(|network| network.source()).collect(), Vec::new()),
        Script::Route => route::sources(settings),
        Script::Nat => nat::sources(settings),
    }
}

/// The filter of what the guest sends, or a loud word that there is none.
fn filter(draft: &mut Draft<'_>) {
    let settings = draft.settings;
    if !settings.antispoof {
        draft.notes.push(format!(
            "WARNING: antispoof=off: domain {} can send from any address on {}, advertise routers and answer DHCP",
            settings.domid, settings.name
        ));
        draft.drop_filter(&settings.name);
        draft.drop_filter_table();
        draft.drop_table(Family::Inet, &route::own_table_name(&settings.name));
        return;
    }
    let mut rules = Rules::new(settings.mac);
    (rules.addresses, rules.except) = sources(settings);
    if settings.script != Script::Bridge {
        draft.table(route::own_table(&settings.name, &rules.addresses));
    }
    if let Some(vlans) = &settings.vlans {
        rules.vlans.tagged = vlans.tagged_ranges();
    }
    if draft.before.filters.get(&draft.was).and_then(Option::as_ref) != Some(&rules) {
        draft.push(Step::Filter { link: settings.name.clone(), rules: Some(rules) });
    }
    draft.drop_filter_table();
}

/// The bridge of an interface: the one that is named; if none is, xenbr0 as xl has it, or the machine's first; `ethN` for an `xenbrN` that does
/// not exist, as the stock script has it for configurations of old.
///
/// # Errors
/// When there is none, or it is none of the kernel's.
pub fn bridge_of(settings: &Settings, before: &State) -> Result<String, Error> {
    let is_bridge = |name: &str| before.links.get(name).is_some_and(LinkState::is_bridge);
    let Some(name) = &settings.bridge else {
        let mut bridges = before.links.keys().filter(|name| is_bridge(name));
        let usual = is_bridge("xenbr0").then(|| "xenbr0".to_owned());
        return usual.or_else(|| bridges.next().cloned()).ok_or(Error::NoBridge);
    };
    if is_bridge(name) {
        return Ok(name.clone());
    }
    if let Some(link) = before.links.get(name) {
        return Err(Error::NotABridge { name: name.clone(), kind: format!("{:?}", link.kind) });
    }
    let other = name.strip_prefix("xenbr").map(|number| format!("eth{number}")).filter(|other| is_bridge(other));
    other.ok_or_else(|| Error::BridgeMissing(name.clone()))
}

fn bridge(draft: &mut Draft<'_>) -> Result<(), Error> {
    let (settings, before) = (draft.settings, draft.before);
    let name = settings.name.clone();
    let bridge_name = bridge_of(settings, before)?;
    let bridge = &before.links[&bridge_name];
    let was = draft.was.clone();
    // A port has no addresses of its own, and no business with IP.
    for address in before.addresses.iter().filter(|address| address.dev == was) {
        let address = crate::state::Address { dev: name.clone(), ..address.clone() };
        draft.push(Step::RemoveAddress(address));
    }
    draft.sysctl("net/ipv6/conf", "disable_ipv6", "1");
    set_mtu(draft, settings.mtu.unwrap_or(bridge.mtu));
    let filtering = match (&settings.vlans, bridge.vlan_filtering()) {
        (None, filtering) => filtering == Some(true),
        (Some(_), Some(true)) => true,
        (Some(_), None) => {
            return Err(Error::Refused(format!(
                "vlan= needs VLAN filtering, which this kernel's bridges do not have (CONFIG_BRIDGE_VLAN_FILTERING). \
                 Without it: a VLAN of the card (network-vlan) and a bridge for it, then bridge={bridge_name}.ID"
            )));
        }
        (Some(_), Some(false)) => {
            let others: Vec<&str> = before.ports_of(&bridge_name).filter(|port| *port != was).collect();
            if !others.is_empty() {
                return Err(Error::Refused(format!(
                    "vlan= needs VLAN filtering on {bridge_name}, which is off, and switching it on would cut off the \
                     tagged traffic of its other ports ({}). Say which VLANs those are in (`bridge vlan add dev PORT \
                     vid ID`), then `ip link set {bridge_name} type bridge vlan_filtering 1`",
                    others.join(", ")
                )));
            }
            draft.push(Step::VlanFiltering { bridge: bridge_name.clone(), on: true });
            true
        }
    };
    let in_place = draft.link().is_some_and(|link| link.master.as_deref() == Some(&bridge_name));
    if !in_place {
        draft.push(Step::SetMaster { link: name.clone(), master: Some(bridge_name.clone()) });
    }
    let emulated = pair::is_emulated(settings);
    let mut flags = port_flags(settings.antispoof);
    flags.learning |= emulated;
    let had = if in_place { draft.link().and_then(|link| link.port) } else { None };
    if had.unwrap_or_default() != flags {
        draft.push(Step::PortFlags { link: name.clone(), flags });
    }
    vlans(draft, in_place);
    forward::online(draft, &bridge_name);
    if settings.antispoof {
        // With VLANs an entry is of one of them; without, of all.
        let ids = match &settings.vlans {
            Some(vlans) if filtering => vlans.all().into_iter().map(|(id, ..)| Some(id)).collect(),
            _ => vec![None],
        };
        let other = pair::other(settings, &bridge_name, before);
        let (live, was, in_place) = match &other {
            Some(paravirtual) if emulated => (paravirtual.clone(), paravirtual.clone(), true),
            _ => (name.clone(), was, in_place),
        };
        for vlan in ids {
            let entry = Fdb { dev: live.clone(), mac: settings.mac, vlan, sticky: other.is_some() };
            if !in_place || !pair::has(before, &Fdb { dev: was.clone(), ..entry.clone() }) {
                draft.push(Step::AddFdb(entry));
            }
        }
        if let Some(other) = other {
            let backup = Some(if emulated { name } else { other });
            let had = before.links.get(&was).filter(|_| in_place).and_then(|link| link.backup.as_ref());
            if had != backup.as_ref() {
                draft.push(Step::BackupPort { link: live, backup });
            }
        }
    }
    Ok(())
}

/// How the bridge treats a guest's port. Guests talk to each other, so it is not isolated. With the guest's one address
/// known, nothing is learnt, and nothing that is not the guest's is sent there.
pub(super) fn port_flags(antispoof: bool) -> PortFlags {
    if !antispoof {
        return PortFlags::default();
    }
    PortFlags { guard: true, root_block: true, learning: false, flood: false, ..PortFlags::default() }
}

/// The port's VLANs, where they are named.
fn vlans(draft: &mut Draft<'_>, in_place: bool) {
    let Some(vlans) = &draft.settings.vlans else { return };
    let name = draft.name().to_owned();
    let wanted: Vec<BridgeVlan> = vlans
        .all()
        .into_iter()
        .map(|(id, pvid, untagged)| BridgeVlan { dev: name.clone(), id, pvid, untagged })
        .collect();
    let had: Vec<BridgeVlan> = if in_place {
        let was = &draft.was;
        let own = draft.before.vlans.iter().filter(|vlan| vlan.dev == *was);
        own.map(|vlan| BridgeVlan { dev: name.clone(), ..vlan.clone() }).collect()
    } else {
        // The bridge puts a new port into VLAN 1.
        vec![BridgeVlan { dev: name, id: 1, pvid: true, untagged: true }]
    };
    for vlan in &had {
        if !wanted.iter().any(|other| other.id == vlan.id) {
            draft.push(Step::RemoveBridgeVlan(vlan.clone()));
        }
    }
    for vlan in wanted {
        if !had.contains(&vlan) {
            draft.push(Step::AddBridgeVlan(vlan));
        }
    }
}
