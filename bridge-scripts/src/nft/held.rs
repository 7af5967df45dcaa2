//! Whether the kernel has a table, whole: its hooks, rules and sets are asked for and compared with what we would send.
//!
//! A table's name says little: anybody may delete a rule. What the kernel tells beyond what we send (counters, options at their default) is
//! not looked at.

use std::collections::BTreeMap;

use super::encode::family_number;
use super::expression;
use super::socket::{Dumped, Error, Nft};
use super::{Chain, Family, Policy, Set, Table};
use crate::ranges::{bytes_of, number};

/// NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETSETELEM of linux/netfilter/nf_tables.h.
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_ELEMENTS: u16 = 13;
/// NLA_TYPE_MASK.
const KIND: u16 = 0x3fff;
/// Length of struct nlmsghdr and of struct nfgenmsg.
const HEADERS: usize = 16 + 4;

impl Nft {
    /// Whether the kernel has this table as we would send it. Something that changes while it is looked at is not.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn holds(&mut self, table: &Table) -> Result<bool, Error> {
        for chain in table.chains.iter().filter(|chain| chain.hook.is_some()) {
            let texts = [(1, table.name.as_str()), (3, chain.name.as_str())];
            let Dumped::Whole(told) = self.question(GET_CHAIN, false, table.family, &texts)? else { return Ok(false) };
            if !told.first().is_some_and(|message| is_hooked(message, chain)) {
                return Ok(false);
            }
        }
        let Dumped::Whole(told) = self.question(GET_RULE, true, table.family, &[(1, &table.name)])? else {
            return Ok(false);
        };
        if !has_rules(&told, table) {
            return Ok(false);
        }
        for set in &table.sets {
            let texts = [(1, table.name.as_str()), (2, set.name.as_str())];
            let Dumped::Whole(told) = self.question(GET_ELEMENTS, true, table.family, &texts)? else {
                return Ok(false);
            };
            if !has_elements(&told, set) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn question(&mut self, kind: u16, dump: bool, family: Family, texts: &[(u16, &str)]) -> Result<Dumped, Error> {
        let mut attributes = super::attributes::Attributes::default();
        for (kind, text) in texts {
            attributes.text(*kind, text);
        }
        self.ask(kind, dump, family_number(family), &attributes.finish())
    }
}

/// The attributes of a message, or inside of one.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & KIND;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(super) fn body(message: &[u8]) -> &[u8] {
    message.get(HEADERS..).unwrap_or_default()
}

/// A text without its closing zero.
pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

fn is_text(value: Option<&[u8]>, text: &str) -> bool {
    value.is_some_and(|value| value.strip_suffix(&[0]).unwrap_or(value) == text.as_bytes())
}

/// Whether the kernel begins this chain where it should.
fn is_hooked(message: &[u8], chain: &Chain) -> bool {
    let Some(hook) = &chain.hook else { return true };
    let ours = super::encode::hook_bytes(hook);
    let told = attribute(body(message), 4).unwrap_or_default();
    let same = |kind| attribute(told, kind) == attribute(&ours, kind);
    let policy: u32 = if hook.policy == Policy::Drop { 0 } else { 1 };
    same(1)
        && same(2)
        && attribute(body(message), 5) == Some(&policy.to_be_bytes())
        && is_text(attribute(body(message), 7), hook.kind.name())
}

/// Whether these rules, in the order in which the kernel tells them, are the table's.
fn has_rules(told: &[Vec<u8>], table: &Table) -> bool {
    let mut of_chain: BTreeMap<&[u8], Vec<&[u8]>> = BTreeMap::new();
    for message in told {
        let name = attribute(body(message), 2).unwrap_or_default();
        let expressions = attribute(body(message), 4).unwrap_or_default();
        of_chain.entry(name.strip_suffix(&[0]).unwrap_or(name)).or_default().push(expressions);
    }
    for chain in &table.chains {
        let told = of_chain.remove(chain.name.as_bytes()).unwrap_or_default();
        let same = |(told, rule): (&&[u8], &super::Rule)| is_same(told, &expression::of(table, rule));
        if told.len() != chain.rules.len() || !told.iter().zip(&chain.rules).all(same) {
            return false;
        }
    }
    of_chain.is_empty()
}

