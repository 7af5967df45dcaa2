//! A table for a device's ingress as programs of classic BPF, which `tc` classifiers run (cls_bpf, with direct action).
//!
//! `nft flush ruleset` deletes every table of a machine, and until somebody puts ours back nothing would be filtered. A
//! program at the device's clsact qdisc is not flushed. It decides as the table does, except that it does not count and
//! knows no rates; it stands before the table, and both have to let a frame through.
//!
//! What the kernel tells of a filter has to fit into one message, so that it can be read back: a table becomes several
//! programs, one for each [`Section`], tried in order. A program whose answer is "not mine" leaves the frame to the next.

mod assemble;

use std::net::IpAddr;

pub use assemble::Instruction;
use assemble::{Code, Is, Label};

use super::expression::{bytes_of, placed, span};
use super::field::{Needs, Place};
use super::{Action, Base, Chain, Field, Match, Op, Rule, Table, Value};

/// TC_ACT_OK, TC_ACT_SHOT and TC_ACT_UNSPEC of linux/pkt_cls.h.
const PASS: u32 = 0;
const DROP: u32 = 2;
const NOT_MINE: u32 = u32::MAX;

// SKF_AD_* of linux/filter.h. A VLAN tag is beside the frame by the time a device's ingress sees it.
const ABOUT_PROTOCOL: u32 = 0;
const ABOUT_TAG: u32 = 44;
const ABOUT_TAG_PRESENT: u32 = 48;
const ABOUT_TAG_KIND: u32 = 60;

const VLAN: u32 = 0x8100;
const IP: u64 = 0x0800;
const IP6: u64 = 0x86dd;
/// Bytes before the network header.
const ETHERNET: u32 = 14;
/// In M\[0\]: whether the IP header is sound, so that the transport header is where it says.
const SOUND: u32 = 0;

/// A part of a table that becomes a program of its own.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    /// The chain it begins with.
    pub entry: &'static str,
    /// The Ethernet type it is for; none for all.
    pub protocol: Option<u64>,
    /// IPv6's next header it is for; none for all.
    pub next: Option<u64>,
    /// Chains that are left to later sections.
    pub left: &'static [&'static str],
}

/// The table's programs, one for each section; `None` where something has no counterpart in BPF.
pub fn programs(table: &Table, sections: &[Section]) -> Option<Vec<Vec<Instruction>>> {
    sections.iter().map(|section| Writer::new(table, *section).program()).collect()
}

struct Writer<'a> {
    table: &'a Table,
    section: Section,
    code: Code,
    chains: Vec<(&'a str, Label)>,
    /// How many bytes the rule at work knows to be there.
    known: u32,
}

/// Where a field's bytes are.
#[derive(Clone, Copy)]
enum Source {
    Protocol,
    Payload { at: u32, from_x: bool },
}

impl<'a> Writer<'a> {
    fn new(table: &'a Table, section: Section) -> Self {
        let mut code = Code::default();
        let chains = table.chains.iter().map(|chain| (chain.name.as_str(), code.label())).collect();
        Self { table, section, code, chains, known: 0 }
    }

    fn program(mut self) -> Option<Vec<Instruction>> {
        let table = self.table;
        if let Some(protocol) = self.section.protocol {
            let other = self.code.label();
            let mine = self.code.label();
            self.code.load_about(ABOUT_PROTOCOL);
            self.code.unless(Is::Equal, u32::try_from(protocol).ok()?, other);
            if let Some(next) = self.section.next {
                self.code.load_length();
                self.code.unless(Is::AtLeast, ETHERNET + 7, other);
                self.code.load(ETHERNET + 6, 1, false);
                self.code.unless(Is::Equal, u32::try_from(next).ok()?, other);
            }
            self.code.jump(mine);
            self.code.mark(other);
            self.code.answer(NOT_MINE);
            self.code.mark(mine);
            match protocol {
                IP => self.look_at_ip4(),
                IP6 => self.look_at_ip6(),
                _ => {}
            }
        }
        let mut reached = vec![self.section.entry];
        for chain in &table.chains {
            if reached.contains(&chain.name.as_str()) {
                let label = self.label_of(&chain.name)?;
                self.code.mark(label);
                self.chain(chain, &mut reached)?;
            }
        }
        self.code.finish()
    }

    fn label_of(&self, chain: &str) -> Option<Label> {
        self.chains.iter().find(|(name, _)| *name == chain).map(|(_, label)| *label)
    }

