//! Waits until the kernel has finished what it does by itself after a change of links and addresses.
//!
//! A link that is up gets its operational state from a worker (net/core/link_watch.c), at most once a second. Only then
//! a bridge lets its port forward, which gives the bridge its carrier, and IPv6 makes a link-local address; that address
//! and its routes come from another worker (net/ipv6/addrconf.c, addrconf_dad_work). A snapshot taken before has ports
//! that are "disabled" and lacks routes, on a busy machine for seconds.

use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take; nothing is said about it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for namespaces, each given as what runs `ip` with some arguments in it.
pub(crate) fn wait(namespaces: &[&dyn Fn(&str) -> String]) {
    let begin = Instant::now();
    for ip in namespaces {
        while let Some(unsettled) = unsettled(ip) {
            assert!(begin.elapsed() < PATIENCE, "the kernel does not settle: {unsettled}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What is still to come.
fn unsettled(ip: &dyn Fn(&str) -> String) -> Option<String> {
    // Nothing at all is printed where there is nothing.
    let list = |words: &str| -> Vec<Value> { serde_json::from_str(&ip(words)).unwrap_or_default() };
    // Addresses before routes: one that is seen has its route, or gets it.
    let (links, addresses) = (list("-j -d link"), list("-j -6 addr"));
    let routes = list("-j -6 route show table local");
    links.iter().find_map(|link| of_link(link, &links)).or_else(|| {
        // Without a carrier an address waits for one.
        let live = |name: &Value| links.iter().any(|link| link["ifname"] == *name && flag(link, "LOWER_UP"));
        let holders = addresses.iter().filter(|holder| live(&holder["ifname"]));
        holders.filter_map(|holder| of_addresses(holder, &routes)).next()
    })
}

fn flag(link: &Value, name: &str) -> bool {
    link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == name))
}

fn of_link(link: &Value, links: &[Value]) -> Option<String> {
    let (name, state, carrier) = (&link["ifname"], &link["operstate"], flag(link, "LOWER_UP"));
    if !flag(link, "UP") || state == "UNKNOWN" {
        return None;
    }
    if carrier != (state == "UP") {
        return Some(format!("{name} has {} carrier, but the state {state}", if carrier { "a" } else { "no" }));
    }
    let port = |link: &Value| link["linkinfo"]["info_slave_data"]["state"].as_str().map(str::to_owned);
    // All ports of a bridge that is down are disabled.
    let forwarding = carrier && links.iter().any(|other| other["ifname"] == link["master"] && flag(other, "UP"));
    if let Some(port) = port(link).filter(|port| (port == "forwarding") != forwarding) {
        return Some(format!("{name} has {} carrier, but its port is {port}", if carrier { "a" } else { "no" }));
    }
    let forwards = |other: &&Value| other["master"] == *name && port(other).as_deref() == Some("forwarding");
    let live = links.iter().find(forwards);
    (link["linkinfo"]["info_kind"] == "bridge" && !carrier)
        .then_some(live)?
        .map(|live| format!("{name} has no carrier, but {} forwards", live["ifname"]))
}

fn of_addresses(holder: &Value, routes: &[Value]) -> Option<String> {
    let name = &holder["ifname"];
    holder["addr_info"].as_array().into_iter().flatten().find_map(|address| {
        let local = &address["local"];
        if address["tentative"] == true {
            return Some(format!("{local} on {name} is tentative"));
        }
        let routed = |route: &Value| route["dst"] == *local && (route["dev"] == *name || route["dev"] == "lo");
        (!routes.iter().any(routed)).then(|| format!("{local} on {name} has no route"))
    })
}
