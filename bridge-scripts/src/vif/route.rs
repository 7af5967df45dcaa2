//! vif-route: dom0 is the guest's gateway, and answers on the network for it.
//!
//! What the guest's `ip=` says decides how:
//!
//! * `192.168.17.1/24`, an address with its network's prefix: the network is the guest's own. dom0's end is its highest
//!   address, 192.168.17.254/24, which is the guest's gateway.
//! * `10.0.0.5`, an address alone, or `10.1.0.0/16`, a network: a route to it; dom0's end has the address of the gateway
//!   device (`gatewaydev`, or where the default route goes) as a /32. For a single address dom0 answers ARP or neighbour
//!   solicitations there, and knows the guest's Ethernet address for good.
//!
//! Towards the guest dom0 answers every ARP question (proxy_arp), lets in what comes from where it would be sent only
//! (rp_filter), and forwards. In IPv6 the guest's gateway is dom0's link-local address on the interface.

use std::net::IpAddr;

use super::Error;
use super::plan::{Draft, is_link_local};
use super::settings::Settings;
use super::words::Network;
use crate::nft::{Action, Chain, Family, Field, Hook, HookKind, HookPoint, Match, Policy, Rule, Set, SetKind, Table};
use crate::state::{Address, Neighbour, Route, State};
use crate::step::Step;

/// The link-local address that the kernel gives to an interface with Xen's address, fe:ff:ff:ff:ff:ff.
pub(super) const GATEWAY6: &str = "fe80::fcff:ffff:feff:ffff";

/// What the guest may send from, and what not though it is inside: dom0's ends.
pub(super) fn sources(settings: &Settings) -> (Vec<(IpAddr, u8)>, Vec<IpAddr>) {
    // Behind a router a guest's network is all its own.
    let addresses = settings.addresses.iter().map(|network| network.network()).collect();
    let mut except: Vec<IpAddr> = settings.addresses.iter().filter_map(|network| own_end(*network)).collect();
    except.extend(GATEWAY6.parse::<IpAddr>());
    (addresses, except)
}

/// dom0's address in a guest's own network.
fn own_end(network: Network) -> Option<IpAddr> {
    if network.is_in_a_network() { network.other_end() } else { None }
}

/// The gateway device: the one that is named, else the one of the default route.
pub(super) fn gateway(settings: &Settings, before: &State) -> Option<String> {
    if settings.gateway.is_some() {
        return settings.gateway.clone();
    }
    let default = before.routes.iter().filter(|route| route.to.is_none() && route.table == 254);
    let best = default.min_by_key(|route| (route.v6, route.metric.unwrap_or(0)));
    best.and_then(|route| route.dev.clone().or_else(|| route.ways.first().map(|way| way.dev.clone())))
}

pub(super) fn online(draft: &mut Draft<'_>) -> Result<(), Error> {
    let (settings, before) = (draft.settings, draft.before);
    if settings.addresses.is_empty() {
        return Err(Error::Refused(
            "vif-route needs to know where to send: name the guest's addresses with ip=, such as ip=10.0.0.5 or, for \
             a network of its own, ip=192.168.17.1/24"
                .to_owned(),
        ));
    }
    let gateway = gateway(settings, before);
    if let Some(name) = settings.gateway.as_ref().filter(|name| !before.links.contains_key(*name)) {
        return Err(Error::Refused(format!("there is no device {name:?}, which gatewaydev= names")));
    }
    let mut addresses = Vec::new();
    let mut routes = Vec::new();
    let mut proxied = Vec::new();
    for network in &settings.addresses {
        if let Some(end) = own_end(*network) {
            addresses.push((end, network.prefix));
            continue;
        }
        let v6 = network.address.is_ipv6();
        let source = gateway.as_ref().and_then(|dev| address_of(before, dev, v6));
        if !v6 {
            let Some(source) = source else {
                return Err(Error::Refused(no_gateway_address(gateway.as_deref())));
            };
            addresses.push((source, 32));
        }
        routes.push((network.network(), source));
        if network.is_single() {
            proxied.push(network.address);
        }
    }
    addresses.dedup();
    let gone: Vec<Network> = match &draft.old {
        Some(old) => old.addresses.iter().filter(|network| !settings.addresses.contains(network)).copied().collect(),
        None => Vec::new(),
    };
    forget(draft, &gone);
    endpoint(draft, &addresses, &routes, &settings.addresses.clone());
    if let Some(gateway) = gateway {
        for address in proxied {
            // Where the guest's address is in no network of the card, nobody asks for it there.
            let asked = before.addresses.iter().any(|own| own.dev == gateway && inside(address, own));
            let entry = Neighbour { dev: gateway.clone(), address, mac: None, proxy: true };
            if asked && !before.neighbours.contains(&entry) {
                if address.is_ipv6() {
                    draft.machine_sysctl(&format!("net/ipv6/conf/{gateway}/proxy_ndp"), "1");
                }
                draft.push(Step::AddNeighbour(entry));
            }
        }
    }
    Ok(())
}

fn inside(address: IpAddr, own: &Address) -> bool {
    let network = |address| Network { address, prefix: own.prefix }.network();
    address.is_ipv4() == own.local.is_ipv4() && network(address) == network(own.local)
}

fn no_gateway_address(gateway: Option<&str>) -> String {
    match gateway {
        Some(dev) => format!(
            "{dev} has no IPv4 address to be the guest's gateway: give it one, or name another device with gatewaydev="
        ),
        None => {
            "there is no default route to tell which device's address is the guest's gateway: name one with gatewaydev="
                .to_owned()
        }
    }
}

