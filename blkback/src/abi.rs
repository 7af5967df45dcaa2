//! The block protocol as bytes (xen/include/public/io/blkif.h), in its two layouts.
//!
//! A 64-bit guest aligns 64-bit fields to 8 bytes, a 32-bit x86 guest to 4, and so the same C structs have different
//! offsets. [`Slot`] is a private copy of a request slot that is read through a table of offsets; nothing here looks
//! at shared memory.

use hypervisor::GrantRef;

/// Operations, as numbers on the wire (BLKIF_OP_*).
pub mod op {
    /// Read sectors.
    pub const READ: u8 = 0;
    /// Write sectors.
    pub const WRITE: u8 = 1;
    /// Write sectors, after everything before and before everything after.
    pub const WRITE_BARRIER: u8 = 2;
    /// Put what was answered so far on stable storage.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Give sectors up.
    pub const DISCARD: u8 = 5;
    /// Read or write with segments in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// How a request ended (BLKIF_RSP_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// Not done.
    Error = -1,
    /// This backend does not do that.
    NotSupported = -2,
    /// Not done. blkif.h has no name for it; to frontends every number but those above is an error, while Linux' blkfront
    /// takes -1 for an empty flush to mean that there is nothing to flush.
    Aborted = -3,
}

/// Bytes in a sector of the protocol, whatever the disk's own sectors are.
pub const SECTOR: u64 = 512;
/// Sectors in a page, so one past the largest `last_sect`.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Segments that fit into a slot (BLKIF_MAX_SEGMENTS_PER_REQUEST).
pub const DIRECT_SEGMENTS: usize = 11;
/// Segments that fit into an indirect page.
pub const SEGMENTS_PER_PAGE: usize = 512;
/// Bytes of a segment descriptor.
pub const SEGMENT_SIZE: usize = 8;
/// Bytes of the largest slot.
pub const SLOT_SIZE: usize = 112;

/// Which layout the frontend speaks (key `protocol`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// "x86_64-abi".
    X86_64,
    /// "x86_32-abi".
    X86_32,
    /// "arm-abi": laid out as x86_64.
    Arm,
}

impl Protocol {
    /// The layout that `name` stands for; `None` where the backend does not know it.
    ///
    /// A frontend that names none is a 32-bit one on x86: so Linux, QEMU and tapback have it, and so old guests
    /// count on it, whatever blkif.h says of a native default.
    pub fn parse(name: Option<&str>) -> Option<Self> {
        match name {
            None if cfg!(any(target_arch = "x86", target_arch = "x86_64")) => Some(Self::X86_32),
            None | Some("arm-abi") => Some(Self::Arm),
            Some("x86_64-abi") => Some(Self::X86_64),
            Some("x86_32-abi") => Some(Self::X86_32),
            Some(_) => None,
        }
    }

    /// The name in XenStore.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-abi",
            Self::X86_32 => "x86_32-abi",
            Self::Arm => "arm-abi",
        }
    }

    /// Bytes from one slot of the ring to the next.
    pub const fn stride(self) -> usize {
        self.offsets().size
    }

    const fn offsets(self) -> &'static Offsets {
        match self {
            Self::X86_64 | Self::Arm => &ALIGNED,
            Self::X86_32 => &PACKED,
        }
    }
}

/// Where the fields of a request lie, in bytes. `operation` is at 0 and `nr_segments` (or the discard flag, or the
/// indirect operation) at 1 in every layout.
struct Offsets {
    size: usize,
    id: usize,
    sector: usize,
    segments: usize,
    discard_sectors: usize,
    indirect_segments: usize,
    indirect_pages: usize,
    response: usize,
}

const ALIGNED: Offsets = Offsets {
    size: 112,
    id: 8,
    sector: 16,
    segments: 24,
    discard_sectors: 24,
    indirect_segments: 2,
    indirect_pages: 28,
    response: 16,
};

const PACKED: Offsets = Offsets {
    size: 108,
    id: 4,
    sector: 12,
    segments: 20,
    discard_sectors: 20,
    indirect_segments: 2,
    indirect_pages: 24,
    response: 12,
};

