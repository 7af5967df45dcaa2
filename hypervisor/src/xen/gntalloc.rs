//! Pages of our own, granted to another domain (/dev/xen/gntalloc).

use std::fs::File;
use std::sync::Arc;

use super::ioctl::{self, DeallocGref};
use super::open_device;
use crate::memory::Mapping;
use crate::{DomId, Error, GrantAccess, GrantRef, PAGE_SIZE, Result, Shared};

/// GNTALLOC_FLAG_WRITABLE.
const WRITABLE: u32 = 1;

/// The device.
#[derive(Debug)]
pub(super) struct GntAlloc {
    device: Arc<File>,
}

/// Takes grants back when dropped.
#[derive(Debug)]
struct Granted {
    device: Arc<File>,
    index: u64,
    count: u32,
}

impl Drop for Granted {
    fn drop(&mut self) {
        let mut dealloc = DeallocGref { index: self.index, count: self.count };
        // SAFETY: the struct is the one this ioctl takes, and it has no pointers.
        if let Err(error) = unsafe { ioctl::call(&self.device, ioctl::DEALLOC_GREF, &mut dealloc) } {
            tracing::error!(%error, "IOCTL_GNTALLOC_DEALLOC_GREF failed");
        }
    }
}

impl GntAlloc {
    pub(super) fn open() -> Result<Self> {
        Ok(Self { device: Arc::new(open_device("/dev/xen/gntalloc", "modprobe xen-gntalloc")?) })
    }

    pub(super) fn share(&self, peer: DomId, pages: usize, access: GrantAccess) -> Result<Shared> {
        // struct ioctl_gntalloc_alloc_gref: domid and flags (16 bits each), count, index (out), then the references
        // (out), padded to whole 64-bit words.
        let flags = if access == GrantAccess::ReadWrite { WRITABLE } else { 0 };
        let mut words = vec![u32::from(peer.0) | flags << 16, pages as u32, 0, 0];
        words.resize((4 + pages).next_multiple_of(2).max(6), 0);
        // SAFETY: `words` has the layout of the struct with room for `count` references, and no pointers.
        unsafe { ioctl::call(&self.device, ioctl::ALLOC_GREF, words.as_mut_slice()) }.map_err(|error| {
            let context = format!("granting {pages} pages to domain {peer} (module parameter limit of xen-gntalloc?)");
            Error::io(context, error)
        })?;
        let index = u64::from(words[2]) | u64::from(words[3]) << 32;
        let refs = words[4..4 + pages].iter().map(|&gref| GrantRef(gref)).collect();
        let granted = Granted { device: Arc::clone(&self.device), index, count: pages as u32 };
        let memory = Mapping::of_device(&self.device, index, pages * PAGE_SIZE, true, &mut Some(granted))
            .map_err(|error| Error::io("mapping pages of /dev/xen/gntalloc", error))?;
        Ok(Shared { memory, refs })
    }
}
