//! Tables in nft's syntax.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use super::field::{Place, Style};
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
            HookPoint::Ingress => "ingress",
            HookPoint::Prerouting => "prerouting",
            HookPoint::Input => "input",
            HookPoint::Forward => "forward",
            HookPoint::Output => "output",
            HookPoint::Postrouting => "postrouting",
        };
        write!(f, "type {kind} hook {point}")?;
        if let Some(device) = &self.device {
            write!(f, " device \"{device}\"")?;
        }
        let policy = match self.policy {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        };
        write!(f, " priority {}; policy {policy};", self.priority)
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
            Self::Return => f.write_str("return"),
            Self::Continue => f.write_str("continue"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Masquerade => f.write_str("masquerade"),
        }
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let sign = |not: bool| if not { "!= " } else { "" };
        match self {
            Self::Is(field, op, value) => write!(f, "{field} {op}{}", shown(*field, value)),
            Self::Masked(field, mask, op, value) => {
                // Without a sign nft takes two numbers around & for a list of flags.
                let op = if *op == Op::Eq { "== ".to_owned() } else { op.to_string() };
                write!(f, "{field} & {mask:#x} {op}{value:#x}")
            }
            Self::Range { field, not, from, to } => {
                write!(f, "{field} {}{}-{}", sign(*not), shown(*field, from), shown(*field, to))
            }
            Self::Network { field, not, network, prefix } => {
                write!(f, "{field} {}{}/{prefix}", sign(*not), masked(*network, *prefix))
            }
            Self::Set { field, not, set } => write!(f, "{field} {}@{set}", sign(*not)),
            Self::Ct(states) => {
                let states: Vec<String> = states.iter().map(ToString::to_string).collect();
                write!(f, "ct state {}", states.join(","))
            }
            Self::Limit { over, rate, burst } => {
                write!(f, "limit rate {}{rate}/second burst {burst} packets", if *over { "over " } else { "" })
            }
        }
    }
}

impl Display for CtState {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Invalid => "invalid",
            Self::Established => "established",
            Self::Related => "related",
            Self::New => "new",
        })
    }
}

impl Display for Op {
    /// With the blank behind it; equality needs no sign.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eq => "",
            Self::Ne => "!= ",
            Self::Lt => "< ",
            Self::Le => "<= ",
            Self::Gt => "> ",
            Self::Ge => ">= ",
        })
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let layout = self.layout();
        match (self, layout.place) {
            (Self::Raw(..), Place::Payload(base, offset, bits)) => write!(f, "@{},{offset},{bits}", base.name()),
            _ => f.write_str(layout.name),
        }
    }
}

/// A value as this field's values are written.
fn shown(field: Field, value: &Value) -> String {
    match (value, field.layout().style) {
        (Value::Number(number), Style::Hex) => format!("{number:#x}"),
        (Value::Number(number), _) => number.to_string(),
        // A raw place has no type that nft could read an address by.
        (Value::Mac(mac), Style::Hex) => {
            format!("0x{}", mac.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
        }
        (Value::Mac(mac), _) => mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
        (Value::Ip(IpAddr::V4(address)), Style::Hex) => format!("{:#x}", address.to_bits()),
        (Value::Ip(IpAddr::V6(address)), Style::Hex) => format!("{:#x}", address.to_bits()),
        (Value::Ip(address), _) => address.to_string(),
        (Value::Name(name), _) => format!("\"{name}\""),
    }
}
