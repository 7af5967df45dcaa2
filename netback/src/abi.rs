//! The network protocol as bytes (xen/include/public/io/netif.h).
//!
//! Two rings of one page, one request and one response layout each, and a third for control. A transmit request may
//! be followed by *extras* in the next slots: same size, another layout. Everything here works on private copies of
//! slots; nothing looks at shared memory. All numbers are little-endian on the wire, as on every machine Xen runs on.

use hypervisor::GrantRef;

/// Bytes of a slot of the transmit ring (`union netif_tx_sring_entry`).
pub const TX_SLOT: usize = 12;
/// Bytes of a slot of the receive ring (`union netif_rx_sring_entry`).
pub const RX_SLOT: usize = 8;
/// Bytes of a slot of the control ring (`union xen_netif_ctrl_sring_entry`).
pub const CTRL_SLOT: usize = 16;
/// Slots in a transmit or receive ring of one page.
pub const RING_SLOTS: u32 = 256;
/// Slots that any frontend may use for one packet (XEN_NETIF_NR_SLOTS_MIN).
pub const SLOTS_MIN: usize = 18;
/// Bytes of the largest packet (XEN_NETIF_MAX_TX_SIZE): what fits into a field of 16 bits.
pub const MAX_PACKET: usize = 0xffff;

/// Flags of transmit requests (NETTXF_*).
pub mod tx_flag {
    /// The checksum field holds the pseudo header's sum only; somebody has to add the rest.
    pub const CSUM_BLANK: u16 = 1;
    /// The checksum is right, whatever stands in the field.
    pub const DATA_VALIDATED: u16 = 2;
    /// The next request continues this packet.
    pub const MORE_DATA: u16 = 4;
    /// Extras follow this slot.
    pub const EXTRA_INFO: u16 = 8;
}

/// Flags of receive responses (NETRXF_*).
pub mod rx_flag {
    /// The checksum is right, whatever stands in the field.
    pub const DATA_VALIDATED: u16 = 1;
    /// The checksum field holds the pseudo header's sum only.
    pub const CSUM_BLANK: u16 = 2;
    /// The next response continues this packet.
    pub const MORE_DATA: u16 = 4;
    /// Extras follow this slot.
    pub const EXTRA_INFO: u16 = 8;
    /// A GSO prefix (deprecated; `feature-gso-tcpv4-prefix`).
    pub const GSO_PREFIX: u16 = 16;
}

/// How a request ended (NETIF_RSP_*). A receive response that succeeded has its length in place of a status.
pub mod status {
    /// Sent.
    pub const OKAY: i16 = 0;
    /// Not sent: the request was wrong.
    pub const ERROR: i16 = -1;
    /// Not sent: no room.
    pub const DROPPED: i16 = -2;
    /// The slot carried an extra, or the first half of something that the next response speaks for.
    pub const NULL: i16 = 1;
}

/// One slot of a packet to send (`struct netif_tx_request`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxRequest {
    /// The page with the data.
    pub gref: GrantRef,
    /// Where in the page they begin, in bytes.
    pub offset: u16,
    /// Of [`tx_flag`].
    pub flags: u16,
    /// Comes back in the response.
    pub id: u16,
    /// Bytes: of the whole packet in its first slot, of this slot alone in later ones.
    pub size: u16,
}

fn u16_at(slot: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([slot[at], slot[at + 1]])
}

fn u32_at(slot: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]])
}

impl TxRequest {
    /// Reads a slot.
    pub fn decode(slot: &[u8; TX_SLOT]) -> Self {
        Self {
            gref: GrantRef(u32_at(slot, 0)),
            offset: u16_at(slot, 4),
            flags: u16_at(slot, 6),
            id: u16_at(slot, 8),
            size: u16_at(slot, 10),
        }
    }

    /// Fills a slot.
    pub fn encode(&self) -> [u8; TX_SLOT] {
        let mut slot = [0; TX_SLOT];
        slot[0..4].copy_from_slice(&self.gref.0.to_le_bytes());
        slot[4..6].copy_from_slice(&self.offset.to_le_bytes());
        slot[6..8].copy_from_slice(&self.flags.to_le_bytes());
        slot[8..10].copy_from_slice(&self.id.to_le_bytes());
        slot[10..12].copy_from_slice(&self.size.to_le_bytes());
        slot
    }
}

/// The answer to one transmit slot (`struct netif_tx_response`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxResponse {
    /// The request's.
    pub id: u16,
    /// Of [`status`].
    pub status: i16,
}

impl TxResponse {
    /// Reads a slot.
    pub fn decode(slot: &[u8; TX_SLOT]) -> Self {
        Self { id: u16_at(slot, 0), status: u16_at(slot, 2).cast_signed() }
    }

    /// The bytes at the beginning of a slot. The rest of it keeps what the request was, for whoever takes over from a
    /// backend that died between two of them ([`Tx::resume`](crate::tx::Tx::resume)).
    pub fn encode(&self) -> [u8; 4] {
        let [id, status] = [self.id.to_le_bytes(), self.status.to_le_bytes()];
        [id[0], id[1], status[0], status[1]]
    }
}

