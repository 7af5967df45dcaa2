//! What a request asks for, checked against the disk: pure functions over private copies.

use crate::abi::{DIRECT_SEGMENTS, SECTOR, SECTORS_PER_PAGE, Segment, Slot, Status, op};

/// Bit 0 of a discard's `flag` (blkif.h).
const BLKIF_DISCARD_SECURE: u8 = 1;

/// What a disk can do, as requests are checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Capacity in units of [`SECTOR`].
    pub sectors: u64,
    /// The disk's own sectors, in units of [`SECTOR`]: requests must be multiples of it.
    pub block: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// DISCARD is offered.
    pub discard: bool,
    /// So is DISCARD with BLKIF_DISCARD_SECURE.
    pub secure: bool,
    /// WRITE_BARRIER is offered.
    pub barrier: bool,
    /// Most segments of an indirect request; 0 where they are not offered.
    pub indirect: usize,
}

/// Why a request was refused. Each is counted apart, and each has its status on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// An operation this backend does not know, or did not offer.
    Operation,
    /// No segments, or more than the protocol or we allow.
    SegmentCount,
    /// A segment that ends before it begins, or past its page.
    SegmentRange,
    /// Sectors past the end of the disk, or a range that overflows.
    BeyondEnd,
    /// A write to a read-only disk.
    ReadOnly,
    /// Not a multiple of the disk's own sectors.
    Misaligned,
    /// A page that could not be mapped or copied.
    Grant,
}

impl Refusal {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 7] = [
        Self::Operation,
        Self::SegmentCount,
        Self::SegmentRange,
        Self::BeyondEnd,
        Self::ReadOnly,
        Self::Misaligned,
        Self::Grant,
    ];

    /// The status of the response.
    pub fn status(self) -> Status {
        match self {
            Self::Operation => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Operation => "unknown operation",
            Self::SegmentCount => "wrong number of segments",
            Self::SegmentRange => "segment outside its page",
            Self::BeyondEnd => "beyond the end of the disk",
            Self::ReadOnly => "write to a read-only disk",
            Self::Misaligned => "not a multiple of the disk's sectors",
            Self::Grant => "bad grant",
        })
    }
}

/// What data a transfer moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the disk into the guest's pages.
    Read,
    /// From the guest's pages to the disk.
    Write,
    /// A flush, and then a write.
    FlushThenWrite,
    /// A write after everything before it, and before everything after it.
    Barrier,
}

/// What a request asks for, as far as its slot alone tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Segments in the slot itself.
    Direct {
        /// Which way.
        transfer: Transfer,
        /// How many segments: 1 to [`DIRECT_SEGMENTS`].
        segments: usize,
    },
    /// Segments in pages of their own, which are still to be fetched.
    Indirect {
        /// Which way.
        transfer: Transfer,
        /// How many segments: 1 to [`Shape::indirect`].
        segments: usize,
    },
    /// Put on stable storage what was answered so far.
    Flush,
    /// A barrier without data: a flush that everything else waits for.
    Barrier,
    /// Give up these bytes.
    Discard {
        /// First byte.
        offset: u64,
        /// How many bytes, not 0.
        len: u64,
    },
    /// Erase these bytes so that nothing brings them back.
    Erase {
        /// First byte.
        offset: u64,
        /// How many bytes, not 0.
        len: u64,
    },
}

impl Work {
    /// Whether it leaves the disk as it is, and promises nothing about it.
    #[inline]
    pub fn is_read(&self) -> bool {
        matches!(self, Self::Direct { transfer: Transfer::Read, .. } | Self::Indirect { transfer: Transfer::Read, .. })
    }
}

/// Which operation the response names: the inner one of an indirect request, as blkfront expects.
#[inline]
pub fn answered_operation(slot: &Slot) -> u8 {
    if slot.operation() == op::INDIRECT { slot.indirect_operation() } else { slot.operation() }
}

