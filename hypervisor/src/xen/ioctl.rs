//! The ioctls of Xen's devices, as Linux declares them (include/uapi/xen/{gntdev,gntalloc,evtchn}.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOC(_IOC_NONE, type, number, size)`.
const fn request(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    ((size as libc::c_ulong) << 16) | ((kind as libc::c_ulong) << 8) | number as libc::c_ulong
}

pub(super) const MAP_GRANT_REF: libc::c_ulong = request(b'G', 0, 24);
pub(super) const UNMAP_GRANT_REF: libc::c_ulong = request(b'G', 1, size_of::<UnmapGrantRef>());
pub(super) const GRANT_COPY: libc::c_ulong = request(b'G', 8, size_of::<GrantCopy>());
pub(super) const ALLOC_GREF: libc::c_ulong = request(b'G', 5, 24);
pub(super) const DEALLOC_GREF: libc::c_ulong = request(b'G', 6, size_of::<DeallocGref>());
pub(super) const BIND_INTERDOMAIN: libc::c_ulong = request(b'E', 1, 8);
pub(super) const BIND_UNBOUND_PORT: libc::c_ulong = request(b'E', 2, 4);
pub(super) const NOTIFY: libc::c_ulong = request(b'E', 4, 4);
pub(super) const RESTRICT_DOMID: libc::c_ulong = request(b'E', 6, 2);

/// struct ioctl_gntdev_unmap_grant_ref.
#[repr(C)]
pub(super) struct UnmapGrantRef {
    pub(super) index: u64,
    pub(super) count: u32,
    pub(super) pad: u32,
}

/// struct ioctl_gntdev_grant_copy.
#[repr(C)]
pub(super) struct GrantCopy {
    pub(super) count: u32,
    pub(super) segments: *mut CopySegment,
}

/// One end of a copy: a virtual address of ours, or a place in a foreign page packed into the same 8 bytes (reference,
/// offset, domain).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union CopyEnd {
    pub(super) local: *mut u8,
    pub(super) foreign: ForeignPlace,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ForeignPlace {
    pub(super) gref: u32,
    pub(super) offset: u16,
    pub(super) domid: u16,
}

/// struct gntdev_grant_copy_segment.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CopySegment {
    pub(super) source: CopyEnd,
    pub(super) dest: CopyEnd,
    pub(super) len: u16,
    pub(super) flags: u16,
    pub(super) status: i16,
}

pub(super) const SOURCE_GREF: u16 = 1;
pub(super) const DEST_GREF: u16 = 2;

/// struct ioctl_gntalloc_dealloc_gref.
#[repr(C)]
pub(super) struct DeallocGref {
    pub(super) index: u64,
    pub(super) count: u32,
}

const _: () = {
    assert!(size_of::<UnmapGrantRef>() == 16 && size_of::<GrantCopy>() == 16 && size_of::<DeallocGref>() == 16);
    assert!(size_of::<CopySegment>() == 24 && size_of::<CopyEnd>() == 8);
};

/// Makes a call whose argument is `argument`, a struct (or its beginning, see the callers) that the kernel reads and
/// writes.
///
/// # Safety
/// `argument` must be of the type, and followed by the memory, that `request` expects; pointers in it must be good.
pub(super) unsafe fn call<T: ?Sized>(device: &File, request: libc::c_ulong, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, std::ptr::from_mut(argument).cast::<u8>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as a C program prints them that includes the kernel's headers.
    #[test]
    fn golden_numbers() {
        assert_eq!(MAP_GRANT_REF, 0x18_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x10_4701);
        assert_eq!(GRANT_COPY, 0x10_4708);
        assert_eq!(ALLOC_GREF, 0x18_4705);
        assert_eq!(DEALLOC_GREF, 0x10_4706);
        assert_eq!(BIND_INTERDOMAIN, 0x8_4501);
        assert_eq!(BIND_UNBOUND_PORT, 0x4_4502);
        assert_eq!(NOTIFY, 0x4_4504);
        assert_eq!(RESTRICT_DOMID, 0x2_4506);
    }
}
