//! network-bridge: a card and the machine's addresses become a bridge, and back. Pure: from a [`State`] to a [`Plan`].

use super::lease;
use super::moving::Luggage;
use super::owners::Owners;
use super::record::{Layout, Record};
use super::refusal::{Refusal, refuse};
use super::settings::{copy_settings, disable_ipv6, give_back, own_link_local, sysctl};
use super::words::{Unclear, Words};
use super::xen3;
use crate::plan::Plan;
use crate::state::{Address, FOREVER, Kind, LinkState, Mac, State};
use crate::step::Step;

/// The keys of network-bridge.
pub const KEYS: [&str; 6] = ["netdev", "bridge", "vifnum", "antispoof", "layout", "force"];

/// What was asked of network-bridge.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The card.
    pub netdev: Option<String>,
    /// The bridge.
    pub bridge: Option<String>,
    /// The number that stands for both: eth2 and xenbr2.
    pub vifnum: Option<u32>,
    /// Whether guests' interfaces that say nothing themselves are filtered.
    pub antispoof: Option<bool>,
    /// The layout; today's if none is said, and where the bridge is there already, the one it has.
    pub layout: Option<Layout>,
    /// Stop although others use the bridge; start although somebody else looks after the card.
    pub force: bool,
    /// Who looks after links.
    pub owners: Owners,
    /// Whether it will be taken back unless confirmed: then more may be risked.
    pub safe: bool,
}

impl Request {
    /// Reads the words.
    ///
    /// # Errors
    ///
    /// A value that makes no sense, with a caret under it.
    pub fn read(words: &Words) -> Result<Self, Unclear> {
        let layout = match words.get("layout") {
            None => None,
            Some("bridge") => Some(Layout::Bridge),
            Some("xen3") => Some(Layout::Xen3),
            Some(other) => return Err(words.unclear("layout", format!("layout is bridge or xen3, not {other:?}"))),
        };
        Ok(Self {
            netdev: words.name("netdev")?,
            bridge: words.name("bridge")?,
            vifnum: words.number("vifnum", 0..=9999)?,
            antispoof: words.yes_or_no("antispoof")?,
            layout,
            force: words.yes_or_no("force")?.unwrap_or(false),
            owners: Owners::default(),
            safe: words.confirm.is_some(),
        })
    }
}

/// Which card and which bridge are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The card.
    pub netdev: String,
    /// The bridge.
    pub bridge: String,
}

/// Finds out which card and bridge are meant: as said, else from vifnum, else the card that the default route goes through
/// and xenbr0.
///
/// # Errors
///
/// When nothing was said and there is no default route.
pub fn resolve(state: &State, request: &Request) -> Result<Pair, Refusal> {
    let records = Record::all(state);
    let bridge = |number: Option<u32>| format!("xenbr{}", number.unwrap_or(0));
    let by_bridge =
        |name: &str| records.iter().find(|record| record.bridge == name).and_then(|record| record.netdev.clone());
    let by_netdev = |name: &str| records.iter().find(|record| record.netdev.as_deref() == Some(name));
    let netdev = match (&request.netdev, request.vifnum, &request.bridge) {
        (Some(netdev), _, _) => netdev.clone(),
        (None, Some(number), _) => format!("eth{number}"),
        (None, None, Some(bridge)) if by_bridge(bridge).is_some() => by_bridge(bridge).unwrap_or_default(),
        (None, None, _) => default_card(state, &records)?,
    };
    let bridge = match (&request.bridge, request.vifnum) {
        (Some(name), _) => name.clone(),
        (None, Some(number)) => bridge(Some(number)),
        // A card that has a bridge already is meant with it.
        (None, None) => by_netdev(&netdev).map_or_else(|| bridge(None), |record| record.bridge.clone()),
    };
    Ok(Pair { netdev, bridge })
}

/// The card of the default route, or the one below the bridge that has the default route now.
fn default_card(state: &State, records: &[Record]) -> Result<String, Refusal> {
    let defaults = state.routes.iter().filter(|route| route.to.is_none() && route.table == 254 && route.kind == 1);
    let best = defaults.filter_map(|route| {
        let dev = route.dev.as_ref().or_else(|| route.ways.first().map(|way| &way.dev))?;
        Some((route.v6, route.metric.unwrap_or(0), dev))
    });
    let Some((_, _, dev)) = best.min() else {
        return refuse("there is no default route that would tell which card is meant: say netdev=eth0 or the like");
    };
    let under = records.iter().find(|record| record.layout == Layout::Bridge && record.bridge == *dev);
    Ok(under.and_then(|record| record.netdev.clone()).unwrap_or_else(|| dev.clone()))
}

