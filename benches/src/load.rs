//! What a load asks of a disk: which sectors, in which order, read or written.

use std::fmt;
use std::str::FromStr;

/// The pattern of a load, named as fio names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads and writes anywhere, half and half.
    RandRw,
    /// Reads one after the other.
    Read,
    /// Writes one after the other.
    Write,
}

impl Pattern {
    const ALL: [(Self, &'static str); 5] = [
        (Self::RandRead, "randread"),
        (Self::RandWrite, "randwrite"),
        (Self::RandRw, "randrw"),
        (Self::Read, "read"),
        (Self::Write, "write"),
    ];

    /// Whether the load changes the disk.
    pub fn writes(self) -> bool {
        !matches!(self, Self::RandRead | Self::Read)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(pattern, _)| pattern == self).map_or("?", |(_, name)| name);
        f.pad(name)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text).map(|(pattern, _)| *pattern);
        found.ok_or_else(|| format!("{text:?} is none of randread, randwrite, randrw, read, write"))
    }
}

/// A size in bytes, as 512, 4k, 128K, 1m, 2G.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..].to_ascii_lowercase()[..] {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        unit => return Err(format!("{unit:?} is no unit of bytes: k, m or g")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size: write 512, 4k, 1m, 2g"))?;
    number.checked_mul(1 << shift).filter(|&size| size > 0).ok_or_else(|| format!("{text:?} is no size"))
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// First byte on the disk.
    pub offset: u64,
    /// Whether it is a write.
    pub write: bool,
}

/// The requests of one queue, without end.
#[derive(Debug, Clone)]
pub struct Requests {
    pattern: Pattern,
    block: u64,
    /// The part of the disk that this queue goes through in order, in blocks.
    first: u64,
    blocks: u64,
    next: u64,
    /// Blocks of the whole disk.
    all: u64,
    state: u64,
}

impl Requests {
    /// Requests of `block` bytes to a disk of `bytes`; queue `queue` of `queues` begins its sequential pass in its own
    /// part. None when not one block fits into each part.
    pub fn new(pattern: Pattern, bytes: u64, block: u64, queue: u64, queues: u64) -> Option<Self> {
        let all = bytes / block;
        let blocks = all / queues;
        (blocks > 0).then(|| Self {
            pattern,
            block,
            first: queue * blocks,
            blocks,
            next: 0,
            all,
            state: 0x9e37_79b9_7f4a_7c15 ^ (queue + 1),
        })
    }

    /// The next request.
    #[inline]
    pub fn next_request(&mut self) -> Request {
        let (block, write) = match self.pattern {
            Pattern::Read | Pattern::Write => {
                let block = self.first + self.next;
                self.next = if self.next + 1 == self.blocks { 0 } else { self.next + 1 };
                (block, self.pattern == Pattern::Write)
            }
            pattern => {
                // xorshift64: cheap, and no two neighbours alike; the top bits make the number.
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                let block = ((u128::from(self.state) * u128::from(self.all)) >> 64) as u64;
                let write = pattern == Pattern::RandWrite || pattern == Pattern::RandRw && self.state & 1 == 1;
                (block, write)
            }
        };
        Request { offset: block * self.block, write }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [("512", 512), ("4k", 4096), ("128K", 131_072), ("1m", 1 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "k", "4x", "-1", "0", "99999999999g"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn requests_stay_on_the_disk_and_sequences_in_order() {
        for pattern in [Pattern::RandRead, Pattern::RandWrite, Pattern::RandRw, Pattern::Read, Pattern::Write] {
            let mut requests = Requests::new(pattern, 100 * 4096 + 5, 4096, 1, 2).unwrap();
            let first: Vec<_> = (0..1000).map(|_| requests.next_request()).collect();
            assert!(first.iter().all(|request| request.offset + 4096 <= 100 * 4096));
            let writes = first.iter().filter(|request| request.write).count();
            match pattern {
                Pattern::RandRead | Pattern::Read => assert_eq!(writes, 0),
                Pattern::RandWrite | Pattern::Write => assert_eq!(writes, 1000),
                Pattern::RandRw => assert!((300..700).contains(&writes), "{writes} of 1000 are writes"),
            }
            if matches!(pattern, Pattern::Read | Pattern::Write) {
                let blocks: Vec<_> = first.iter().take(51).map(|request| request.offset / 4096).collect();
                assert_eq!(blocks, (50..100).chain([50]).collect::<Vec<_>>());
            }
        }
        assert!(Requests::new(Pattern::Read, 4096, 4096, 0, 2).is_none());
    }
}
