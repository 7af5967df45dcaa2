//! A rule as the expressions of nf_tables: what is loaded into a register, compared, and decided.

use std::net::IpAddr;

use super::attributes::Attributes;
use super::field::{Needs, Place};
use super::{Action, Base, CtState, Family, Field, Match, Op, Rule, Table, Value};
use crate::ranges::{bytes_of, masked};

/// The expressions of a rule: what is in NFTA_RULE_EXPRESSIONS.
pub(super) fn of(table: &Table, rule: &Rule) -> Vec<u8> {
    Writer::default().rule(table, rule)
}

/// NFT_REG_1, which everything goes through, and NFT_REG_VERDICT.
const REGISTER: u32 = 1;
const VERDICT: u32 = 0;
/// NFTA_LIST_ELEM, and in it NFTA_EXPR_NAME and NFTA_EXPR_DATA.
const ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
/// In an attribute that holds data: NFTA_DATA_VALUE and NFTA_DATA_VERDICT.
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

/// Writes a rule's expressions, and remembers what was asked already so that nothing is asked twice.
#[derive(Default)]
struct Writer {
    expressions: Attributes,
    asked: Vec<(Field, Value)>,
    ethernet: bool,
}

impl Writer {
    fn rule(mut self, table: &Table, rule: &Rule) -> Vec<u8> {
        for condition in &rule.matches {
            self.condition(table, condition);
        }
        if rule.counter {
            // NFTA_COUNTER_BYTES and _PACKETS.
            self.push("counter", |data| {
                data.u64(1, 0).u64(2, 0);
            });
        }
        self.action(&rule.action);
        self.expressions.finish()
    }

    /// Appends an expression of this kind; `attributes` are its own.
    fn push(&mut self, kind: &str, attributes: impl FnOnce(&mut Attributes)) {
        self.expressions.nest(ELEMENT, |element| {
            element.text(NAME, kind).nest(DATA, attributes);
        });
    }

