//! network-nat: guests reach the world behind the machine's own address. Pure.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use super::dummy::parse_network;
use super::forwarding;
use super::moving::network;
use super::refusal::Refusal;
use super::route::card;
use super::words::{Unclear, Words};
use crate::nft::{Action, Chain, CtState, Family, Field, Hook, HookKind, HookPoint, Match, Policy, Rule, Table};
use crate::plan::Plan;
use crate::state::State;
use crate::step::Step;

/// The keys of network-nat.
pub const KEYS: [&str; 3] = ["netdev", "network", "dhcp"];
/// The table, in the family inet.
pub const TABLE: &str = "xen-nat";
/// The file for dnsmasq, in the run directory.
pub const DNSMASQ: &str = "dnsmasq-xen-nat.conf";
/// The guests' addresses for dnsmasq, a line each, in the run directory. vif-nat writes them.
pub const HOSTS: &str = "dnsmasq-hosts";
/// Where dnsmasq writes its number, in the run directory.
pub const PID: &str = "dnsmasq.pid";
/// The network of the addresses that vif-nat makes of guests' numbers: 10.D.E.N for the domain 256·D + E, at most 32751.
pub const USUAL: (IpAddr, u8) = (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 9);
const USER: &str = "nat";

/// What was asked of network-nat.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatRequest {
    /// The link towards the outside.
    pub netdev: Option<String>,
    /// The guests' networks; all of them if none is said.
    pub networks: Vec<(IpAddr, u8)>,
    /// Whether guests get their addresses by DHCP.
    pub dhcp: bool,
    /// The run directory, which dnsmasq's configuration names.
    pub run: PathBuf,
}

impl NatRequest {
    /// Reads the words.
    ///
    /// # Errors
    ///
    /// A value that makes no sense, with a caret under it.
    pub fn read(words: &Words, run: &Path) -> Result<Self, Unclear> {
        let mut networks = Vec::new();
        for text in words.get("network").unwrap_or_default().split(',').filter(|text| !text.is_empty()) {
            let (address, prefix) = parse_network(text).map_err(|message| words.unclear("network", message))?;
            networks.push((network(address, prefix), prefix));
        }
        let dhcp = words.yes_or_no("dhcp")?.unwrap_or(false);
        Ok(Self { netdev: words.name("netdev")?, networks, dhcp, run: run.to_owned() })
    }
}

/// The plan for `network-nat start`.
///
/// # Errors
///
/// When there is no such link.
pub fn start(state: &State, request: &NatRequest) -> Result<Plan, Refusal> {
    let netdev = card(state, request.netdev.as_ref())?;
    let mut plan = Plan::new(format!("network-nat start {netdev}"));
    let wanted = table(&netdev, &request.networks);
    let had = state.table(Family::Inet, TABLE).and_then(|table| table.content.as_ref());
    if had != Some(&wanted) {
        plan.push(Step::Table(wanted));
    }
    forwarding::start(state, USER, &[], &mut plan);
    let dnsmasq = request.dhcp.then(|| hand_over(&request.networks, &request.run));
    if state.records.get(DNSMASQ) != dnsmasq.as_ref() {
        plan.push(Step::Record { name: DNSMASQ.to_owned(), content: dnsmasq });
    }
    Ok(plan)
}

/// The plan for `network-nat stop`.
///
/// # Errors
///
/// None yet.
pub fn stop(state: &State) -> Result<Plan, Refusal> {
    let mut plan = Plan::new("network-nat stop");
    if state.table(Family::Inet, TABLE).is_some() {
        plan.push(Step::DropTable(Family::Inet, TABLE.to_owned()));
    }
    forwarding::stop(state, USER, &[], &mut plan);
    if state.records.contains_key(DNSMASQ) {
        plan.push(Step::Record { name: DNSMASQ.to_owned(), content: None });
    }
    Ok(plan)
}

/// Our table: what leaves by the card gets the card's address; what claims to come from the guests' networks does not
/// come in by the card.
pub(crate) fn table(netdev: &str, networks: &[(IpAddr, u8)]) -> Table {
    let source = |address: &IpAddr| if address.is_ipv4() { Field::IpSaddr } else { Field::Ip6Saddr };
    let out = || Match::is(Field::Oifname, netdev);
    let mut leaving = Vec::new();
    let mut forward = vec![Rule::new([Match::Ct(vec![CtState::Established, CtState::Related])], Action::Accept)];
    for (address, prefix) in networks {
        let from = || Match::network(source(address), *address, *prefix);
        leaving.push(Rule::new([out(), from()], Action::Masquerade));
        let forged = Rule::new([Match::is(Field::Iifname, netdev), from()], Action::Drop);
        forward.push(forged.comment("guests' addresses do not come from outside"));
    }
    if networks.is_empty() {
        leaving.push(Rule::new([out()], Action::Masquerade));
    }
    let hook = |kind, point, priority| Some(Hook { kind, point, priority, policy: Policy::Accept });
    let chain = |name: &str, hook, rules| Chain { name: name.to_owned(), hook, rules };
    Table {
        family: Family::Inet,
        name: TABLE.to_owned(),
        sets: Vec::new(),
        chains: vec![
            // 100 is nft's srcnat, 0 its filter.
            chain("postrouting", hook(HookKind::Nat, HookPoint::Postrouting, 100), leaving),
            chain("forward", hook(HookKind::Filter, HookPoint::Forward, 0), forward),
        ],
    }
}

/// What dnsmasq(8) has to know. It binds to guests' interfaces as they come, and gives each guest the address that vif-nat
/// has for it and no other: only that one is routed.
fn hand_over(networks: &[(IpAddr, u8)], run: &Path) -> String {
    let file = |name: &str| run.join(name).display().to_string();
    let mut text = format!(
        "# Written by network-nat start dhcp=yes; gone with network-nat stop.\n\
         interface=vif*\nbind-dynamic\nexcept-interface=lo\ndhcp-authoritative\n\
         # Answers go to everybody, instead of into the ARP table, where vif-nat has entered the guest for good.\n\
         dhcp-broadcast\n\
         dhcp-hostsfile={}\ndhcp-leasefile={}\npid-file={}\n",
        file(HOSTS),
        file("dnsmasq.leases"),
        file(PID)
    );
    for (address, prefix) in if networks.is_empty() { &[USUAL][..] } else { networks } {
        match address {
            IpAddr::V4(first) => {
                let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0));
                text += &format!("dhcp-range={first},static,{mask},1h\n");
            }
            IpAddr::V6(_) => text += &format!("# {address}/{prefix}: no DHCPv6, these guests are configured by hand\n"),
        }
    }
    text
}
