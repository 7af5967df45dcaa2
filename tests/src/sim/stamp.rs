//! What stands in a sector: who wrote it, where, and as which of its writes, so that any other content shows.

use super::random::mix;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The bytes of one sector.
pub type Bytes = [u8; SECTOR];

const MAGIC: u64 = 0x5349_4d44_4953_4b31;
const WORDS: usize = SECTOR / 8;

/// A sector's mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The sector it was meant for.
    pub lba: u64,
    /// Who wrote it; differs between guests and between histories.
    pub writer: u64,
    /// Which write of the writer's it was; 0 for what stood there before.
    pub generation: u64,
}

/// What a sector was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole stamp.
    Stamp(Stamp),
    /// Nothing but zeros, as after a discard.
    Zeros,
    /// Neither: part of a stamp, parts of several, or something else.
    Torn,
}

impl Stamp {
    fn checksum(self) -> u64 {
        mix(mix(mix(MAGIC ^ self.lba) ^ self.writer) ^ self.generation)
    }

    /// The sector's bytes: magic, LBA, writer, generation, and then the checksum up to the end, so that no part of
    /// another stamp goes unseen.
    pub fn fill(self, bytes: &mut Bytes) {
        let (words, _) = bytes.as_chunks_mut::<8>();
        words.fill(self.checksum().to_le_bytes());
        words[0] = MAGIC.to_le_bytes();
        words[1] = self.lba.to_le_bytes();
        words[2] = self.writer.to_le_bytes();
        words[3] = self.generation.to_le_bytes();
    }
}

impl Content {
    /// Reads a sector.
    pub fn of(bytes: &Bytes) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |at: usize| u64::from_le_bytes(words[at]);
        let stamp = Stamp { lba: word(1), writer: word(2), generation: word(3) };
        let checksum = stamp.checksum();
        let differing = |wanted: u64, from: usize| (from..WORDS).fold(0, |found, at| found | (word(at) ^ wanted));
        if word(0) == MAGIC && differing(checksum, 4) == 0 {
            Self::Stamp(stamp)
        } else if differing(0, 0) == 0 {
            Self::Zeros
        } else {
            Self::Torn
        }
    }
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stamp(Stamp { lba, writer: 0, generation: 0 }) => {
                write!(f, "what stood there first (of sector {lba})")
            }
            Self::Stamp(Stamp { lba, writer, generation }) => {
                write!(f, "#{generation} of writer {writer:#x} for sector {lba}")
            }
            Self::Zeros => write!(f, "zeros"),
            Self::Torn => write!(f, "a mixture"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_byte_shows() {
        let stamp = Stamp { lba: 7, writer: 0x1_0002, generation: 3 };
        let mut bytes = [0; SECTOR];
        assert_eq!(Content::of(&bytes), Content::Zeros);
        stamp.fill(&mut bytes);
        assert_eq!(Content::of(&bytes), Content::Stamp(stamp));
        for at in 0..SECTOR {
            let mut other = bytes;
            other[at] ^= 0x10;
            assert_eq!(Content::of(&other), Content::Torn, "byte {at}");
        }
    }
}
