//! How large an image is, and how large it has become.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Image;
use super::problem::{Problem, io_problem};
use crate::abi::SECTOR;

/// How large a file or device was found to be, in whole sectors of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Size {
    /// As large as the guest's disk.
    #[default]
    Same,
    /// So much larger.
    Grown(u64),
    /// So much smaller.
    Shrunk(u64),
    /// Nobody knows: an errno.
    Unknown(i32),
}

impl Image {
    /// Whole sectors of 512 bytes: as many as when it was opened, or more.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Whether [`measure`](Self::measure) would find something else than it did last.
    pub fn has_changed(&self) -> bool {
        self.look() != *self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) -> Size {
        if self.remote.is_some() {
            return Size::Same;
        }
        let mut tries = 0;
        let bytes = loop {
            match (&self.file).seek(SeekFrom::End(0)) {
                Ok(bytes) => break bytes,
                Err(error) if tries < 3 && matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                    tries += 1;
                }
                Err(error) => return Size::Unknown(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        };
        let unit = u64::from(self.unit.max(self.sector_size));
        let sectors = bytes / unit * unit / SECTOR;
        match sectors.cmp(&self.sectors()) {
            Less => Size::Shrunk(sectors),
            Equal => Size::Same,
            Greater => Size::Grown(sectors),
        }
    }

    /// Looks how large the file or device is now. What has grown is taken over; one that has shrunk keeps its size
    /// towards the guest, and gives errors past its end: a guest cannot be told to need less.
    pub fn measure(&self) -> Size {
        let size = self.look();
        if let Size::Grown(sectors) = size {
            self.sectors.fetch_max(sectors, Ordering::AcqRel);
        }
        let settled = if matches!(size, Size::Grown(_)) { Size::Same } else { size };
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = settled;
        size
    }
}

/// Bytes of a block device's physical sectors (queue/physical_block_size, Documentation/ABI/stable/sysfs-block of Linux); 0
/// for what is none, such as the number btrfs or tmpfs have instead.
pub(super) fn physical_sectors((major, minor): (u32, u32)) -> u32 {
    let device = format!("/sys/dev/block/{major}:{minor}");
    // A partition has its disk's.
    let read = |folder: &str| std::fs::read_to_string(format!("{device}/{folder}/physical_block_size")).ok();
    read("queue").or_else(|| read("../queue")).and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Bytes of a file or device that holds a sector at least.
pub(super) fn size(file: &mut File) -> Result<u64, Problem> {
    let bytes = file.seek(SeekFrom::End(0)).map_err(io_problem("finding its size"))?;
    let device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    match bytes {
        _ if bytes >= SECTOR => Ok(bytes),
        _ if device => Err(Problem::NothingBehind(bytes)),
        _ => Err(Problem::Empty(bytes)),
    }
}
