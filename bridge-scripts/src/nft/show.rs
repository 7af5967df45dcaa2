//! Tables in nft's syntax.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use super::{
    Action, Chain, CtState, Family, Field, Hook, HookKind, HookPoint, Match, Op, Policy, Rule, Set, SetKind, Table,
    Value,
};
use crate::ranges::{masked, number};

impl Display for Family {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {} {{", self.family, self.name)?;
        let mut first = true;
        let mut gap = |f: &mut Formatter<'_>| if std::mem::take(&mut first) { Ok(()) } else { writeln!(f) };
        for set in &self.sets {
            gap(f)?;
            write!(f, "{set}")?;
        }
        for chain in &self.chains {
            gap(f)?;
            write!(f, "{chain}")?;
        }
        writeln!(f, "}}")
    }
}

impl Display for Set {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            SetKind::Ipv4 => "ipv4_addr",
            SetKind::Ipv6 => "ipv6_addr",
        };
        writeln!(f, "\tset {} {{\n\t\ttype {kind}\n\t\tflags interval", self.name)?;
        let ranges: Vec<String> = self.ranges.iter().map(|(first, last)| range(*first, *last)).collect();
        if !ranges.is_empty() {
            writeln!(f, "\t\telements = {{ {} }}", ranges.join(", "))?;
        }
        writeln!(f, "\t}}")
    }
}

/// An address, a network if the range is one, else the range.
fn range(first: IpAddr, last: IpAddr) -> String {
    let (low, high) = (number(first), number(last));
    if low == high {
        return first.to_string();
    }
    let bits = if first.is_ipv4() { 32 } else { 128 };
    let host = (low ^ high).count_ones();
    let mask = 1u128.checked_shl(host).map_or(u128::MAX, |bit| bit - 1);
    if low ^ high == mask && low & mask == 0 { format!("{first}/{}", bits - host) } else { format!("{first}-{last}") }
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(hook) = &self.hook {
            writeln!(f, "\t\t{hook}")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl HookKind {
    /// nft's and the kernel's word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

impl Display for Hook {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        let point = match self.point {
            HookPoint::Prerouting => "prerouting",
            HookPoint::Forward => "forward",
            HookPoint::Postrouting => "postrouting",
        };
        let policy = match self.policy {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        };
        write!(f, "type {kind} hook {point} priority {}; policy {policy};", self.priority)
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        if self.counter {
            f.write_str("counter ")?;
        }
        write!(f, "{}", self.action)?;
        match &self.comment {
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}

impl Display for Action {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Masquerade => f.write_str("masquerade"),
        }
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(field, op, value) => write!(f, "{field} {op}{value}"),
            Self::Network { field, network, prefix } => write!(f, "{field} {}/{prefix}", masked(*network, *prefix)),
            Self::Set { field, set } => write!(f, "{field} @{set}"),
            Self::Ct(states) => {
                let states: Vec<String> = states.iter().map(ToString::to_string).collect();
                write!(f, "ct state {}", states.join(","))
            }
        }
    }
}

impl Display for CtState {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Established => "established",
            Self::Related => "related",
        })
    }
}

impl Display for Op {
    /// With the blank behind it; equality needs no sign.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eq => "",
            Self::Ne => "!= ",
        })
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.layout().name)
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::Name(name) => write!(f, "\"{name}\""),
        }
    }
}
