//! Tables as the messages of nf_tables (linux/netfilter/nf_tables.h).

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, DevHookNumber, ExpressionAttribute, Expressions,
    Hook as HookAttribute, HookNumber, Immediate, InetHookNumber, ListAttribute, Lookup, Meta, NfTablesMessage,
    Operator, Payload, Register, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags,
    SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};

use super::field::{Needs, Place};
use super::{
    Action, Base, Chain, CtState, Family, Field, Hook, HookKind, HookPoint, Match, Op, Policy, Rule, Set, SetKind,
    Table, Value,
};

/// A message, the netlink flags it needs beside NLM_F_REQUEST, and what it is about, for an error.
pub(super) struct Part {
    pub(super) message: NetfilterMessage,
    pub(super) flags: u16,
    pub(super) about: String,
}

type Expression = ListAttribute<ExpressionAttribute>;

/// What makes the kernel have this table and nothing else of its name.
pub(super) fn replace(table: &Table) -> Vec<Part> {
    let mut parts = delete(table.family, &table.name);
    let part = |message, flags, about| Part { message: wrap(table.family, message), flags, about };
    parts.push(part(new_table(&table.name), NLM_F_CREATE, "the table".to_owned()));
    for (id, set) in (1..).zip(&table.sets) {
        let about = format!("set {}", set.name);
        parts.push(part(new_set(&table.name, set, id), NLM_F_CREATE, about.clone()));
        if !set.ranges.is_empty() {
            parts.push(part(new_elements(&table.name, set, id), NLM_F_CREATE, about));
        }
    }
    for chain in &table.chains {
        parts.push(part(new_chain(table.family, &table.name, chain), NLM_F_CREATE, format!("chain {}", chain.name)));
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            let message = new_rule(table, chain, rule);
            let about = format!("chain {}: rule `{rule}`", chain.name);
            parts.push(part(message, NLM_F_CREATE | NLM_F_APPEND, about));
        }
    }
    parts
}

/// What makes the kernel have no table of this name. One that is not there is made first: deleting what is absent
/// would make the whole batch fail, and looking first would be a race.
pub(super) fn delete(family: Family, name: &str) -> Vec<Part> {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    let gone = NfTablesMessage::DeleteTable(TableMessage { attributes });
    [(new_table(name), NLM_F_CREATE), (gone, 0)]
        .map(|(message, flags)| Part { message: wrap(family, message), flags, about: "the table before".to_owned() })
        .into()
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
        Family::Bridge => NetfilterProtoFamily::Bridge,
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Ip => NetfilterProtoFamily::IPv4,
        Family::Ip6 => NetfilterProtoFamily::IPv6,
        Family::Arp => NetfilterProtoFamily::ARP,
    };
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

