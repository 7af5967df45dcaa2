//! A range of mapped memory that somebody else may be writing to.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags};

use crate::PAGE_SIZE;

/// Memory mapped into this process that another domain, or the kernel, may change at any time.
///
/// Offsets count bytes from its start. An access outside it, or a write to a read-only mapping, is a bug of ours and
/// panics; offsets that come from a peer are checked before they get here.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    /// Whatever keeps `base..base+len` mapped; dropping it unmaps.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the memory belongs to the mapping, not to a thread; `_owner` is Send. Every access goes through volatile
// or atomic operations on raw pointers, so that two threads here are no worse than a thread and another domain.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method hands out a reference to the memory other than to atomics.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("len", &self.len).field("writable", &self.writable).finish_non_exhaustive()
    }
}

/// Unmaps what `mmap` mapped.
struct Unmap {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address range of the process, usable from any thread.
unsafe impl Send for Unmap {}
// SAFETY: it has no methods but drop.
unsafe impl Sync for Unmap {}

impl Drop for Unmap {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are one range that mmap returned to us and that nothing else unmaps; the Mapping
        // that owned it is gone, and so are the IoLists that kept that Mapping alive.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::error!(%error, len = self.len, "munmap failed");
        }
    }
}

fn protection(writable: bool) -> ProtFlags {
    if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

fn non_null(address: *mut core::ffi::c_void) -> io::Result<NonNull<u8>> {
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))
}