/// A device's first address that others can answer.
fn address_of(before: &State, dev: &str, v6: bool) -> Option<IpAddr> {
    let addresses = before.addresses.iter().filter(|address| address.dev == dev && address.local.is_ipv6() == v6);
    addresses.map(|address| address.local).find(|address| !is_link_local(*address))
}

/// dom0's end of the interface: sysctls, addresses, switched on, routes, neighbours.
pub(super) fn endpoint(
    draft: &mut Draft<'_>,
    addresses: &[(IpAddr, u8)],
    routes: &[((IpAddr, u8), Option<IpAddr>)],
    guests: &[Network],
) {
    let (before, name) = (draft.before, draft.name().to_owned());
    let v4 = guests.iter().any(|network| network.address.is_ipv4());
    let v6 = guests.iter().any(|network| network.address.is_ipv6());
    draft.sysctl("net/ipv4/conf", "rp_filter", "1");
    draft.sysctl("net/ipv4/conf", "proxy_arp", if v4 { "1" } else { "0" });
    draft.sysctl("net/ipv6/conf", "accept_ra", "0");
    draft.sysctl("net/ipv6/conf", "disable_ipv6", if v6 { "0" } else { "1" });
    if v6 {
        // The gateway's address is the same on every guest's interface, and is to work at once.
        draft.sysctl("net/ipv6/conf", "accept_dad", "0");
        draft.machine_sysctl("net/ipv6/conf/all/forwarding", "1");
    }
    if v4 {
        draft.machine_sysctl("net/ipv4/ip_forward", "1");
    }
    let was = draft.was.clone();
    let up = draft.link().is_some_and(|link| link.up);
    let addresses: Vec<Address> = addresses
        .iter()
        .map(|(local, prefix)| {
            let mut address = Address::new(&name, *local, *prefix);
            // IFA_F_NODAD: the guest's network is a cable with two ends.
            address.flags = if local.is_ipv6() { 2 } else { 0 };
            address
        })
        .collect();
    let had = |address: &Address| {
        before.addresses.iter().any(|had| had.dev == was && had.local == address.local && had.prefix == address.prefix)
    };
    let routed = |to: (IpAddr, u8)| before.routes.iter().any(|route| route.uses(&was) && route.to == Some(to));
    let entry = |dev: &str, network: &Network| Neighbour {
        dev: dev.to_owned(),
        address: network.address,
        mac: Some(draft.settings.mac),
        proxy: false,
    };
    let stations: Vec<&Network> = guests.iter().filter(|n| n.is_single() || n.is_in_a_network()).collect();
    let there = addresses.iter().all(had)
        && routes.iter().all(|(to, _)| routed(*to))
        && stations.iter().all(|network| before.neighbours.contains(&entry(&was, network)));
    if up && there && draft.steps.is_empty() && draft.old.as_ref() == Some(draft.settings) {
        return;
    }
    let entries: Vec<Neighbour> = stations.into_iter().map(|network| entry(&name, network)).collect();
    // What was there has been cleared away.
    draft.steps.extend(addresses.into_iter().map(Step::AddAddress));
    draft.push(Step::SetUp { link: name.clone(), up: true });
    for (to, source) in routes {
        let mut route = Route::new(Some(*to), to.0.is_ipv6(), &name);
        route.source = *source;
        draft.push(Step::AddRoute(route));
    }
    draft.steps.extend(entries.into_iter().map(Step::AddNeighbour));
}

/// The name of the table that keeps a guest's addresses for its interface.
pub(super) fn own_table_name(vif: &str) -> String {
    format!("xen-own-{vif}")
}

/// Nobody else sends from a guest's addresses: what comes in by another device with one of them is dropped. dom0's own
/// packets to itself come by the loopback device, and may have the address of its end.
pub(super) fn own_table(vif: &str, addresses: &[(IpAddr, u8)]) -> Table {
    let sets: Vec<Set> = [("addresses4", SetKind::Ipv4), ("addresses6", SetKind::Ipv6)]
        .into_iter()
        .map(|(name, kind)| Set::of(name, kind, addresses.iter().copied()))
        .filter(|set| !set.ranges.is_empty())
        .collect();
    let rule = |set: &Set| {
        let field = if set.kind == SetKind::Ipv4 { Field::IpSaddr } else { Field::Ip6Saddr };
        let elsewhere = [Match::not(Field::Iifname, vif), Match::not(Field::Iifname, "lo")];
        let forged = elsewhere.into_iter().chain([Match::within(field, &set.name)]).collect::<Vec<_>>();
        Rule::new(forged, Action::Drop).counted().comment("a guest's address, from elsewhere")
    };
    let hook = Hook {
        kind: HookKind::Filter,
        point: HookPoint::Prerouting,
        // NF_IP_PRI_RAW of linux/netfilter_ipv4.h: no connection is made of it.
        priority: -300,
        policy: Policy::Accept,
    };
    let chain = Chain { name: "prerouting".to_owned(), hook: Some(hook), rules: sets.iter().map(rule).collect() };
    Table { family: Family::Inet, name: own_table_name(vif), sets, chains: vec![chain] }
}

/// What is left elsewhere of these addresses: entries on the gateway device.
pub(super) fn forget(draft: &mut Draft<'_>, networks: &[Network]) {
    let addresses: Vec<IpAddr> = networks.iter().filter(|n| n.is_single()).map(|n| n.address).collect();
    let ours = |entry: &&Neighbour| entry.proxy && entry.dev != draft.was && addresses.contains(&entry.address);
    let entries: Vec<Neighbour> = draft.before.neighbours.iter().filter(ours).cloned().collect();
    draft.steps.extend(entries.into_iter().map(Step::RemoveNeighbour));
}
