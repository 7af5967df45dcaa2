//! network-vlan: VLANs of a card, each with a bridge of its own. Pure.

use super::bridge::{self, Request};
use super::record::Record;
use super::refusal::{Refusal, refuse};
use super::words::{Unclear, Words, bad_name};
use crate::plan::Plan;
use crate::state::State;

/// The keys of network-vlan.
pub const KEYS: [&str; 5] = ["netdev", "vlan", "bridge", "antispoof", "force"];

/// What was asked of network-vlan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VlanRequest {
    /// The card; that of the default route if none is said.
    pub netdev: Option<String>,
    /// The VLANs' numbers; to stop, all of the card's that have bridges if none is said.
    pub ids: Vec<u16>,
    /// The beginning of the bridges' names.
    pub bridge: String,
    /// As for network-bridge.
    pub antispoof: Option<bool>,
    /// As for network-bridge.
    pub force: bool,
    /// As for network-bridge.
    pub safe: bool,
}

impl VlanRequest {
    /// Reads the words.
    ///
    /// # Errors
    ///
    /// A value that makes no sense, with a caret under it.
    pub fn read(words: &Words) -> Result<Self, Unclear> {
        let mut ids = Vec::new();
        for text in words.get("vlan").unwrap_or_default().split(',').filter(|text| !text.is_empty()) {
            match text.parse() {
                Ok(id) if (1..=4094).contains(&id) => ids.push(id),
                _ => {
                    return Err(words.unclear(
                        "vlan",
                        format!("{text:?} is no VLAN: numbers from 1 to 4094 with commas are meant"),
                    ));
                }
            }
        }
        let bridge = words.get("bridge").unwrap_or("xenbr").to_owned();
        if let Some(message) = ids.iter().find_map(|id| bad_name(&format!("{bridge}{id}"))) {
            return Err(words.unclear("bridge", message));
        }
        ids.sort_unstable();
        ids.dedup();
        let netdev = words.name("netdev")?;
        if let Some(message) = netdev.iter().find_map(|dev| ids.iter().find_map(|id| bad_name(&format!("{dev}.{id}"))))
        {
            return Err(words.unclear("netdev", message));
        }
        let (antispoof, force) = (words.yes_or_no("antispoof")?, words.yes_or_no("force")?.unwrap_or(false));
        Ok(Self { netdev, ids, bridge, antispoof, force, safe: words.confirm.is_some() })
    }

    fn of(&self, netdev: &str, id: u16) -> Request {
        Request {
            netdev: Some(format!("{netdev}.{id}")),
            bridge: Some(format!("{}{id}", self.bridge)),
            antispoof: self.antispoof,
            force: self.force,
            safe: self.safe,
            ..Request::default()
        }
    }
}

/// The plan for `network-vlan start`.
///
/// # Errors
///
/// As of network-bridge, for each VLAN.
pub fn start(state: &State, request: &VlanRequest) -> Result<Plan, Refusal> {
    if request.ids.is_empty() {
        return refuse("which VLANs? Say their numbers, as in vlan=411,412");
    }
    let netdev = card(state, request)?;
    if !state.links.contains_key(&netdev) {
        return refuse(format!("there is no network device {netdev:?} to make VLANs of"));
    }
    let mut plan = Plan::new(format!("network-vlan start {netdev}"));
    for id in &request.ids {
        let next = bridge::start(&plan.outcome(state), &request.of(&netdev, *id))?;
        add(&mut plan, next);
    }
    Ok(plan)
}

/// The plan for `network-vlan stop`.
///
/// # Errors
///
/// As of network-bridge, for each VLAN.
pub fn stop(state: &State, request: &VlanRequest) -> Result<Plan, Refusal> {
    let netdev = card(state, request)?;
    let mut plan = Plan::new(format!("network-vlan stop {netdev}"));
    let made = |record: &Record| record.netdev.as_deref()?.strip_prefix(&format!("{netdev}."))?.parse().ok();
    let ids = match request.ids.as_slice() {
        [] => Record::all(state).iter().filter_map(made).collect(),
        ids => ids.to_vec(),
    };
    for id in ids {
        let next = bridge::stop(&plan.outcome(state), &request.of(&netdev, id))?;
        add(&mut plan, next);
    }
    Ok(plan)
}

fn card(state: &State, request: &VlanRequest) -> Result<String, Refusal> {
    let asked = Request { netdev: request.netdev.clone(), ..Request::default() };
    Ok(bridge::resolve(state, &asked)?.netdev)
}

/// Puts one plan behind another.
pub(super) fn add(plan: &mut Plan, other: Plan) {
    plan.steps.extend(other.steps);
    plan.notes.extend(other.notes);
}