impl Mapping {
    /// Zeroed memory of this process alone, page aligned; pages cost nothing until they are touched.
    ///
    /// # Errors
    /// When the kernel has no room.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address the kernel chooses overlaps nothing.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                protection(true),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let base = non_null(address)?;
        Ok(Self { base, len, writable: true, _owner: Box::new(Unmap { base, len }) })
    }

    /// `len` bytes of `file` from `offset` (a multiple of the page size), shared with everyone who maps it.
    ///
    /// The file must not shrink while it is mapped (seal a memfd against it), or an access kills the process.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn of_file(file: impl AsFd, offset: u64, len: usize, writable: bool) -> io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, protection(writable), MapFlags::SHARED, file, offset)?
        };
        let base = non_null(address)?;
        Ok(Self { base, len, writable, _owner: Box::new(Unmap { base, len }) })
    }

    /// `len` bytes of a device that maps what `index` stands for (gntdev, gntalloc). On success `guard` is taken, to be
    /// dropped after the memory is unmapped.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn of_device<G: Any + Send + Sync>(
        device: impl AsFd,
        index: u64,
        len: usize,
        writable: bool,
        guard: &mut Option<G>,
    ) -> io::Result<Self> {
        let Self { base, len, writable, _owner: unmap } = Self::of_file(device, index, len, writable)?;
        // Fields are dropped in order: the memory is unmapped before the guard goes.
        Ok(Self { base, len, writable, _owner: Box::new((unmap, guard.take())) })
    }

    /// Pages of `file`, wherever they lie in it, side by side in this process: `offsets` are multiples of the page
    /// size. A request slot may then straddle two pages of a ring that lie apart in the guest.
    ///
    /// `guard` is dropped after the memory is unmapped.
    ///
    /// # Errors
    /// When the kernel refuses one of them; nothing stays mapped then.
    pub fn of_scattered(
        file: impl AsFd,
        offsets: &[u64],
        writable: bool,
        guard: impl Any + Send + Sync,
    ) -> io::Result<Self> {
        let len = offsets.len() * PAGE_SIZE;
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing; it reserves the range.
        let address =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let base = non_null(address)?;
        let unmap = Unmap { base, len };
        for (page, &offset) in offsets.iter().enumerate() {
            // SAFETY: `page * PAGE_SIZE` lies inside the `len` bytes reserved above.
            let at = unsafe { base.as_ptr().add(page * PAGE_SIZE) };
            // SAFETY: MAP_FIXED replaces one page of the range reserved above, which nobody else knows of yet.
            unsafe {
                rustix::mm::mmap(
                    at.cast(),
                    PAGE_SIZE,
                    protection(writable),
                    MapFlags::SHARED | MapFlags::FIXED,
                    &file,
                    offset,
                )?;
            }
        }
        Ok(Self { base, len, writable, _owner: Box::new((unmap, guard)) })
    }

    /// A part of `whole`, which stays mapped as long as the part lives. `guard` is dropped with the part: it takes
    /// back whatever allowed the access.
    ///
    /// # Panics
    /// When the part is not inside the whole or does not start on an 8-byte boundary, which atomics rely on.
    pub fn window(whole: &Arc<Self>, offset: usize, len: usize, guard: impl Any + Send + Sync) -> Self {
        whole.check(offset, len);
        assert!(offset.is_multiple_of(8), "a window at odd offset {offset}");
        // SAFETY: `offset` lies inside the mapping, as just checked.
        let base = unsafe { whole.base.add(offset) };
        Self { base, len, writable: whole.writable, _owner: Box::new((guard, Arc::clone(whole))) }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether we may write to it.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    #[inline]
    #[track_caller]
    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a mapping of {} bytes",
            self.len
        );
    }

    #[inline]
    #[track_caller]
    fn check_write(&self, offset: usize, len: usize) {
        self.check(offset, len);
        assert!(self.writable, "write to a read-only mapping");
    }

    /// The address of `len` bytes at `offset`, for the kernel.
    #[inline]
    #[track_caller]
    pub(crate) fn address(&self, offset: usize, len: usize) -> NonNull<u8> {
        self.check(offset, len);
        // SAFETY: `offset` lies inside the mapping, as just checked.
        unsafe { self.base.add(offset) }
    }

    /// The 32-bit number at `offset`, to be read and written as an atomic.
    ///
    /// # Panics
    /// When `offset` is outside the mapping or not a multiple of 4, or the mapping is read-only.
    #[inline]
    #[track_caller]
    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        self.check_write(offset, 4);
        assert!(offset.is_multiple_of(4), "misaligned atomic");
        // SAFETY: inside the mapping, writable, and aligned: every mapping starts on a page or, as `window` checks,
        // on an 8-byte boundary.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// The 16-bit number at `offset`, to be read and written as an atomic. Panics like
    /// [`atomic_u32`](Self::atomic_u32).
    #[inline]
    #[track_caller]
    pub fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        self.check_write(offset, 2);
        assert!(offset.is_multiple_of(2), "misaligned atomic");
        // SAFETY: as in atomic_u32.
        unsafe { AtomicU16::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// The 64-bit number at `offset`, to be read and written as an atomic. Panics like
    /// [`atomic_u32`](Self::atomic_u32).
    #[inline]
    #[track_caller]
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        self.check_write(offset, 8);
        assert!(offset.is_multiple_of(8), "misaligned atomic");
        // SAFETY: as in atomic_u32.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// Copies a small record out, each byte loaded once, by volatile loads: the compiler may neither split nor
    /// repeat them, so what is checked afterwards is what was read (XSA-155).
    #[inline]
    #[track_caller]
    pub fn read_once(&self, offset: usize, record: &mut [u8]) {
        self.check(offset, record.len());
        // SAFETY: inside the mapping, as just checked.
        let source = unsafe { self.base.as_ptr().add(offset) };
        let words = if source.cast::<u32>().is_aligned() { record.len() / 4 } else { 0 };
        for word in 0..words {
            // SAFETY: aligned, and `word * 4 + 4 <= record.len()` bytes were checked.
            let value = unsafe { source.cast::<u32>().add(word).read_volatile() };
            record[word * 4..word * 4 + 4].copy_from_slice(&value.to_ne_bytes());
        }
        for (at, byte) in record.iter_mut().enumerate().skip(words * 4) {
            // SAFETY: `at < record.len()` bytes were checked.
            *byte = unsafe { source.add(at).read_volatile() };
        }
    }

    /// Copies a small record in by volatile stores.
    #[inline]
    #[track_caller]
    pub fn write_record(&self, offset: usize, record: &[u8]) {
        self.check_write(offset, record.len());
        // SAFETY: inside the mapping, as just checked.
        let target = unsafe { self.base.as_ptr().add(offset) };
        let (words, tail) = if target.cast::<u32>().is_aligned() { record.as_chunks::<4>() } else { (&[][..], record) };
        for (at, word) in words.iter().enumerate() {
            // SAFETY: aligned, and inside the `record.len()` bytes that were checked.
            unsafe { target.cast::<u32>().add(at).write_volatile(u32::from_ne_bytes(*word)) };
        }
        for (at, byte) in tail.iter().enumerate() {
            // SAFETY: inside the `record.len()` bytes that were checked.
            unsafe { target.add(words.len() * 4 + at).write_volatile(*byte) };
        }
    }

    /// Copies data out: bytes nobody takes decisions on, at memcpy's speed.
    #[track_caller]
    pub fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.check(offset, data.len());
        // SAFETY: the source was checked; the target is a Rust slice of our own, which no mapping overlaps. The
        // peer may change the source meanwhile; then the data are a mixture, as from a disk that is written while
        // it is read, and nothing depends on them.
        unsafe { self.base.as_ptr().add(offset).copy_to_nonoverlapping(data.as_mut_ptr(), data.len()) }
    }

    /// Copies data in at memcpy's speed.
    #[track_caller]
    pub fn copy_in(&self, offset: usize, data: &[u8]) {
        self.check_write(offset, data.len());
        // SAFETY: the target was checked; the source is a Rust slice of our own, which no mapping overlaps.
        unsafe { self.base.as_ptr().add(offset).copy_from_nonoverlapping(data.as_ptr(), data.len()) }
    }

    /// Copies `len` bytes from one mapping to another; they may be the same memory.
    #[track_caller]
    pub fn copy(from: &Self, from_offset: usize, to: &Self, to_offset: usize, len: usize) {
        from.check(from_offset, len);
        to.check_write(to_offset, len);
        // SAFETY: both ranges were checked; `copy` allows them to overlap, as two mappings of one page do.
        unsafe { from.base.as_ptr().add(from_offset).copy_to(to.base.as_ptr().add(to_offset), len) }
    }

    /// Fills `len` bytes with zeros.
    #[track_caller]
    pub fn zero(&self, offset: usize, len: usize) {
        self.check_write(offset, len);
        // SAFETY: checked.
        unsafe { self.base.as_ptr().add(offset).write_bytes(0, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_any_alignment() {
        let mapping = Mapping::anonymous(PAGE_SIZE).unwrap();
        for offset in 0..9 {
            for len in [0, 1, 3, 4, 7, 8, 108, 112] {
                let record: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
                mapping.write_record(offset, &record);
                let mut back = vec![0; len];
                mapping.read_once(offset, &mut back);
                assert_eq!(back, record, "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn scattered_pages_lie_side_by_side() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_SIZE as u64).unwrap();
        let whole = Mapping::of_file(&file, 0, 4 * PAGE_SIZE, true).unwrap();
        let part = Mapping::of_scattered(&file, &[3 * PAGE_SIZE as u64, PAGE_SIZE as u64], true, ()).unwrap();
        part.copy_in(PAGE_SIZE - 2, b"abcd");
        let mut ends = [0; 4];
        whole.copy_out(4 * PAGE_SIZE - 2, &mut ends[..2]);
        whole.copy_out(PAGE_SIZE, &mut ends[2..]);
        assert_eq!(&ends, b"abcd");
    }

    #[test]
    fn the_guard_of_a_window_is_dropped_with_it() {
        let whole = Arc::new(Mapping::anonymous(2 * PAGE_SIZE).unwrap());
        let guard = Arc::new(());
        let window = Mapping::window(&whole, PAGE_SIZE, PAGE_SIZE, Arc::clone(&guard));
        window.copy_in(0, b"x");
        assert_eq!(Arc::strong_count(&guard), 2);
        drop(window);
        assert_eq!(Arc::strong_count(&guard), 1);
    }

    #[test]
    #[should_panic(expected = "2 bytes at 4095")]
    fn an_access_past_the_end_panics() {
        Mapping::anonymous(PAGE_SIZE).unwrap().zero(PAGE_SIZE - 1, 2);
    }
}