    /// As nf_tables does before a rule sees the packet (nft_set_pktinfo_ipv4_validate): version, lengths. X becomes the
    /// length of the header.
    fn look_at_ip4(&mut self) {
        let code = &mut self.code;
        let end = code.label();
        code.load_constant(0);
        code.store_memory(SOUND);
        code.load_length();
        code.unless(Is::AtLeast, ETHERNET + 20, end);
        code.load(ETHERNET, 1, false);
        code.and(0xf0);
        code.unless(Is::Equal, 0x40, end);
        code.load(ETHERNET + 2, 2, false);
        code.move_to_x();
        code.load_length();
        code.subtract(ETHERNET);
        code.unless(Is::AtLeastX, 0, end);
        code.header_length_to_x(ETHERNET);
        code.move_to_a();
        code.unless(Is::AtLeast, 20, end);
        code.load(ETHERNET + 2, 2, false);
        code.unless(Is::AtLeastX, 0, end);
        code.load_constant(1);
        code.store_memory(SOUND);
        code.mark(end);
    }

    /// The same for IPv6, whose transport header is behind the 40 bytes: rules that ask for it have seen the next header.
    fn look_at_ip6(&mut self) {
        let code = &mut self.code;
        let end = code.label();
        code.load_constant(0);
        code.store_memory(SOUND);
        code.load_length();
        code.unless(Is::AtLeast, ETHERNET + 40, end);
        code.load(ETHERNET, 1, false);
        code.and(0xf0);
        code.unless(Is::Equal, 0x60, end);
        code.load(ETHERNET + 4, 2, false);
        code.move_to_x();
        code.load_length();
        code.subtract(ETHERNET + 40);
        code.unless(Is::AtLeastX, 0, end);
        code.load_constant(1);
        code.store_memory(SOUND);
        code.mark(end);
    }

    fn chain(&mut self, chain: &'a Chain, reached: &mut Vec<&'a str>) -> Option<()> {
        for rule in &chain.rules {
            self.rule(rule, reached)?;
        }
        // The end of the chain at the device, or of one that was gone to for good: the policy.
        self.code.answer(DROP);
        Some(())
    }

    fn rule(&mut self, rule: &'a Rule, reached: &mut Vec<&'a str>) -> Option<()> {
        if rule.matches.iter().any(|part| matches!(part, Match::Limit { over: true, .. })) {
            // There are no rates here: nothing is over one.
            return Some(());
        }
        let next = self.code.label();
        self.known = 0;
        rule.matches.iter().try_for_each(|part| self.condition(part, next))?;
        match &rule.action {
            Action::Accept => self.code.answer(PASS),
            Action::Drop => self.code.answer(DROP),
            Action::Goto(to) if self.section.left.contains(&to.as_str()) => self.code.answer(NOT_MINE),
            Action::Goto(to) => {
                let label = self.label_of(to)?;
                self.code.jump(label);
                reached.push(to);
            }
            Action::Return | Action::Continue | Action::Jump(_) | Action::Masquerade => return None,
        }
        self.code.mark(next);
        Some(())
    }