/// The structs of blkif.h, for the compiler to check the offsets above against.
macro_rules! check_layout {
    ($offsets:expr, $repr:meta) => {
        const _: () = {
            use std::mem::{offset_of, size_of};

            #[repr(C)]
            #[allow(dead_code)]
            struct Segment {
                gref: u32,
                first_sect: u8,
                last_sect: u8,
            }
            #[$repr]
            #[allow(dead_code)]
            struct Request {
                operation: u8,
                nr_segments: u8,
                handle: u16,
                id: u64,
                sector_number: u64,
                seg: [Segment; DIRECT_SEGMENTS],
            }
            #[$repr]
            #[allow(dead_code)]
            struct Discard {
                operation: u8,
                flag: u8,
                handle: u16,
                id: u64,
                sector_number: u64,
                nr_sectors: u64,
            }
            #[$repr]
            #[allow(dead_code)]
            struct Indirect {
                operation: u8,
                indirect_op: u8,
                nr_segments: u16,
                id: u64,
                sector_number: u64,
                handle: u16,
                indirect_grefs: [u32; 8],
            }
            #[$repr]
            #[allow(dead_code)]
            struct Response {
                id: u64,
                operation: u8,
                status: i16,
            }
            assert!(size_of::<Segment>() == SEGMENT_SIZE && offset_of!(Segment, last_sect) == 5);
            assert!(size_of::<Request>() == $offsets.size && size_of::<Request>() <= SLOT_SIZE);
            assert!(offset_of!(Request, id) == $offsets.id && offset_of!(Request, sector_number) == $offsets.sector);
            assert!(offset_of!(Request, seg) == $offsets.segments && offset_of!(Request, handle) == 2);
            assert!(offset_of!(Discard, id) == $offsets.id && offset_of!(Discard, sector_number) == $offsets.sector);
            assert!(offset_of!(Discard, nr_sectors) == $offsets.discard_sectors);
            assert!(offset_of!(Indirect, id) == $offsets.id && offset_of!(Indirect, sector_number) == $offsets.sector);
            assert!(offset_of!(Indirect, nr_segments) == $offsets.indirect_segments);
            assert!(offset_of!(Indirect, indirect_grefs) == $offsets.indirect_pages);
            assert!(size_of::<Response>() == $offsets.response && offset_of!(Response, status) == 10);
            assert!(offset_of!(Response, operation) == 8);
        };
    };
}

check_layout!(ALIGNED, repr(C));
check_layout!(PACKED, repr(C, packed(4)));

/// One piece of a request: sectors of one granted page, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The page.
    pub gref: GrantRef,
    /// First sector within the page, 0 to 7.
    pub first_sect: u8,
    /// Last sector within the page, inclusive.
    pub last_sect: u8,
}

impl Segment {
    /// Reads a descriptor.
    #[inline]
    pub fn decode(bytes: &[u8; SEGMENT_SIZE]) -> Self {
        let [a, b, c, d, first_sect, last_sect, _, _] = *bytes;
        Self { gref: GrantRef(u32::from_le_bytes([a, b, c, d])), first_sect, last_sect }
    }

    /// Its grant, and the first byte and length within the page, of a segment whose sectors have been checked.
    #[inline]
    pub(crate) fn bytes(&self) -> (GrantRef, u16, u16) {
        (self.gref, u16::from(self.first_sect) * 512, u16::from(self.last_sect - self.first_sect + 1) * 512)
    }

    /// Writes a descriptor, its padding zero.
    #[inline]
    pub fn encode(self) -> [u8; SEGMENT_SIZE] {
        let [a, b, c, d] = self.gref.0.to_le_bytes();
        [a, b, c, d, self.first_sect, self.last_sect, 0, 0]
    }
}

/// A private copy of a request slot, as the guest wrote it: no field of it has been checked.
#[derive(Clone, Copy)]
pub struct Slot {
    /// The bytes; a layout with smaller slots leaves the rest unused.
    pub bytes: [u8; SLOT_SIZE],
    /// How to read them.
    pub protocol: Protocol,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot")
            .field("operation", &self.operation())
            .field("id", &self.id())
            .field("sector", &self.sector())
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// An empty slot of this layout.
    pub fn new(protocol: Protocol) -> Self {
        Self { bytes: [0; SLOT_SIZE], protocol }
    }

