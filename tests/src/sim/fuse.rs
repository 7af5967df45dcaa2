//! A file whose storage fails on command: a file system of one file, in this process, that the kernel reaches through
//! /dev/fuse. Under it blkback's own io_uring storage meets errors, short transfers and interruptions as they come out
//! of a real kernel.
//!
//! The protocol is Linux's (include/uapi/linux/fuse.h, version 7.31), as little of it as one open file needs. I/O is
//! direct (FOPEN_DIRECT_IO): each of our requests is one of its requests.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use blkback::erase::Erase;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::bench::What;

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    /// In which call.
    pub what: What,
    /// How many of the kind come before it.
    pub after: u32,
    /// With this error, or none for a transfer that is short.
    pub errno: Option<i32>,
    /// How often, at least once.
    pub times: u32,
}

/// The file.
#[derive(Debug, Default)]
pub struct Medium {
    /// What readers see.
    pub seen: Vec<u8>,
    /// What was there when fdatasync last succeeded.
    pub flushed: Vec<u8>,
    /// What goes wrong next.
    pub failure: Option<Failure>,
    /// The size that is told instead of the true one, in bytes.
    pub claimed: Option<u64>,
    /// fdatasync calls that succeeded after one had failed.
    pub flushes_after_failure: u32,
    flush_failed: bool,
    /// What it tells the kernel of itself.
    init_flags: u32,
}

impl Medium {
    /// Whether this call fails: with an error, or by being short.
    fn strike(&mut self, what: What) -> Option<Option<i32>> {
        let failure = self.failure.as_mut().filter(|failure| failure.what == what)?;
        if failure.after > 0 {
            failure.after -= 1;
            return None;
        }
        let errno = failure.errno;
        failure.times -= 1;
        if failure.times == 0 {
            self.failure = None;
        }
        Some(errno)
    }

    fn size(&self) -> u64 {
        self.claimed.unwrap_or(self.seen.len() as u64)
    }
}

/// What the file system's thread and others look at.
#[derive(Debug)]
pub struct Shared {
    medium: Mutex<Medium>,
    device: File,
    /// Writes that came and were not answered, if they are not to be.
    withheld: Mutex<Option<Vec<Vec<u8>>>>,
}

impl Shared {
    /// The file's content. For as long as the guard is held, the file system answers nothing.
    pub fn hang(&self) -> MutexGuard<'_, Medium> {
        lock(&self.medium)
    }

    /// From now on writes alone get no answer.
    pub fn withhold_writes(&self) {
        lock(&self.withheld).get_or_insert_default();
    }

    /// How many writes wait for an answer.
    pub fn withheld(&self) -> usize {
        lock(&self.withheld).as_ref().map_or(0, Vec::len)
    }

    /// They get it, and all that come.
    ///
    /// # Errors
    /// When the file is not mounted any more.
    pub fn answer_writes(&self) -> io::Result<()> {
        let withheld = lock(&self.withheld).take();
        withheld.into_iter().flatten().try_for_each(|request| self.reply(&request))
    }

    /// Does what is asked for, and says so.
    fn reply(&self, request: &[u8]) -> io::Result<()> {
        let (operation, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
        let (error, body) = match answer(operation, node, &request[HEADER..], &mut self.hang()) {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = ((16 + body.len()) as u32).to_le_bytes().to_vec();
        reply.extend(error.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.extend(body);
        match (&self.device).write_all(&reply) {
            // Whoever asked has gone away.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            outcome => outcome,
        }
    }
}

impl Erase for Shared {
    fn erase(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut medium = lock(&self.medium);
        if let Some(errno) = medium.strike(What::Erase) {
            return Err(io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO)));
        }
        // As devices do that leave ones.
        let range = offset as usize..(offset + len) as usize;
        medium.seen[range.clone()].fill(0xff);
        medium.flushed[range].fill(0xff);
        Ok(())
    }
}

/// A mounted file system with one open file.
#[derive(Debug)]
pub struct Mounted {
    /// The file, open.
    pub file: File,
    /// The file's content, which can also be erased: past the kernel, as no file system offers that.
    pub medium: Arc<Shared>,
    folder: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
}

impl Mounted {
    /// Mounts a file of `len` bytes, in a mount namespace of the calling thread's own.
    ///
    /// # Errors
    /// When this process may not mount, or there is no /dev/fuse.
    pub fn new(len: usize) -> io::Result<Self> {
        Self::mount(len, 0)
    }

    /// As [`new`](Self::new), but no thread of the process that asks waits for the answer, as with block devices. The
    /// kernel makes an error of a short write then.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn asynchronous(len: usize) -> io::Result<Self> {
        Self::mount(len, ASYNC_DIO)
    }

    fn mount(len: usize, init_flags: u32) -> io::Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private)?;
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let folder = tempfile::tempdir()?;
        let options = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd()))?;
        rustix::mount::mount("simdisk", folder.path(), "fuse.simdisk", MountFlags::empty(), options.as_c_str())?;
        let medium = Medium { seen: vec![0; len], flushed: vec![0; len], init_flags, ..Medium::default() };
        let medium = Arc::new(Shared { medium: Mutex::new(medium), device, withheld: Mutex::default() });
        let server = {
            let medium = Arc::clone(&medium);
            std::thread::spawn(move || serve(&medium))
        };
        let file = open(&folder.path().join("disk"))?;
        Ok(Self { file, medium, folder, server: Some(server) })
    }

    /// The file's content and what is to go wrong.
    pub fn medium(&self) -> MutexGuard<'_, Medium> {
        lock(&self.medium.medium)
    }

    /// Where the file is, for threads that came after [`new`](Self::new) of the one that called it.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever waits for an answer has the file open.
        let _ = self.medium.answer_writes();
        // Ends the server: the device then says ENODEV. A second unmount is done by the namespace's end.
        let _ = rustix::mount::unmount(self.folder.path(), UnmountFlags::DETACH);
        if let Ok(null) = File::open("/dev/null") {
            self.file = null;
        }
        if let Some(server) = self.server.take()
            && server.join().is_err()
        {
            eprintln!("the file system's thread had panicked");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const FALLOCATE: u32 = 43;
}