/// Reads and checks a slot.
///
/// # Errors
/// The reason to refuse it.
#[inline]
pub fn parse(slot: &Slot, shape: &Shape) -> Result<Work, Refusal> {
    match slot.operation() {
        operation @ (op::READ | op::WRITE) => {
            let transfer = transfer(operation, shape)?;
            let segments = slot.nr_segments();
            if segments == 0 || segments > DIRECT_SEGMENTS {
                return Err(Refusal::SegmentCount);
            }
            Ok(Work::Direct { transfer, segments })
        }
        op::INDIRECT => {
            if shape.indirect == 0 {
                return Err(Refusal::Operation);
            }
            // Xen's Linux backend calls a bad inner operation an error, not an unsupported operation.
            let transfer = match slot.indirect_operation() {
                operation @ (op::READ | op::WRITE) => transfer(operation, shape)?,
                _ => return Err(Refusal::SegmentCount),
            };
            let segments = slot.indirect_segments();
            if segments == 0 || segments > shape.indirect {
                return Err(Refusal::SegmentCount);
            }
            Ok(Work::Indirect { transfer, segments })
        }
        op::FLUSH_DISKCACHE => match slot.nr_segments() {
            0 => Ok(Work::Flush),
            _ if shape.read_only => Err(Refusal::ReadOnly),
            segments if segments <= DIRECT_SEGMENTS => {
                Ok(Work::Direct { transfer: Transfer::FlushThenWrite, segments })
            }
            _ => Err(Refusal::SegmentCount),
        },
        op::WRITE_BARRIER if shape.barrier => match slot.nr_segments() {
            _ if shape.read_only => Err(Refusal::ReadOnly),
            0 => Ok(Work::Barrier),
            segments if segments <= DIRECT_SEGMENTS => Ok(Work::Direct { transfer: Transfer::Barrier, segments }),
            _ => Err(Refusal::SegmentCount),
        },
        op::DISCARD if shape.discard => {
            if shape.read_only {
                return Err(Refusal::ReadOnly);
            }
            let secure = slot.discard_flag() & BLKIF_DISCARD_SECURE != 0;
            // Where it was not offered: freeing the blocks would leave readable what was to be erased.
            if secure && !shape.secure {
                return Err(Refusal::Operation);
            }
            let (sector, sectors) = (slot.sector(), slot.discard_sectors());
            check_range(sector, sectors, shape)?;
            let (offset, len) = (sector * SECTOR, sectors * SECTOR);
            Ok(if secure { Work::Erase { offset, len } } else { Work::Discard { offset, len } })
        }
        _ => Err(Refusal::Operation),
    }
}

#[inline]
fn transfer(operation: u8, shape: &Shape) -> Result<Transfer, Refusal> {
    match operation {
        op::READ => Ok(Transfer::Read),
        _ if shape.read_only => Err(Refusal::ReadOnly),
        _ => Ok(Transfer::Write),
    }
}

/// Where a segment's data lie in its page: (offset, length) in bytes.
///
/// # Errors
/// When they lie outside, or are not a multiple of the disk's sectors.
#[inline]
pub fn segment_bytes(segment: &Segment, shape: &Shape) -> Result<(u16, u16), Refusal> {
    let Segment { first_sect: first, last_sect: last, .. } = *segment;
    if last >= SECTORS_PER_PAGE || first > last {
        return Err(Refusal::SegmentRange);
    }
    let sectors = last - first + 1;
    if shape.block > 1 && !u64::from(sectors).is_multiple_of(shape.block) {
        return Err(Refusal::Misaligned);
    }
    Ok((u16::from(first) * 512, u16::from(sectors) * 512))
}

