//! A guest: its memory, its grant table, and what a frontend does with them.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::call::{Join, Request};
use super::entry::RawEntry;
use super::frames::Frames;
use super::link::unexpected;
use super::machine::Machine;
use super::peer::open_table;
use super::seat::{Place, Seat};
use super::table::GrantTable;
use crate::memory::Mapping;
use crate::{DomId, Error, EventChannel, GrantAccess, GrantRef, GrantStatus, Guest, PAGE_SIZE, Port, Result, Shared};

/// References below this are the toolstack's (GNTTAB_NR_RESERVED_ENTRIES): no frontend hands them out.
const FIRST_REF: u32 = 8;

/// How a guest is to be.
#[derive(Debug, Clone, Default)]
pub struct GuestOptions {
    /// Its name in XenStore; `guest-N` when empty.
    pub name: String,
    /// Its memory in pages; 0 for what the machine gives by default.
    pub memory_pages: u32,
    /// The id it wants; none for the next that is free.
    pub domid: Option<DomId>,
}

/// A guest's seat. It *is* the domain: dropping it, or the death of its process, destroys the domain.
///
/// Besides what an honest frontend needs ([`Guest`]) it can do what a hostile one does.
#[derive(Debug)]
pub struct GuestSeat {
    seat: Arc<Seat>,
    memory: Arc<Mapping>,
    table: GrantTable,
    book: Mutex<Book>,
}

/// What the guest knows of its own pages and references.
#[derive(Debug)]
struct Book {
    frames: Frames,
    /// By reference: the frame it grants.
    granted: Vec<Option<u32>>,
    /// References below `granted.len()` that grant nothing.
    free: Vec<u32>,
}

impl Book {
    fn take_ref(&mut self, entries: u32) -> Option<GrantRef> {
        if let Some(gref) = self.free.pop() {
            return Some(GrantRef(gref));
        }
        let next = u32::try_from(self.granted.len()).ok()?.max(FIRST_REF);
        if next >= entries {
            return None;
        }
        self.granted.resize(next as usize + 1, None);
        Some(GrantRef(next))
    }

    fn frame_of(&self, gref: GrantRef) -> Option<u32> {
        self.granted.get(gref.0 as usize).copied().flatten()
    }

    /// The first of the pages that these references grant, if they lie side by side as `share` makes them.
    fn run_of(&self, refs: &[GrantRef]) -> Option<u32> {
        let first = self.frame_of(*refs.first()?)?;
        (first..).zip(refs).all(|(frame, &gref)| self.frame_of(gref) == Some(frame)).then_some(first)
    }
}

impl GuestSeat {
    /// Creates a guest on the machine that `emu-xen serve --dir DIR` keeps.
    ///
    /// # Errors
    /// When no machine is there, the wanted id is taken, or the kernel has no memory.
    pub fn join(dir: impl AsRef<Path>, options: GuestOptions) -> Result<Self> {
        Self::take(Place::Dir(dir.as_ref()), options)
    }

    /// Creates a guest on a machine of this process.
    ///
    /// # Errors
    /// When the wanted id is taken, or the kernel has no memory.
    pub fn local(machine: &Machine, options: GuestOptions) -> Result<Self> {
        Self::take(Place::Here(machine), options)
    }

