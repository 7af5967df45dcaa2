//! Other people's chains that see what bridges forward, when the kernel's br_netfilter hands it to IP's hooks, and that drop
//! by default.

use serde::{Deserialize, Serialize};

use super::encode::{self, family_number};
use super::held::{attribute, attributes, body, text};
use super::socket::{Dumped, Error, Nft};
use super::{Action, Family, Field, Match, Rule};

/// NFT_MSG_GETCHAIN and NFT_MSG_GETRULE.
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
/// NF_INET_FORWARD.
const FORWARD: u32 = 2;

/// A chain at IP's forward hook that drops what no rule accepts, or has a rule of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardChain {
    /// The table's family: ip, ip6 or inet.
    pub family: Family,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Whether it drops what no rule accepts.
    pub drops: bool,
    /// The bridges for which we have put a rule into it, each with the rule's number there.
    pub ours: Vec<(String, u64)>,
    /// The table's rules as the kernel tells them, for [`ForwardChain::knows`].
    rules: Vec<Vec<u8>>,
}

impl ForwardChain {
    /// Whether a rule of the table names this bridge, or asks which ports of bridges a packet passes: then somebody has
    /// thought of it.
    pub fn knows(&self, bridge: &str) -> bool {
        let name = [bridge.as_bytes(), &[0]].concat();
        let has = |rule: &[u8], bytes: &[u8]| rule.windows(bytes.len()).any(|window| window == bytes);
        self.rules.iter().any(|rule| has(rule, &name) || has(rule, b"physdev\0"))
    }

    /// Whether it is iptables' (`iptables-nft`), which takes rules of ours.
    pub fn is_iptables(&self) -> bool {
        self.table == "filter" && self.chain == "FORWARD" && self.family != Family::Inet
    }
}

/// By which a rule of ours is known.
fn mark(bridge: &str) -> String {
    format!("xen bridge-scripts: within {bridge}")
}

/// What `iptables -I FORWARD -i BRIDGE -o BRIDGE -j ACCEPT` would write: a packet that is forwarded within a bridge has it
/// as both its devices.
pub(super) fn rule(bridge: &str) -> Rule {
    let within = [Match::is(Field::Iifname, bridge), Match::is(Field::Oifname, bridge)];
    Rule::new(within, Action::Accept).counted().comment(&mark(bridge))
}

impl Nft {
    /// The chains that would drop what a bridge forwards, and those that have rules of ours.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn forward_chains(&mut self) -> Result<Vec<ForwardChain>, Error> {
        let mut found = Vec::new();
        for family in [Family::Ip, Family::Ip6, Family::Inet] {
            let Dumped::Whole(chains) = self.ask(GET_CHAIN, true, family_number(family), &[])? else { continue };
            for message in chains.iter().filter(|message| is_at_forward(message)) {
                let of = |kind| attribute(body(message), kind).map(text).unwrap_or_default();
                let (table, chain) = (of(1), of(3));
                let mut asked = super::attributes::Attributes::default();
                asked.text(1, &table);
                let told = self.ask(GET_RULE, true, family_number(family), &asked.finish())?;
                let Dumped::Whole(rules) = told else { continue };
                let here = |rule: &&Vec<u8>| attribute(body(rule), 2).map(text).as_deref() == Some(&chain);
                let drops = attribute(body(message), 5) == Some(&0u32.to_be_bytes())
                    || rules.iter().rfind(here).is_some_and(|last| ends_all(last));
                let ours: Vec<_> = rules.iter().filter(here).filter_map(|rule| our_bridge(rule)).collect();
                if (drops || !ours.is_empty()) && !table.starts_with("xen-") {
                    found.push(ForwardChain { family, table, chain, drops, ours, rules });
                }
            }
        }
        Ok(found)
    }

    /// Lets packets through that are forwarded within a bridge, or takes that rule back.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn accept_within(&mut self, bridge: &str, family: Family, on: bool) -> Result<(), Error> {
        for chain in self.forward_chains()?.into_iter().filter(|chain| chain.family == family && chain.is_iptables()) {
            let had: Vec<u64> =
                chain.ours.iter().filter(|(name, _)| name == bridge).map(|(_, number)| *number).collect();
            let parts = match (on, had.is_empty()) {
                (true, true) => vec![encode::insert(family, &chain.table, &chain.chain, &rule(bridge))],
                (true, false) => Vec::new(),
                (false, _) => {
                    let delete = |number| encode::delete_rule(family, &chain.table, &chain.chain, number);
                    had.into_iter().map(delete).collect()
                }
            };
            self.send_parts(parts, &format!("rule for {bridge} in {family} {} {}", chain.table, chain.chain))?;
        }
        Ok(())
    }
}

fn is_at_forward(message: &[u8]) -> bool {
    let hook = attribute(body(message), 4);
    hook.and_then(|hook| attribute(hook, 1)) == Some(&FORWARD.to_be_bytes())
        && attribute(body(message), 7).map(text).as_deref() == Some("filter")
}

/// Whether a rule drops or rejects everything: it asks for nothing. (firewalld's last one does.)
fn ends_all(rule: &[u8]) -> bool {
    let expressions = attributes(attribute(body(rule), 4).unwrap_or_default());
    let mut ends = false;
    for (_, expression) in expressions {
        match attribute(expression, 1).map(text).unwrap_or_default().as_str() {
            "counter" | "log" => {}
            "reject" => ends = true,
            "immediate" => {
                // NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE: NF_DROP.
                let data = attribute(expression, 2).and_then(|data| attribute(data, 2));
                let code = data.and_then(|data| attribute(data, 2)).and_then(|verdict| attribute(verdict, 1));
                ends = code == Some(&0u32.to_be_bytes());
            }
            _ => return false,
        }
    }
    ends
}

/// The bridge a rule of ours is for, and the rule's number.
fn our_bridge(rule: &[u8]) -> Option<(String, u64)> {
    // Type 0, length, text: see [`encode`].
    let comment = attribute(body(rule), 7)?.get(2..)?;
    let bridge = text(comment).strip_prefix(&mark(""))?.to_owned();
    let number = attribute(body(rule), 3)?.try_into().ok().map(u64::from_be_bytes)?;
    Some((bridge, number))
}
