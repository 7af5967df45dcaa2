//! The machine as a router, for network-route and network-nat: what they switch on, and what it was before. Pure.
//!
//! Both may be on at a time. What was before the first is kept until the last stops.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::state::State;
use crate::step::{Step, after_forwarding};

/// The record's name.
pub(super) const RECORD: &str = "forwarding.json";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    users: BTreeSet<String>,
    before: BTreeMap<String, String>,
}

const V4: &str = "net/ipv4/ip_forward";
const V6: &str = "net/ipv6/conf/all/forwarding";

fn kept(state: &State) -> Kept {
    state.records.get(RECORD).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// Switches forwarding on, and these sysctls to these values, for a user of this name.
pub(super) fn start(state: &State, user: &str, own: &[(String, &str)], plan: &mut Plan) {
    let mut kept = kept(state);
    let mut wanted: Vec<(String, &str)> = Vec::new();
    // A router does not listen to routers, and the kernel forgets what it learnt from one; unless told 2.
    for route in state.routes.iter().filter(|route| route.is_advertised()) {
        let path = route.dev.as_ref().map(|dev| format!("net/ipv6/conf/{dev}/accept_ra"));
        if let Some(path) = path.filter(|path| state.sysctls.get(path).is_some_and(|value| value == "1")) {
            wanted.push((path, "2"));
        }
    }
    wanted.extend([(V4.to_owned(), "1"), (V6.to_owned(), "1")]);
    wanted.extend(own.iter().cloned());
    for (path, value) in wanted {
        let Some(had) = state.sysctls.get(&path).filter(|had| *had != value) else { continue };
        kept.before.entry(path.clone()).or_insert_with(|| had.clone());
        for step in after_forwarding(&path, had, state) {
            if let Step::Sysctl { path, value } = step {
                kept.before.entry(path).or_insert(value);
            }
        }
        plan.push(Step::Sysctl { path, value: value.to_owned() });
    }
    if kept.users.insert(user.to_owned()) || !plan.is_empty() {
        plan.push(keep(&kept));
    }
}

/// Puts everything back that this user switched on and no other needs.
pub(super) fn stop(state: &State, user: &str, own: &[String], plan: &mut Plan) {
    let mut kept = kept(state);
    if !kept.users.remove(user) {
        return;
    }
    let last = kept.users.is_empty();
    let mut back: Vec<(String, String)> = Vec::new();
    // The switches first: they overwrite the links' own.
    for path in [V4, V6] {
        if last && let Some(value) = kept.before.remove(path) {
            back.push((path.to_owned(), value));
        }
    }
    let rest: Vec<String> = kept.before.keys().filter(|path| last || own.contains(path)).cloned().collect();
    back.extend(rest.into_iter().filter_map(|path| kept.before.remove_entry(&path)));
    // A link may have gone since.
    let there = |path: &String| state.sysctls.contains_key(path);
    for (path, value) in back.into_iter().filter(|(path, _)| there(path)) {
        plan.push(Step::Sysctl { path, value });
    }
    plan.push(if last { Step::Record { name: RECORD.to_owned(), content: None } } else { keep(&kept) });
}

/// Whether somebody of this name has switched forwarding on.
pub(super) fn has(state: &State, user: &str) -> bool {
    kept(state).users.contains(user)
}

fn keep(kept: &Kept) -> Step {
    // Strings only: nothing that could fail.
    let content = serde_json::to_string(kept).unwrap_or_default();
    Step::Record { name: RECORD.to_owned(), content: Some(content) }
}

/// The sysctls that plans here look at, for these links.
pub(super) fn sysctls<'a>(devs: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut paths = vec![V4.to_owned(), V6.to_owned(), "net/ipv4/conf/all/accept_redirects".to_owned()];
    paths.push("net/ipv4/conf/all/rp_filter".to_owned());
    for dev in devs.into_iter().chain(["default"]) {
        let of = [("ipv4", "forwarding"), ("ipv6", "forwarding"), ("ipv6", "accept_ra"), ("ipv4", "rp_filter")];
        paths.extend(of.iter().map(|(family, name)| format!("net/{family}/conf/{dev}/{name}")));
        paths.push(format!("net/ipv4/conf/{dev}/proxy_arp"));
        paths.push(format!("net/ipv6/conf/{dev}/proxy_ndp"));
    }
    paths
}
