//! A process that keeps this one's memory after it was killed, until no I/O of an io_uring uses it any more.
//!
//! A guest's page that is under I/O must not lose its mapping. A PV dom0's kernel does not see to that when a process
//! dies: gntdev_mmu_ops unmaps a grant only once nobody else holds its page (drivers/xen/gntdev.c, and
//! gnttab_unmap_refs_async in drivers/xen/grant-table.c, since Linux 5.19); until then the page table still has it, and
//! zap_pte_range (mm/memory.c, by way of find_special_page) clears the entry behind Xen's back and gives back a reference
//! that nobody took. The page is freed when its I/O ends, the hypervisor refuses the late unmapping, and from then on
//! the grants of other disks cannot be mapped: until dom0 boots again. do_exit cancels polls of an io_uring, and does not
//! wait for its reads and writes.
//!
//! So the memory has a second user: a process of its own, made by clone(2) with CLONE_VM. What it waits for is the end of
//! a pipe whose other end is a registered file of every [`Uring`](super::Uring). The kernel lets go of a ring's files
//! after its last request (io_ring_ctx_free), and of a ring when nobody has its descriptor *or its memory* any more. The
//! memory is shared, so the keeper first waits for this process's end, and unmaps the rings.
//!
//! It is cloned by a thread that does nothing else, and whose thread-local storage (errno, the stack's canary) it can
//! therefore use: simpler than a child without any.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, WaitOptions};

/// What ps(1) calls it. Not after its program: `pkill -KILL blkback` would kill both.
const NAME: &std::ffi::CStr = c"grant-keeper";
const STACK: usize = 256 << 10;
/// The largest page there is.
const GUARD: usize = 64 << 10;

/// The pipe's end that rings have. It is never closed.
static IN_FLIGHT: OnceLock<OwnedFd> = OnceLock::new();

/// What every ring is to register.
pub(super) fn in_flight() -> Option<BorrowedFd<'static>> {
    IN_FLIGHT.get().map(AsFd::as_fd)
}

/// Makes the keeper of this process, if it has none. Only the rings that are made afterwards are waited for.
///
/// It ends with this process, or later, with its rings' last request. Should it be killed first, an error is logged.
///
/// # Errors
/// When there can be no further process, thread or descriptor.
pub fn start() -> io::Result<()> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if IN_FLIGHT.get().is_some() {
        return Ok(());
    }
    // It will need that, and cannot say so then.
    std::fs::File::open("/proc/self/maps")?;
    let process = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let (ended, in_flight) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (sender, outcome) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new().name("keeper".into()).spawn(move || {
        let kept = Kept { process: process.as_raw_fd(), in_flight: ended.as_raw_fd() };
        let keeper = keep(&kept);
        // Whoever waits for it lives: see below.
        let _ = sender.send(keeper.as_ref().map(drop).map_err(|error| io::Error::from(*error)));
        drop((process, ended));
        let Ok(keeper) = keeper else { return };
        // It has no signal for its end, so it is no child by wait(2)'s default.
        let all = WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());
        while matches!(rustix::process::waitpid(Some(keeper), all), Err(Errno::INTR)) {}
        tracing::error!(
            process = keeper.as_raw_nonzero(),
            "the grant keeper was killed: if this process is killed too while a guest's I/O is in flight, dom0's kernel \
             may be unable to map grants afterwards; restart the server when its guests allow it"
        );
    })?;
    outcome.recv().map_err(io::Error::other)??;
    // Nobody else sets it.
    let _ = IN_FLIGHT.set(in_flight);
    Ok(())
}

/// The keeper's two descriptors.
struct Kept {
    /// The process whose memory it keeps.
    process: RawFd,
    /// Ends after the last ring.
    in_flight: RawFd,
}

/// Clones the keeper. It has every signal blocked, as the calling thread has from now on.
fn keep(kept: &Kept) -> Result<Pid, Errno> {
    let stack = stack()?;
    // SAFETY: the set is filled before it is read, and only the calling thread's mask changes.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigfillset(&raw mut signals);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut());
    }
    let kept: *const Kept = kept;
    // SAFETY: `stack` is the upper end of a mapping that nobody else uses and nobody unmaps. `keeper` reads `kept` from
    // the calling thread's stack, which stays as it is while it runs: this thread then waits for the keeper's end, and a
    // process that has ended leaves its memory to the keeper. It allocates nothing, takes no lock and cannot panic, so
    // it does not matter what other threads were doing. With neither CLONE_FILES nor CLONE_SIGHAND nor CLONE_THREAD it
    // is another process in all but memory.
    let pid = unsafe { libc::clone(keeper, stack, libc::CLONE_VM, kept.cast_mut().cast()) };
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(|| {
        let error = Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::AGAIN);
        // SAFETY: nothing runs on it.
        let _ = unsafe { rustix::mm::munmap(stack.wrapping_byte_sub(STACK), STACK) };
        error
    })
}

/// A stack, by its upper end.
fn stack() -> Result<*mut c_void, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::STACK;
    // SAFETY: the mapping is a new one.
    let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), STACK, ProtFlags::empty(), flags)? };
    let usable = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: the range is in the mapping, which nobody uses yet. Below it stays a part that nobody can touch.
    unsafe { rustix::mm::mprotect(base.wrapping_byte_add(GUARD), STACK - GUARD, usable)? };
    Ok(base.wrapping_byte_add(STACK))
}

