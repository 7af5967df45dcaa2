//! Other domains' granted pages: mapped and copied (/dev/xen/gntdev).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::ioctl::{self, CopyEnd, CopySegment, ForeignPlace, GrantCopy, UnmapGrantRef};
use super::open_device;
use crate::memory::Mapping;
use crate::{CopyDirection, CopyOp, DomId, Error, GrantAccess, GrantRef, GrantStatus, PAGE_SIZE, Result};

/// Copies handed to the kernel in one call. It splits them into hypercalls of 16.
const BATCH: usize = 64;
/// How often a page that is away (GNTST_eagain: paged out, ballooned) is tried again, and how long apart.
const RETRIES: u32 = 20;
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// The device.
#[derive(Debug)]
pub(super) struct GntDev {
    device: Arc<File>,
}

/// Forgets a recorded mapping; the kernel unmaps what is left of it once no I/O uses the pages any more.
#[derive(Debug)]
struct Recorded {
    device: Arc<File>,
    index: u64,
    count: u32,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let mut unmap = UnmapGrantRef { index: self.index, count: self.count, pad: 0 };
        // SAFETY: the struct is the one this ioctl takes, and it has no pointers.
        if let Err(error) = unsafe { ioctl::call(&self.device, ioctl::UNMAP_GRANT_REF, &mut unmap) } {
            tracing::error!(%error, index = self.index, count = self.count, "IOCTL_GNTDEV_UNMAP_GRANT_REF failed");
        }
    }
}

impl GntDev {
    pub(super) fn open() -> Result<Self> {
        Ok(Self { device: Arc::new(open_device("/dev/xen/gntdev", "modprobe xen-gntdev")?) })
    }

    /// Maps `refs` side by side, all or none.
    pub(super) fn map(&self, peer: DomId, refs: &[GrantRef], access: GrantAccess) -> Result<Mapping> {
        self.try_map(peer, refs, access).map_err(|error| match error.raw_os_error() {
            // The hypervisor's verdict on one of them; which one it was the kernel does not say.
            Some(libc::EINVAL | libc::EFAULT | libc::EAGAIN) => {
                let bad = refs.len() > 1;
                let first = refs.iter().find(|&&gref| bad && self.try_map(peer, &[gref], access).is_err());
                let gref = first.or(refs.first()).copied().unwrap_or(GrantRef(0));
                Error::Grant { operation: "map", domain: peer, gref, status: GrantStatus::GeneralError }
            }
            _ => {
                let context = format!("mapping {} grants of domain {peer} through /dev/xen/gntdev", refs.len());
                Error::io(context, error)
            }
        })
    }

    fn try_map(&self, peer: DomId, refs: &[GrantRef], access: GrantAccess) -> io::Result<Mapping> {
        let recorded = self.record(peer, refs)?;
        let index = recorded.index;
        let (len, writable) = (refs.len() * PAGE_SIZE, access == GrantAccess::ReadWrite);
        // The hypercall happens in mmap. The kernel answers EAGAIN where the granted page is away for a while.
        let mut recorded = Some(recorded);
        for attempt in 0.. {
            match Mapping::of_device(&self.device, index, len, writable, &mut recorded) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempt < RETRIES => {
                    std::thread::sleep(RETRY_PAUSE);
                }
                outcome => return outcome,
            }
        }
        unreachable!("the loop above only ends by returning")
    }

    /// Tells the device what is going to be mapped; the hypervisor hears of it only at mmap.
    fn record(&self, peer: DomId, refs: &[GrantRef]) -> io::Result<Recorded> {
        // struct ioctl_gntdev_map_grant_ref: count, padding, index (out), then {domid, ref} for each.
        let mut words: Vec<u32> = vec![refs.len() as u32, 0, 0, 0];
        words.extend(refs.iter().flat_map(|gref| [u32::from(peer.0), gref.0]));
        // SAFETY: `words` has the layout of the struct with `count` references behind it, and no pointers.
        unsafe { ioctl::call(&self.device, ioctl::MAP_GRANT_REF, words.as_mut_slice())? };
        let index = u64::from(words[2]) | u64::from(words[3]) << 32;
        Ok(Recorded { device: Arc::clone(&self.device), index, count: refs.len() as u32 })
    }

    /// Carries out copies between `peer`'s pages and `local`.
    pub(super) fn copy(&self, peer: DomId, local: &Mapping, ops: &mut [CopyOp]) -> Result<()> {
        for ops in ops.chunks_mut(BATCH) {
            self.copy_batch(peer, local, ops)?;
            for _ in 0..RETRIES {
                if ops.iter().all(|op| op.status != GrantStatus::Eagain) {
                    break;
                }
                std::thread::sleep(RETRY_PAUSE);
                for op in ops.iter_mut().filter(|op| op.status == GrantStatus::Eagain) {
                    self.copy_batch(peer, local, std::slice::from_mut(op))?;
                }
            }
        }
        Ok(())
    }

    fn copy_batch(&self, peer: DomId, local: &Mapping, ops: &mut [CopyOp]) -> Result<()> {
        let nowhere = CopyEnd { local: std::ptr::null_mut() };
        let mut segments = [CopySegment { source: nowhere, dest: nowhere, len: 0, flags: 0, status: 0 }; BATCH];
        for (segment, op) in segments.iter_mut().zip(ops.iter()) {
            if usize::from(op.offset) + usize::from(op.len) > PAGE_SIZE {
                return Err(Error::Invalid(format!("a grant copy of {} bytes at {}", op.len, op.offset)));
            }
            let to_guest = op.direction == CopyDirection::ToGuest;
            if !to_guest && !local.is_writable() {
                return Err(Error::Invalid("a grant copy into read-only memory".to_owned()));
            }
            let ours = CopyEnd { local: local.address(op.local, op.len.into()).as_ptr() };
            let theirs = CopyEnd { foreign: ForeignPlace { gref: op.gref.0, offset: op.offset, domid: peer.0 } };
            *segment = match to_guest {
                true => CopySegment { source: ours, dest: theirs, len: op.len, flags: ioctl::DEST_GREF, status: 0 },
                false => CopySegment { source: theirs, dest: ours, len: op.len, flags: ioctl::SOURCE_GREF, status: 0 },
            };
        }
        let mut batch = GrantCopy { count: ops.len() as u32, segments: segments.as_mut_ptr() };
        // SAFETY: `count` segments are initialised; their local addresses lie in `local`, checked for `len` bytes, and
        // the kernel is done with them when the call returns.
        unsafe { ioctl::call(&self.device, ioctl::GRANT_COPY, &mut batch) }
            .map_err(|error| Error::io(format!("IOCTL_GNTDEV_GRANT_COPY with domain {peer}"), error))?;
        for (op, segment) in ops.iter_mut().zip(&segments) {
            op.status = GrantStatus::from_raw(segment.status);
        }
        Ok(())
    }
}