    fn condition(&mut self, table: &Table, condition: &Match) {
        match condition {
            Match::Is(field, op, value) => {
                self.needs(table.family, *field);
                self.asked.push((*field, value.clone()));
                let (data, mask) = self.load(*field, value);
                if let Some(mask) = mask {
                    self.mask(&mask);
                }
                self.compare(*op, &data);
            }
            Match::Masked(field, mask, op, value) => {
                self.needs(table.family, *field);
                let (data, whole) = self.load(*field, &Value::Number(*value));
                let mut mask = placed(*field, &Value::Number(*mask));
                for (bit, allowed) in mask.iter_mut().zip(whole.unwrap_or_else(|| vec![0xff; data.len()])) {
                    *bit &= allowed;
                }
                self.mask(&mask);
                self.compare(*op, &data);
            }
            Match::Range { field, not, from, to } => {
                self.needs(table.family, *field);
                let (from, mask) = self.load(*field, from);
                if let Some(mask) = mask {
                    self.mask(&mask);
                }
                let to = placed(*field, to);
                if *not {
                    // NFTA_RANGE_SREG, _OP (NFT_RANGE_NEQ), _FROM_DATA, _TO_DATA.
                    self.push("range", |data| {
                        data.u32(1, REGISTER).u32(2, 1);
                        value(data, 3, &from);
                        value(data, 4, &to);
                    });
                } else {
                    self.compare(Op::Ge, &from);
                    self.compare(Op::Le, &to);
                }
            }
            Match::Network { field, not, network, prefix } => {
                self.needs(table.family, *field);
                let (data, _) = self.load(*field, &Value::Ip(masked(*network, *prefix)));
                let ones: IpAddr = match network {
                    IpAddr::V4(_) => std::net::Ipv4Addr::BROADCAST.into(),
                    IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(u128::MAX).into(),
                };
                if u16::from(*prefix) < field.bits() {
                    self.mask(&bytes_of(masked(ones, *prefix)));
                }
                self.compare(if *not { Op::Ne } else { Op::Eq }, &data);
            }
            Match::Set { field, not, set } => {
                self.needs(table.family, *field);
                self.fetch(*field);
                let id = table.sets.iter().position(|other| other.name == *set).unwrap_or(table.sets.len()) + 1;
                // NFTA_LOOKUP_SET, _SREG, _SET_ID, _FLAGS (NFT_LOOKUP_F_INV).
                self.push("lookup", |data| {
                    data.text(1, set).u32(2, REGISTER).u32(4, u32::try_from(id).unwrap_or(u32::MAX));
                    if *not {
                        data.u32(5, 1);
                    }
                });
            }
            Match::Ct(states) => {
                // NFTA_CT_DREG, NFTA_CT_KEY (NFT_CT_STATE). States are bits of a number in the machine's byte order.
                self.push("ct", |data| {
                    data.u32(1, REGISTER).u32(2, 0);
                });
                let bits = states.iter().fold(0u32, |bits, state| bits | state.bit());
                self.mask(&bits.to_ne_bytes());
                self.compare(Op::Ne, &[0; 4]);
            }
            Match::Limit { over, rate, burst } => {
                // NFTA_LIMIT_RATE, _UNIT (seconds), _BURST, _TYPE (NFT_LIMIT_PKTS), _FLAGS (NFT_LIMIT_F_INV).
                self.push("limit", |data| {
                    data.u64(1, u64::from(*rate)).u64(2, 1).u32(3, *burst).u32(4, 0).u32(5, u32::from(*over));
                });
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
            self.meta(8);
            self.compare(Op::Eq, &1u16.to_ne_bytes());
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
                self.compare(Op::Eq, &data);
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
        match field.layout().place {
            Place::Meta(key, _) => self.meta(key),
            Place::Payload(base, offset, bits) => {
                let (first, bytes) = span(offset, bits);
                // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN.
                self.push("payload", |data| {
                    data.u32(1, REGISTER).u32(2, base.number()).u32(3, first.into()).u32(4, bytes.into());
                });
            }
        }
    }

    fn meta(&mut self, key: u32) {
        // NFTA_META_DREG, _KEY.
        self.push("meta", |data| {
            data.u32(1, REGISTER).u32(2, key);
        });
    }

    fn mask(&mut self, mask: &[u8]) {
        let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
        // NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR.
        self.push("bitwise", |data| {
            data.u32(1, REGISTER).u32(2, REGISTER).u32(3, length);
            value(data, 4, mask);
            value(data, 5, &vec![0; mask.len()]);
        });
    }

    fn compare(&mut self, op: Op, with: &[u8]) {
        // enum nft_cmp_ops.
        let op = match op {
            Op::Eq => 0,
            Op::Ne => 1,
            Op::Lt => 2,
            Op::Le => 3,
            Op::Gt => 4,
            Op::Ge => 5,
        };
        // NFTA_CMP_SREG, _OP, _DATA.
        self.push("cmp", |data| {
            data.u32(1, REGISTER).u32(2, op);
            value(data, 3, with);
        });
    }

    fn action(&mut self, action: &Action) {
        // NF_DROP, NF_ACCEPT and enum nft_verdicts.
        let (verdict, chain) = match action {
            Action::Masquerade => return self.push("masq", |_| {}),
            Action::Drop => (0i32, None),
            Action::Accept => (1, None),
            Action::Continue => (-1, None),
            Action::Jump(to) => (-3, Some(to)),
            Action::Goto(to) => (-4, Some(to)),
            Action::Return => (-5, None),
        };
        // NFTA_IMMEDIATE_DREG, _DATA; NFTA_VERDICT_CODE, _CHAIN.
        self.push("immediate", |data| {
            data.u32(1, VERDICT).nest(2, |data| {
                data.nest(DATA_VERDICT, |data| {
                    data.u32(1, verdict.cast_unsigned());
                    if let Some(chain) = chain {
                        data.text(2, chain);
                    }
                });
            });
        });
    }
}

/// Data to compare with, as an attribute of its own.
fn value(data: &mut Attributes, kind: u16, bytes: &[u8]) {
    data.nest(kind, |data| {
        data.bytes(DATA_VALUE, bytes);
    });
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
