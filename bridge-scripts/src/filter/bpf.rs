//! A filter's parts as programs of classic BPF, which `tc` classifiers run (tc-bpf(8), linux/filter.h).

use std::net::IpAddr;

use super::assemble::{Code, Instruction, Is, Label};
use super::field::{Base, Needs, Place};
use super::{Action, Chain, Field, Match, Op, Rate, Rule, Section, Untranslatable, Value};
use crate::ranges::{bytes_of, masked};

/// TC_ACT_OK, TC_ACT_SHOT and TC_ACT_UNSPEC of linux/pkt_cls.h: what becomes of a frame. With the last, the next classifier
/// is tried.
const PASS: u32 = 0;
const DROP: u32 = 2;
const NOT_MINE: u32 = u32::MAX;
/// What a program answers that only says whether a frame is meant (cls_bpf without direct action): all ones is yes, and
/// gives the frame no class.
const YES: u32 = u32::MAX;
const NO: u32 = 0;

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

/// The program of a section: what becomes of a frame, or that another section says.
pub(super) fn section(chains: &[Chain], section: Section) -> Result<Vec<Instruction>, Untranslatable> {
    Writer::new(chains, section).program()
}

/// The program that says whether a frame is one of those that may only come so often.
pub(super) fn rate(rate: &Rate) -> Result<Vec<Instruction>, Untranslatable> {
    let mut writer = Writer::new(&[], Section { entry: "", protocol: rate.protocol, next: None, left: &[] });
    let no = writer.code.label();
    let program = writer.prologue(NO).and_then(|()| {
        rate.matches.iter().try_for_each(|part| writer.condition(part, no))?;
        writer.code.answer(YES);
        writer.code.mark(no);
        writer.code.answer(NO);
        writer.code.finish()
    });
    program.ok_or_else(|| Untranslatable(format!("the rate of {:?}", rate.matches)))
}

/// The program that drops everything.
pub(super) fn drop_all() -> Vec<Instruction> {
    let mut code = Code::default();
    code.answer(DROP);
    code.finish().unwrap_or_default()
}