/// The one file's inode number; the folder's is 1.
const FILE: u64 = 2;
/// FUSE_ASYNC_DIO.
const ASYNC_DIO: u32 = 1 << 15;
/// Bytes of fuse_in_header.
const HEADER: usize = 40;
/// Bytes of fuse_write_in.
const WRITE_HEADER: usize = 40;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn serve(shared: &Shared) {
    // Larger than max_write and the header, or the kernel refuses to read.
    let mut request = vec![0; 256 << 10];
    loop {
        let len = match (&shared.device).read(&mut request) {
            Ok(len) => len,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
            // Unmounted.
            Err(_) => return,
        };
        let request = &request[..len];
        match u32_at(request, 4) {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => continue,
            opcode::WRITE => {
                if let Some(withheld) = &mut *lock(&shared.withheld) {
                    withheld.push(request.to_vec());
                    continue;
                }
            }
            _ => {}
        }
        if shared.reply(request).is_err() {
            return;
        }
    }
}

/// The answer's body, or an errno.
fn answer(operation: u32, node: u64, body: &[u8], medium: &mut Medium) -> Result<Vec<u8>, i32> {
    match operation {
        opcode::INIT => {
            let words = [7, 31, 0, medium.init_flags, 0, 128 << 10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
        }
        opcode::LOOKUP if body.starts_with(b"disk\0") => {
            // Attributes are good for no time at all: each look at the size comes here.
            let head = [FILE, 1, 3600, 0, 0];
            Ok(head.into_iter().flat_map(u64::to_le_bytes).chain(attributes(FILE, medium.size())).collect())
        }
        opcode::LOOKUP => Err(libc::ENOENT),
        opcode::GETATTR => {
            if node == FILE
                && let Some(errno) = medium.strike(What::Size)
            {
                return Err(errno.unwrap_or(libc::EIO));
            }
            let head = [0, 0];
            Ok(head.into_iter().flat_map(u64::to_le_bytes).chain(attributes(node, medium.size())).collect())
        }
        // fh 0, FOPEN_DIRECT_IO.
        opcode::OPEN => Ok([0, 1].into_iter().flat_map(u64::to_le_bytes).collect()),
        opcode::RELEASE | opcode::FLUSH => Ok(Vec::new()),
        opcode::READ => {
            let (offset, len) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let len = moved(medium.strike(What::Read), len)?.min(medium.seen.len().saturating_sub(offset));
            Ok(medium.seen.iter().skip(offset).take(len).copied().collect())
        }
        opcode::WRITE => {
            let (offset, len) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let len = moved(medium.strike(What::Write), len)?;
            if offset + len > medium.seen.len() {
                return Err(libc::EFBIG);
            }
            medium.seen[offset..offset + len].copy_from_slice(&body[WRITE_HEADER..WRITE_HEADER + len]);
            Ok(u64::to_le_bytes(len as u64).to_vec())
        }
        opcode::FSYNC => match medium.strike(What::Flush) {
            Some(errno) => {
                let errno = errno.unwrap_or(libc::EIO);
                medium.flush_failed |= !matches!(errno, libc::EINTR | libc::EAGAIN);
                Err(errno)
            }
            None => {
                medium.flushes_after_failure += u32::from(medium.flush_failed);
                medium.flushed.clone_from(&medium.seen);
                Ok(Vec::new())
            }
        },
        opcode::FALLOCATE => match medium.strike(What::Discard) {
            Some(errno) => Err(errno.unwrap_or(libc::EIO)),
            None => {
                let (offset, len) = (u64_at(body, 8) as usize, u64_at(body, 16) as usize);
                medium.seen.iter_mut().skip(offset).take(len).for_each(|byte| *byte = 0);
                Ok(Vec::new())
            }
        },
        _ => Err(libc::ENOSYS),
    }
}

/// Of a transfer of `len` bytes, how many are moved.
fn moved(struck: Option<Option<i32>>, len: usize) -> Result<usize, i32> {
    match struck {
        None => Ok(len),
        Some(None) => Ok((len / 2).next_multiple_of(512).min(len)),
        Some(Some(errno)) => Err(errno),
    }
}

/// struct fuse_attr.
fn attributes(node: u64, len: u64) -> impl Iterator<Item = u8> {
    let (mode, len) = if node == FILE { (libc::S_IFREG | 0o600, len) } else { (libc::S_IFDIR | 0o700, 0) };
    let longs = [node, len, len / 512, 0, 0, 0];
    let words = [0, 0, 0, mode, 1, 0, 0, 0, 512, 0];
    longs.into_iter().flat_map(u64::to_le_bytes).chain(words.into_iter().flat_map(u32::to_le_bytes))
}
