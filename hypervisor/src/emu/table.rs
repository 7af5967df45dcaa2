//! A domain's grant table: memory that the domain writes and the machine checks.
//!
//! Every access is one 64-bit atomic, so that nobody ever sees half of an entry, and so that a change the guest makes
//! between check and use makes an exchange fail instead of going unseen.

use std::sync::atomic::Ordering;

use super::entry::{ENTRY_SIZE, READING, RawEntry, WRITING};
use crate::memory::Mapping;
use crate::{DomId, GrantAccess, GrantRef, GrantStatus};

/// How often an exchange is tried against a guest that keeps changing the entry. Xen gives up after five as well.
const TRIES: u32 = 5;

#[derive(Debug)]
pub(super) struct GrantTable {
    memory: Mapping,
    entries: u32,
}

impl GrantTable {
    pub(super) fn new(memory: Mapping) -> Self {
        let entries = u32::try_from(memory.len() / ENTRY_SIZE).unwrap_or(u32::MAX);
        Self { memory, entries }
    }

    pub(super) fn entries(&self) -> u32 {
        self.entries
    }

    fn offset(&self, gref: GrantRef) -> Option<usize> {
        // u32 to usize widens.
        (gref.0 < self.entries).then_some(gref.0 as usize * ENTRY_SIZE)
    }

    /// What the entry says now; nothing for a reference beyond the table.
    #[inline]
    pub(super) fn load(&self, gref: GrantRef) -> Option<RawEntry> {
        // Acquire: who sees the grant also sees what was written to the page before it was granted.
        self.offset(gref).map(|at| RawEntry::unpack(self.memory.atomic_u64(at).load(Ordering::Acquire)))
    }

    /// Writes an entry, whatever it says. Nothing happens beyond the table's end.
    pub(super) fn store(&self, gref: GrantRef, entry: RawEntry) {
        if let Some(at) = self.offset(gref) {
            self.memory.atomic_u64(at).store(entry.pack(), Ordering::Release);
        }
    }

    /// The machine marks the entry as mapped, if it still allows `access` to `caller`.
    pub(super) fn pin(
        &self,
        gref: GrantRef,
        caller: DomId,
        access: GrantAccess,
        pages: u32,
    ) -> Result<RawEntry, GrantStatus> {
        let at = self.offset(gref).ok_or(GrantStatus::BadGrantRef)?;
        let word = self.memory.atomic_u64(at);
        let marks = if access == GrantAccess::ReadWrite { READING | WRITING } else { READING };
        let mut seen = word.load(Ordering::Acquire);
        for _ in 0..TRIES {
            let entry = RawEntry::unpack(seen);
            entry.check(caller, access, pages)?;
            let marked = RawEntry { flags: entry.flags | marks, ..entry };
            match word.compare_exchange(seen, marked.pack(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(marked),
                Err(changed) => seen = changed,
            }
        }
        Err(GrantStatus::GeneralError)
    }

    /// The machine takes marks back.
    pub(super) fn unpin(&self, gref: GrantRef, marks: u16) {
        if let Some(at) = self.offset(gref) {
            // Release: who sees the mark gone, the guest, sees all that the mapper wrote.
            self.memory.atomic_u64(at).fetch_and(!u64::from(marks), Ordering::AcqRel);
        }
    }

    /// The guest ends a grant, unless it is mapped.
    pub(super) fn revoke(&self, gref: GrantRef) -> Result<RawEntry, GrantStatus> {
        let at = self.offset(gref).ok_or(GrantStatus::BadGrantRef)?;
        let word = self.memory.atomic_u64(at);
        let mut seen = word.load(Ordering::Acquire);
        for _ in 0..TRIES {
            let entry = RawEntry::unpack(seen);
            if entry.flags & (READING | WRITING) != 0 {
                return Err(GrantStatus::Busy);
            }
            match word.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(entry),
                Err(changed) => seen = changed,
            }
        }
        Err(GrantStatus::Busy)
    }

    /// Entries that grant something.
    pub(super) fn in_use(&self) -> u32 {
        let used = (0..self.entries).filter(|&gref| self.load(GrantRef(gref)).is_some_and(|entry| entry.flags != 0));
        u32::try_from(used.count()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use GrantAccess::{ReadOnly, ReadWrite};

    fn table() -> GrantTable {
        GrantTable::new(Mapping::anonymous(PAGE_SIZE).unwrap())
    }

    #[test]
    fn a_marked_entry_cannot_be_revoked() {
        let (table, gref, me) = (table(), GrantRef(9), DomId(0));
        table.store(gref, RawEntry::granting(4, me, ReadWrite));
        table.pin(gref, me, ReadOnly, 16).unwrap();
        assert_eq!(table.revoke(gref), Err(GrantStatus::Busy));
        table.unpin(gref, READING | WRITING);
        assert_eq!(table.revoke(gref), Ok(RawEntry::granting(4, me, ReadWrite)));
        assert_eq!(table.pin(gref, me, ReadOnly, 16), Err(GrantStatus::GeneralError));
    }

    #[test]
    fn beyond_the_table_there_is_nothing() {
        let table = table();
        for gref in [table.entries(), u32::MAX].map(GrantRef) {
            assert_eq!(table.load(gref), None);
            assert_eq!(table.pin(gref, DomId(0), ReadOnly, 16), Err(GrantStatus::BadGrantRef));
            assert_eq!(table.revoke(gref), Err(GrantStatus::BadGrantRef));
            table.store(gref, RawEntry::default());
            table.unpin(gref, READING);
        }
    }

    #[test]
    fn the_machine_gives_up_on_an_entry_that_never_rests() {
        let table = table();
        let (gref, me) = (GrantRef(1), DomId(0));
        table.store(gref, RawEntry::granting(4, me, ReadWrite));
        std::thread::scope(|scope| {
            let (stop, stopped) = std::sync::mpsc::channel::<()>();
            scope.spawn(|| {
                let mut frame = 0;
                let stopped = stopped;
                while stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
                    frame = (frame + 1) % 16;
                    table.store(gref, RawEntry::granting(frame, me, ReadWrite));
                }
            });
            for _ in 0..10_000 {
                // It may succeed or be refused, but it comes back, and what it pinned is what it checked.
                if let Ok(entry) = table.pin(gref, me, ReadWrite, 16) {
                    assert!(entry.frame < 16);
                }
            }
            drop(stop);
        });
    }
}
