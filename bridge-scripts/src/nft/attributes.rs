//! Attributes as nf_tables has them: numbers with the highest byte first (linux/netlink.h, struct nlattr).
//!
//! A rule's expressions lie five deep. Typed messages count the bytes of everything below at each of these depths, before
//! and while they write, which takes longer than the kernel needs for them.

use netlink_packet_core::NLA_F_NESTED;

/// Attributes being written one after the other.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// Appends an attribute.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let start = self.begin(kind);
        self.0.extend_from_slice(value);
        self.end(start)
    }

    /// Appends a text with its closing zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let start = self.begin(kind);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.end(start)
    }

    /// Appends a number.
    pub(super) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends a number.
    pub(super) fn u64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends an attribute that has attributes in it.
    pub(super) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.begin(kind | NLA_F_NESTED);
        inside(self);
        self.end(start)
    }

    /// What was written.
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    fn begin(&mut self, kind: u16) -> usize {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    /// The length counts the header and not the padding. One too long for its field is one that no kernel takes.
    fn end(&mut self, start: usize) -> &mut Self {
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut attributes = Attributes::default();
        attributes.text(1, "cmp").nest(2, |data| {
            data.u32(2, 5).bytes(3, &[0xaa]);
        });
        let [low, high] = (2 | NLA_F_NESTED).to_le_bytes();
        let expected = [
            &[8, 0, 1, 0, b'c', b'm', b'p', 0][..],
            &[20, 0, low, high],
            &[8, 0, 2, 0, 0, 0, 0, 5],
            &[5, 0, 3, 0, 0xaa, 0, 0, 0],
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(attributes.finish(), expected.concat());
        }
    }
}