/// The plan for `network-bridge start`.
///
/// # Errors
///
/// When the machine is not as it has to be; the message says what to do.
pub fn start(state: &State, request: &Request) -> Result<Plan, Refusal> {
    let pair = resolve(state, request)?;
    let mut plan = Plan::new(format!("network-bridge start {}", pair.bridge));
    let Pair { netdev, bridge } = &pair;
    if let Some(record) = Record::find(state, bridge) {
        return again(state, request, &pair, record, plan);
    }
    if netdev == bridge {
        let there = state.links.get(bridge).is_some_and(LinkState::is_bridge);
        if there && request.netdev.is_none() && request.layout != Some(Layout::Xen3) {
            plan.note(format!("{bridge} is there already, which somebody else made: nothing is changed"));
            return Ok(plan);
        }
        return refuse(format!("the card and the bridge cannot both be named {netdev}"));
    }
    let made_netdev = make_vlan(state, netdev, &mut plan)?;
    let state = &plan.outcome(state);
    let Some(card) = state.links.get(netdev) else {
        let others: Vec<&str> =
            state.links.iter().filter(|(_, link)| !link.loopback).map(|(name, _)| name.as_str()).collect();
        let hint = match netdev.starts_with("dummy") {
            true => format!(". For a network of guests alone: network-dummy start bridge={bridge}"),
            false => String::new(),
        };
        return refuse(format!("there is no network device {netdev:?}; there are: {}{hint}", others.join(", ")));
    };
    fit(state, netdev, card, request)?;
    if let Some(there) = state.links.get(bridge)
        && !there.is_bridge()
    {
        return refuse(format!(
            "{bridge} exists and is no bridge: choose another name with bridge=, or rename that device"
        ));
    }
    if let Some(master) = card.master.as_ref().filter(|master| *master != bridge) {
        return refuse(format!("{netdev} is in {master} already: take it out first (ip link set {netdev} nomaster)"));
    }
    let luggage = Luggage::of(state, netdev);
    if let Some(route) = luggage.stuck() {
        return refuse(format!(
            "the {route} goes through a nexthop object, which cannot be moved: replace it by a plain route"
        ));
    }
    let kept_by = lease::objection(state, &request.owners, &pair).filter(|_| card.master.is_none());
    if let Some(objection) = &kept_by {
        if !request.force {
            return refuse(objection.clone());
        }
        plan.note(objection.lines().next().unwrap_or_default().to_owned());
    }
    let uplink = state.ports_of(bridge).find(|port| *port != netdev && is_card(&state.links[*port]));
    if let (Some(other), None) = (uplink, &request.bridge) {
        return refuse(format!(
            "{bridge} has the card {other} already: say which bridge {netdev} is for, as in bridge=xenbr1"
        ));
    }
    let layout = request.layout.unwrap_or_default();
    let record = Record {
        bridge: bridge.clone(),
        netdev: Some(netdev.clone()),
        layout,
        own_port: None,
        made_bridge: !state.links.contains_key(bridge),
        made_netdev,
        mac: card.mac,
        was_up: card.up && !made_netdev,
        disable_ipv6: state.sysctls.get(&disable_ipv6(netdev)).cloned(),
        antispoof: request.antispoof,
    };
    match layout {
        Layout::Bridge if card.master.as_ref() == Some(bridge) && luggage.is_empty() => {
            plan.note(format!("{netdev} is in {bridge} already, which somebody else made: nothing is changed"));
            return Ok(plan);
        }
        Layout::Bridge => enslave(state, &luggage, record, &mut plan),
        Layout::Xen3 => xen3::start(state, &luggage, record, &mut plan)?,
    }
    let lonely = |address: &&Address| kept_by.is_none() && address.valid != FOREVER && !address.is_advertised();
    for address in luggage.addresses.iter().filter(lonely) {
        let (local, prefix) = (address.local, address.prefix);
        plan.note(format!("{local}/{prefix} was given for a time, and nobody is seen who would ask for more"));
    }
    loudly(request.antispoof, bridge, &mut plan);
    Ok(plan)
}

/// Says that guests are not filtered.
pub(super) fn loudly(antispoof: Option<bool>, bridge: &str, plan: &mut Plan) {
    if antispoof == Some(false) {
        plan.note(format!(
            "WARNING: antispoof=no: guests on {bridge} can send from any address, unless their own vif says antispoof=on"
        ));
    }
}

