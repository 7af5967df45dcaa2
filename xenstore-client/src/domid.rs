//! The number of a domain, as the store knows it.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

/// A Xen domain identifier (`domid_t`, `xen/include/public/xen.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl DomId {
    /// The first domain, which the hypervisor trusts and the store never refuses.
    pub const DOM0: Self = Self(0);
    /// `DOMID_SELF`: "the caller" in hypercalls. Never appears in a store path.
    pub const SELF: Self = Self(0x7FF0);

    /// `/local/domain/<id>`: where the store resolves this domain's relative paths.
    #[must_use]
    pub fn home(self) -> String {
        format!("/local/domain/{self}")
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for DomId {
    type Err = ParseIntError;

    /// Decimal, as in store paths. `+5` is refused although `u16` would take it: no path spells a domain so.
    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        // An empty string makes the integer parser produce the error value, which cannot be built by hand.
        if text.starts_with('+') { "".parse().map(Self) } else { text.parse().map(Self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_prints_decimal() {
        assert_eq!("17".parse(), Ok(DomId(17)));
        assert_eq!(DomId(17).to_string(), "17");
        assert_eq!(DomId(3).home(), "/local/domain/3");
        for wrong in ["", "+1", "-1", "65536", "0x1", " 1"] {
            assert!(wrong.parse::<DomId>().is_err(), "{wrong:?}");
        }
    }
}
