//! A filter of what a device receives, as plain values, and as programs of classic BPF that `tc` classifiers run.
//!
//! * [`Filter`] and what it is made of are pure. [`crate::antispoof`] makes one from what is known of an interface.
//! * [`Filter::classifiers`] makes the classifiers of it, in the order in which the kernel is to try them.
//! * [`crate::link`] puts them at a device's clsact qdisc, and reads them back.
//!
//! Nobody flushes what is at a device by flushing nftables; a renamed device keeps it; and a saved ruleset of nftables does
//! not name it, so that it loads at a boot at which the device is not there yet.

mod assemble;
mod bpf;
mod field;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use assemble::Instruction;
pub use field::{Base, Field};

/// What may pass: it begins with the first section's first chain, and what no rule accepts is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// What may only come so often, before anything is looked at.
    pub rates: Vec<Rate>,
    /// Rules in order. Chains are gone to from those before them.
    pub chains: Vec<Chain>,
    /// The parts of which each becomes a program.
    pub sections: Vec<Section>,
}

/// Frames of a kind, of which only so many may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rate {
    /// The Ethernet type of the frames; none for all.
    pub protocol: Option<u64>,
    /// All must hold.
    pub matches: Vec<Match>,
    /// How many.
    pub limit: Limit,
}

/// How often something may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Frames a second.
    pub rate: u32,
    /// Frames that may come at once.
    pub burst: u32,
}

/// Rules in order, the first that holds deciding. At the end the frame is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The name.
    pub name: &'static str,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// A part of a filter that becomes a program of its own.
///
/// What the kernel tells of a classifier has to fit into one message, so that it can be read back. A program that answers
/// "not mine" leaves the frame to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// If everything matches, do it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// All must hold.
    pub matches: Vec<Match>,
    /// What is done.
    pub action: Action,
    /// For people: what is dropped, or let through.
    pub why: &'static str,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The frame goes on into the machine.
    Accept,
    /// The frame is gone.
    Drop,
    /// Another chain decides.
    Goto(&'static str),
}

/// A condition on a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// A field compared with a value.
    Is(Field, Op, Value),
    /// Some bits of a field compared with a value.
    Masked(Field, u64, Op, u64),
    /// A field between two values, both included; or outside of them.
    Range {
        /// What is looked at.
        field: Field,
        /// Outside instead of between.
        not: bool,
        /// The lowest.
        from: Value,
        /// The highest.
        to: Value,
    },
    /// An address in a network of so many bits.
    Network(Field, IpAddr, u8),
    /// An address in one of these ranges, both ends included.
    Within(Field, Vec<(IpAddr, IpAddr)>),
}

impl Match {
    /// The field has this value.
    pub fn is(field: Field, value: impl Into<Value>) -> Self {
        Self::Is(field, Op::Eq, value.into())
    }

    /// The field has another value.
    pub fn not(field: Field, value: impl Into<Value>) -> Self {
        Self::Is(field, Op::Ne, value.into())
    }
}

/// A comparison; fields compare as numbers with the first byte highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// =
    Eq,
    /// ≠
    Ne,
    /// <
    Lt,
    /// ≥
    Ge,
}

/// What a field is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number of at most 8 bytes.
    Number(u64),
    /// An Ethernet address.
    Mac([u8; 6]),
    /// An IP address.
    Ip(IpAddr),
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<[u8; 6]> for Value {
    fn from(mac: [u8; 6]) -> Self {
        Self::Mac(mac)
    }
}

impl From<IpAddr> for Value {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address)
    }
}

impl From<Ipv4Addr> for Value {
    fn from(address: Ipv4Addr) -> Self {
        Self::Ip(address.into())
    }
}

impl From<Ipv6Addr> for Value {
    fn from(address: Ipv6Addr) -> Self {
        Self::Ip(address.into())
    }
}

/// A program at a device, and what its answer means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classifier {
    /// The program.
    pub code: Vec<Instruction>,
    /// The answer is yes or no, and yes means that this limit holds; none where the answer is what becomes of the frame.
    pub limit: Option<Limit>,
}

/// A rule that has no counterpart in BPF: a mistake in our programs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be said in BPF")]
pub struct Untranslatable(String);

impl Filter {
    /// The classifiers, in order: the rates, the sections, and at last one that drops what none of them has decided about.
    ///
    /// # Errors
    /// When a rule has no counterpart in BPF.
    pub fn classifiers(&self) -> Result<Vec<Classifier>, Untranslatable> {
        let mut all = Vec::new();
        for rate in &self.rates {
            all.push(Classifier { code: bpf::rate(rate)?, limit: Some(rate.limit) });
        }
        for section in &self.sections {
            all.push(Classifier { code: bpf::section(&self.chains, *section)?, limit: None });
        }
        all.push(Classifier { code: bpf::drop_all(), limit: None });
        Ok(all)
    }
}