    fn take(place: Place<'_>, options: GuestOptions) -> Result<Self> {
        let GuestOptions { name, memory_pages: pages, domid } = options;
        let (seat, answer) = Seat::take(place, Join::Guest { name, pages, domid: domid.map(|id| id.0) })?;
        let [_, _, memory, table] = answer.fds.as_slice() else { return Err(unexpected(&answer)) };
        let failed = |error: std::io::Error| Error::io("mapping our memory", error);
        let len = rustix::fs::fstat(memory).map_err(|error| failed(error.into()))?.st_size;
        let len = usize::try_from(len).map_err(|error| failed(std::io::Error::other(error)))?;
        let pages = u32::try_from(len / PAGE_SIZE).map_err(|error| failed(std::io::Error::other(error)))?;
        let book = Book { frames: Frames::new(pages), granted: Vec::new(), free: Vec::new() };
        Ok(Self {
            memory: Arc::new(Mapping::of_file(memory, 0, len, true).map_err(failed)?),
            table: open_table(table).map_err(failed)?,
            seat,
            book: Mutex::new(book),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of the guest's memory.
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Takes zeroed pages side by side; returns the first frame. `memory()` has them at `frame * PAGE_SIZE`.
    ///
    /// # Errors
    /// When there is no such run of free pages.
    pub fn alloc_pages(&self, pages: usize) -> Result<u32> {
        let taken =
            u32::try_from(pages).ok().filter(|&count| count > 0).and_then(|count| self.book().frames.take(count));
        let first = taken.ok_or_else(|| Error::Invalid(format!("the guest has no {pages} free pages side by side")))?;
        self.memory.zero(first as usize * PAGE_SIZE, pages * PAGE_SIZE);
        Ok(first)
    }

    /// Gives pages back.
    ///
    /// # Panics
    /// When one of them is free already: that is a bug of the caller's.
    pub fn free_pages(&self, first: u32, pages: usize) {
        let given = u32::try_from(pages).is_ok_and(|count| self.book().frames.give(first, count));
        assert!(given, "pages {first}+{pages} are not all in use");
    }

    /// Grants a page of our memory, or of anything: the machine checks the frame, not we.
    ///
    /// # Errors
    /// When all entries are in use.
    pub fn grant(&self, frame: u32, peer: DomId, access: GrantAccess) -> Result<GrantRef> {
        let mut book = self.book();
        let none_left = || Error::Invalid("the guest's grant table is full".to_owned());
        let gref = book.take_ref(self.table.entries()).ok_or_else(none_left)?;
        book.granted[gref.0 as usize] = Some(frame);
        self.table.store(gref, RawEntry::granting(frame, peer, access));
        Ok(gref)
    }

    /// Revokes a grant; its page stays ours.
    ///
    /// # Errors
    /// [`GrantStatus::Busy`] while it is mapped, [`GrantStatus::BadGrantRef`] when we do not grant it.
    pub fn revoke(&self, gref: GrantRef) -> Result<()> {
        let mut book = self.book();
        let refused = |status| Error::Grant { operation: "end", domain: self.seat.domid, gref, status };
        book.frame_of(gref).ok_or_else(|| refused(GrantStatus::BadGrantRef))?;
        self.table.revoke(gref).map_err(refused)?;
        book.granted[gref.0 as usize] = None;
        book.free.push(gref.0);
        Ok(())
    }

    /// Writes a grant entry, whatever it says, past all bookkeeping. Nothing happens beyond the table's end.
    pub fn write_entry(&self, gref: GrantRef, entry: RawEntry) {
        self.table.store(gref, entry);
    }

    /// What a grant entry says now; nothing beyond the table's end.
    pub fn read_entry(&self, gref: GrantRef) -> Option<RawEntry> {
        self.table.load(gref)
    }

    /// How many entries our grant table has.
    pub fn entries(&self) -> u32 {
        self.table.entries()
    }

    /// Binds a port of ours to one that `peer` offered, as a backend does.
    ///
    /// # Errors
    /// As [`Backend::bind`](crate::Backend::bind).
    pub fn bind(&self, peer: DomId, remote: Port) -> Result<Box<dyn EventChannel>> {
        self.seat.bind(peer, remote)
    }

    /// Revokes all of `refs`, or none.
    fn revoke_all(&self, refs: &[GrantRef]) -> Result<()> {
        let refused = |gref, status| Error::Grant { operation: "end", domain: self.seat.domid, gref, status };
        let mut ended: Vec<(GrantRef, RawEntry)> = Vec::with_capacity(refs.len());
        for &gref in refs {
            match self.table.revoke(gref) {
                Ok(entry) => ended.push((gref, entry)),
                Err(status) => {
                    for (gref, entry) in ended {
                        self.table.store(gref, entry);
                    }
                    return Err(refused(gref, status));
                }
            }
        }
        Ok(())
    }
}

impl Drop for GuestSeat {
    fn drop(&mut self) {
        // Channels may still hold the connection; the domain ends now all the same.
        self.seat.release(Request::Leave);
    }
}

impl Guest for GuestSeat {
    fn domid(&self) -> DomId {
        self.seat.domid
    }

    fn store(&self) -> Result<xenstore_client::Client> {
        self.seat.store()
    }

    fn share(&self, peer: DomId, pages: usize, access: GrantAccess) -> Result<Shared> {
        let first = self.alloc_pages(pages)?;
        let mut refs = Vec::with_capacity(pages);
        for page in 0..pages {
            // It fitted into a u32 when it was allocated.
            match self.grant(first + page as u32, peer, access) {
                Ok(gref) => refs.push(gref),
                Err(error) => {
                    for gref in refs {
                        // Nobody knows the reference yet, so nobody has it mapped.
                        self.revoke(gref)?;
                    }
                    self.free_pages(first, pages);
                    return Err(error);
                }
            }
        }
        let memory = Mapping::window(&self.memory, first as usize * PAGE_SIZE, pages * PAGE_SIZE, ());
        Ok(Shared { memory, refs })
    }

    fn unshare(&self, shared: Shared) -> std::result::Result<(), (Shared, Error)> {
        let mut book = self.book();
        let Some(first) = book.run_of(&shared.refs) else {
            return Err((shared, Error::Invalid("pages that this guest does not share".to_owned())));
        };
        if let Err(error) = self.revoke_all(&shared.refs) {
            return Err((shared, error));
        }
        for gref in &shared.refs {
            book.granted[gref.0 as usize] = None;
            book.free.push(gref.0);
        }
        let count = u32::try_from(shared.refs.len()).unwrap_or(u32::MAX);
        if !book.frames.give(first, count) {
            tracing::error!(first, count, "shared pages were free already");
        }
        Ok(())
    }

    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>> {
        self.seat.alloc_unbound(peer)
    }
}
