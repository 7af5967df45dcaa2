//! Tables as the messages of nf_tables (linux/netfilter/nf_tables.h).

use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook as HookAttribute, HookNumber, InetHookNumber, ListAttribute,
    NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags, SetElementList,
    SetElementMessage, SetFlags, SetMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};

use super::expression;
use super::{Chain, Family, Hook, HookPoint, Policy, Rule, Set, SetKind, Table};
use crate::ranges::{bytes_of, number};

/// A message, the netlink flags it needs beside NLM_F_REQUEST, and what it is about, for an error.
pub(super) struct Part<'a> {
    pub(super) message: NetfilterMessage,
    pub(super) flags: u16,
    pub(super) about: About<'a>,
}

/// What a message is about. In words only if the kernel refuses it: the words of a hundred rules take their time.
#[derive(Clone, Copy)]
pub(super) enum About<'a> {
    /// The one that was there.
    Before,
    Table,
    /// Somebody else's chain.
    Foreign,
    Set(&'a Set),
    Chain(&'a Chain),
    Rule(&'a Chain, &'a Rule),
}

impl std::fmt::Display for About<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Before => f.write_str("the table before"),
            Self::Table => f.write_str("the table"),
            Self::Foreign => f.write_str("another's chain"),
            Self::Set(set) => write!(f, "set {}", set.name),
            Self::Chain(chain) => write!(f, "chain {}", chain.name),
            Self::Rule(chain, rule) => write!(f, "chain {}: rule `{rule}`", chain.name),
        }
    }
}

/// What makes the kernel have this table and nothing else of its name. If it is `new`, the kernel refuses with EEXIST where
/// there is one already.
pub(super) fn replace(table: &Table, new: bool) -> Vec<Part<'_>> {
    let mut parts = if new { Vec::new() } else { delete(table.family, &table.name) };
    let part = |message, flags, about| Part { message: wrap(table.family, message), flags, about };
    let alone = if new { NLM_F_CREATE | NLM_F_EXCL } else { NLM_F_CREATE };
    parts.push(part(new_table(&table.name), alone, About::Table));
    for (id, set) in (1..).zip(&table.sets) {
        let about = About::Set(set);
        parts.push(part(new_set(&table.name, set, id), NLM_F_CREATE, about));
        if !set.ranges.is_empty() {
            parts.push(part(new_elements(&table.name, set, id), NLM_F_CREATE, about));
        }
    }
    for chain in &table.chains {
        parts.push(part(new_chain(&table.name, chain), NLM_F_CREATE, About::Chain(chain)));
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            let message = new_rule(table, chain, rule);
            parts.push(part(message, NLM_F_CREATE | NLM_F_APPEND, About::Rule(chain, rule)));
        }
    }
    parts
}

/// What makes the kernel have no table of this name. One that is not there is made first: deleting what is absent
/// would make the whole batch fail, and looking first would be a race.
pub(super) fn delete<'a>(family: Family, name: &str) -> Vec<Part<'a>> {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    let gone = NfTablesMessage::DeleteTable(TableMessage { attributes });
    [(new_table(name), NLM_F_CREATE), (gone, 0)]
        .map(|(message, flags)| Part { message: wrap(family, message), flags, about: About::Before })
        .into()
}

/// What puts a rule before all others of somebody else's chain.
pub(super) fn insert<'a>(family: Family, table: &str, chain: &str, rule: &Rule) -> Part<'a> {
    let table = Table { family, name: table.to_owned(), sets: Vec::new(), chains: Vec::new() };
    let chain = Chain { name: chain.to_owned(), hook: None, rules: Vec::new() };
    Part { message: wrap(family, new_rule(&table, &chain, rule)), flags: NLM_F_CREATE, about: About::Foreign }
}

/// What deletes the rule of this number.
pub(super) fn delete_rule<'a>(family: Family, table: &str, chain: &str, number: u64) -> Part<'a> {
    /// NFTA_RULE_HANDLE.
    const HANDLE: u16 = 3;
    let attributes = vec![
        RuleAttribute::Table(table.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Other(DefaultNla::new(HANDLE, number.to_be_bytes().to_vec())),
    ];
    let message = NfTablesMessage::DeleteRule(RuleMessage { attributes });
    Part { message: wrap(family, message), flags: 0, about: About::Foreign }
}

/// The question which tables there are.
pub(super) fn list() -> NetfilterMessage {
    let attributes = Vec::new();
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0),
        NfTablesMessage::GetTable(TableMessage { attributes }),
    )
}

fn wrap(family: Family, message: NfTablesMessage) -> NetfilterMessage {
    let family = match family {
        Family::Netdev => NetfilterProtoFamily::NetDev,
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Ip => NetfilterProtoFamily::IPv4,
        Family::Ip6 => NetfilterProtoFamily::IPv6,
    };
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

/// The family of a message that the kernel sent.
pub(super) fn family(family: NetfilterProtoFamily) -> Option<Family> {
    Some(match family {
        NetfilterProtoFamily::NetDev => Family::Netdev,
        NetfilterProtoFamily::Inet => Family::Inet,
        NetfilterProtoFamily::IPv4 => Family::Ip,
        NetfilterProtoFamily::IPv6 => Family::Ip6,
        _ => return None,
    })
}

fn new_table(name: &str) -> NfTablesMessage {
    NfTablesMessage::NewTable(TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] })
}

