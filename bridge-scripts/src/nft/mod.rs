//! nf_tables without the program nft: a model of tables in plain values, and a socket that makes the kernel have them.
//!
//! * [`Table`] and what it is made of are pure: they can be stored, compared, and printed in nft's own syntax. What is
//!   printed is what `nft -f` reads, and what `nft list table` answers but for its choice of spellings.
//! * [`Table::check`] says what is wrong with a table before the kernel is asked.
//! * `encode` writes the messages of linux/netfilter/nf_tables.h. Like the program nft it puts the conditions in front
//!   of a match that make it mean something: `ip saddr` looks at packets of IPv4 only.
//! * [`Nft::holds`] asks the kernel whether it has a table, whole.
//! * [`Nft`] sends changes as one batch, which the kernel applies whole or not at all.

mod attributes;
mod check;
mod encode;
mod expression;
mod field;
mod forward;
mod held;
mod set;
mod show;
mod socket;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

pub use check::Malformed;
pub use field::Field;
pub use forward::ForwardChain;
pub use set::{Set, SetKind};
pub(crate) use socket::tables_told;
pub use socket::{Change, Error, Nft};

/// What kind of packets a table sees, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// What one device receives: former versions filtered by such tables, which are deleted where they are found.
    Netdev,
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    /// The family of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        let all = [Self::Netdev, Self::Inet, Self::Ip, Self::Ip6];
        all.into_iter().find(|family| family.name() == name)
    }

    /// nft's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Netdev => "netdev",
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }
}

/// A table: what is replaced or deleted as one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Which packets.
    pub family: Family,
    /// The name; ours begin with `xen-`.
    pub name: String,
    /// Its sets.
    #[serde(default)]
    pub sets: Vec<Set>,
    /// Its chains.
    #[serde(default)]
    pub chains: Vec<Chain>,
}

/// Rules in order; the kernel begins at the hook.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chain {
    /// The name.
    pub name: String,
    /// Where packets come from; `None` for somebody else's chain, which has its own.
    #[serde(default)]
    pub hook: Option<Hook>,
    /// The rules, the first that gives a verdict deciding.
    pub rules: Vec<Rule>,
}

/// Where the kernel begins a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// What the chain may do.
    pub kind: HookKind,
    /// At which place of a packet's way.
    pub point: HookPoint,
    /// The order among chains of one place; lower comes first.
    pub priority: i32,
    /// What becomes of packets no rule decided about.
    pub policy: Policy,
}

/// What a chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookKind {
    /// Let through or drop.
    Filter,
    /// Change addresses; sees the first packet of each connection.
    Nat,
}

/// A place of a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookPoint {
    /// Received, not yet routed.
    Prerouting,
    /// For another machine.
    Forward,
    /// About to leave.
    Postrouting,
}

/// What becomes of packets no rule decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// They go on.
    Accept,
    /// They are dropped.
    Drop,
}

/// If everything matches, do it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// All must hold.
    #[serde(default)]
    pub matches: Vec<Match>,
    /// Whether the kernel counts the packets that came to the action.
    #[serde(default)]
    pub counter: bool,
    /// What is done.
    pub action: Action,
    /// For people; at most 127 bytes.
    #[serde(default)]
    pub comment: Option<String>,
}

impl Rule {
    /// A rule without counter and comment.
    pub fn new(matches: impl Into<Vec<Match>>, action: Action) -> Self {
        Self { matches: matches.into(), counter: false, action, comment: None }
    }

    /// The same, with a comment.
    #[must_use]
    pub fn comment(mut self, text: &str) -> Self {
        self.comment = Some(text.to_owned());
        self
    }

    /// The same, counted.
    #[must_use]
    pub fn counted(mut self) -> Self {
        self.counter = true;
        self
    }
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The packet goes on; chains of other tables still see it.
    Accept,
    /// The packet is gone.
    Drop,
    /// The packet leaves with the outgoing device's address.
    Masquerade,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// A field compared with a value.
    Is(Field, Op, Value),
    /// An address in a network of so many bits.
    Network {
        /// What is looked at.
        field: Field,
        /// The network's address; host bits are ignored.
        network: IpAddr,
        /// Bits of its prefix.
        prefix: u8,
    },
    /// A field in a set of this table.
    Set {
        /// What is looked at.
        field: Field,
        /// The set's name.
        set: String,
    },
    /// Connections in one of these states.
    Ct(Vec<CtState>),
}

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CtState {
    /// Packets went both ways.
    Established,
    /// Made by another one, or an error about one.
    Related,
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

    /// The field is in the set.
    pub fn within(field: Field, set: &str) -> Self {
        Self::Set { field, set: set.to_owned() }
    }

    /// The address is in the network.
    pub fn network(field: Field, network: impl Into<IpAddr>, prefix: u8) -> Self {
        Self::Network { field, network: network.into(), prefix }
    }
}

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// =
    Eq,
    /// ≠
    Ne,
}

/// What a field is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// An IP address.
    Ip(IpAddr),
    /// A device's name.
    Name(String),
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

impl From<&str> for Value {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}