    /// The part of the bytes that the layout uses: what is copied from and to the ring.
    #[inline]
    pub fn record(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.protocol.stride()]
    }

    #[inline]
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    #[inline]
    fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }

    #[inline]
    fn u64_at(&self, at: usize) -> u64 {
        u64::from(self.u32_at(at)) | u64::from(self.u32_at(at + 4)) << 32
    }

    /// What to do, one of [`op`] or anything else.
    #[inline]
    pub fn operation(&self) -> u8 {
        self.bytes[0]
    }

    /// The frontend's own number, to be returned as it is.
    #[inline]
    pub fn id(&self) -> u64 {
        self.u64_at(self.protocol.offsets().id)
    }

    /// The first sector, in units of [`SECTOR`].
    #[inline]
    pub fn sector(&self) -> u64 {
        self.u64_at(self.protocol.offsets().sector)
    }

    /// Segments of a direct request: 0 to 255.
    #[inline]
    pub fn nr_segments(&self) -> usize {
        self.bytes[1].into()
    }

    /// Segment `index` of a direct request.
    ///
    /// # Panics
    /// From [`DIRECT_SEGMENTS`] on.
    #[inline]
    pub fn segment(&self, index: usize) -> Segment {
        assert!(index < DIRECT_SEGMENTS);
        let at = self.protocol.offsets().segments + index * SEGMENT_SIZE;
        let mut bytes = [0; SEGMENT_SIZE];
        bytes.copy_from_slice(&self.bytes[at..at + SEGMENT_SIZE]);
        Segment::decode(&bytes)
    }

    /// Sectors to discard.
    #[inline]
    pub fn discard_sectors(&self) -> u64 {
        self.u64_at(self.protocol.offsets().discard_sectors)
    }

    /// The flags of a discard; bit 0 asks for a secure one (BLKIF_DISCARD_SECURE).
    #[inline]
    pub fn discard_flag(&self) -> u8 {
        self.bytes[1]
    }

    /// The operation inside an indirect request.
    #[inline]
    pub fn indirect_operation(&self) -> u8 {
        self.bytes[1]
    }

    /// Segments of an indirect request: 0 to 65535.
    #[inline]
    pub fn indirect_segments(&self) -> usize {
        self.u16_at(self.protocol.offsets().indirect_segments).into()
    }

    /// Page `index` of segment descriptors of an indirect request, 0 to 7.
    #[inline]
    pub fn indirect_page(&self, index: usize) -> GrantRef {
        GrantRef(self.u32_at(self.protocol.offsets().indirect_pages + index * 4))
    }
}

/// A response as bytes: built from zeros, so that padding carries nothing of ours (XSA-216).
#[derive(Debug, Clone, Copy)]
pub struct Response {
    bytes: [u8; 16],
    len: usize,
}

