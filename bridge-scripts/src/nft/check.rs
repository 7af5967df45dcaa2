//! What is wrong with a table, found before the kernel is asked.

use std::net::IpAddr;

use super::{Action, Chain, Family, Field, HookKind, HookPoint, Match, Rule, SetKind, Table, Value};

/// A table no kernel would take, or would take for something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("table {table}: {place}{problem}")]
pub struct Malformed {
    /// The table, with its family.
    pub table: String,
    /// The chain, rule or set, ending in a colon; empty for the table itself.
    pub place: String,
    /// What is wrong.
    pub problem: String,
}

/// Longest name of a device (IFNAMSIZ without the closing zero).
const DEVICE_NAME: usize = 15;
/// Longest name of a table, chain or set here. The kernel's limit (NFT_NAME_MAXLEN) is 255.
const NAME: usize = 200;
/// Longest comment that nft shows (NFTNL_UDATA_COMMENT_MAXLEN without the closing zero).
const COMMENT: usize = 127;

impl Table {
    /// Whether the kernel can be asked for this table.
    ///
    /// # Errors
    /// The first thing that is wrong, and where.
    pub fn check(&self) -> Result<(), Malformed> {
        let fail = |place: String, problem: String| Malformed {
            table: format!("{} {}", self.family, self.name),
            place,
            problem,
        };
        if self.family == Family::Netdev {
            return Err(fail(String::new(), "tables for one device are not made any more".into()));
        }
        name(&self.name).map_err(|problem| fail(String::new(), problem))?;
        for (index, set) in self.sets.iter().enumerate() {
            let at = || format!("set {}: ", set.name);
            name(&set.name).map_err(|problem| fail(at(), problem))?;
            if self.sets[..index].iter().any(|other| other.name == set.name) {
                return Err(fail(at(), "there are two of this name".into()));
            }
            let mut before = None;
            for (first, last) in &set.ranges {
                let fits = |address: &IpAddr| address.is_ipv4() == (set.kind == SetKind::Ipv4);
                if !fits(first) || !fits(last) {
                    return Err(fail(at(), format!("{first}-{last} is no range of this set's kind")));
                }
                if first > last || before.is_some_and(|before| *first <= before) {
                    return Err(fail(at(), format!("{first}-{last} is not in order")));
                }
                before = Some(*last);
            }
        }
        for (index, chain) in self.chains.iter().enumerate() {
            let at = || format!("chain {}: ", chain.name);
            name(&chain.name).map_err(|problem| fail(at(), problem))?;
            if self.chains[..index].iter().any(|other| other.name == chain.name) {
                return Err(fail(at(), "there are two of this name".into()));
            }
            let nat = chain.hook.as_ref().is_some_and(|hook| hook.kind == HookKind::Nat);
            if nat && chain.hook.as_ref().is_some_and(|hook| hook.point == HookPoint::Forward) {
                return Err(fail(at(), "no NAT at this hook".into()));
            }
            for rule in &chain.rules {
                self.check_rule(chain, rule).map_err(|problem| fail(format!("{}rule `{rule}`: ", at()), problem))?;
            }
        }
        Ok(())
    }

    fn check_rule(&self, chain: &Chain, rule: &Rule) -> Result<(), String> {
        if let Some(comment) = &rule.comment {
            if comment.len() > COMMENT {
                return Err(format!("a comment has at most {COMMENT} bytes"));
            }
            if comment.contains(['"', '\n', '\0']) {
                return Err("a comment has no quotes and no line breaks".into());
            }
        }
        if rule.action == Action::Masquerade {
            let hooked = chain.hook.as_ref();
            if !hooked.is_some_and(|hook| hook.kind == HookKind::Nat && hook.point == HookPoint::Postrouting) {
                return Err("masquerade belongs into a nat chain at postrouting".into());
            }
        }
        rule.matches.iter().try_for_each(|condition| self.check_match(condition))
    }

    fn check_match(&self, condition: &Match) -> Result<(), String> {
        if let Match::Is(field, ..) | Match::Network { field, .. } | Match::Set { field, .. } = condition {
            let seen = match (self.family, field.layout().of) {
                (Family::Ip, Some(of)) => of == 2,
                (Family::Ip6, Some(of)) => of == 10,
                _ => true,
            };
            if !seen {
                return Err(format!("{field} is not seen by the family {}", self.family));
            }
        }
        match condition {
            Match::Is(field, _, value) => fits(*field, value),
            Match::Network { field, network, prefix } => {
                fits(*field, &Value::Ip(*network))?;
                let bits = if network.is_ipv4() { 32 } else { 128 };
                if *prefix > bits || *prefix == 0 {
                    return Err(format!("a prefix has 1 to {bits} bits"));
                }
                Ok(())
            }
            Match::Set { field, set } => {
                let found = self.sets.iter().find(|other| other.name == *set);
                let kind = found.ok_or_else(|| format!("there is no set {set}"))?.kind;
                let wanted = match field {
                    Field::IpSaddr => SetKind::Ipv4,
                    Field::Ip6Saddr => SetKind::Ipv6,
                    Field::Iifname | Field::Oifname => return Err(format!("{field} is no address")),
                };
                if kind == wanted { Ok(()) } else { Err(format!("{set} is a set of the other kind of addresses")) }
            }
            Match::Ct(states) if states.is_empty() => Err("ct state without a state".into()),
            Match::Ct(_) => Ok(()),
        }
    }
}

/// The name of a table, chain or set, as nft can read it.
fn name(text: &str) -> Result<(), String> {
    let mut chars = text.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if first && text.len() <= NAME && chars.all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c)) {
        Ok(())
    } else {
        Err(format!("{text:?} is no name for nftables"))
    }
}

fn device_name(text: &str) -> Result<(), String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || c == '/' || c == '"' || c == '*';
    if text.is_empty() || text.len() > DEVICE_NAME || text.contains(bad) {
        return Err(format!("{text:?} is no name of a device"));
    }
    Ok(())
}

fn fits(field: Field, value: &Value) -> Result<(), String> {
    let good = match (field, value) {
        (Field::IpSaddr, Value::Ip(address)) => address.is_ipv4(),
        (Field::Ip6Saddr, Value::Ip(address)) => address.is_ipv6(),
        (Field::Iifname | Field::Oifname, Value::Name(name)) => {
            device_name(name)?;
            true
        }
        _ => false,
    };
    if good { Ok(()) } else { Err(format!("{field} is not compared with a value of this kind")) }
}
