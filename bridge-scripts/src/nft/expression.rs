//! A rule as the expressions of nf_tables: what is loaded into a register, compared, and decided.

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta, Operator,
    Payload, Register, Verdict, VerdictAttribute,
};

use super::field::{Needs, Place};
use super::{Action, Base, CtState, Family, Field, Match, Op, Rule, Table, Value};

type Expression = ListAttribute<ExpressionAttribute>;

/// The expressions of a rule.
pub(super) fn of(table: &Table, rule: &Rule) -> Vec<Expression> {
    Writer::default().rule(table, rule)
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

pub(super) fn bytes_of(address: IpAddr) -> Vec<u8> {
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