impl Response {
    /// A response in this layout. `operation` is the request's, the inner one for an indirect request: blkfront
    /// compares, and disables the disk where they differ.
    #[inline]
    pub fn new(protocol: Protocol, id: u64, operation: u8, status: Status) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8] = operation;
        bytes[10..12].copy_from_slice(&(status as i16).to_le_bytes());
        Self { bytes, len: protocol.offsets().response }
    }

    /// The bytes of the layout.
    #[inline]
    pub fn record(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The frontend's side of the layouts: requests written, responses read.
#[cfg(feature = "frontend")]
mod encode {
    use super::{Offsets, Protocol, Segment, Slot, Status, op};
    use hypervisor::GrantRef;

    impl Slot {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn head(protocol: Protocol, operation: u8, second: u8, id: u64, sector: u64) -> (Self, &'static Offsets) {
            let mut slot = Self::new(protocol);
            let offsets = protocol.offsets();
            slot.bytes[0] = operation;
            slot.bytes[1] = second;
            slot.put(offsets.id, &id.to_le_bytes());
            slot.put(offsets.sector, &sector.to_le_bytes());
            (slot, offsets)
        }

        /// A read, write, barrier or flush.
        ///
        /// # Panics
        /// With more segments than fit.
        pub fn direct(protocol: Protocol, operation: u8, id: u64, sector: u64, segments: &[Segment]) -> Self {
            let (mut slot, offsets) = Self::head(protocol, operation, segments.len() as u8, id, sector);
            for (index, segment) in segments.iter().enumerate() {
                slot.put(offsets.segments + index * super::SEGMENT_SIZE, &segment.encode());
            }
            slot
        }

        /// A discard.
        pub fn discard(protocol: Protocol, id: u64, sector: u64, sectors: u64, flag: u8) -> Self {
            let (mut slot, offsets) = Self::head(protocol, op::DISCARD, flag, id, sector);
            slot.put(offsets.discard_sectors, &sectors.to_le_bytes());
            slot
        }

        /// A read or write of `count` segments that stand in `pages`.
        ///
        /// # Panics
        /// With more than eight pages.
        pub fn indirect(
            protocol: Protocol,
            operation: u8,
            id: u64,
            sector: u64,
            count: u16,
            pages: &[GrantRef],
        ) -> Self {
            assert!(pages.len() <= 8);
            let (mut slot, offsets) = Self::head(protocol, op::INDIRECT, operation, id, sector);
            slot.put(offsets.indirect_segments, &count.to_le_bytes());
            for (index, page) in pages.iter().enumerate() {
                slot.put(offsets.indirect_pages + index * 4, &page.0.to_le_bytes());
            }
            slot
        }
    }

    /// A response as the frontend reads it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Answer {
        /// The request's number.
        pub id: u64,
        /// The request's operation.
        pub operation: u8,
        /// BLKIF_RSP_*, as a number.
        pub status: i16,
    }

    impl Answer {
        /// Reads a response; both layouts begin alike.
        pub fn decode(bytes: &[u8; 12]) -> Self {
            let mut id = [0; 8];
            id.copy_from_slice(&bytes[..8]);
            Self { id: u64::from_le_bytes(id), operation: bytes[8], status: i16::from_le_bytes([bytes[10], bytes[11]]) }
        }

        /// Whether it says that all went well.
        pub fn is_okay(&self) -> bool {
            self.status == Status::Okay as i16
        }
    }
}

