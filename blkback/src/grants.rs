//! A queue's way to the guest's pages: mapped once and kept, or copied through pages of our own.
//!
//! A frontend that speaks persistent grants uses the same few pages again and again; those are mapped at first sight
//! and stay mapped, and the disk reads and writes them directly. Everything else is copied by one batched grant copy:
//! dearer per byte, but without the map and unmap that cost most on Xen.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use hypervisor::memory::{IoList, Mapping};
use hypervisor::{Backend, CopyDirection, CopyOp, DomId, GrantAccess, GrantRef, GrantStatus, PAGE_SIZE};

/// Spreads grant references over a hash table: they are small consecutive numbers, and an attacker who picks them
/// must first have them mapped, which bounds what he can do.
#[derive(Debug, Default)]
pub struct GrantHasher(u64);

impl Hasher for GrantHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(byte.into());
        }
    }

    #[inline]
    fn write_u32(&mut self, number: u32) {
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

#[derive(Debug)]
struct Kept {
    page: Rc<Mapping>,
    /// In which period it was last used.
    used: u32,
}

/// Pages of our own that grant copies go through.
#[derive(Debug)]
struct Arena {
    memory: Rc<Mapping>,
    free: Vec<u32>,
}

/// How a queue gets at its guest's pages.
#[derive(Debug)]
pub struct Grants {
    xen: Arc<dyn Backend>,
    peer: DomId,
    kept: HashMap<GrantRef, Kept, BuildHasherDefault<GrantHasher>>,
    /// Most pages to keep mapped; 0 where the frontend does not speak persistent grants.
    most_kept: usize,
    period: u32,
    arena: Arena,
}

/// Periods without use after which a kept page is unmapped.
const IDLE_PERIODS: u32 = 6;

impl Grants {
    /// `arena_pages` pages for copies, and at most `most_kept` pages kept mapped.
    ///
    /// # Errors
    /// When the kernel has no memory.
    pub fn new(xen: Arc<dyn Backend>, peer: DomId, arena_pages: u32, most_kept: usize) -> std::io::Result<Self> {
        let memory = Rc::new(Mapping::anonymous(arena_pages as usize * PAGE_SIZE)?);
        let arena = Arena { memory, free: (0..arena_pages).rev().collect() };
        let kept = HashMap::with_capacity_and_hasher(most_kept, BuildHasherDefault::default());
        Ok(Self { xen, peer, kept, most_kept, period: 0, arena })
    }

    /// Pages that copies can still take.
    #[inline]
    pub fn free_pages(&self) -> usize {
        self.arena.free.len()
    }

    /// Pages kept mapped.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// The page behind `gref`, mapped for reading and writing, if it is kept or can be from now on.
    #[inline]
    fn persistent(&mut self, gref: GrantRef) -> Option<&Rc<Mapping>> {
        if self.most_kept == 0 {
            return None;
        }
        // Looked up twice on the way in: a page that is mapped for the first time costs a system call anyway.
        if !self.kept.contains_key(&gref) {
            if self.kept.len() >= self.most_kept {
                return None;
            }
            // A refusal is no verdict yet: a read-only grant can still be copied from, and the copy says what is
            // wrong with it.
            let page = self.xen.map(self.peer, &[gref], GrantAccess::ReadWrite).ok()?;
            self.kept.insert(gref, Kept { page: Rc::new(page), used: self.period });
        }
        let kept = self.kept.get_mut(&gref)?;
        kept.used = self.period;
        Some(&kept.page)
    }

    /// Adds a segment's bytes to `list`: of the guest's page itself where it is kept mapped, else of a page of ours,
    /// which is noted in `pages` with the copy it needs in `copies`.
    ///
    /// # Panics
    /// When the arena is empty; look at [`free_pages`](Self::free_pages) first.
    #[inline]
    pub fn add(
        &mut self,
        (gref, offset, len): (GrantRef, u16, u16),
        direction: CopyDirection,
        list: &mut IoList,
        pages: &mut Vec<u32>,
        copies: &mut Vec<CopyOp>,
    ) {
        if let Some(page) = self.persistent(gref) {
            list.push(page, offset.into(), len.into());
            return;
        }
        let Some(page) = self.arena.free.pop() else { panic!("a request was taken without pages for it") };
        let local = page as usize * PAGE_SIZE + usize::from(offset);
        pages.push(page);
        list.push(&self.arena.memory, local, len.into());
        copies.push(CopyOp { gref, offset, len, direction, local, status: GrantStatus::GeneralError });
    }

    /// Returns pages of ours.
    #[inline]
    pub fn give_back(&mut self, pages: &mut Vec<u32>) {
        self.arena.free.append(pages);
    }

    /// Carries out a batch of copies; each then says how it went.
    #[inline]
    pub fn copy(&self, copies: &mut [CopyOp]) {
        if copies.is_empty() {
            return;
        }
        if let Err(error) = self.xen.copy(self.peer, &self.arena.memory, copies) {
            tracing::error!(%error, domain = %self.peer, "grant copy failed as a whole");
            for copy in copies {
                copy.status = GrantStatus::GeneralError;
            }
        }
    }

    /// Copies the first `record.len()` bytes of a guest's page, once: the guest may go on changing it.
    pub fn read_page(&mut self, gref: GrantRef, record: &mut [u8]) -> bool {
        if let Some(page) = self.persistent(gref) {
            page.read_once(0, record);
            return true;
        }
        let Some(page) = self.arena.free.pop() else { return false };
        let local = page as usize * PAGE_SIZE;
        let mut copy = [CopyOp {
            gref,
            offset: 0,
            len: record.len() as u16,
            direction: CopyDirection::FromGuest,
            local,
            status: GrantStatus::GeneralError,
        }];
        self.copy(&mut copy);
        self.arena.memory.copy_out(local, record);
        self.arena.free.push(page);
        copy[0].status == GrantStatus::Okay
    }

    /// Begins a new period, and unmaps pages that were not used for some. Pages in flight stay.
    pub fn next_period(&mut self) {
        self.period = self.period.wrapping_add(1);
        let period = self.period;
        self.kept.retain(|_, kept| period.wrapping_sub(kept.used) < IDLE_PERIODS || Rc::strong_count(&kept.page) > 1);
    }
}