/// Checks that `sectors` sectors from `sector` lie on the disk.
///
/// # Errors
/// When they do not, are none at all, or are not a multiple of the disk's sectors.
#[inline]
pub fn check_range(sector: u64, sectors: u64, shape: &Shape) -> Result<(), Refusal> {
    match sector.checked_add(sectors) {
        Some(end) if end <= shape.sectors && sectors > 0 => {}
        _ => return Err(Refusal::BeyondEnd),
    }
    if shape.block > 1 && !(sector.is_multiple_of(shape.block) && sectors.is_multiple_of(shape.block)) {
        return Err(Refusal::Misaligned);
    }
    Ok(())
}

#[cfg(all(test, feature = "frontend"))]
mod tests {
    use super::*;
    use crate::abi::Protocol;
    use hypervisor::GrantRef;

    const SHAPE: Shape =
        Shape { sectors: 1000, block: 1, read_only: false, discard: true, secure: false, barrier: true, indirect: 256 };
    const READ_ONLY: Shape = Shape { read_only: true, ..SHAPE };
    const PLAIN: Shape = Shape { discard: false, barrier: false, indirect: 0, ..SHAPE };
    const SECURE: Shape = Shape { secure: true, ..SHAPE };
    const PAGES: [GrantRef; 1] = [GrantRef(1)];

    fn direct(operation: u8, segments: u8) -> Slot {
        let mut slot = Slot::direct(Protocol::X86_64, operation, 1, 0, &[]);
        slot.bytes[1] = segments;
        slot
    }

    #[test]
    fn every_operation_and_count() {
        use Refusal as R;
        use Transfer::*;
        let indirect = |operation, count| Slot::indirect(Protocol::X86_64, operation, 1, 0, count, &PAGES);
        let discard = |sector, sectors| Slot::discard(Protocol::X86_64, 1, sector, sectors, 0);
        let secure = |sector, sectors| Slot::discard(Protocol::X86_64, 1, sector, sectors, 1);
        let cases = [
            (direct(op::READ, 1), SHAPE, Ok(Work::Direct { transfer: Read, segments: 1 })),
            (direct(op::WRITE, 11), SHAPE, Ok(Work::Direct { transfer: Write, segments: 11 })),
            (direct(op::READ, 0), SHAPE, Err(R::SegmentCount)),
            (direct(op::READ, 12), SHAPE, Err(R::SegmentCount)),
            (direct(op::WRITE, 255), SHAPE, Err(R::SegmentCount)),
            (direct(op::READ, 1), READ_ONLY, Ok(Work::Direct { transfer: Read, segments: 1 })),
            (direct(op::WRITE, 1), READ_ONLY, Err(R::ReadOnly)),
            (direct(op::FLUSH_DISKCACHE, 0), SHAPE, Ok(Work::Flush)),
            (direct(op::FLUSH_DISKCACHE, 0), READ_ONLY, Ok(Work::Flush)),
            (direct(op::FLUSH_DISKCACHE, 2), SHAPE, Ok(Work::Direct { transfer: FlushThenWrite, segments: 2 })),
            (direct(op::FLUSH_DISKCACHE, 12), SHAPE, Err(R::SegmentCount)),
            (direct(op::FLUSH_DISKCACHE, 1), READ_ONLY, Err(R::ReadOnly)),
            (direct(op::WRITE_BARRIER, 0), SHAPE, Ok(Work::Barrier)),
            (direct(op::WRITE_BARRIER, 11), SHAPE, Ok(Work::Direct { transfer: Barrier, segments: 11 })),
            (direct(op::WRITE_BARRIER, 12), SHAPE, Err(R::SegmentCount)),
            (direct(op::WRITE_BARRIER, 1), READ_ONLY, Err(R::ReadOnly)),
            (direct(op::WRITE_BARRIER, 1), PLAIN, Err(R::Operation)),
            (direct(4, 1), SHAPE, Err(R::Operation)),
            (direct(7, 1), SHAPE, Err(R::Operation)),
            (direct(255, 1), SHAPE, Err(R::Operation)),
            (indirect(op::READ, 1), SHAPE, Ok(Work::Indirect { transfer: Read, segments: 1 })),
            (indirect(op::WRITE, 256), SHAPE, Ok(Work::Indirect { transfer: Write, segments: 256 })),
            (indirect(op::READ, 0), SHAPE, Err(R::SegmentCount)),
            (indirect(op::READ, 257), SHAPE, Err(R::SegmentCount)),
            (indirect(op::READ, 65535), SHAPE, Err(R::SegmentCount)),
            (indirect(op::WRITE, 1), READ_ONLY, Err(R::ReadOnly)),
            (indirect(op::DISCARD, 1), SHAPE, Err(R::SegmentCount)),
            (indirect(op::INDIRECT, 1), SHAPE, Err(R::SegmentCount)),
            (indirect(op::READ, 1), PLAIN, Err(R::Operation)),
            (discard(0, 1000), SHAPE, Ok(Work::Discard { offset: 0, len: 512_000 })),
            (discard(999, 1), SHAPE, Ok(Work::Discard { offset: 999 * 512, len: 512 })),
            (discard(999, 2), SHAPE, Err(R::BeyondEnd)),
            (discard(1, u64::MAX), SHAPE, Err(R::BeyondEnd)),
            (discard(u64::MAX, 2), SHAPE, Err(R::BeyondEnd)),
            (discard(0, 1 << 63), SHAPE, Err(R::BeyondEnd)),
            (discard(0, 0), SHAPE, Err(R::BeyondEnd)),
            (discard(0, 1), READ_ONLY, Err(R::ReadOnly)),
            (discard(0, 1), PLAIN, Err(R::Operation)),
            (secure(0, 8), SHAPE, Err(R::Operation)),
            (secure(1, 7), SECURE, Ok(Work::Erase { offset: 512, len: 7 * 512 })),
            (discard(1, 7), SECURE, Ok(Work::Discard { offset: 512, len: 7 * 512 })),
            (secure(999, 2), SECURE, Err(R::BeyondEnd)),
            (secure(0, 0), SECURE, Err(R::BeyondEnd)),
            (secure(4, 8), Shape { block: 8, ..SECURE }, Err(R::Misaligned)),
            (secure(0, 8), Shape { read_only: true, ..SECURE }, Err(R::ReadOnly)),
            (secure(0, 8), Shape { discard: false, ..SECURE }, Err(R::Operation)),
        ];
        for (slot, shape, expected) in cases {
            assert_eq!(parse(&slot, &shape), expected, "{slot:?} {:?} on {shape:?}", slot.bytes);
        }
    }