struct Writer<'a> {
    chains: &'a [Chain],
    section: Section,
    code: Code,
    labels: Vec<Label>,
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
    fn new(chains: &'a [Chain], section: Section) -> Self {
        let mut code = Code::default();
        let labels = chains.iter().map(|_| code.label()).collect();
        Self { chains, section, code, labels, known: 0 }
    }

    fn program(mut self) -> Result<Vec<Instruction>, Untranslatable> {
        let entry = self.section.entry;
        let whole = || Untranslatable(format!("the section {entry}"));
        self.prologue(NOT_MINE).ok_or_else(whole)?;
        let mut reached = vec![self.section.entry];
        for (index, chain) in self.chains.iter().enumerate() {
            if reached.contains(&chain.name) {
                self.code.mark(self.labels[index]);
                for rule in &chain.rules {
                    let told = self.rule(rule, &mut reached);
                    told.ok_or_else(|| Untranslatable(format!("{}, rule {rule:?}", chain.name)))?;
                }
                self.code.answer(DROP);
            }
        }
        self.code.finish().ok_or_else(whole)
    }

    /// Answers `other` to what is not the section's, and looks at the rest once for all rules.
    fn prologue(&mut self, other: u32) -> Option<()> {
        let Some(protocol) = self.section.protocol else { return Some(()) };
        let (not_mine, mine) = (self.code.label(), self.code.label());
        self.code.load_about(ABOUT_PROTOCOL);
        self.code.unless(Is::Equal, u32::try_from(protocol).ok()?, not_mine);
        if let Some(next) = self.section.next {
            self.code.load_length();
            self.code.unless(Is::AtLeast, ETHERNET + 7, not_mine);
            self.code.load(ETHERNET + 6, 1, false);
            self.code.unless(Is::Equal, u32::try_from(next).ok()?, not_mine);
        }
        self.code.jump(mine);
        self.code.mark(not_mine);
        self.code.answer(other);
        self.code.mark(mine);
        match protocol {
            IP => self.look_at_ip4(),
            IP6 => self.look_at_ip6(),
            _ => {}
        }
        Some(())
    }

    fn label_of(&self, chain: &str) -> Option<Label> {
        self.chains.iter().position(|other| other.name == chain).map(|index| self.labels[index])
    }

    /// Whether version and lengths of the IPv4 header fit each other and the frame. X becomes the length of the header.
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

    fn rule(&mut self, rule: &Rule, reached: &mut Vec<&'static str>) -> Option<()> {
        let next = self.code.label();
        self.known = 0;
        rule.matches.iter().try_for_each(|part| self.condition(part, next))?;
        match rule.action {
            Action::Accept => self.code.answer(PASS),
            Action::Drop => self.code.answer(DROP),
            Action::Goto(to) if self.section.left.contains(&to) => self.code.answer(NOT_MINE),
            Action::Goto(to) => {
                let label = self.label_of(to)?;
                self.code.jump(label);
                reached.push(to);
            }
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
                let (data, mask) = (field.placed(value)?, field.mask());
                match (op, mask) {
                    (Op::Eq, mask) => self.equal(source, &data, mask.as_deref(), next),
                    (Op::Ne, mask) => self.unequal(source, &data, mask.as_deref(), next),
                    (Op::Ge, None) => self.at_least(source, &data, next),
                    (Op::Lt, None) if matches!(data.len(), 1 | 2 | 4) => {
                        self.load(source, 0, data.len());
                        self.compare_one(*op, number(&data), next);
                    }
                    _ => return None,
                }
            }
            Match::Masked(field, mask, op, value) => {
                let source = self.fetch(*field, next)?;
                let (data, mask) = (field.placed(&Value::Number(*value))?, field.placed(&Value::Number(*mask))?);
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
                if field.mask().is_some() {
                    return None;
                }
                let (from, to) = (field.placed(from)?, field.placed(to)?);
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
            Match::Network(field, network, prefix) => {
                let source = self.fetch(*field, next)?;
                let all = match network {
                    IpAddr::V4(_) => IpAddr::from([0xff; 4]),
                    IpAddr::V6(_) => IpAddr::from([0xff; 16]),
                };
                let (data, mask) = (bytes_of(masked(*network, *prefix)), bytes_of(masked(all, *prefix)));
                self.equal(source, &data, Some(&mask), next);
            }
            Match::Within(field, ranges) => {
                let source = self.fetch(*field, next)?;
                let within = self.code.label();
                for (first, last) in ranges {
                    let another = self.code.label();
                    let (first, last) = (field.placed(&Value::Ip(*first))?, field.placed(&Value::Ip(*last))?);
                    if first == last {
                        self.equal(source, &first, None, another);
                    } else {
                        self.at_least(source, &first, another);
                        self.at_most(source, &last, another);
                    }
                    self.code.jump(within);
                    self.code.mark(another);
                }
                self.code.jump(next);
                self.code.mark(within);
            }
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

    /// Sees to it that a field is there, and finds its bytes.
    fn fetch(&mut self, field: Field, next: Label) -> Option<Source> {
        let (place, needs) = field.place();
        let mine = self.section.protocol;
        let here = |protocol| mine == Some(protocol);
        match needs {
            Needs::Nothing => {}
            Needs::Arp if here(0x0806) => {}
            Needs::Ip if here(IP) => {}
            Needs::Ip6 if here(IP6) => {}
            Needs::IpTransport(number) if here(IP) => self.transport(number, next),
            Needs::Ip6Transport(number) if here(IP6) => self.transport(number, next),
            Needs::Transport(number) if here(IP) || here(IP6) => self.transport(number, next),
            _ => return None,
        }
        let (first, bytes, _) = field.span();
        let (first, end) = (u32::from(first), u32::from(first + bytes));
        let before = match (place, field) {
            (Place::Beside, Field::Protocol) => return Some(Source::Protocol),
            (Place::Beside, Field::L4proto) if here(IP) || here(IP6) => {
                self.sound(next);
                return Some(Source::Payload { at: self.protocol_at(), from_x: false });
            }
            (Place::Beside, _) => return None,
            (Place::Payload(Base::Link, ..), _) if end <= ETHERNET => 0,
            (Place::Payload(Base::Link, ..), _) => return None,
            (Place::Payload(Base::Network, ..), _) => ETHERNET,
            (Place::Payload(Base::Transport, ..), _) if here(IP6) => ETHERNET + 40,
            (Place::Payload(Base::Transport, ..), _) => {
                // Sound already, and so longer than this.
                self.code.load_length();
                self.code.subtract(ETHERNET + end);
                self.code.unless(Is::AtLeastX, 0, next);
                return Some(Source::Payload { at: ETHERNET + first, from_x: true });
            }
        };
        self.known_until(before + end, next);
        Some(Source::Payload { at: before + first, from_x: false })
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
            Op::Ge => self.code.unless(Is::AtLeast, with, next),
            Op::Lt => self.code.when(Is::AtLeast, with, next),
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