fn new_set(table: &str, set: &Set, id: u32) -> NfTablesMessage {
    // The kernel only keeps the type, for nft to print: TYPE_IPADDR and TYPE_IP6ADDR of nft's datatype.h.
    let (kind, bytes) = match set.kind {
        SetKind::Ipv4 => (7, 4),
        SetKind::Ipv6 => (8, 16),
    };
    NfTablesMessage::NewSet(SetMessage {
        attributes: vec![
            SetAttribute::Table(table.to_owned()),
            SetAttribute::Name(set.name.clone()),
            SetAttribute::Flags(SetFlags::Interval),
            SetAttribute::KeyType(kind),
            SetAttribute::KeyLen(bytes),
            SetAttribute::Id(id),
        ],
    })
}

/// Intervals are their first address and, marked as an end, the one behind their last. The very last address has none
/// behind it, and its interval no end. What is before the first interval is the end of nothing.
fn new_elements(table: &str, set: &Set, id: u32) -> NfTablesMessage {
    let element = |address: u128, flags: Option<SetElementFlags>| {
        let key = bytes_of(set.kind.address(address));
        let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(key))];
        attributes.extend(flags.map(SetElementAttribute::Flags));
        ListAttribute::Element(attributes)
    };
    let end_of_all = u128::MAX >> (128 - u32::from(set.kind.bits()));
    let mut elements = Vec::with_capacity(2 * set.ranges.len());
    if set.ranges.first().is_some_and(|(first, _)| number(*first) > 0) {
        elements.push(element(0, Some(SetElementFlags::IntervalEnd)));
    }
    for (first, last) in &set.ranges {
        elements.push(element(number(*first), None));
        let last = number(*last);
        if last < end_of_all {
            elements.push(element(last + 1, Some(SetElementFlags::IntervalEnd)));
        }
    }
    NfTablesMessage::NewSetElement(SetElementMessage {
        attributes: vec![
            SetElementList::Table(table.to_owned()),
            SetElementList::Set(set.name.clone()),
            SetElementList::SetId(id),
            SetElementList::Elements(elements),
        ],
    })
}

fn new_chain(table: &str, chain: &Chain) -> NfTablesMessage {
    let mut attributes = vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.name.clone())];
    if let Some(hook) = &chain.hook {
        attributes.push(ChainAttribute::Hook(hook_attributes(hook)));
        // NF_DROP and NF_ACCEPT.
        attributes.push(ChainAttribute::Policy(match hook.policy {
            Policy::Drop => 0,
            Policy::Accept => 1,
        }));
        attributes.push(ChainAttribute::Type(hook.kind.name().to_owned()));
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

/// The same as [`wrap`] writes into a message's header: NFPROTO_* of linux/netfilter.h.
pub(super) fn family_number(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
        Family::Netdev => 5,
        Family::Ip6 => 10,
    }
}

/// What the kernel tells of a hook: NFTA_HOOK_HOOKNUM and NFTA_HOOK_PRIORITY.
pub(super) fn hook_bytes(hook: &Hook) -> Vec<u8> {
    let number = match hook.point {
        HookPoint::Prerouting => 0,
        HookPoint::Forward => 2,
        HookPoint::Postrouting => 4,
    };
    let mut attributes = super::attributes::Attributes::default();
    attributes.u32(1, number).u32(2, hook.priority.cast_unsigned());
    attributes.finish()
}

fn hook_attributes(hook: &Hook) -> Vec<HookAttribute> {
    let number = HookNumber::Inet(match hook.point {
        HookPoint::Prerouting => InetHookNumber::PreRouting,
        HookPoint::Forward => InetHookNumber::Forward,
        HookPoint::Postrouting => InetHookNumber::PostRouting,
    });
    vec![HookAttribute::Number(number), HookAttribute::Priority(hook.priority.cast_unsigned())]
}

/// NFTA_RULE_EXPRESSIONS.
const RULE_EXPRESSIONS: u16 = 4;

fn new_rule(table: &Table, chain: &Chain, rule: &Rule) -> NfTablesMessage {
    let mut attributes = vec![
        RuleAttribute::Table(table.name.clone()),
        RuleAttribute::Chain(chain.name.clone()),
        RuleAttribute::Other(DefaultNla::new(RULE_EXPRESSIONS | NLA_F_NESTED, expression::of(table, rule))),
    ];
    if let Some(comment) = &rule.comment {
        // NFTNL_UDATA_RULE_COMMENT of libnftnl: type 0, length, text with its zero.
        let mut data = vec![0, u8::try_from(comment.len() + 1).unwrap_or(u8::MAX)];
        data.extend(comment.as_bytes());
        data.push(0);
        attributes.push(RuleAttribute::UserData(data));
    }
    NfTablesMessage::NewRule(RuleMessage { attributes })
}