/// The family of a message that the kernel sent.
pub(super) fn family(family: NetfilterProtoFamily) -> Option<Family> {
    Some(match family {
        NetfilterProtoFamily::NetDev => Family::Netdev,
        NetfilterProtoFamily::Bridge => Family::Bridge,
        NetfilterProtoFamily::Inet => Family::Inet,
        NetfilterProtoFamily::IPv4 => Family::Ip,
        NetfilterProtoFamily::IPv6 => Family::Ip6,
        NetfilterProtoFamily::ARP => Family::Arp,
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
    if set.ranges.first().is_some_and(|(first, _)| super::number(*first) > 0) {
        elements.push(element(0, Some(SetElementFlags::IntervalEnd)));
    }
    for (first, last) in &set.ranges {
        elements.push(element(super::number(*first), None));
        let last = super::number(*last);
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

fn new_chain(family: Family, table: &str, chain: &Chain) -> NfTablesMessage {
    let mut attributes = vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.name.clone())];
    if let Some(hook) = &chain.hook {
        attributes.push(ChainAttribute::Hook(hook_attributes(family, hook)));
        // NF_DROP and NF_ACCEPT.
        attributes.push(ChainAttribute::Policy(match hook.policy {
            Policy::Drop => 0,
            Policy::Accept => 1,
        }));
        let kind = match hook.kind {
            HookKind::Filter => "filter",
            HookKind::Nat => "nat",
        };
        attributes.push(ChainAttribute::Type(kind.to_owned()));
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn hook_attributes(family: Family, hook: &Hook) -> Vec<HookAttribute> {
    // enum nf_inet_hooks; bridges count the same way, and ARP has NF_ARP_IN and NF_ARP_OUT.
    let number = match hook.point {
        HookPoint::Input if family == Family::Arp => HookNumber::Other(0),
        HookPoint::Output if family == Family::Arp => HookNumber::Other(1),
        HookPoint::Ingress => HookNumber::Dev(DevHookNumber::Ingress),
        HookPoint::Prerouting => HookNumber::Inet(InetHookNumber::PreRouting),
        HookPoint::Input => HookNumber::Inet(InetHookNumber::LocalIn),
        HookPoint::Forward => HookNumber::Inet(InetHookNumber::Forward),
        HookPoint::Output => HookNumber::Inet(InetHookNumber::LocalOut),
        HookPoint::Postrouting => HookNumber::Inet(InetHookNumber::PostRouting),
    };
    let mut attributes = vec![HookAttribute::Number(number), HookAttribute::Priority(hook.priority.cast_unsigned())];
    attributes.extend(hook.device.clone().map(HookAttribute::NetDeviceName));
    attributes
}

fn new_rule(table: &Table, chain: &Chain, rule: &Rule) -> NfTablesMessage {
    let mut attributes = vec![
        RuleAttribute::Table(table.name.clone()),
        RuleAttribute::Chain(chain.name.clone()),
        RuleAttribute::Expressions(Writer::default().rule(table, rule)),
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

const REGISTER: Register = Register::Reg1;

/// Writes a rule's expressions, and remembers what was asked already so that nothing is asked twice.
#[derive(Default)]
struct Writer {
    expressions: Vec<Expression>,
    asked: Vec<(Field, Value)>,
    ethernet: bool,
}

impl Writer {
    fn rule(mut self, table: &Table, rule: &Rule) -> Vec<Expression> {
        for condition in &rule.matches {
            self.condition(table, condition);
        }
        if rule.counter {
            // NFTA_COUNTER_BYTES and _PACKETS.
            self.other("counter", vec![DefaultNla::new(1, vec![0; 8]), DefaultNla::new(2, vec![0; 8])]);
        }
        self.action(&rule.action);
        self.expressions
    }

    fn push(&mut self, expression: Expressions) {
        self.expressions.push(expression.into());
    }

    fn other(&mut self, name: &str, attributes: Vec<DefaultNla>) {
        self.push(Expressions::Other { expression_type: name.to_owned(), attributes });
    }

    fn condition(&mut self, table: &Table, condition: &Match) {
        match condition {
            Match::Is(field, op, value) => {
                self.needs(table.family, *field);
                self.asked.push((*field, value.clone()));
                let (data, mask) = self.load(*field, value);
                if let Some(mask) = mask {
                    self.mask(mask);
                }
                self.compare(*op, data);
            }
            Match::Masked(field, mask, op, value) => {
                self.needs(table.family, *field);
                let (data, whole) = self.load(*field, &Value::Number(*value));
                let mut mask = placed(*field, &Value::Number(*mask));
                for (bit, allowed) in mask.iter_mut().zip(whole.unwrap_or_else(|| vec![0xff; data.len()])) {
                    *bit &= allowed;
                }
                self.mask(mask);
                self.compare(*op, data);
            }
            Match::Range { field, not, from, to } => {
                self.needs(table.family, *field);
                let (from, mask) = self.load(*field, from);
                if let Some(mask) = mask {
                    self.mask(mask);
                }
                let to = placed(*field, to);
                if *not {
                    // NFTA_RANGE_SREG, _OP (NFT_RANGE_NEQ), _FROM_DATA, _TO_DATA.
                    let data = |kind: u16, bytes| DefaultNla::new(kind | NLA_F_NESTED, value_bytes(bytes));
                    let (register, op) = (u32::from(REGISTER).to_be_bytes(), 1u32.to_be_bytes());
                    let plain = [DefaultNla::new(1, register.into()), DefaultNla::new(2, op.into())];
                    self.other("range", plain.into_iter().chain([data(3, from), data(4, to)]).collect());
                } else {
                    self.compare(Op::Ge, from);
                    self.compare(Op::Le, to);
                }
            }
            Match::Network { field, not, network, prefix } => {
                self.needs(table.family, *field);
                let (data, _) = self.load(*field, &Value::Ip(super::show::masked(*network, *prefix)));
                let ones: IpAddr = match network {
                    IpAddr::V4(_) => std::net::Ipv4Addr::BROADCAST.into(),
                    IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(u128::MAX).into(),
                };
                if u16::from(*prefix) < field.bits() {
                    self.mask(bytes_of(super::show::masked(ones, *prefix)));
                }
                self.compare(if *not { Op::Ne } else { Op::Eq }, data);
            }
            Match::Set { field, not, set } => {
                self.needs(table.family, *field);
                self.fetch(*field);
                let id = table.sets.iter().position(|other| other.name == *set).unwrap_or(table.sets.len()) + 1;
                let mut lookup = vec![
                    Lookup::Set(set.clone()),
                    Lookup::SourceRegister(REGISTER),
                    Lookup::SetId(u32::try_from(id).unwrap_or(u32::MAX)),
                ];
                if *not {
                    // NFT_LOOKUP_F_INV.
                    lookup.push(Lookup::Flags(1));
                }
                self.push(Expressions::Lookup(lookup));
            }
            Match::Ct(states) => {
                // NFTA_CT_DREG, NFTA_CT_KEY (NFT_CT_STATE). States are bits of a number in the machine's byte order.
                let register = u32::from(REGISTER).to_be_bytes();
                self.other("ct", vec![DefaultNla::new(1, register.into()), DefaultNla::new(2, vec![0; 4])]);
                let bits = states.iter().fold(0u32, |bits, state| bits | state.bit());
                self.mask(bits.to_ne_bytes().into());
                self.compare(Op::Ne, vec![0; 4]);
            }
            Match::Limit { over, rate, burst } => {
                // NFTA_LIMIT_RATE, _UNIT (seconds), _BURST, _TYPE (NFT_LIMIT_PKTS), _FLAGS (NFT_LIMIT_F_INV).
                self.other(
                    "limit",
                    vec![
                        DefaultNla::new(1, u64::from(*rate).to_be_bytes().into()),
                        DefaultNla::new(2, 1u64.to_be_bytes().into()),
                        DefaultNla::new(3, burst.to_be_bytes().into()),
                        DefaultNla::new(4, 0u32.to_be_bytes().into()),
                        DefaultNla::new(5, u32::from(*over).to_be_bytes().into()),
                    ],
                );
            }
        }
    }

    /// Asks for what must hold before the field means anything, unless the rule asked already.
    fn needs(&mut self, family: Family, field: Field) {
        const VLAN: u64 = 0x8100;
        const ARP: u64 = 0x0806;
        const IP: u64 = 0x0800;
        const IP6: u64 = 0x86dd;
        let layout = field.layout();
        let link = matches!(layout.place, Place::Payload(Base::Link, ..)) && !matches!(field, Field::Raw(..));
        if link && family == Family::Netdev && !self.ethernet {
            // NFT_META_IIFTYPE, a number in the machine's byte order, is ARPHRD_ETHER.
            self.push(Expressions::Meta(vec![Meta::Key(8.into()), Meta::DestinationRegister(REGISTER)]));
            self.compare(Op::Eq, 1u16.to_ne_bytes().into());
            self.ethernet = true;
        }
        let network = |ethertype| match family {
            Family::Netdev | Family::Bridge => Some((Field::Protocol, ethertype)),
            // NFPROTO_IPV4 and NFPROTO_IPV6.
            Family::Inet if ethertype == IP => Some((Field::Nfproto, 2)),
            Family::Inet if ethertype == IP6 => Some((Field::Nfproto, 10)),
            _ => None,
        };
        let transport = |number: u8| Some((Field::L4proto, u64::from(number)));
        let questions = match layout.needs {
            Needs::Nothing => [None, None],
            Needs::Vlan => [Some((Field::EtherType, VLAN)), None],
            Needs::Arp => [network(ARP), None],
            Needs::Ip => [network(IP), None],
            Needs::Ip6 => [network(IP6), None],
            Needs::Transport(number) => [None, transport(number)],
            Needs::IpTransport(number) => [network(IP), transport(number)],
            Needs::Ip6Transport(number) => [network(IP6), transport(number)],
        };
        for (field, number) in questions.into_iter().flatten() {
            let question = (field, Value::Number(number));
            if !self.asked.contains(&question) {
                let (data, _) = self.load(question.0, &question.1);
                self.compare(Op::Eq, data);
                self.asked.push(question);
            }
        }
    }

    /// Fetches the bytes a field is in, and gives the value in the same place, and a mask if the field does not fill
    /// its bytes.
    fn load(&mut self, field: Field, value: &Value) -> (Vec<u8>, Option<Vec<u8>>) {
        self.fetch(field);
        let mask = match field.layout().place {
            Place::Payload(_, _, bits) if bits % 8 != 0 => {
                Some(placed(field, &Value::Number(u64::MAX >> (64 - u32::from(bits)))))
            }
            _ => None,
        };
        (placed(field, value), mask)
    }

    fn fetch(&mut self, field: Field) {
        self.push(match field.layout().place {
            Place::Meta(key, _) => Expressions::Meta(vec![Meta::Key(key.into()), Meta::DestinationRegister(REGISTER)]),
            Place::Payload(base, offset, bits) => {
                let (first, bytes) = span(offset, bits);
                Expressions::Payload(vec![
                    Payload::DestinationRegister(REGISTER),
                    Payload::Base(base.number()),
                    Payload::Offset(first.into()),
                    Payload::Len(bytes.into()),
                ])
            }
        });
    }

    fn mask(&mut self, mask: Vec<u8>) {
        let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
        let xor = vec![0; mask.len()];
        self.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(REGISTER),
            Bitwise::DestinationRegister(REGISTER),
            Bitwise::Length(length),
            Bitwise::Mask(DataAttribute::Value(mask)),
            Bitwise::Xor(DataAttribute::Value(xor)),
        ]));
    }

    fn compare(&mut self, op: Op, data: Vec<u8>) {
        let op = match op {
            Op::Eq => Operator::Equal,
            Op::Ne => Operator::NotEqual,
            Op::Lt => Operator::LessThan,
            Op::Le => Operator::LessThanEqual,
            Op::Gt => Operator::GreaterThan,
            Op::Ge => Operator::GreatherThanEqual,
        };
        self.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(REGISTER),
            Cmp::Op(op),
            Cmp::Data(DataAttribute::Value(data)),
        ]));
    }

    fn action(&mut self, action: &Action) {
        let (verdict, chain) = match action {
            Action::Masquerade => return self.other("masq", Vec::new()),
            // NF_ACCEPT and NF_DROP.
            Action::Accept => (Verdict::Other(1), None),
            Action::Drop => (Verdict::Other(0), None),
            Action::Return => (Verdict::Return, None),
            Action::Continue => (Verdict::Continue, None),
            Action::Jump(to) => (Verdict::Jump, Some(to)),
            Action::Goto(to) => (Verdict::Goto, Some(to)),
        };
        let mut attributes = vec![VerdictAttribute::Code(verdict)];
        attributes.extend(chain.map(|name| VerdictAttribute::Chain(name.clone())));
        self.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(DataAttribute::Verdict(attributes)),
        ]));
    }
}

