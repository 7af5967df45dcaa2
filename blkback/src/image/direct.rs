//! Whether the page cache can be left out, and in which units.

use rustix::fs::{OFlags, StatxFlags};

use super::Image;
use super::claim::status_flags;
use super::problem::{ImageError, Problem};
use crate::abi::SECTOR;
use crate::spec::Access;

/// The sectors of a "4Kn" disk, in bytes.
const LARGE: u32 = 4096;

impl Image {
    /// Leaves the page cache out if the storage lets us, in units of the disk's sectors or in larger ones.
    pub(super) fn choose_unit(&mut self, access: Access) -> Result<(), Problem> {
        self.unit = self.sector_size;
        self.direct = self.try_direct(self.sector_size);
        if self.direct {
            return Ok(());
        }
        // Storage with sectors of 4096 bytes under a file.
        let whole = (self.sectors() * SECTOR).is_multiple_of(u64::from(LARGE));
        if self.sector_size < LARGE && whole && self.try_direct(LARGE) {
            self.direct = true;
            self.unit = LARGE;
            self.physical_sector_size = self.physical_sector_size.max(LARGE);
            // Two backends that read, change and write the same unit would undo each other's writes.
            if access == Access::SharedWrite {
                self.sector_size = LARGE;
                self.notes.push("its storage has sectors of 4096 bytes, and so has this shared disk".to_owned());
            }
            return Ok(());
        }
        if access == Access::SharedWrite {
            return Err(Problem::InUse(
                "cannot be shared (w!): its storage cannot do direct I/O, and what one guest writes would stay in this \
                 machine's page cache, unseen by others"
                    .to_owned(),
            ));
        }
        self.notes.push("its storage cannot do direct I/O: served through the page cache".to_owned());
        Ok(())
    }

    /// Has sectors of 512 bytes, whatever the storage's are: what is smaller than those goes through memory of ours.
    ///
    /// # Errors
    /// When others write to the disk too: backends cannot keep out of each other's sectors.
    pub fn have_small_sectors(&mut self, access: Access) -> Result<(), ImageError> {
        if self.sector_size == SECTOR as u32 {
            return Ok(());
        }
        if access == Access::SharedWrite {
            let text = format!(
                "cannot be shared (w!) with sectors of 512 bytes: its storage has sectors of {} bytes; leave sector-size out",
                self.sector_size
            );
            return Err(ImageError { path: self.path.clone(), problem: Problem::InUse(text) });
        }
        self.physical_sector_size = self.physical_sector_size.max(self.sector_size);
        // The page cache takes any bytes.
        self.unit = if self.direct { self.sector_size } else { SECTOR as u32 };
        self.sector_size = SECTOR as u32;
        Ok(())
    }

    /// Switches the page cache off if the smallest request, `unit` bytes anywhere, then still works.
    fn try_direct(&self, unit: u32) -> bool {
        // Asked before it is tried: on a hole of a sparse file ext4 lets a read pass that it refuses later, on data.
        let fits = self
            .direct_io_units()
            .is_none_or(|(offset, memory)| (1..=unit).contains(&offset) && (1..=SECTOR as u32).contains(&memory));
        let plain = status_flags(&self.file);
        if !fits || rustix::fs::fcntl_setfl(&self.file, plain | OFlags::DIRECT).is_err() {
            return false;
        }
        let unit = unit as usize;
        let mut buffer = vec![0; 4096 + 512 + unit];
        // As odd as a guest's smallest request gets: not the start of a page, where sectors are smaller than that.
        let start = buffer.as_ptr().align_offset(4096) + if unit == 512 { 512 } else { 0 };
        let last = (self.sectors() * SECTOR / unit as u64).saturating_sub(1) * unit as u64;
        let works = rustix::io::pread(&self.file, &mut buffer[start..start + unit], last).is_ok();
        if !works && rustix::fs::fcntl_setfl(&self.file, plain).is_err() {
            tracing::warn!(path = %self.path.display(), "cannot switch O_DIRECT off again");
        }
        works
    }

    /// What direct I/O wants offsets and memory to be multiples of, in bytes, 0 where there is none; `None` where the
    /// kernel or file system does not say (statx(2), STATX_DIOALIGN, since Linux 6.1).
    fn direct_io_units(&self) -> Option<(u32, u32)> {
        let flags = StatxFlags::DIOALIGN;
        let answer = rustix::fs::statx(&self.file, "", rustix::fs::AtFlags::EMPTY_PATH, flags).ok()?;
        let known = answer.stx_mask & flags.bits() != 0;
        known.then_some((answer.stx_dio_offset_align, answer.stx_dio_mem_align))
    }
}
