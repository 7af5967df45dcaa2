//! Plans from made-up machines: what the test machine's kernel does not have (VLANs, bonds, wireless cards, a root over NFS).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;

use super::bridge::{self, Request};
use super::record::Layout;
use super::settings;
use super::vlan::{self, VlanRequest};
use crate::plan::Plan;
use crate::state::{Address, Kind, LinkState, Mac, Route, State};
use crate::step::Step;

/// A machine with a loopback device and eth0, which has an address and the default route.
fn machine() -> State {
    let mut state = State::default();
    let mac = |last| Some(Mac([0, 0x16, 0x3e, 0, 0, last]));
    state.links.insert("lo".into(), LinkState { loopback: true, up: true, ..LinkState::new(Kind::Physical) });
    for (name, last) in [("eth0", 1), ("eth1", 2)] {
        state.links.insert(name.into(), LinkState { mac: mac(last), up: true, ..LinkState::new(Kind::Physical) });
    }
    state.addresses.push(Address::new("eth0", "192.0.2.2".parse().unwrap(), 24));
    state.addresses.push(Address::new("eth0", "2001:db8::2".parse().unwrap(), 64));
    let gateway = Some("192.0.2.1".parse().unwrap());
    state.routes.push(Route { gateway, scope: 0, ..Route::new(None, false, "eth0") });
    for path in settings::sysctls(["lo", "eth0", "eth1"]) {
        state.sysctls.insert(path, "0".into());
    }
    state
}

fn request(netdev: &str) -> Request {
    Request { netdev: Some(netdev.into()), bridge: Some("xenbr0".into()), ..Request::default() }
}

/// Undoing on paper what was done on paper leaves nothing behind.
fn undone(plan: &Plan, before: &State) -> State {
    let mut state = plan.outcome(before);
    for steps in plan.undo(before).iter().rev() {
        steps.iter().for_each(|step| state.take(step));
    }
    // In lists the order is the kernel's, which paper does not know.
    state.addresses.sort_by_key(|address| address.local);
    // Of links that came and went something may have been written.
    state.sysctls.retain(|path, _| before.sysctls.contains_key(path));
    state
}

fn steps(plan: &Plan) -> String {
    plan.to_string()
}

#[test]
fn every_plan_can_be_undone_on_paper() {
    let mut before = machine();
    before.addresses.sort_by_key(|address| address.local);
    for layout in [Layout::Bridge, Layout::Xen3] {
        let start = bridge::start(&before, &Request { layout: Some(layout), ..request("eth0") }).unwrap();
        assert_eq!(undone(&start, &before), before, "{layout:?} start");
        let mut started = start.outcome(&before);
        started.addresses.sort_by_key(|address| address.local);
        let stop = bridge::stop(&started, &request("eth0")).unwrap();
        assert_eq!(undone(&stop, &started).links, started.links, "{layout:?} stop");
        let mut stopped = stop.outcome(&started);
        stopped.addresses.sort_by_key(|address| address.local);
        assert_eq!(
            (&stopped.links, &stopped.addresses, &stopped.routes),
            (&before.links, &before.addresses, &before.routes)
        );
        assert_eq!(stopped.records, BTreeMap::new());
        assert_eq!(bridge::start(&started, &Request { layout: Some(layout), ..request("eth0") }).unwrap().steps, []);
    }
}

#[test]
fn the_card_is_that_of_the_default_route() {
    let pair = bridge::resolve(&machine(), &Request::default()).unwrap();
    assert_eq!((pair.netdev.as_str(), pair.bridge.as_str()), ("eth0", "xenbr0"));
    let pair = bridge::resolve(&machine(), &Request { vifnum: Some(1), ..Request::default() }).unwrap();
    assert_eq!((pair.netdev.as_str(), pair.bridge.as_str()), ("eth1", "xenbr1"));
}

#[test]
fn a_wireless_card_and_a_root_over_the_network_are_refused() {
    let mut state = machine();
    state.links.get_mut("eth1").unwrap().wireless = true;
    let said = bridge::start(&state, &request("eth1")).unwrap_err().to_string();
    assert!(said.contains("wireless") && said.contains("network-nat"), "{said}");
    state.root_on_network = true;
    let said = bridge::start(&state, &request("eth0")).unwrap_err().to_string();
    assert!(said.contains("--confirm"), "{said}");
    assert!(bridge::start(&state, &Request { safe: true, ..request("eth0") }).is_ok());
}

#[test]
fn a_bond_is_a_card_and_keeps_its_slaves() {
    let mut state = machine();
    let mac = state.links["eth0"].mac;
    state.links.insert("bond0".into(), LinkState { mac, up: true, ..LinkState::new(Kind::Bond) });
    for slave in ["eth0", "eth1"] {
        state.links.get_mut(slave).unwrap().master = Some("bond0".into());
    }
    state.addresses.iter_mut().for_each(|address| address.dev = "bond0".into());
    state.routes.iter_mut().for_each(|route| route.dev = Some("bond0".into()));
    let said = bridge::start(&state, &request("eth1")).unwrap_err().to_string();
    assert!(said.contains("in bond0 already"), "{said}");
    for layout in [Layout::Bridge, Layout::Xen3] {
        let start = bridge::start(&state, &Request { layout: Some(layout), ..request("bond0") }).unwrap();
        let started = start.outcome(&state);
        let bond = if layout == Layout::Xen3 { "pbond0" } else { "bond0" };
        assert_eq!(started.ports_of(bond).collect::<Vec<_>>(), ["eth0", "eth1"], "{}", steps(&start));
        assert_eq!(started.links[bond].master.as_deref(), Some("xenbr0"));
        let stopped = bridge::stop(&started, &request("bond0")).unwrap().outcome(&started);
        assert_eq!(stopped.links, state.links, "{layout:?}");
    }
}

