//! Discarding a block device's content, and erasing it for good: ioctl(2), BLKDISCARD and BLKSECDISCARD
//! (include/uapi/linux/fs.h). io_uring has no operation for the second, and for the first only since Linux 6.12.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// _IO(0x12, 119).
const BLKDISCARD: u32 = 0x1277;
/// _IO(0x12, 125).
const BLKSECDISCARD: u32 = 0x127d;

/// Gives up these bytes of a block device that is open for writing, and returns when the device is done: that can take
/// seconds. What they read as afterwards is open.
///
/// # Errors
/// As [`secure_erase`].
pub fn discard(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    on_range(device, BLKDISCARD, offset, len)
}

/// Erases these bytes of a block device that is open for writing, and returns when the device is done: that can take
/// seconds. What they read as afterwards is open.
///
/// # Errors
/// The kernel's and the device's: EOPNOTSUPP where it cannot, EINVAL for what is no whole number of its sectors, ENOTTY
/// for what is no block device.
pub fn secure_erase(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    on_range(device, BLKSECDISCARD, offset, len)
}

/// `request` is BLKDISCARD or BLKSECDISCARD.
fn on_range(device: BorrowedFd<'_>, request: u32, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two u64 from the address they are given, and write nothing there; `range` is two u64 and
    // lives until the call returns. On another kind of file they are unknown and nothing is read.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), request.into(), range.as_ptr()) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a block device that is open for writing can erase. Nothing is erased: the range is one that no device takes.
/// The kernel looks first whether the device can at all, and then at the range (blk_ioctl_secure_erase, since Linux 5.19;
/// before that it looked at the range first, and this says yes of every device).
pub fn can_erase(device: BorrowedFd<'_>) -> bool {
    secure_erase(device, 1, 0).is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_cannot_be_erased_or_discarded() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(secure_erase(file.as_fd(), 0, 512).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(discard(file.as_fd(), 0, 512).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert!(!can_erase(file.as_fd()));
    }
}
