//! A snapshot of one end's nodes.

use std::collections::BTreeMap;

use super::{Blame, Fault};

const EINVAL: i32 = 22;
const ENOENT: i32 = 2;

/// Small texts by key, relative to a device's directory: `ring-ref`, `queue-3/event-channel`. Taken in one transaction
/// and never looked up again, so that nobody can change them after they were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    map: BTreeMap<String, String>,
    dir: String,
    blame: Blame,
}

impl Keys {
    /// An empty snapshot of the directory `dir`; faults found in it are blamed on `blame`.
    #[must_use]
    pub fn new(dir: impl Into<String>, blame: Blame) -> Self {
        Self { map: BTreeMap::new(), dir: dir.into(), blame }
    }

    /// A snapshot made up by hand, as a frontend's (for tests).
    #[must_use]
    pub fn from_pairs<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        let map = pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Self { map, dir: String::new(), blame: Blame::Guest }
    }

    /// Adds or replaces a key.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.map.insert(key.into(), value.into());
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.map.get(key).map(String::as_str)
    }

    /// The value of a key that has to exist.
    ///
    /// # Errors
    /// ENOENT, blamed on the directory's writer.
    pub fn require(&self, key: &str) -> Result<&str, Fault> {
        self.get(key).ok_or_else(|| self.fault(ENOENT, &format!("{key} is missing")))
    }

    /// All keys and values, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.map.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// A number below 2³², written as decimal digits and nothing else; `None` if the key is missing.
    ///
    /// # Errors
    /// EINVAL for any other text.
    pub fn parse_u32(&self, key: &str) -> Result<Option<u32>, Fault> {
        self.parse(key)
    }

    /// As [`Keys::parse_u32`], below 2⁶⁴.
    ///
    /// # Errors
    /// EINVAL for any other text.
    pub fn parse_u64(&self, key: &str) -> Result<Option<u64>, Fault> {
        self.parse(key)
    }

    /// As [`Keys::parse_u32`], for a key that has to exist.
    ///
    /// # Errors
    /// ENOENT, EINVAL.
    pub fn require_u32(&self, key: &str) -> Result<u32, Fault> {
        self.require(key)?;
        self.parse_u32(key)?.ok_or_else(|| self.fault(ENOENT, &format!("{key} is missing")))
    }

    /// A flag: `1` (any number but 0) or `0`; a missing key is `false`, as frontends and Linux have it.
    ///
    /// # Errors
    /// EINVAL for text that is not a number.
    pub fn parse_bool(&self, key: &str) -> Result<bool, Fault> {
        Ok(self.parse_u32(key)?.unwrap_or(0) != 0)
    }

    /// A fault about these keys, blamed on who wrote them, naming the directory. `errno` is positive.
    #[must_use]
    pub fn fault(&self, errno: i32, text: &str) -> Fault {
        let text = if self.dir.is_empty() { text.to_owned() } else { format!("{}: {text}", self.dir) };
        Fault { errno, text, blame: self.blame }
    }

    fn parse<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, Fault> {
        let Some(text) = self.get(key) else { return Ok(None) };
        // The digits are checked first because Rust's parser would also take "+7".
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = if digits { text.parse().ok() } else { None };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(self.fault(EINVAL, &format!("{key} is not a number in range: {text:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strict() {
        let long = "9".repeat(5000);
        for wrong in ["", "-1", "+1", "4294967296", "0x10", " 1", "1 ", "1\0", "１", long.as_str()] {
            let keys = Keys::from_pairs([("ring-ref", wrong)]);
            let fault = keys.parse_u32("ring-ref").expect_err(wrong);
            assert_eq!((fault.errno, fault.blame), (22, Blame::Guest));
        }
        let keys = Keys::from_pairs([("a", "4294967295"), ("b", "18446744073709551615"), ("c", "007")]);
        assert_eq!(keys.parse_u32("a"), Ok(Some(u32::MAX)));
        assert_eq!(keys.parse_u64("b"), Ok(Some(u64::MAX)));
        assert_eq!(keys.parse_u32("c"), Ok(Some(7)));
        assert_eq!(keys.parse_u32("none"), Ok(None));
        assert_eq!(keys.require_u32("none").map_err(|fault| fault.errno), Err(2));
        assert_eq!(keys.parse_bool("a"), Ok(true));
    }
}