/// The keeper's whole life. System calls alone, on its own stack.
extern "C" fn keeper(kept: *mut c_void) -> libc::c_int {
    // SAFETY: keep passes a Kept that lives as long as this runs.
    let Kept { process, in_flight } = *unsafe { &*kept.cast::<Kept>() };
    let _ = rustix::thread::set_name(NAME);
    // Its table of files and its folder are copies, which would hold devices, locks and mounts.
    close_all_but([process.min(in_flight), process.max(in_flight)]);
    let _ = rustix::process::chdir(c"/");
    // SAFETY: both are open in this process's own table, where nobody closes them.
    let (process, in_flight) = unsafe { (BorrowedFd::borrow_raw(process), BorrowedFd::borrow_raw(in_flight)) };
    if wait_for_end(process).is_ok() && unmap_rings().is_ok() {
        let mut nothing = [0_u8; 64];
        while matches!(rustix::io::read(in_flight, &mut nothing), Ok(1..) | Err(Errno::INTR)) {}
    }
    0
}

/// Closes what is open in the keeper's own table.
fn close_all_but([low, high]: [RawFd; 2]) {
    for (first, last) in
        [(0, low.wrapping_sub(1)), (low.wrapping_add(1), high.wrapping_sub(1)), (high.wrapping_add(1), RawFd::MAX)]
    {
        if first <= last {
            // SAFETY: the keeper uses none of these descriptors, and other processes have tables of their own.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Waits until no thread of the process is left.
fn wait_for_end(process: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut watched = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    loop {
        match poll(&mut watched, None) {
            Ok(_) if watched.iter().all(|end| end.revents().contains(PollFlags::IN)) => return Ok(()),
            Ok(_) => return Err(Errno::BADF),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Unmaps every io_uring of this memory. For when nobody uses them any more.
fn unmap_rings() -> Result<(), Errno> {
    let maps = rustix::fs::open(c"/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut line = Line { bytes: [0; LONGEST], len: 0 };
    let mut bytes = [0_u8; 4096];
    loop {
        let read = match rustix::io::read(&maps, &mut bytes) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        for &byte in bytes.iter().take(read) {
            if let Some((start, end)) = line.push(byte) {
                let start = std::ptr::with_exposed_provenance_mut(start);
                // SAFETY: the range is a ring's, and the process that used it has ended.
                unsafe { rustix::mm::munmap(start, end.wrapping_sub(start.addr()))? };
            }
        }
    }
}

/// More than a line about a ring has.
const LONGEST: usize = 128;

/// A line of /proc/PID/maps, byte by byte.
struct Line {
    bytes: [u8; LONGEST],
    /// How many there were; more than fit if it is longer.
    len: usize,
}

impl Line {
    /// The next byte. If it ends a line about an io_uring: from where to where that is mapped.
    fn push(&mut self, byte: u8) -> Option<(usize, usize)> {
        if byte != b'\n' {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
            }
            self.len = self.len.saturating_add(1);
            return None;
        }
        let line = self.bytes.get(..self.len);
        self.len = 0;
        // START-END rw-s OFFSET DEVICE INODE NAME
        let range = line?.strip_suffix(b" anon_inode:[io_uring]")?.split(|&byte| byte == b' ').next()?;
        let mut ends = range.split(|&byte| byte == b'-').map(hexadecimal);
        Some((ends.next()??, ends.next()??))
    }
}

fn hexadecimal(digits: &[u8]) -> Option<usize> {
    digits.iter().try_fold(0_usize, |number, &digit| {
        let digit = char::from(digit).to_digit(16)?;
        number.checked_mul(16)?.checked_add(digit as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, usize)> {
        let mut line = Line { bytes: [0; LONGEST], len: 0 };
        text.bytes().filter_map(|byte| line.push(byte)).collect()
    }

    #[test]
    fn the_mappings_of_rings_are_found() {
        let long = "x".repeat(5000);
        let text = format!(
            "7f0a3c000000-7f0a3c021000 rw-p 00000000 00:00 0 \n\
             7f0a40000000-7f0a40002000 rw-s 10000000 00:0f 2061                       anon_inode:[io_uring]\n\
             7f0a40002000-7f0a40003000 rw-s 00000000 00:06 12                         /dev/xen/gntdev\n\
             7f0a40003000-7f0a40004000 r--p 00000000 fe:00 7                          /{long} anon_inode:[io_uring]\n\
             7f0a40004000-7f0a40005000 r--p 00000000 fe:00 7                          /anon_inode:[io_uring]\n\
             ffff40005000-ffff40006000 rw-s 00000000 00:0f 2062                       anon_inode:[io_uring]\n\
             7f0a40007000-7f0a40008000 rw-s 00000000 00:0f 2063    anon_inode:[io_uring]"
        );
        let rings = [(0x7f0a_4000_0000, 0x7f0a_4000_2000), (0xffff_4000_5000, 0xffff_4000_6000)];
        assert_eq!(found(&text), rings, "the last line has no end");
    }

    #[test]
    fn what_is_no_range_is_nothing() {
        assert_eq!(found(" anon_inode:[io_uring]\nx-y anon_inode:[io_uring]\n12 anon_inode:[io_uring]\n\n"), []);
    }
}
