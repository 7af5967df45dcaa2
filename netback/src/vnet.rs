//! The header before each frame of a tap (linux/virtio_net.h, struct virtio_net_hdr_mrg_rxbuf), and what it means in
//! Xen's words.

use crate::abi::GsoType;

/// The checksum has to be finished: `csum_start` and `csum_offset` say where.
const NEEDS_CSUM: u8 = 1;
/// The checksum is right.
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Set beside a GSO type: the segments' congestion bits need care.
const GSO_ECN: u8 = 0x80;

/// A checksum whose pseudo header alone has been summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// Where the summed bytes begin, from the frame's start.
    pub start: u16,
    /// Where the checksum is, from `start`.
    pub offset: u16,
}

/// What is known of a frame beside its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// The checksum is to be finished by whoever needs it.
    pub partial: Option<Partial>,
    /// The checksum was found right.
    pub validated: bool,
    /// The frame is to be cut.
    pub gso: Option<(GsoType, u16)>,
    /// Bytes of headers, which have to be in one piece.
    pub headers: u16,
}

impl Offload {
    /// An ordinary frame.
    pub const NONE: Self = Self { partial: None, validated: false, gso: None, headers: 0 };
}

/// A kind of cutting that we did not ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the tap delivered a frame of GSO type {0}")]
pub struct UnknownGso(pub u8);

impl Offload {
    /// Bytes of the header (TUNSETVNETHDRSZ).
    pub const SIZE: usize = 12;

    /// Reads a header.
    ///
    /// # Errors
    /// When the frame is to be cut in a way that was not offered to the kernel.
    pub fn decode(header: &[u8; Self::SIZE]) -> Result<Self, UnknownGso> {
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let gso = match header[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some((GsoType::TcpV4, word(4))),
            GSO_TCPV6 => Some((GsoType::TcpV6, word(4))),
            other => return Err(UnknownGso(other)),
        };
        let partial = (header[0] & NEEDS_CSUM != 0).then(|| Partial { start: word(6), offset: word(8) });
        Ok(Self { partial, validated: header[0] & DATA_VALID != 0, gso, headers: word(2) })
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut header = [0; Self::SIZE];
        let mut put = |at: usize, word: u16| header[at..at + 2].copy_from_slice(&word.to_le_bytes());
        put(2, self.headers);
        let (kind, size) = match self.gso {
            None | Some((GsoType::None, _)) => (GSO_NONE, 0),
            Some((GsoType::TcpV4, size)) => (GSO_TCPV4, size),
            Some((GsoType::TcpV6, size)) => (GSO_TCPV6, size),
        };
        put(4, size);
        if let Some(partial) = self.partial {
            put(6, partial.start);
            put(8, partial.offset);
        }
        header[0] = if self.partial.is_some() { NEEDS_CSUM } else { 0 } | if self.validated { DATA_VALID } else { 0 };
        header[1] = kind;
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let offload = Offload {
            partial: Some(Partial { start: 34, offset: 16 }),
            validated: false,
            gso: Some((GsoType::TcpV4, 1448)),
            headers: 66,
        };
        let bytes = [1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(offload.encode(), bytes);
        assert_eq!(Offload::decode(&bytes), Ok(offload));
        assert_eq!(Offload::NONE.encode(), [0; 12]);
        let v6 = Offload { gso: Some((GsoType::TcpV6, 1)), validated: true, ..Offload::NONE };
        assert_eq!(v6.encode(), [2, 4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Offload::decode(&v6.encode()), Ok(v6));
    }

    #[test]
    fn foreign_headers() {
        let mut bytes = [0; 12];
        bytes[1] = 0x81;
        assert_eq!(Offload::decode(&bytes).map(|offload| offload.gso), Ok(Some((GsoType::TcpV4, 0))));
        for kind in [3, 5] {
            bytes[1] = kind;
            assert_eq!(Offload::decode(&bytes), Err(UnknownGso(kind)));
        }
    }
}
