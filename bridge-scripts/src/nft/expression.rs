//! A rule as the expressions of nf_tables: what is loaded into a register, compared, and decided.

use std::net::IpAddr;

use super::attributes::Attributes;
use super::field::{META_NFPROTO, Place};
use super::{Action, CtState, Family, Field, Match, Op, Rule, Table, Value};
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
    /// The kind of IP that was asked for.
    asked: Option<u8>,
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
                self.fetch(table.family, *field);
                self.compare(*op, &bytes(value));
            }
            Match::Network { field, network, prefix } => {
                self.fetch(table.family, *field);
                let ones: IpAddr = match network {
                    IpAddr::V4(_) => std::net::Ipv4Addr::BROADCAST.into(),
                    IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(u128::MAX).into(),
                };
                let mask = bytes_of(masked(ones, *prefix));
                if mask.iter().any(|byte| *byte != 0xff) {
                    self.mask(&mask);
                }
                self.compare(Op::Eq, &bytes_of(masked(*network, *prefix)));
            }
            Match::Set { field, set } => {
                self.fetch(table.family, *field);
                let id = table.sets.iter().position(|other| other.name == *set).unwrap_or(table.sets.len()) + 1;
                // NFTA_LOOKUP_SET, _SREG, _SET_ID.
                self.push("lookup", |data| {
                    data.text(1, set).u32(2, REGISTER).u32(4, u32::try_from(id).unwrap_or(u32::MAX));
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
        }
    }

    /// Fetches a field, after asking for what must hold before it means anything, unless the rule asked already.
    fn fetch(&mut self, family: Family, field: Field) {
        let layout = field.layout();
        if let Some(kind) = layout.of.filter(|_| family == Family::Inet)
            && self.asked != Some(kind)
        {
            self.meta(META_NFPROTO);
            self.compare(Op::Eq, &[kind]);
            self.asked = Some(kind);
        }
        match layout.place {
            Place::Meta(key) => self.meta(key),
            // NFTA_PAYLOAD_DREG, _BASE (NFT_PAYLOAD_NETWORK_HEADER), _OFFSET, _LEN.
            Place::Network(offset, length) => self.push("payload", |data| {
                data.u32(1, REGISTER).u32(2, 1).u32(3, offset).u32(4, length);
            }),
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
        };
        // NFTA_CMP_SREG, _OP, _DATA.
        self.push("cmp", |data| {
            data.u32(1, REGISTER).u32(2, op);
            value(data, 3, with);
        });
    }

    fn action(&mut self, action: &Action) {
        // NF_DROP and NF_ACCEPT.
        let verdict = match action {
            Action::Masquerade => return self.push("masq", |_| {}),
            Action::Drop => 0,
            Action::Accept => 1,
        };
        // NFTA_IMMEDIATE_DREG, _DATA; NFTA_VERDICT_CODE.
        self.push("immediate", |data| {
            data.u32(1, VERDICT).nest(2, |data| {
                data.nest(DATA_VERDICT, |data| {
                    data.u32(1, verdict);
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
            Self::Established => 2,
            Self::Related => 4,
        }
    }
}

/// A value as the kernel compares it: names as long as they may be (IFNAMSIZ).
fn bytes(value: &Value) -> Vec<u8> {
    match value {
        Value::Ip(address) => bytes_of(*address),
        Value::Name(name) => {
            let mut data = name.clone().into_bytes();
            data.resize(16, 0);
            data
        }
    }
}
