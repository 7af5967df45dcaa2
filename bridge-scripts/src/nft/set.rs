//! Sets of addresses, which rules ask for by name.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ranges;

/// Addresses that a rule can ask for by one name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Set {
    /// The name.
    pub name: String,
    /// What is in it.
    pub kind: SetKind,
    /// The ranges, both ends included.
    pub ranges: Vec<(IpAddr, IpAddr)>,
}

impl Set {
    /// A set of networks of one kind, each with the length of its prefix in bits. Those of the other kind are left
    /// out; those that overlap or touch become one range, because the kernel refuses overlaps.
    pub fn of(name: &str, kind: SetKind, networks: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        Self { name: name.to_owned(), kind, ranges: ranges::of(kind == SetKind::Ipv4, networks) }
    }
}

/// What a set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SetKind {
    /// IPv4 addresses.
    Ipv4,
    /// IPv6 addresses.
    Ipv6,
}

impl SetKind {
    /// Bits in one element.
    pub(super) fn bits(self) -> u8 {
        match self {
            Self::Ipv4 => 32,
            Self::Ipv6 => 128,
        }
    }

    pub(super) fn address(self, number: u128) -> IpAddr {
        ranges::address(self == Self::Ipv4, number)
    }
}
