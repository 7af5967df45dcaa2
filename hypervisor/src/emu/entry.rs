//! One entry of a grant table, version 1 (struct grant_entry_v1 of xen/include/public/grant_table.h), and the rules
//! by which the hypervisor lets a peer use it.

use crate::{DomId, GrantAccess, GrantStatus, PAGE_SIZE};

/// Bytes of an entry in the table.
pub(super) const ENTRY_SIZE: usize = 8;

/// GTF_permit_access: the peer may map or copy the page.
pub const PERMIT_ACCESS: u16 = 1;
/// GTF_type_mask: 0 is an unused entry, 2 and 3 are kinds that backends never see.
pub const TYPE_MASK: u16 = 3;
/// GTF_readonly: the peer may not write.
pub const READONLY: u16 = 1 << 2;
/// GTF_reading: set by the hypervisor while the page is mapped.
pub const READING: u16 = 1 << 3;
/// GTF_writing: set by the hypervisor while the page is mapped for writing.
pub const WRITING: u16 = 1 << 4;

// An entry is read and exchanged as one 64-bit number; its fields sit in it as they sit in memory only here.
const _: () = assert!(cfg!(target_endian = "little") && ENTRY_SIZE == size_of::<u64>());
const _: () = assert!(PAGE_SIZE.is_multiple_of(ENTRY_SIZE));

/// A v1 grant entry, whatever it says: a guest that misbehaves writes what it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawEntry {
    /// GTF_* bits.
    pub flags: u16,
    /// Who may use the grant.
    pub domid: u16,
    /// Which page of the granting domain.
    pub frame: u32,
}

impl RawEntry {
    /// An honest grant.
    pub fn granting(frame: u32, peer: DomId, access: GrantAccess) -> Self {
        let readonly = if access == GrantAccess::ReadOnly { READONLY } else { 0 };
        Self { flags: PERMIT_ACCESS | readonly, domid: peer.0, frame }
    }

    pub(super) fn unpack(word: u64) -> Self {
        // Truncation takes the fields apart.
        Self { flags: word as u16, domid: (word >> 16) as u16, frame: (word >> 32) as u32 }
    }

    pub(super) fn pack(self) -> u64 {
        u64::from(self.flags) | u64::from(self.domid) << 16 | u64::from(self.frame) << 32
    }

    /// Whether `caller` may use the grant so; the frame, if it may. `pages` is the granting domain's size.
    ///
    /// The codes are Xen's (xen/common/grant_table.c): a grant to somebody else is a general error there too, only
    /// an unknown domain is a bad domain. Flags Xen knows and we do not (sub-page and transitive grants, cache
    /// attributes) are refused.
    #[inline]
    pub(super) fn check(self, caller: DomId, access: GrantAccess, pages: u32) -> Result<u32, GrantStatus> {
        let plain = self.flags & !(READONLY | READING | WRITING);
        if plain != PERMIT_ACCESS || self.domid != caller.0 {
            return Err(GrantStatus::GeneralError);
        }
        if access == GrantAccess::ReadWrite && self.flags & READONLY != 0 {
            return Err(GrantStatus::GeneralError);
        }
        if self.frame >= pages {
            return Err(GrantStatus::BadPage);
        }
        Ok(self.frame)
    }

    /// Whether two looks at an entry saw the same grant: only the hypervisor's own marks may differ.
    #[inline]
    pub(super) fn is_same_grant(self, other: Self) -> bool {
        let marks = READING | WRITING;
        (self.flags | marks, self.domid, self.frame) == (other.flags | marks, other.domid, other.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use GrantAccess::{ReadOnly, ReadWrite};
    use GrantStatus as S;

    #[test]
    fn the_layout_is_xens() {
        let entry = RawEntry { flags: 0x0005, domid: 0x0102, frame: 0xa1a2_a3a4 };
        assert_eq!(entry.pack().to_le_bytes(), [5, 0, 2, 1, 0xa4, 0xa3, 0xa2, 0xa1]);
        assert_eq!(RawEntry::unpack(entry.pack()), entry);
    }

    #[test]
    fn every_way_to_be_refused() {
        let me = DomId(7);
        let good = RawEntry::granting(3, me, ReadWrite);
        let readonly = RawEntry::granting(3, me, ReadOnly);
        for (entry, access, expected) in [
            (good, ReadWrite, Ok(3)),
            (good, ReadOnly, Ok(3)),
            (readonly, ReadOnly, Ok(3)),
            (readonly, ReadWrite, Err(S::GeneralError)),
            (RawEntry { flags: good.flags | READING | WRITING, ..good }, ReadWrite, Ok(3)),
            (RawEntry::default(), ReadOnly, Err(S::GeneralError)),
            (RawEntry { flags: 0, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { flags: 2, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { flags: 3, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { flags: PERMIT_ACCESS | 1 << 8, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { flags: 0xffff, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { domid: 8, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { domid: DomId::SELF.0, ..good }, ReadOnly, Err(S::GeneralError)),
            (RawEntry { frame: 16, ..good }, ReadOnly, Err(S::BadPage)),
            (RawEntry { frame: u32::MAX, ..good }, ReadWrite, Err(S::BadPage)),
        ] {
            assert_eq!(entry.check(me, access, 16), expected, "{entry:?} {access:?}");
        }
    }
}
