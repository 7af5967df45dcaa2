//! What is wrong with a table, found before the kernel is asked.

use std::net::IpAddr;

use super::field::{Base, Needs, Place, Style};
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
            self.check_hook(chain).map_err(|problem| fail(at(), problem))?;
            for rule in &chain.rules {
                self.check_rule(chain, rule).map_err(|problem| fail(format!("{}rule `{rule}`: ", at()), problem))?;
            }
        }
        Ok(())
    }

    fn check_hook(&self, chain: &Chain) -> Result<(), String> {
        let Some(hook) = &chain.hook else { return Ok(()) };
        let ingress = hook.point == HookPoint::Ingress;
        if ingress != (self.family == Family::Netdev) {
            return Err("ingress is the hook of the family netdev, and its only one".into());
        }
        match &hook.device {
            None if ingress => return Err("an ingress hook needs a device".into()),
            Some(_) if !ingress => return Err("only an ingress hook has a device".into()),
            Some(device) => device_name(device)?,
            None => {}
        }
        if self.family == Family::Arp && !matches!(hook.point, HookPoint::Input | HookPoint::Output) {
            return Err("ARP has the hooks input and output".into());
        }
        let nat = matches!(self.family, Family::Inet | Family::Ip | Family::Ip6) && hook.point != HookPoint::Forward;
        if hook.kind == HookKind::Nat && !nat {
            return Err("no NAT at this hook of this family".into());
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
        match &rule.action {
            Action::Jump(to) | Action::Goto(to) => match self.chains.iter().find(|chain| chain.name == *to) {
                None => return Err(format!("there is no chain {to}")),
                Some(found) if found.hook.is_some() => return Err(format!("{to} has a hook, and cannot be jumped to")),
                Some(_) => {}
            },
            Action::Masquerade => {
                let hooked = chain.hook.as_ref();
                if !hooked.is_some_and(|hook| hook.kind == HookKind::Nat && hook.point == HookPoint::Postrouting) {
                    return Err("masquerade belongs into a nat chain at postrouting".into());
                }
            }
            _ => {}
        }
        rule.matches.iter().try_for_each(|condition| self.check_match(condition))
    }

    fn check_match(&self, condition: &Match) -> Result<(), String> {
        if let Match::Is(field, ..)
        | Match::Masked(field, ..)
        | Match::Range { field, .. }
        | Match::Network { field, .. }
        | Match::Set { field, .. } = condition
        {
            let layout = field.layout();
            let link = matches!(layout.place, Place::Payload(Base::Link, ..));
            let seen = match self.family {
                Family::Netdev | Family::Bridge => true,
                Family::Inet => !link && layout.needs != Needs::Arp,
                Family::Ip => {
                    !link
                        && matches!(
                            layout.needs,
                            Needs::Nothing | Needs::Transport(_) | Needs::Ip | Needs::IpTransport(_)
                        )
                }
                Family::Ip6 => {
                    !link
                        && matches!(
                            layout.needs,
                            Needs::Nothing | Needs::Transport(_) | Needs::Ip6 | Needs::Ip6Transport(_)
                        )
                }
                Family::Arp => !link && matches!(layout.needs, Needs::Nothing | Needs::Arp),
            };
            if !seen {
                return Err(format!("{field} is not seen by the family {}", self.family));
            }
        }
        match condition {
            Match::Is(field, _, value) => fits(*field, value),
            Match::Masked(field, mask, _, value) => {
                field_is_sound(*field)?;
                let max = max(*field).ok_or("a mask is for fields of at most 8 bytes")?;
                if *mask > max || *mask == 0 || value & !mask != 0 {
                    return Err("the mask does not fit the field or the value".into());
                }
                Ok(())
            }
            Match::Range { field, from, to, .. } => {
                fits(*field, from)?;
                fits(*field, to)?;
                let ordered = match (from, to) {
                    (Value::Number(from), Value::Number(to)) => from <= to,
                    (Value::Mac(from), Value::Mac(to)) => from <= to,
                    (Value::Ip(from), Value::Ip(to)) => from <= to,
                    _ => false,
                };
                if ordered { Ok(()) } else { Err("a range goes from the lower to the higher".into()) }
            }
            Match::Network { field, network, prefix, .. } => {
                fits(*field, &Value::Ip(*network))?;
                if u16::from(*prefix) > field.bits() || *prefix == 0 {
                    return Err(format!("a prefix has 1 to {} bits", field.bits()));
                }
                Ok(())
            }
            Match::Set { field, set, .. } => {
                let found = self.sets.iter().find(|other| other.name == *set);
                let kind = found.ok_or_else(|| format!("there is no set {set}"))?.kind;
                let wanted = match field.layout().style {
                    Style::Ipv4 => SetKind::Ipv4,
                    Style::Ipv6 => SetKind::Ipv6,
                    // A raw place says nothing of its type; its length must do.
                    Style::Hex if field.bits() == 32 => SetKind::Ipv4,
                    Style::Hex if field.bits() == 128 => SetKind::Ipv6,
                    _ => return Err(format!("{field} is no address")),
                };
                if kind == wanted { Ok(()) } else { Err(format!("{set} is a set of the other kind of addresses")) }
            }
            Match::Ct(states) => {
                if states.is_empty() {
                    return Err("ct state without a state".into());
                }
                if matches!(self.family, Family::Netdev | Family::Arp) {
                    return Err("there is no connection tracking at this family's hooks".into());
                }
                Ok(())
            }
            Match::Limit { rate, burst, .. } => {
                if *rate == 0 || *burst == 0 {
                    Err("a limit of nothing".into())
                } else {
                    Ok(())
                }
            }
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

fn field_is_sound(field: Field) -> Result<(), String> {
    if let Field::Raw(base, offset, bits) = field
        && (offset % 8 != 0 || bits % 8 != 0 || bits == 0 || bits > 128 || base == Base::Link && offset >= 112)
    {
        return Err(format!("{field} does not begin and end at a byte of a header, or is too long"));
    }
    Ok(())
}

/// The highest number a field holds; `None` if a number does not do.
fn max(field: Field) -> Option<u64> {
    let bits = match field.layout().place {
        Place::Meta(_, bytes) => bytes * 8,
        Place::Payload(_, _, bits) => bits,
    };
    u64::MAX.checked_shr(64u32.checked_sub(bits.into())?)
}

fn fits(field: Field, value: &Value) -> Result<(), String> {
    field_is_sound(field)?;
    let style = field.layout().style;
    let good = match value {
        Value::Number(number) => {
            matches!(style, Style::Number | Style::Hex) && max(field).is_some_and(|max| *number <= max)
        }
        Value::Mac(_) => field.bits() == 48,
        Value::Ip(IpAddr::V4(_)) => field.bits() == 32 && style != Style::Number,
        Value::Ip(IpAddr::V6(_)) => field.bits() == 128 && style != Style::Name,
        Value::Name(name) => {
            device_name(name)?;
            style == Style::Name
        }
    };
    if good { Ok(()) } else { Err(format!("{field} is not compared with a value of this kind or size")) }
}