    /// Goes on if the condition holds, else to `next`.
    fn condition(&mut self, condition: &Match, next: Label) -> Option<()> {
        match condition {
            Match::Is(Field::EtherType, op, Value::Number(number)) => {
                self.ether_type();
                self.compare_one(*op, u32::try_from(*number).ok()?, next);
            }
            Match::Is(Field::VlanId, op, Value::Number(number)) => {
                self.tag(next);
                self.compare_one(*op, u32::try_from(*number).ok()?, next);
            }
            Match::Is(field, op, value) => {
                let source = self.fetch(*field, next)?;
                let (data, mask) = (placed(*field, value), bits(*field));
                match (op, mask) {
                    (Op::Eq, mask) => self.equal(source, &data, mask.as_deref(), next),
                    (Op::Ne, mask) => self.unequal(source, &data, mask.as_deref(), next),
                    (Op::Ge, None) => self.at_least(source, &data, next),
                    (Op::Le, None) => self.at_most(source, &data, next),
                    (Op::Gt | Op::Lt, None) if matches!(data.len(), 1 | 2 | 4) => {
                        self.load(source, 0, data.len());
                        self.compare_one(*op, number(&data), next);
                    }
                    _ => return None,
                }
            }
            Match::Masked(field, mask, op, value) => {
                let source = self.fetch(*field, next)?;
                let (data, mask) = (placed(*field, &Value::Number(*value)), placed(*field, &Value::Number(*mask)));
                match op {
                    Op::Eq => self.equal(source, &data, Some(&mask), next),
                    Op::Ne => self.unequal(source, &data, Some(&mask), next),
                    _ => return None,
                }
            }
            Match::Range { field: Field::VlanId, not: false, from: Value::Number(from), to: Value::Number(to) } => {
                self.tag(next);
                self.code.unless(Is::AtLeast, u32::try_from(*from).ok()?, next);
                self.code.when(Is::Greater, u32::try_from(*to).ok()?, next);
            }
            Match::Range { field, not, from, to } => {
                let source = self.fetch(*field, next)?;
                if bits(*field).is_some() {
                    return None;
                }
                let (from, to) = (placed(*field, from), placed(*field, to));
                if *not {
                    let outside = self.code.label();
                    self.at_least(source, &from, outside);
                    self.at_most(source, &to, outside);
                    self.code.jump(next);
                    self.code.mark(outside);
                } else {
                    self.at_least(source, &from, next);
                    self.at_most(source, &to, next);
                }
            }
            Match::Network { field, not, network, prefix } => {
                let source = self.fetch(*field, next)?;
                let all = match network {
                    IpAddr::V4(_) => IpAddr::from([0xff; 4]),
                    IpAddr::V6(_) => IpAddr::from([0xff; 16]),
                };
                let masked = |address| bytes_of(super::show::masked(address, *prefix));
                let (data, mask) = (masked(*network), masked(all));
                match not {
                    false => self.equal(source, &data, Some(&mask), next),
                    true => self.unequal(source, &data, Some(&mask), next),
                }
            }
            Match::Set { field, not: false, set } => {
                let source = self.fetch(*field, next)?;
                let ranges = &self.table.sets.iter().find(|other| other.name == *set)?.ranges;
                let within = self.code.label();
                for (first, last) in ranges {
                    let another = self.code.label();
                    if first == last {
                        self.equal(source, &bytes_of(*first), None, another);
                    } else {
                        self.at_least(source, &bytes_of(*first), another);
                        self.at_most(source, &bytes_of(*last), another);
                    }
                    self.code.jump(within);
                    self.code.mark(another);
                }
                self.code.jump(next);
                self.code.mark(within);
            }
            Match::Limit { .. } | Match::Set { not: true, .. } | Match::Ct(_) => return None,
        }
        Some(())
    }

    /// The tag's type where there is a tag.
    fn ether_type(&mut self) {
        let (untagged, end) = (self.code.label(), self.code.label());
        self.code.load_about(ABOUT_TAG_PRESENT);
        self.code.when(Is::Equal, 0, untagged);
        self.code.load_about(ABOUT_TAG_KIND);
        self.code.jump(end);
        self.code.mark(untagged);
        self.code.load_about(ABOUT_PROTOCOL);
        self.code.mark(end);
    }

    /// The VLAN's number, if there is a tag of 802.1Q.
    fn tag(&mut self, next: Label) {
        self.code.load_about(ABOUT_TAG_PRESENT);
        self.code.when(Is::Equal, 0, next);
        self.code.load_about(ABOUT_TAG_KIND);
        self.code.unless(Is::Equal, VLAN, next);
        self.code.load_about(ABOUT_TAG);
        self.code.and(0xfff);
    }

    /// Sees to it that a field is there, as [`super::expression`] does, and in bytes of the packet.
    fn fetch(&mut self, field: Field, next: Label) -> Option<Source> {
        let layout = field.layout();
        let mine = self.section.protocol;
        let here = |protocol| mine == Some(protocol);
        match layout.needs {
            Needs::Nothing => {}
            Needs::Arp if here(0x0806) => {}
            Needs::Ip if here(IP) => {}
            Needs::Ip6 if here(IP6) => {}
            Needs::IpTransport(number) if here(IP) => self.transport(number, next),
            Needs::Ip6Transport(number) if here(IP6) => self.transport(number, next),
            Needs::Transport(number) if here(IP) || here(IP6) => self.transport(number, next),
            _ => return None,
        }
        let at = match layout.place {
            Place::Meta(..) if field == Field::Protocol => return Some(Source::Protocol),
            Place::Meta(..) if field == Field::L4proto => {
                self.sound(next);
                return Some(Source::Payload { at: self.protocol_at(), from_x: false });
            }
            Place::Meta(..) => return None,
            Place::Payload(base, offset, bits) => {
                let (first, bytes) = span(offset, bits);
                let (first, end) = (u32::from(first), u32::from(first + bytes));
                let before = match base {
                    Base::Link if end <= ETHERNET => 0,
                    Base::Link => return None,
                    Base::Network => ETHERNET,
                    Base::Transport if here(IP6) => ETHERNET + 40,
                    Base::Transport => {
                        // Sound already, and so longer than this.
                        self.code.load_length();
                        self.code.subtract(ETHERNET + end);
                        self.code.unless(Is::AtLeastX, 0, next);
                        return Some(Source::Payload { at: ETHERNET + first, from_x: true });
                    }
                };
                self.known_until(before + end, next);
                before + first
            }
        };
        Some(Source::Payload { at, from_x: false })
    }