#[cfg(feature = "frontend")]
pub use encode::Answer;

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    /// A read of two segments as a 64-bit guest's compiler lays it out.
    #[test]
    fn golden_read_x86_64() {
        let mut slot = Slot::new(Protocol::X86_64);
        slot.bytes[..4].copy_from_slice(&[0, 2, 0xca, 0x00]);
        slot.bytes[8..16].copy_from_slice(&ID);
        slot.bytes[16..24].copy_from_slice(&[0x10, 0, 0, 0, 0, 0, 0, 0x80]);
        slot.bytes[24..32].copy_from_slice(&[0x2a, 0, 0, 0, 1, 7, 0xee, 0xee]);
        slot.bytes[32..40].copy_from_slice(&[0x2b, 1, 0, 0, 0, 3, 0xee, 0xee]);
        assert_eq!((slot.operation(), slot.nr_segments()), (op::READ, 2));
        assert_eq!((slot.id(), slot.sector()), (0x0807_0605_0403_0201, 0x8000_0000_0000_0010));
        assert_eq!(slot.segment(0), Segment { gref: GrantRef(0x2a), first_sect: 1, last_sect: 7 });
        assert_eq!(slot.segment(1), Segment { gref: GrantRef(0x12b), first_sect: 0, last_sect: 3 });
    }

    /// The same as a 32-bit guest's compiler lays it out: everything 64 bits wide four bytes earlier.
    #[test]
    fn golden_read_x86_32() {
        let mut slot = Slot::new(Protocol::X86_32);
        slot.bytes[..4].copy_from_slice(&[1, 1, 0, 0]);
        slot.bytes[4..12].copy_from_slice(&ID);
        slot.bytes[12..20].copy_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0]);
        slot.bytes[20..28].copy_from_slice(&[0x2a, 0, 0, 0, 2, 5, 0, 0]);
        assert_eq!((slot.operation(), slot.nr_segments(), slot.sector()), (op::WRITE, 1, 9));
        assert_eq!(slot.id(), 0x0807_0605_0403_0201);
        assert_eq!(slot.segment(0), Segment { gref: GrantRef(0x2a), first_sect: 2, last_sect: 5 });
        assert_eq!(slot.record().len(), 108);
    }

    #[test]
    fn golden_discard_and_indirect() {
        for (protocol, shift) in [(Protocol::X86_64, 0), (Protocol::Arm, 0), (Protocol::X86_32, 4)] {
            let mut slot = Slot::new(protocol);
            slot.bytes[..2].copy_from_slice(&[5, 1]);
            slot.bytes[16 - shift..18 - shift].copy_from_slice(&[7, 1]);
            slot.bytes[24 - shift..26 - shift].copy_from_slice(&[0, 2]);
            assert_eq!((slot.operation(), slot.discard_flag()), (op::DISCARD, 1));
            assert_eq!((slot.sector(), slot.discard_sectors()), (0x107, 0x200));

            let mut slot = Slot::new(protocol);
            slot.bytes[..4].copy_from_slice(&[6, 1, 0x00, 0x01]);
            slot.bytes[28 - shift..36 - shift].copy_from_slice(&[5, 0, 0, 0, 6, 0, 0, 0]);
            assert_eq!((slot.indirect_operation(), slot.indirect_segments()), (op::WRITE, 256));
            assert_eq!((slot.indirect_page(0), slot.indirect_page(1)), (GrantRef(5), GrantRef(6)));
        }
    }

    #[test]
    fn golden_responses() {
        let response = Response::new(Protocol::X86_64, 0x0807_0605_0403_0201, op::WRITE, Status::NotSupported);
        assert_eq!(response.record(), [1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0xfe, 0xff, 0, 0, 0, 0]);
        let response = Response::new(Protocol::X86_32, 5, op::READ, Status::Error);
        assert_eq!(response.record(), [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    }

    #[test]
    fn protocol_names() {
        assert_eq!(Protocol::parse(Some("x86_64-abi")), Some(Protocol::X86_64));
        assert_eq!(Protocol::parse(Some("arm-abi")), Some(Protocol::Arm));
        assert_eq!(Protocol::parse(Some("ia64-abi")), None);
        assert_eq!(Protocol::parse(Some("")), None);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(Protocol::parse(None), Some(Protocol::X86_32));
        }
    }

    #[cfg(feature = "frontend")]
    #[test]
    fn what_the_frontend_writes_the_backend_reads() {
        let segments = [Segment { gref: GrantRef(7), first_sect: 1, last_sect: 6 }; 11];
        for protocol in [Protocol::X86_64, Protocol::X86_32, Protocol::Arm] {
            let slot = Slot::direct(protocol, op::WRITE, u64::MAX - 1, 1 << 40, &segments);
            assert_eq!((slot.operation(), slot.id(), slot.sector()), (op::WRITE, u64::MAX - 1, 1 << 40));
            assert_eq!((0..slot.nr_segments()).map(|index| slot.segment(index)).collect::<Vec<_>>(), segments);
            let slot = Slot::discard(protocol, 3, 4, 5, 1);
            assert_eq!((slot.id(), slot.sector(), slot.discard_sectors(), slot.discard_flag()), (3, 4, 5, 1));
            let slot = Slot::indirect(protocol, op::READ, 3, 4, 300, &[GrantRef(9)]);
            assert_eq!((slot.indirect_operation(), slot.indirect_segments()), (op::READ, 300));
            assert_eq!(slot.indirect_page(0), GrantRef(9));
            let mut bytes = [0; 12];
            bytes.copy_from_slice(&Response::new(protocol, 77, op::READ, Status::Error).record()[..12]);
            assert_eq!(Answer::decode(&bytes), Answer { id: 77, operation: op::READ, status: -1 });
        }
    }
}
