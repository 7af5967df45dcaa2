//! Fields of packets: where they are, what must hold for them to be there, and what nft calls them.

use serde::{Deserialize, Serialize};

/// Something a rule can look at. The names are nft's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "each is nft's own word, given in `name`")]
pub enum Field {
    Iifname,
    Oifname,
    IpSaddr,
    Ip6Saddr,
}

/// Where a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// enum nft_meta_keys: a device's name.
    Meta(u32),
    /// From the beginning of the IP header so many bytes on, so many bytes long.
    Network(u32, u32),
}

pub(super) struct Layout {
    pub(super) name: &'static str,
    pub(super) place: Place,
    /// NFPROTO_IPV4 or NFPROTO_IPV6, where the packet must be of one of them.
    pub(super) of: Option<u8>,
}

/// enum nft_meta_keys.
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
pub(super) const META_NFPROTO: u32 = 15;

impl Field {
    pub(super) fn layout(self) -> Layout {
        let (name, place, of) = match self {
            Self::Iifname => ("iifname", Place::Meta(META_IIFNAME), None),
            Self::Oifname => ("oifname", Place::Meta(META_OIFNAME), None),
            Self::IpSaddr => ("ip saddr", Place::Network(12, 4), Some(2)),
            Self::Ip6Saddr => ("ip6 saddr", Place::Network(8, 16), Some(10)),
        };
        Layout { name, place, of }
    }
}