/// `start` when there is a record: nothing to do, unless what is asked differs.
fn again(state: &State, request: &Request, pair: &Pair, record: Record, mut plan: Plan) -> Result<Plan, Refusal> {
    let Pair { netdev, bridge } = pair;
    let port = record.port();
    let in_place = port.as_ref().and_then(|port| state.links.get(port)).and_then(|link| link.master.as_ref());
    if let (Some(other), None) = (record.netdev.as_ref().filter(|other| *other != netdev), &request.bridge) {
        return refuse(format!(
            "{bridge} has the card {other} already: say which bridge {netdev} is for, as in bridge=xenbr1"
        ));
    }
    if record.netdev.as_ref() != Some(netdev) || request.layout.is_some_and(|layout| layout != record.layout) {
        let had = record.netdev.as_deref().unwrap_or("no card");
        let layout = if record.layout == Layout::Xen3 { "xen3" } else { "bridge" };
        return refuse(format!(
            "{bridge} was started with {had}, layout={layout}: stop it first (network-bridge stop bridge={bridge})"
        ));
    }
    if in_place != Some(bridge) {
        return refuse(format!(
            "{bridge} was started with {netdev}, and somebody has changed it since: put {} back into it (ip link set ... master \
             {bridge}), or stop it (network-bridge stop bridge={bridge})",
            port.as_deref().unwrap_or(netdev)
        ));
    }
    if request.antispoof.is_some() && request.antispoof != record.antispoof {
        plan.push(Record { antispoof: request.antispoof, ..record }.keep());
        plan.note(format!("antispoof= counts for interfaces that come online from now on, not for those on {bridge}"));
        loudly(request.antispoof, bridge, &mut plan);
    }
    Ok(plan)
}

impl Record {
    /// The card's name now that it is a port.
    pub(super) fn port(&self) -> Option<String> {
        let netdev = self.netdev.clone()?;
        Some(if self.layout == Layout::Xen3 { xen3::physical(&netdev) } else { netdev })
    }
}

/// Makes a VLAN whose name says what it is, if there is none yet: eth0.411 is VLAN 411 of eth0.
fn make_vlan(state: &State, netdev: &str, plan: &mut Plan) -> Result<bool, Refusal> {
    if state.links.contains_key(netdev) {
        return Ok(false);
    }
    let Some((link, id)) = netdev.rsplit_once('.') else { return Ok(false) };
    let (true, Ok(number)) = (state.links.contains_key(link), id.parse::<u16>()) else { return Ok(false) };
    if !(1..=4094).contains(&number) {
        return refuse(format!("{netdev} would be VLAN {number} of {link}: VLANs are numbered 1 to 4094"));
    }
    plan.push(Step::CreateVlan { name: netdev.to_owned(), link: link.to_owned(), id: number });
    if !state.links[link].up {
        plan.push(Step::SetUp { link: link.to_owned(), up: true });
    }
    Ok(true)
}

/// Whether this link can be a bridge's way out at all.
fn fit(state: &State, netdev: &str, card: &LinkState, request: &Request) -> Result<(), Refusal> {
    if card.loopback {
        return refuse(format!("{netdev} is the loopback device, which cannot be bridged"));
    }
    if card.wireless {
        return refuse(format!(
            "{netdev} is a wireless card: an access point accepts frames from the card's own address only, so guests behind a \
             bridge would hear nothing. Use network-nat or network-route with it"
        ));
    }
    if card.is_bridge() {
        return refuse(format!(
            "{netdev} is a bridge itself: guests can use it as it is (bridge={netdev}); netdev= names the card below"
        ));
    }
    if card.mac.is_none() {
        return refuse(format!("{netdev} has no Ethernet address, so it cannot be bridged: use network-route with it"));
    }
    let carries_root = !Luggage::of(state, netdev).addresses.is_empty();
    if state.root_on_network && carries_root && !request.safe {
        return refuse(format!(
            "the root file system comes over the network, and {netdev} may be its way: if something goes wrong the machine \
             stands still. Say --confirm SECONDS, so that it is taken back by itself"
        ));
    }
    Ok(())
}

fn is_card(link: &LinkState) -> bool {
    matches!(link.kind, Kind::Physical | Kind::Bond | Kind::Vlan { .. })
}