/// A page that the guest offers for what it receives (`struct netif_rx_request`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxRequest {
    /// Comes back in the response.
    pub id: u16,
    /// The page.
    pub gref: GrantRef,
}

impl RxRequest {
    /// Reads a slot.
    pub fn decode(slot: &[u8; RX_SLOT]) -> Self {
        Self { id: u16_at(slot, 0), gref: GrantRef(u32_at(slot, 4)) }
    }

    /// Fills a slot.
    pub fn encode(&self) -> [u8; RX_SLOT] {
        let mut slot = [0; RX_SLOT];
        slot[0..2].copy_from_slice(&self.id.to_le_bytes());
        slot[4..8].copy_from_slice(&self.gref.0.to_le_bytes());
        slot
    }
}

/// One piece of a received packet (`struct netif_rx_response`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxResponse {
    /// The request's.
    pub id: u16,
    /// Where in the page the data begin, in bytes.
    pub offset: u16,
    /// Of [`rx_flag`].
    pub flags: u16,
    /// Bytes in the page, or one of [`status`] below 0.
    pub status: i16,
}

impl RxResponse {
    /// Reads a slot.
    pub fn decode(slot: &[u8; RX_SLOT]) -> Self {
        Self {
            id: u16_at(slot, 0),
            offset: u16_at(slot, 2),
            flags: u16_at(slot, 4),
            status: u16_at(slot, 6).cast_signed(),
        }
    }

    /// Fills a slot.
    pub fn encode(&self) -> [u8; RX_SLOT] {
        let mut slot = [0; RX_SLOT];
        slot[0..2].copy_from_slice(&self.id.to_le_bytes());
        slot[2..4].copy_from_slice(&self.offset.to_le_bytes());
        slot[4..6].copy_from_slice(&self.flags.to_le_bytes());
        slot[6..8].copy_from_slice(&self.status.to_le_bytes());
        slot
    }
}

/// How a packet is to be cut (`XEN_NETIF_GSO_TYPE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoType {
    /// Not at all.
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
}

/// What a slot says that carries no data (`struct netif_extra_info`). Its first byte is a type, its second has the
/// flag [`Extra::MORE`]; six bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// The packet is to be cut into segments.
    Gso {
        /// Bytes of payload in each.
        size: u16,
        /// How.
        kind: GsoType,
    },
    /// The guest wants frames to this group.
    McastAdd([u8; 6]),
    /// The guest no longer wants them.
    McastDel([u8; 6]),
    /// The packet's hash.
    Hash {
        /// Which fields were hashed: one bit of the control ring's hash types.
        kind: u8,
        /// XEN_NETIF_CTRL_HASH_ALGORITHM_*.
        algorithm: u8,
        /// The value.
        value: u32,
    },
    /// How many bytes are free before the packet (XEN_NETIF_EXTRA_TYPE_XDP; Linux' header only).
    Xdp {
        /// Bytes.
        headroom: u16,
    },
}

/// An extra that means nothing here: its type, or for GSO the kind of cutting, is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadExtra {
    /// The first byte.
    #[error("an extra of type {0}")]
    Type(u8),
    /// A GSO type.
    #[error("GSO of type {0}")]
    Gso(u8),
}

impl Extra {
    /// Another extra follows (XEN_NETIF_EXTRA_FLAG_MORE).
    pub const MORE: u8 = 1;
    /// Bytes of an extra, the first of a slot.
    pub const SIZE: usize = 8;

    /// Reads an extra, and whether another one follows.
    ///
    /// # Errors
    /// When the type is unknown.
    pub fn decode(slot: &[u8]) -> (Result<Self, BadExtra>, bool) {
        let mac = || [slot[2], slot[3], slot[4], slot[5], slot[6], slot[7]];
        let extra = match slot[0] {
            1 => match slot[4] {
                0 => Ok(GsoType::None),
                1 => Ok(GsoType::TcpV4),
                2 => Ok(GsoType::TcpV6),
                other => Err(BadExtra::Gso(other)),
            }
            .map(|kind| Self::Gso { size: u16_at(slot, 2), kind }),
            2 => Ok(Self::McastAdd(mac())),
            3 => Ok(Self::McastDel(mac())),
            4 => Ok(Self::Hash { kind: slot[2], algorithm: slot[3], value: u32_at(slot, 4) }),
            5 => Ok(Self::Xdp { headroom: u16_at(slot, 2) }),
            other => Err(BadExtra::Type(other)),
        };
        (extra, slot[1] & Self::MORE != 0)
    }

