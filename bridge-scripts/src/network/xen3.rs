//! Xen 3's layout: eth0 becomes peth0, and dom0 keeps an interface named eth0, which is one end of a pair whose other end,
//! vif0.0, is a port of the bridge. In those days the driver netloop made the pair.

use super::bridge::make_bridge;
use super::moving::Luggage;
use super::record::Record;
use super::refusal::{Refusal, refuse};
use super::settings::{copy_settings, disable_ipv6, give_back, own_link_local, sysctl};
use super::words::bad_name;
use crate::plan::Plan;
use crate::state::{Kind, Mac, State};
use crate::step::Step;

/// The card's name as a port.
pub(super) fn physical(netdev: &str) -> String {
    format!("p{netdev}")
}

pub(super) fn start(state: &State, luggage: &Luggage, mut record: Record, plan: &mut Plan) -> Result<(), Refusal> {
    let (netdev, bridge) = (record.netdev.clone().unwrap_or_default(), record.bridge.clone());
    let (card, port) = (&state.links[&netdev], physical(&netdev));
    if let Some(message) = bad_name(&port) {
        return refuse(format!("layout=xen3 would rename {netdev}: {message}"));
    }
    if state.links.contains_key(&port) {
        return refuse(format!("layout=xen3 would rename {netdev} to {port}, which exists already"));
    }
    if card.master.is_some() {
        return refuse(format!("{netdev} is in a bridge already: take it out first (ip link set {netdev} nomaster)"));
    }
    let above = |kind: &Kind| matches!(kind, Kind::Vlan { link, .. } if *link == netdev);
    if let Some((vlan, _)) =
        state.links.iter().find(|(name, link)| above(&link.kind) && !Luggage::of(state, name).is_empty())
    {
        return refuse(format!(
            "layout=xen3 switches {netdev} off for a moment, and {vlan} on top of it would lose its routes: start {vlan} \
             first (network-bridge netdev={vlan}), or use layout=bridge"
        ));
    }
    // The first that is free: two bridges may have been asked for with the same vifnum.
    let number = (0..).find(|number| !state.links.contains_key(&format!("vif0.{number}"))).unwrap_or(0);
    let own = format!("vif0.{number}");
    record.own_port = Some(own.clone());

    luggage.unload(plan);
    if card.up {
        plan.push(Step::SetUp { link: netdev.clone(), up: false });
    }
    plan.push(Step::Rename { from: netdev.clone(), to: port.clone() });
    plan.push(Step::SetMac { link: port.clone(), mac: Mac::XEN });
    plan.push(Step::SetArp { link: port.clone(), arp: false });
    plan.steps.extend(
        sysctl(state, &port, &disable_ipv6(&port), "1").filter(|_| record.disable_ipv6.as_deref() != Some("1")),
    );
    plan.push(Step::CreateVeth { name: netdev.clone(), peer: own.clone() });
    if let Some(mac) = card.mac {
        plan.push(Step::SetMac { link: netdev.clone(), mac });
    }
    plan.push(Step::SetMac { link: own.clone(), mac: Mac::XEN });
    plan.push(Step::SetArp { link: own.clone(), arp: false });
    if card.mtu != 1500 {
        plan.push(Step::SetMtu { link: own.clone(), mtu: card.mtu });
        plan.push(Step::SetMtu { link: netdev.clone(), mtu: card.mtu });
    }
    copy_settings(state, &netdev, &netdev, plan);
    plan.steps.extend(own_link_local(state, luggage, &netdev, &netdev));
    plan.steps.extend(sysctl(state, &own, &disable_ipv6(&own), "1"));
    if record.made_bridge {
        make_bridge(&bridge, Some(Mac::XEN), plan);
        // Linux answers ARP for every address it has on whatever link the question comes in. The bridge would answer for
        // eth0 with its own address, and who heard that cannot reach eth0 once the bridge is gone.
        plan.push(Step::SetArp { link: bridge.clone(), arp: false });
        plan.steps.extend(sysctl(state, &bridge, &disable_ipv6(&bridge), "1"));
        if card.mtu != 1500 {
            plan.push(Step::SetMtu { link: bridge.clone(), mtu: card.mtu });
        }
    }
    for link in [&port, &own] {
        plan.push(Step::SetMaster { link: link.clone(), master: Some(bridge.clone()) });
    }
    let down = |link: &&String| !state.links.get(*link).is_some_and(|had| had.up) || **link == netdev;
    for link in [&bridge, &port, &own, &netdev].into_iter().filter(down) {
        plan.push(Step::SetUp { link: link.clone(), up: true });
    }
    // A bond keeps its slaves when it is renamed. Saying so again costs nothing, and mends what a driver lost on the way.
    for slave in state.ports_of(&netdev).filter(|_| card.kind == Kind::Bond) {
        plan.push(Step::SetMaster { link: slave.to_owned(), master: Some(port.clone()) });
    }
    luggage.load(plan);
    plan.push(record.keep());
    Ok(())
}

pub(super) fn stop(state: &State, record: &Record, plan: &mut Plan) {
    let (netdev, bridge) = (record.netdev.clone().unwrap_or_default(), &record.bridge);
    let port = physical(&netdev);
    let luggage = Luggage::of(state, &netdev);
    luggage.unload(plan);
    if let Some(own) = record.own_port.as_ref().filter(|own| state.links.contains_key(*own)) {
        plan.push(Step::SetMaster { link: own.clone(), master: None });
        plan.push(Step::DeleteLink(netdev.clone()));
    }
    if let Some(card) = state.links.get(&port) {
        if card.master.as_ref() == Some(bridge) {
            plan.push(Step::SetMaster { link: port.clone(), master: None });
        }
        if card.up {
            plan.push(Step::SetUp { link: port.clone(), up: false });
        }
        if let Some(mac) = record.mac {
            plan.push(Step::SetMac { link: port.clone(), mac });
        }
        plan.push(Step::SetArp { link: port.clone(), arp: true });
        plan.push(Step::Rename { from: port.clone(), to: netdev.clone() });
        for slave in state.ports_of(&port).filter(|_| card.kind == Kind::Bond) {
            plan.push(Step::SetMaster { link: slave.to_owned(), master: Some(netdev.clone()) });
        }
        // Written under its old name, as what was read under the present one.
        let mut renamed = state.clone();
        renamed.sysctls.retain(|path, _| path.split('/').nth(3) != Some(&netdev));
        give_back(&renamed, record, &netdev, plan);
        if record.was_up {
            plan.push(Step::SetUp { link: netdev.clone(), up: true });
        }
        if record.made_netdev {
            plan.push(Step::DeleteLink(netdev.clone()));
        } else {
            luggage.load(plan);
        }
    }
    if record.made_bridge && state.links.contains_key(bridge) {
        plan.push(Step::DeleteLink(bridge.clone()));
    }
}