/// Whether the kernel's expressions are those we send.
fn is_same(told: &[u8], ours: &[u8]) -> bool {
    let (mut told, mut ours) = (attributes(told), attributes(ours));
    loop {
        match (told.next(), ours.next()) {
            (None, None) => return true,
            (Some((_, told)), Some((_, ours))) => {
                let (name, wanted) = (attribute(told, 1), attribute(ours, 1));
                let (told, ours) = (attribute(told, 2).unwrap_or_default(), attribute(ours, 2).unwrap_or_default());
                if name != wanted || !has_all(name.unwrap_or_default(), told, ours) {
                    return false;
                }
            }
            _ => return false,
        }
    }
}

/// Whether an expression has all attributes that we send, and nothing else but what is zero.
fn has_all(name: &[u8], told: &[u8], ours: &[u8]) -> bool {
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    if name == b"counter" {
        return true;
    }
    // NFTA_LOOKUP_SET_ID is for the batch only.
    let ignored = |kind: u16| name == b"lookup" && kind == 4;
    // Data is an attribute with a value, or a verdict with its own attributes, in it.
    let nested = |kind: u16| match name {
        b"cmp" => kind == 3,
        b"bitwise" => matches!(kind, 4 | 5),
        b"immediate" => kind == 2,
        _ => false,
    };
    let same = |kind: u16, told: &[u8], ours: &[u8]| match nested(kind) {
        true => same_data(told, ours),
        false => told == ours,
    };
    let sent = attributes(ours)
        .filter(|(kind, _)| !ignored(*kind))
        .all(|(kind, value)| attribute(told, kind).is_some_and(|told| same(kind, told, value)));
    let more = |(kind, value): (u16, &[u8])| attribute(ours, kind).is_some() || value.iter().all(|byte| *byte == 0);
    sent && attributes(told).all(more)
}

fn same_data(told: &[u8], ours: &[u8]) -> bool {
    // NFTA_DATA_VALUE, else NFTA_DATA_VERDICT with NFTA_VERDICT_CODE, and _CHAIN where somebody else jumps.
    let verdict = |data| attribute(data, 2).map(|verdict| (attribute(verdict, 1), attribute(verdict, 2)));
    attribute(told, 1) == attribute(ours, 1) && verdict(told) == verdict(ours)
}

/// Whether a set has these ranges: their beginnings, and the address behind each end.
fn has_elements(told: &[Vec<u8>], set: &Set) -> bool {
    let mut there: Vec<(Vec<u8>, bool)> = Vec::new();
    for message in told {
        // NFTA_SET_ELEM_LIST_ELEMENTS; in each NFTA_SET_ELEM_KEY and NFTA_SET_ELEM_FLAGS.
        for (_, element) in attributes(attribute(body(message), 3).unwrap_or_default()) {
            let key = attribute(element, 1).and_then(|key| attribute(key, 1)).unwrap_or_default().to_vec();
            let end = attribute(element, 3).is_some_and(|flags| flags.last().is_some_and(|flags| flags & 1 != 0));
            there.push((key, end));
        }
    }
    let last_of_all = u128::MAX >> (128 - u32::from(set.kind.bits()));
    let key = |number: u128| bytes_of(set.kind.address(number));
    let mut wanted: Vec<(Vec<u8>, bool)> = Vec::new();
    if set.ranges.first().is_some_and(|(first, _)| number(*first) > 0) {
        wanted.push((key(0), true));
    }
    for (first, last) in &set.ranges {
        wanted.push((key(number(*first)), false));
        if number(*last) < last_of_all {
            wanted.push((key(number(*last) + 1), true));
        }
    }
    there.sort_unstable();
    wanted.sort_unstable();
    there == wanted
}