    #[test]
    fn segments_stay_inside_their_page() {
        let segment = |first_sect, last_sect| Segment { gref: GrantRef(1), first_sect, last_sect };
        assert_eq!(segment_bytes(&segment(0, 7), &SHAPE), Ok((0, 4096)));
        assert_eq!(segment_bytes(&segment(7, 7), &SHAPE), Ok((3584, 512)));
        for (first, last) in [(0, 8), (0, 255), (255, 255), (3, 2), (8, 8)] {
            assert_eq!(segment_bytes(&segment(first, last), &SHAPE), Err(Refusal::SegmentRange));
        }
        let big = Shape { block: 8, ..SHAPE };
        assert_eq!(segment_bytes(&segment(0, 7), &big), Ok((0, 4096)));
        assert_eq!(segment_bytes(&segment(0, 3), &big), Err(Refusal::Misaligned));
    }

    #[test]
    fn ranges_end_on_the_disk() {
        assert_eq!(check_range(992, 8, &SHAPE), Ok(()));
        assert_eq!(check_range(993, 8, &SHAPE), Err(Refusal::BeyondEnd));
        assert_eq!(check_range(u64::MAX - 3, 8, &SHAPE), Err(Refusal::BeyondEnd));
        let big = Shape { block: 8, ..SHAPE };
        assert_eq!(check_range(8, 16, &big), Ok(()));
        assert_eq!(check_range(4, 8, &big), Err(Refusal::Misaligned));
    }
}
