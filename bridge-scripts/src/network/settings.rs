//! A card's settings below /proc/sys/net, which follow its addresses. Pure.

use super::moving::Luggage;
use super::record::Record;
use crate::plan::Plan;
use crate::state::State;
use crate::step::Step;

/// IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const NO_LINK_LOCAL: &str = "1";

/// The card's IPv6 as it was.
pub(super) fn give_back(state: &State, record: &Record, netdev: &str, plan: &mut Plan) {
    if let Some(value) = &record.disable_ipv6 {
        plan.steps.extend(sysctl(state, netdev, &disable_ipv6(netdev), value));
    }
}

/// The path of a link's disable_ipv6. A port has no IPv6 of its own: it would hear nothing, and ask for routers in vain.
pub(super) fn disable_ipv6(dev: &str) -> String {
    format!("net/ipv6/conf/{dev}/disable_ipv6")
}

/// Writes a sysctl if the kernel has IPv6 and the value differs.
pub(super) fn sysctl(state: &State, dev: &str, path: &str, value: &str) -> Option<Step> {
    let had = state.sysctls.get(path);
    let known = state.sysctls.contains_key("net/ipv6/conf/default/disable_ipv6") || !path.starts_with("net/ipv6");
    let new = !state.links.contains_key(dev) || had.is_none();
    let differs = had.is_some_and(|had| had != value);
    (known && (new || differs)).then(|| Step::Sysctl { path: path.to_owned(), value: value.to_owned() })
}

/// The kernel is not to invent a link-local address for a new link `to` that gets the one of the card `from`, or whose card
/// was to have none. Otherwise it may: a card that has just got its carrier has no address yet, and will not get one any
/// more.
pub(super) fn own_link_local(state: &State, luggage: &Luggage, from: &str, to: &str) -> Option<Step> {
    let mode = |dev: &str| format!("net/ipv6/conf/{dev}/addr_gen_mode");
    let none = state.sysctls.get(&mode(from)).is_some_and(|mode| mode == NO_LINK_LOCAL);
    if !none && !luggage.has_link_local() {
        return None;
    }
    Some(Step::Sysctl { path: mode(to), value: NO_LINK_LOCAL.to_owned() })
}

/// A card's settings that follow its addresses, where they differ from what a new link gets.
pub(super) fn copy_settings(state: &State, from: &str, to: &str, plan: &mut Plan) {
    for setting in SETTINGS {
        let (family, name) = setting;
        let of = |dev: &str| format!("net/{family}/conf/{dev}/{name}");
        if let (Some(value), usual) = (state.sysctls.get(&of(from)), state.sysctls.get(&of("default")))
            && Some(value) != usual
        {
            plan.push(Step::Sysctl { path: of(to), value: value.clone() });
        }
    }
}

/// Settings of a link that say how its addresses are used (Documentation/networking/ip-sysctl.rst).
const SETTINGS: [(&str, &str); 26] = [
    ("ipv4", "forwarding"),
    ("ipv4", "rp_filter"),
    ("ipv4", "proxy_arp"),
    ("ipv4", "accept_redirects"),
    ("ipv4", "secure_redirects"),
    ("ipv4", "send_redirects"),
    ("ipv4", "accept_source_route"),
    ("ipv4", "arp_filter"),
    ("ipv4", "arp_announce"),
    ("ipv4", "arp_ignore"),
    ("ipv4", "arp_notify"),
    ("ipv4", "arp_accept"),
    ("ipv4", "log_martians"),
    ("ipv4", "route_localnet"),
    ("ipv4", "promote_secondaries"),
    ("ipv4", "src_valid_mark"),
    ("ipv6", "disable_ipv6"),
    ("ipv6", "forwarding"),
    ("ipv6", "accept_ra"),
    ("ipv6", "accept_ra_defrtr"),
    ("ipv6", "accept_ra_pinfo"),
    ("ipv6", "accept_ra_rtr_pref"),
    ("ipv6", "accept_redirects"),
    ("ipv6", "autoconf"),
    ("ipv6", "use_tempaddr"),
    ("ipv6", "proxy_ndp"),
];

/// The sysctls that plans of network-bridge look at, for these links.
pub(super) fn sysctls<'a>(devs: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut paths = Vec::new();
    for dev in devs.into_iter().chain(["default"]) {
        paths.extend(SETTINGS.iter().map(|(family, name)| format!("net/{family}/conf/{dev}/{name}")));
        paths.push(format!("net/ipv6/conf/{dev}/addr_gen_mode"));
    }
    paths
}