impl CtState {
    /// NF_CT_STATE_BIT of linux/netfilter/nf_conntrack_common.h.
    fn bit(self) -> u32 {
        match self {
            Self::Invalid => 1,
            Self::Established => 2,
            Self::Related => 4,
            Self::New => 8,
        }
    }
}

/// The bytes around some bits: the first, and how many.
fn span(offset: u16, bits: u16) -> (u16, u16) {
    let first = offset / 8;
    (first, (offset + bits).div_ceil(8) - first)
}

/// A value in the bytes that [`Writer::fetch`] brings for this field.
fn placed(field: Field, value: &Value) -> Vec<u8> {
    let (bytes, shift) = match field.layout().place {
        Place::Meta(_, bytes) => (bytes, 0),
        Place::Payload(_, offset, bits) => {
            let (first, bytes) = span(offset, bits);
            (bytes, (first + bytes) * 8 - offset - bits)
        }
    };
    match value {
        Value::Number(number) => {
            let number = (number << shift).to_be_bytes();
            let at = number.len() - usize::from(bytes).min(number.len());
            number[at..].to_vec()
        }
        Value::Mac(mac) => mac.to_vec(),
        Value::Ip(address) => bytes_of(*address),
        Value::Name(name) => {
            let mut data = name.clone().into_bytes();
            data.resize(bytes.into(), 0);
            data
        }
    }
}

fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// NFTA_DATA_VALUE as the content of a nested attribute.
fn value_bytes(bytes: Vec<u8>) -> Vec<u8> {
    let data = [DataAttribute::Value(bytes)];
    let mut buffer = vec![0; data.as_slice().buffer_len()];
    data.as_slice().emit(&mut buffer);
    buffer
}
