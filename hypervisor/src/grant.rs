//! Grants: how a domain lets another at its pages (xen/include/public/grant_table.h).

use std::fmt;

/// An index into a domain's grant table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantRef(pub u32);

impl fmt::Display for GrantRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a grant, or a mapping of one, allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrantAccess {
    /// The peer may only read (GTF_readonly; GNTMAP_readonly).
    ReadOnly,
    /// The peer may read and write.
    ReadWrite,
}

/// How one grant operation ended: Xen's GNTST_* values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i16)]
pub enum GrantStatus {
    /// Done.
    Okay = 0,
    /// Refused for a reason without a code of its own: an entry that grants nothing, or to somebody else, or only to
    /// read.
    GeneralError = -1,
    /// No such domain. A grant that is for another domain is a general error, on Xen as here.
    BadDomain = -2,
    /// No such grant reference.
    BadGrantRef = -3,
    /// Unrecognised mapping handle.
    BadHandle = -4,
    /// Inappropriate virtual address.
    BadVirtAddr = -5,
    /// Inappropriate device address.
    BadDevAddr = -6,
    /// Out of space for mappings.
    NoDeviceSpace = -7,
    /// The grant does not permit this.
    PermissionDenied = -8,
    /// The granted frame is not a page of the granting domain.
    BadPage = -9,
    /// Copy arguments cross a page boundary.
    BadCopyArg = -10,
    /// Transfer page address too big.
    AddressTooBig = -11,
    /// The granted frame is paged out: try again.
    Eagain = -12,
    /// Out of space.
    NoSpace = -13,
    /// Not a status of Xen's: the grant is still mapped by the peer and cannot be revoked yet.
    Busy = -100,
}

impl GrantStatus {
    /// The status for one of Xen's numbers; an unknown number is a [`GrantStatus::GeneralError`].
    pub fn from_raw(raw: i16) -> Self {
        use GrantStatus as S;
        const ALL: [GrantStatus; 14] = [
            S::Okay,
            S::GeneralError,
            S::BadDomain,
            S::BadGrantRef,
            S::BadHandle,
            S::BadVirtAddr,
            S::BadDevAddr,
            S::NoDeviceSpace,
            S::PermissionDenied,
            S::BadPage,
            S::BadCopyArg,
            S::AddressTooBig,
            S::Eagain,
            S::NoSpace,
        ];
        raw.checked_neg()
            .and_then(|n| usize::try_from(n).ok())
            .and_then(|n| ALL.get(n).copied())
            .unwrap_or(S::GeneralError)
    }
}

impl fmt::Display for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Okay => "okay",
            Self::GeneralError => "refused (GNTST_general_error)",
            Self::BadDomain => "no such domain (GNTST_bad_domain)",
            Self::BadGrantRef => "no such grant (GNTST_bad_gntref)",
            Self::BadHandle => "no such mapping (GNTST_bad_handle)",
            Self::BadVirtAddr => "bad address (GNTST_bad_virt_addr)",
            Self::BadDevAddr => "bad device address (GNTST_bad_dev_addr)",
            Self::NoDeviceSpace => "no room for more mappings (GNTST_no_device_space)",
            Self::PermissionDenied => "permission denied (GNTST_permission_denied)",
            Self::BadPage => "not a page of that domain (GNTST_bad_page)",
            Self::BadCopyArg => "copy crosses a page boundary (GNTST_bad_copy_arg)",
            Self::AddressTooBig => "address too big (GNTST_address_too_big)",
            Self::Eagain => "page is away, try again (GNTST_eagain)",
            Self::NoSpace => "out of space (GNTST_no_space)",
            Self::Busy => "still mapped by the peer",
        })
    }
}

/// Which way a grant copy goes, seen from the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyDirection {
    /// The peer's granted page is the source.
    FromGuest,
    /// The peer's granted page is the destination.
    ToGuest,
}

/// One piece of a batched grant copy (struct gnttab_copy): at most one page, within one page on the granted side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOp {
    /// The peer's page.
    pub gref: GrantRef,
    /// Where in the peer's page, in bytes.
    pub offset: u16,
    /// How many bytes; `offset + len` must not pass the page's end.
    pub len: u16,
    /// Which way.
    pub direction: CopyDirection,
    /// Where in the local mapping, in bytes.
    pub local: usize,
    /// The outcome, filled in by the copy.
    pub status: GrantStatus,
}
