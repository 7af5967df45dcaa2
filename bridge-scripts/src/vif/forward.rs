//! Bridged guests and the machine's own firewall.
//!
//! Where br_netfilter is loaded (Docker does it), IP packets that a bridge forwards pass the machine's FORWARD rules, and a
//! firewall that drops there by default cuts off all guests. The stock scripts put rules for each interface before
//! iptables' others; here it is one rule for the bridge, in iptables' chain. An accept there says nothing in the chains of
//! others (firewalld's, or one's own of nft): what to add to those is said.

use super::Script;
use super::plan::Draft;
use super::settings::Settings;
use crate::nft::{Family, ForwardChain};
use crate::state::{Kind, State};
use crate::step::Step;

/// IFLA_BR_NF_CALL_IPTABLES and IFLA_BR_NF_CALL_IP6TABLES of linux/if_link.h.
const OWN_SWITCHES: [u16; 2] = [36, 37];

/// Whether what the bridge forwards passes IPv4's hooks, and IPv6's.
fn passes(state: &State, bridge: &str) -> [bool; 2] {
    let own = |switch: u16| match state.links.get(bridge).map(|link| &link.kind) {
        Some(Kind::Bridge(settings)) => settings.get(&switch).is_some_and(|value| value.first() == Some(&1)),
        _ => false,
    };
    let [all4, all6] = state.bridge_netfilter;
    [all4 || own(OWN_SWITCHES[0]), all6 || own(OWN_SWITCHES[1])]
}

/// The chains that drop what the bridge forwards, and know nothing of the bridge.
fn in_the_way<'a>(state: &'a State, bridge: &'a str) -> impl Iterator<Item = &'a ForwardChain> {
    let [v4, v6] = passes(state, bridge);
    state.forward.iter().filter(move |chain| {
        let passed = match chain.family {
            Family::Ip => v4,
            Family::Ip6 => v6,
            _ => v4 || v6,
        };
        passed && chain.drops && !chain.knows(bridge)
    })
}

/// What an administrator has to add for a bridge whose guests are cut off, a line for each chain. iptables' chains are
/// dealt with when an interface comes online.
pub(crate) fn advice(state: &State, bridge: &str) -> Vec<String> {
    let others = in_the_way(state, bridge).filter(|chain| !chain.is_iptables());
    others
        .map(|chain| {
            let ForwardChain { family, table, chain, .. } = chain;
            let add = match table.as_str() {
                "firewalld" => {
                    format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge}; firewall-cmd --reload")
                }
                _ => format!("nft insert rule {family} {table} {chain} iifname {bridge} oifname {bridge} accept"),
            };
            format!(
                "WARNING: guests on {bridge} are cut off by the machine's firewall: br_netfilter hands it what bridges \
                 forward, and {family} {table} {chain} drops that. Add: {add} (or leave bridges out: sysctl -w \
                 net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0)"
            )
        })
        .collect()
}

pub(super) fn online(draft: &mut Draft<'_>, bridge: &str) {
    let before = draft.before;
    let mut families: Vec<Family> =
        in_the_way(before, bridge).filter(|chain| chain.is_iptables()).map(|chain| chain.family).collect();
    families.dedup();
    for family in families {
        draft.push(Step::AcceptWithin { bridge: bridge.to_owned(), family, on: true });
    }
    draft.notes.extend(advice(before, bridge));
}

/// The last guest of a bridge takes the rule along.
pub(super) fn offline(draft: &mut Draft<'_>) {
    let (settings, before) = (draft.settings, draft.before);
    let Some(bridge) = settings.bridge.as_ref().filter(|_| settings.script == Script::Bridge) else { return };
    let own = super::plan::record_name(&settings.vif);
    let mut guests = before.records.iter().filter(|(name, _)| name.starts_with("vif-") && **name != own);
    let there = |(_, text): (&String, &String)| {
        serde_json::from_str::<Settings>(text)
            .is_ok_and(|other| other.script == Script::Bridge && other.bridge.as_ref() == Some(bridge))
    };
    if guests.any(there) {
        return;
    }
    for chain in before.forward.iter().filter(|chain| chain.ours.iter().any(|(name, _)| name == bridge)) {
        draft.push(Step::AcceptWithin { bridge: bridge.clone(), family: chain.family, on: false });
    }
}
