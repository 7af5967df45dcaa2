//! network-dummy: nothing, as xend's script of this name; or, with words, a network of guests alone. Pure.

use super::bridge::{loudly, make_bridge, stop_record};
use super::record::{Layout, Record};
use super::refusal::{Refusal, refuse};
use super::words::{Unclear, Words};
use crate::plan::Plan;
use crate::state::{Address, State};
use crate::step::Step;
use std::net::IpAddr;

/// The keys of network-dummy.
pub const KEYS: [&str; 5] = ["bridge", "netdev", "address", "antispoof", "force"];

/// What was asked of network-dummy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DummyRequest {
    /// The bridge.
    pub bridge: String,
    /// The dummy device; `dummy-` and the bridge's name, or `dummyN` for a bridge whose name ends in a number.
    pub netdev: Option<String>,
    /// Addresses of dom0 on the bridge.
    pub addresses: Vec<(IpAddr, u8)>,
    /// As for network-bridge.
    pub antispoof: Option<bool>,
    /// As for network-bridge.
    pub force: bool,
}

impl DummyRequest {
    /// Reads the words.
    ///
    /// # Errors
    ///
    /// A value that makes no sense, with a caret under it.
    pub fn read(words: &Words) -> Result<Self, Unclear> {
        let bridge = words.name("bridge")?;
        let bridge = bridge.ok_or_else(|| words.unclear("bridge", "which bridge? Say bridge=NAME"))?;
        let mut addresses = Vec::new();
        for text in words.get("address").unwrap_or_default().split(',').filter(|text| !text.is_empty()) {
            let parsed = parse_network(text).map_err(|message| words.unclear("address", message))?;
            addresses.push(parsed);
        }
        let (antispoof, force) = (words.yes_or_no("antispoof")?, words.yes_or_no("force")?.unwrap_or(false));
        Ok(Self { bridge, netdev: words.name("netdev")?, addresses, antispoof, force })
    }
}

/// Reads 192.168.17.254/24 or fd00::1/64.
pub(super) fn parse_network(text: &str) -> Result<(IpAddr, u8), String> {
    let wrong = || format!("{text:?} is no address with a prefix, as 192.168.17.254/24 is");
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    match prefix.parse() {
        Ok(prefix) if prefix <= most => Ok((address, prefix)),
        _ => Err(wrong()),
    }
}

/// The plan for `network-dummy start bridge=...`, with a dummy device in the card's place or without.
///
/// # Errors
///
/// When the bridge's name is taken.
pub fn start(state: &State, request: &DummyRequest, with_device: bool) -> Result<Plan, Refusal> {
    let bridge = &request.bridge;
    let mut plan = Plan::new(format!("network-dummy start {bridge}"));
    if Record::find(state, bridge).is_some() && state.links.contains_key(bridge) {
        return Ok(plan);
    }
    if state.links.contains_key(bridge) {
        return refuse(format!(
            "{bridge} exists already: guests can use it as it is, or choose another name with bridge="
        ));
    }
    let device = request.netdev.clone().unwrap_or_else(|| device_name(state, bridge));
    if state.links.contains_key(&device) {
        return refuse(format!("{device} exists already: choose another name with netdev="));
    }
    let netdev = with_device.then(|| device.clone());
    let record = Record {
        bridge: bridge.clone(),
        netdev: netdev.clone(),
        layout: Layout::Bridge,
        own_port: None,
        made_bridge: true,
        made_netdev: true,
        mac: None,
        was_up: false,
        disable_ipv6: None,
        antispoof: request.antispoof,
    };
    make_bridge(bridge, None, &mut plan);
    match &netdev {
        Some(device) => {
            plan.push(Step::CreateDummy { name: device.clone() });
            plan.push(Step::SetMaster { link: device.clone(), master: Some(bridge.clone()) });
            plan.push(Step::SetUp { link: device.clone(), up: true });
        }
        None => {
            plan.note(format!(
                "this kernel has no dummy devices: {bridge} is an empty bridge, which does the same for guests"
            ));
        }
    }
    plan.push(Step::SetUp { link: bridge.clone(), up: true });
    for (address, prefix) in &request.addresses {
        plan.push(Step::AddAddress(Address::new(bridge, *address, *prefix)));
    }
    plan.push(record.keep());
    loudly(request.antispoof, bridge, &mut plan);
    Ok(plan)
}

/// The plan for `network-dummy stop bridge=...`.
///
/// # Errors
///
/// When guests are still on the bridge.
pub fn stop(state: &State, request: &DummyRequest) -> Result<Plan, Refusal> {
    let plan = Plan::new(format!("network-dummy stop {}", request.bridge));
    match Record::find(state, &request.bridge) {
        Some(record) => stop_record(state, &record, request.force, plan),
        None => Ok(plan),
    }
}

/// dummy3 for xenbr3, as `modprobe dummy numdummies=5` named them, or the first that is free.
fn device_name(state: &State, bridge: &str) -> String {
    let number = bridge.trim_start_matches(|char: char| !char.is_ascii_digit());
    let wanted = format!("dummy{number}");
    if !number.is_empty() && wanted.len() <= 15 && !state.links.contains_key(&wanted) {
        return wanted;
    }
    let free = (0..).map(|number| format!("dummy{number}")).find(|name| !state.links.contains_key(name));
    free.unwrap_or_else(|| "dummy".to_owned())
}