    fn known_until(&mut self, bytes: u32, next: Label) {
        if self.known < bytes {
            self.code.load_length();
            self.code.unless(Is::AtLeast, bytes, next);
            self.known = bytes;
        }
    }

    fn sound(&mut self, next: Label) {
        self.code.load_memory(SOUND);
        self.code.unless(Is::Equal, 1, next);
    }

    /// Where the number of the transport protocol is.
    fn protocol_at(&self) -> u32 {
        if self.section.protocol == Some(IP) { ETHERNET + 9 } else { ETHERNET + 6 }
    }

    fn transport(&mut self, number: u8, next: Label) {
        self.sound(next);
        self.code.load(self.protocol_at(), 1, false);
        self.code.unless(Is::Equal, number.into(), next);
    }

    fn load(&mut self, source: Source, offset: usize, bytes: usize) {
        match source {
            Source::Protocol => self.code.load_about(ABOUT_PROTOCOL),
            // A header is far smaller.
            Source::Payload { at, from_x } => self.code.load(at + offset as u32, bytes, from_x),
        }
    }

    fn compare_one(&mut self, op: Op, with: u32, next: Label) {
        match op {
            Op::Eq => self.code.unless(Is::Equal, with, next),
            Op::Ne => self.code.when(Is::Equal, with, next),
            Op::Gt => self.code.unless(Is::Greater, with, next),
            Op::Ge => self.code.unless(Is::AtLeast, with, next),
            Op::Lt => self.code.when(Is::AtLeast, with, next),
            Op::Le => self.code.when(Is::Greater, with, next),
        }
    }

    fn equal(&mut self, source: Source, data: &[u8], mask: Option<&[u8]>, next: Label) {
        for (at, word) in words(data) {
            let mask = mask.map_or(u32::MAX, |mask| number(&mask[at..at + word.len()]));
            if mask == 0 {
                continue;
            }
            self.load(source, at, word.len());
            if mask != u32::MAX {
                self.code.and(mask);
            }
            self.code.unless(Is::Equal, number(word) & mask, next);
        }
    }

    fn unequal(&mut self, source: Source, data: &[u8], mask: Option<&[u8]>, next: Label) {
        let differs = self.code.label();
        self.equal(source, data, mask, differs);
        self.code.jump(next);
        self.code.mark(differs);
    }

    /// Word by word: the first that differs decides.
    fn at_least(&mut self, source: Source, data: &[u8], next: Label) {
        let more = self.code.label();
        let count = words(data).count();
        for (index, (at, word)) in words(data).enumerate() {
            self.load(source, at, word.len());
            if index + 1 == count {
                self.code.unless(Is::AtLeast, number(word), next);
            } else {
                self.code.when(Is::Greater, number(word), more);
                self.code.unless(Is::Equal, number(word), next);
            }
        }
        self.code.mark(more);
    }

    fn at_most(&mut self, source: Source, data: &[u8], next: Label) {
        let less = self.code.label();
        let count = words(data).count();
        for (index, (at, word)) in words(data).enumerate() {
            self.load(source, at, word.len());
            if index + 1 < count {
                self.code.unless(Is::AtLeast, number(word), less);
            }
            self.code.when(Is::Greater, number(word), next);
        }
        self.code.mark(less);
    }
}

/// The bits of a field that does not fill its bytes.
fn bits(field: Field) -> Option<Vec<u8>> {
    match field.layout().place {
        Place::Payload(_, _, bits) if bits % 8 != 0 => {
            Some(placed(field, &Value::Number(u64::MAX >> (64 - u32::from(bits)))))
        }
        _ => None,
    }
}

/// Pieces that can be loaded at once, each with its place.
fn words(mut data: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let size = match data.len() {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let (word, rest) = data.split_at(size);
        data = rest;
        at += size;
        Some((at - size, word))
    })
}

/// At most four bytes, the first being the highest.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