#[test]
fn vlans_of_the_handbooks() {
    let mut state = machine();
    state.links.get_mut("eth0").unwrap().mtu = 1492;
    let asked = VlanRequest {
        netdev: Some("eth0".into()),
        ids: vec![411, 412],
        bridge: "xenbr".into(),
        antispoof: None,
        force: false,
        safe: false,
    };
    let start = vlan::start(&state, &asked).unwrap();
    let started = start.outcome(&state);
    for (vlan, bridge) in [("eth0.411", "xenbr411"), ("eth0.412", "xenbr412")] {
        assert_eq!(started.links[vlan].master.as_deref(), Some(bridge), "{}", steps(&start));
        assert_eq!((started.links[vlan].mtu, started.links[bridge].mtu), (1492, 1492));
        assert!(started.links[vlan].up && started.links[bridge].up);
    }
    assert_eq!(vlan::start(&started, &asked).unwrap().steps, []);
    let stop = vlan::stop(&started, &VlanRequest { ids: Vec::new(), ..asked }).unwrap();
    assert_eq!(stop.outcome(&started).links, state.links, "{}", steps(&stop));
    // The same by network-bridge, as the notes of 2008 have it.
    let request = Request { vifnum: Some(0), bridge: Some("xenbr411".into()), ..request("eth0.411") };
    let plan = bridge::start(&state, &request).unwrap();
    assert!(plan.steps.contains(&Step::CreateVlan { name: "eth0.411".into(), link: "eth0".into(), id: 411 }));
    let said = vlan::start(
        &state,
        &VlanRequest {
            ids: vec![7],
            netdev: Some("eth9".into()),
            bridge: "b".into(),
            antispoof: None,
            force: false,
            safe: false,
        },
    );
    assert!(said.unwrap_err().to_string().contains("no network device"));
}

#[test]
fn routes_through_nexthop_objects_are_refused() {
    let mut state = machine();
    state.routes[0].rest.push((30, vec![1, 0, 0, 0]));
    let said = bridge::start(&state, &request("eth0")).unwrap_err().to_string();
    assert!(said.contains("nexthop object"), "{said}");
}

#[test]
fn routes_of_other_links_that_send_from_a_moved_address_come_back() {
    let mut state = machine();
    let source = Some("192.0.2.2".parse().unwrap());
    let to = Some(("203.0.113.0".parse().unwrap(), 24));
    let other = Route { source, ..Route::new(to, false, "eth1") };
    state.routes.push(other.clone());
    let plan = bridge::start(&state, &request("eth0")).unwrap();
    let at = |step: &Step| plan.steps.iter().position(|other| other == step);
    let (gone, back) = (at(&Step::RemoveRoute(other.clone())), at(&Step::AddRoute(other)));
    assert!(gone.is_some() && gone < back, "{}", steps(&plan));
}

/// As with networkd, NetworkManager and ifupdown, after they were told to make it.
#[test]
fn a_bridge_that_a_manager_made_is_left_alone() {
    let mut state = machine();
    state.links.insert("xenbr0".into(), LinkState { up: true, ..LinkState::new(Kind::Bridge(BTreeMap::new())) });
    state.routes = vec![Route::new(None, false, "xenbr0")];
    let plan = bridge::start(&state, &Request::default()).unwrap();
    assert!(plan.steps.is_empty() && plan.notes.iter().any(|note| note.contains("somebody else made")), "{plan}");
    for request in [
        Request { netdev: Some("xenbr0".into()), ..Request::default() },
        Request { layout: Some(Layout::Xen3), ..Request::default() },
    ] {
        let refused = bridge::start(&state, &request).unwrap_err().to_string();
        assert!(refused.contains("cannot both be named"), "{refused}");
    }
}

/// A DHCP client that went on looking after the card (force=yes) has renewed the lease there.
#[test]
fn an_address_that_is_on_the_card_again_does_not_stop_stop() {
    let before = machine();
    let mut started = bridge::start(&before, &request("eth0")).unwrap().outcome(&before);
    started.addresses.push(Address::new("eth0", "192.0.2.2".parse().unwrap(), 24));
    let plan = bridge::stop(&started, &request("eth0")).unwrap();
    let adds = |step: &&Step| matches!(step, Step::AddAddress(_));
    assert_eq!(plan.steps.iter().filter(adds).count(), 1, "{plan}");
    let there = plan.outcome(&started).addresses.iter().filter(|address| address.dev == "eth0").count();
    assert_eq!(there, 2, "{plan}");
}