    /// The bytes of an extra; `more` if another one follows.
    pub fn encode(&self, more: bool) -> [u8; Self::SIZE] {
        let mut slot = [0; Self::SIZE];
        slot[1] = u8::from(more);
        match self {
            Self::Gso { size, kind } => {
                slot[0] = 1;
                slot[2..4].copy_from_slice(&size.to_le_bytes());
                slot[4] = match kind {
                    GsoType::None => 0,
                    GsoType::TcpV4 => 1,
                    GsoType::TcpV6 => 2,
                };
            }
            Self::McastAdd(mac) => {
                slot[0] = 2;
                slot[2..8].copy_from_slice(mac);
            }
            Self::McastDel(mac) => {
                slot[0] = 3;
                slot[2..8].copy_from_slice(mac);
            }
            Self::Hash { kind, algorithm, value } => {
                slot[0] = 4;
                slot[2] = *kind;
                slot[3] = *algorithm;
                slot[4..8].copy_from_slice(&value.to_le_bytes());
            }
            Self::Xdp { headroom } => {
                slot[0] = 5;
                slot[2..4].copy_from_slice(&headroom.to_le_bytes());
            }
        }
        slot
    }
}

/// Requests on the control ring (XEN_NETIF_CTRL_TYPE_*).
pub mod ctrl_type {
    /// Which hash types there are.
    pub const GET_HASH_FLAGS: u16 = 1;
    /// Which hash types to use.
    pub const SET_HASH_FLAGS: u16 = 2;
    /// The key: a grant and a length.
    pub const SET_HASH_KEY: u16 = 3;
    /// How many entries the table may have.
    pub const GET_HASH_MAPPING_SIZE: u16 = 4;
    /// How many entries the table has.
    pub const SET_HASH_MAPPING_SIZE: u16 = 5;
    /// Entries: a grant, a length and an offset.
    pub const SET_HASH_MAPPING: u16 = 6;
    /// How to hash.
    pub const SET_HASH_ALGORITHM: u16 = 7;
    /// How many grants may be kept.
    pub const GET_GREF_MAPPING_SIZE: u16 = 8;
    /// Grants to keep.
    pub const ADD_GREF_MAPPING: u16 = 9;
    /// Grants to give back.
    pub const DEL_GREF_MAPPING: u16 = 10;
}

/// How control requests end (XEN_NETIF_CTRL_STATUS_*).
pub mod ctrl_status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// This backend does not do that.
    pub const NOT_SUPPORTED: u32 = 1;
    /// The request was wrong.
    pub const INVALID_PARAMETER: u32 = 2;
    /// There is no room for so much.
    pub const BUFFER_OVERFLOW: u32 = 3;
}

/// Types of hash (XEN_NETIF_CTRL_HASH_TYPE_*), as flags.
pub mod hash_type {
    /// Addresses of IPv4.
    pub const IPV4: u32 = 1;
    /// Addresses and ports of TCP over IPv4.
    pub const IPV4_TCP: u32 = 2;
    /// Addresses of IPv6.
    pub const IPV6: u32 = 4;
    /// Addresses and ports of TCP over IPv6.
    pub const IPV6_TCP: u32 = 8;
}

/// A control request (`struct xen_netif_ctrl_request`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtrlRequest {
    /// Comes back in the response.
    pub id: u16,
    /// Of [`ctrl_type`].
    pub kind: u16,
    /// What the type needs.
    pub data: [u32; 3],
}

impl CtrlRequest {
    /// Bytes of a request.
    pub const SIZE: usize = 16;

    /// Reads a slot.
    pub fn decode(slot: &[u8]) -> Self {
        Self { id: u16_at(slot, 0), kind: u16_at(slot, 2), data: [u32_at(slot, 4), u32_at(slot, 8), u32_at(slot, 12)] }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut slot = [0; Self::SIZE];
        slot[0..2].copy_from_slice(&self.id.to_le_bytes());
        slot[2..4].copy_from_slice(&self.kind.to_le_bytes());
        for (index, word) in self.data.iter().enumerate() {
            slot[4 + 4 * index..8 + 4 * index].copy_from_slice(&word.to_le_bytes());
        }
        slot
    }
}

/// The answer to a control request (`struct xen_netif_ctrl_response`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtrlResponse {
    /// The request's.
    pub id: u16,
    /// The request's.
    pub kind: u16,
    /// Of [`ctrl_status`].
    pub status: u32,
    /// What was asked for.
    pub data: u32,
}

impl CtrlResponse {
    /// Bytes of a response.
    pub const SIZE: usize = 12;

    /// Reads a slot.
    pub fn decode(slot: &[u8]) -> Self {
        Self { id: u16_at(slot, 0), kind: u16_at(slot, 2), status: u32_at(slot, 4), data: u32_at(slot, 8) }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut slot = [0; Self::SIZE];
        slot[0..2].copy_from_slice(&self.id.to_le_bytes());
        slot[2..4].copy_from_slice(&self.kind.to_le_bytes());
        slot[4..8].copy_from_slice(&self.status.to_le_bytes());
        slot[8..12].copy_from_slice(&self.data.to_le_bytes());
        slot
    }
}