/// Today's layout.
fn enslave(state: &State, luggage: &Luggage, record: Record, plan: &mut Plan) {
    let (netdev, bridge) = (record.netdev.clone().unwrap_or_default(), record.bridge.clone());
    let card = &state.links[&netdev];
    if record.made_bridge {
        make_bridge(&bridge, card.mac, plan);
        copy_settings(state, &netdev, &bridge, plan);
        plan.steps.extend(own_link_local(state, luggage, &netdev, &bridge));
    }
    if !state.links.get(&bridge).is_some_and(|link| link.up) {
        plan.push(Step::SetUp { link: bridge.clone(), up: true });
    }
    luggage.unload(plan);
    plan.steps.extend(sysctl(state, &netdev, &disable_ipv6(&netdev), "1"));
    if card.master.as_ref() != Some(&bridge) {
        plan.push(Step::SetMaster { link: netdev.clone(), master: Some(bridge.clone()) });
    }
    if record.made_bridge && card.mtu != 1500 {
        // Set by hand it stays, whatever guests' interfaces come and go.
        plan.push(Step::SetMtu { link: bridge.clone(), mtu: card.mtu });
    }
    if !card.up {
        plan.push(Step::SetUp { link: netdev.clone(), up: true });
    }
    luggage.clone().onto(&netdev, &bridge).load(plan);
    plan.push(record.keep());
}

/// A bridge, down. Without addresses of dom0's on it IPv6 is left as the kernel has it.
pub(super) fn make_bridge(bridge: &str, mac: Option<Mac>, plan: &mut Plan) {
    plan.push(Step::CreateBridge { name: bridge.to_owned(), mac, vlan_filtering: false });
}

/// The plan for `network-bridge stop`.
///
/// # Errors
///
/// When the bridge is not one of ours, or is in use.
pub fn stop(state: &State, request: &Request) -> Result<Plan, Refusal> {
    let records = Record::all(state);
    let bridge = match (&request.bridge, records.as_slice()) {
        (Some(bridge), _) => bridge.clone(),
        // Without a default route the only bridge there is must be meant.
        (None, [only]) if request.netdev.is_none() && request.vifnum.is_none() => only.bridge.clone(),
        (None, []) if request.netdev.is_none() && request.vifnum.is_none() => "xenbr0".to_owned(),
        _ => resolve(state, request)?.bridge,
    };
    let plan = Plan::new(format!("network-bridge stop {bridge}"));
    let Some(record) = Record::find(state, &bridge) else {
        if state.links.get(&bridge).is_some_and(LinkState::is_bridge) {
            return refuse(format!("{bridge} was not made by network-bridge: whoever made it knows how to undo it"));
        }
        return Ok(plan);
    };
    stop_record(state, &record, request.force, plan)
}

/// Takes back what a record tells of.
pub(super) fn stop_record(state: &State, record: &Record, force: bool, mut plan: Plan) -> Result<Plan, Refusal> {
    let bridge = &record.bridge;
    let port = record.port();
    let ours = |name: &str| Some(name) == port.as_deref() || Some(name) == record.own_port.as_deref();
    let guests: Vec<&str> = state.ports_of(bridge).filter(|name| !ours(name)).collect();
    if !guests.is_empty() && record.made_bridge && !force {
        return refuse(format!(
            "{bridge} is in use by {}: detach these first, or say force=yes to cut them off",
            guests.join(", ")
        ));
    }
    if record.made_bridge {
        for guest in guests {
            plan.push(Step::SetMaster { link: guest.to_owned(), master: None });
        }
    }
    match record.layout {
        Layout::Bridge => release(state, record, &mut plan),
        Layout::Xen3 => xen3::stop(state, record, &mut plan),
    }
    plan.push(record.forget());
    Ok(plan)
}

fn release(state: &State, record: &Record, plan: &mut Plan) {
    let bridge = &record.bridge;
    let netdev = record.netdev.as_deref().filter(|netdev| state.links.contains_key(*netdev));
    let luggage = if record.made_bridge { Luggage::of(state, bridge) } else { Luggage::default() };
    luggage.unload(plan);
    if let Some(netdev) = netdev {
        if state.links[netdev].master.as_ref() == Some(bridge) {
            plan.push(Step::SetMaster { link: netdev.to_owned(), master: None });
        }
        give_back(state, record, netdev, plan);
        if !record.made_netdev {
            // A DHCP client that was left with the card may have given it the bridge's address again.
            luggage.onto(bridge, netdev).lacking(state).load(plan);
        }
        if record.made_netdev {
            plan.push(Step::DeleteLink(netdev.to_owned()));
        } else if !record.was_up && state.links[netdev].up {
            plan.push(Step::SetUp { link: netdev.to_owned(), up: false });
        }
    }
    if record.made_bridge && state.links.contains_key(bridge) {
        plan.push(Step::DeleteLink(bridge.clone()));
    }
}
