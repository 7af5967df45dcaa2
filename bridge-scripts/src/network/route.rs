//! network-route: the machine routes between its card and guests. Pure.

use super::bridge::{self, Request};
use super::forwarding;
use super::refusal::{Refusal, refuse};
use crate::plan::Plan;
use crate::state::State;

/// The keys of network-route.
pub const KEYS: [&str; 1] = ["netdev"];

fn own(netdev: &str) -> [(String, &'static str); 4] {
    [
        // Guests' addresses may be of the card's own network: then this machine answers for them there.
        (format!("net/ipv4/conf/{netdev}/proxy_arp"), "1"),
        (format!("net/ipv6/conf/{netdev}/proxy_ndp"), "1"),
        (format!("net/ipv4/conf/{netdev}/rp_filter"), "1"),
        // The greater of both counts, and 2 is the loose check.
        ("net/ipv4/conf/all/rp_filter".to_owned(), "1"),
    ]
}

/// The plan for `network-route start`.
///
/// # Errors
///
/// When there is no such card.
pub fn start(state: &State, netdev: Option<&String>) -> Result<Plan, Refusal> {
    let netdev = card(state, netdev)?;
    let mut plan = Plan::new(format!("network-route start {netdev}"));
    forwarding::start(state, &user(&netdev), &own(&netdev), &mut plan);
    Ok(plan)
}

/// The plan for `network-route stop`.
///
/// # Errors
///
/// When it cannot be told which card is meant.
pub fn stop(state: &State, netdev: Option<&String>) -> Result<Plan, Refusal> {
    let netdev = card(state, netdev)?;
    let mut plan = Plan::new(format!("network-route stop {netdev}"));
    forwarding::stop(state, &user(&netdev), &own(&netdev).map(|(path, _)| path), &mut plan);
    Ok(plan)
}

fn user(netdev: &str) -> String {
    format!("route {netdev}")
}

/// The link towards the outside: as said, or that of the default route.
pub(super) fn card(state: &State, netdev: Option<&String>) -> Result<String, Refusal> {
    let netdev = match netdev {
        Some(netdev) => netdev.clone(),
        None => {
            // Without records: if the bridge has the default route, the bridge is meant.
            let bare = State { records: Default::default(), ..state.clone() };
            bridge::resolve(&bare, &Request::default())?.netdev
        }
    };
    if state.links.contains_key(&netdev) {
        Ok(netdev)
    } else {
        refuse(format!("there is no network device {netdev:?}"))
    }
}
