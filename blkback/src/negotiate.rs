//! What backend and frontend agree on, as XenStore keys: pure functions (xen/include/public/io/blkif.h).

use std::collections::HashSet;

use hypervisor::{GrantRef, Port};
use xenstore_client::xenbus::{Fault, Keys};

use crate::abi::Protocol;
use crate::image::Image;

/// The frontend's keys that we read; everything else in its directory is never looked at.
pub const FRONTEND_KEYS: &[&str] = &[
    "ring-ref",
    "ring-ref#",
    "event-channel",
    "ring-page-order",
    "num-ring-pages",
    "multi-queue-num-queues",
    "queue-#/ring-ref",
    "queue-#/ring-ref#",
    "queue-#/event-channel",
    "protocol",
    "feature-persistent",
];

/// What this backend offers at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rings may be 2^order pages.
    pub ring_page_order: u32,
    /// Queues of one disk.
    pub queues: u32,
    /// Segments of an indirect request; 0 to offer none.
    pub indirect_segments: u32,
    /// Whether pages may stay mapped.
    pub persistent: bool,
    /// Whether flushes are offered.
    pub flush: bool,
    /// Whether barriers are offered.
    pub barrier: bool,
    /// Whether discards are, on disks that can.
    pub discard: bool,
}

impl Default for Limits {
    /// What Linux' backend offers: 16 pages, a queue per processor, 256 segments, persistent grants, barriers.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let queues = processors.min(16) as u32;
        Self {
            ring_page_order: 4,
            queues,
            indirect_segments: 256,
            persistent: true,
            flush: true,
            barrier: true,
            discard: true,
        }
    }
}

/// One queue, as the frontend describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueKeys {
    /// The pages of the ring.
    pub ring: Vec<GrantRef>,
    /// The frontend's end of the event channel.
    pub port: Port,
}

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The layout of the slots.
    pub protocol: Protocol,
    /// Whether the frontend uses the same pages again and again.
    pub persistent: bool,
    /// At least one.
    pub queues: Vec<QueueKeys>,
}

type Pairs = Vec<(String, String)>;

fn pair(key: &str, value: impl ToString) -> (String, String) {
    (key.to_owned(), value.to_string())
}

/// What is published before state 2, so that the frontend can choose its rings.
pub fn offer(limits: &Limits) -> Pairs {
    let mut keys = vec![
        pair("max-ring-page-order", limits.ring_page_order),
        pair("max-ring-pages", 1u32 << limits.ring_page_order),
        pair("multi-queue-max-queues", limits.queues),
    ];
    if limits.indirect_segments > 0 {
        keys.push(pair("feature-max-indirect-segments", limits.indirect_segments));
    }
    keys
}

/// Bits of the key `info` (VDISK_*).
const VDISK_CDROM: u32 = 1;
const VDISK_REMOVABLE: u32 = 2;
const VDISK_READONLY: u32 = 4;

/// What the toolstack wants a disk to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kind {
    /// Writes are refused.
    pub read_only: bool,
    /// A CD-ROM drive.
    pub cdrom: bool,
    /// A drive whose disk can be changed.
    pub removable: bool,
    /// DISCARD is offered.
    pub discard: bool,
    /// So is secure discard; only along with it.
    pub secure: bool,
}

/// The disk itself: published when it is open, and again together with state 4.
pub fn describe(image: &Image, limits: &Limits, kind: Kind) -> Pairs {
    let Kind { read_only, cdrom, removable, discard, secure } = kind;
    let bit = |on, bit| if on { bit } else { 0 };
    let info = bit(cdrom, VDISK_CDROM) | bit(removable, VDISK_REMOVABLE) | bit(read_only, VDISK_READONLY);
    let mut keys = vec![
        // Both: a frontend that knows flushes prefers them, and does not stop everything for each.
        pair("feature-flush-cache", u32::from(limits.flush && !read_only)),
        pair("feature-barrier", u32::from(limits.barrier && !read_only)),
        pair("feature-persistent", u32::from(limits.persistent)),
        pair("feature-discard", u32::from(discard)),
        // Always in units of 512 bytes, whatever sector-size says: so has Linux it, and so says blkif.h today.
        pair("sectors", image.sectors()),
        pair("info", info),
        pair("sector-size", image.sector_size),
        pair("physical-sector-size", image.physical_sector_size),
    ];
    if discard {
        keys.push(pair("discard-granularity", image.discard_granularity));
        keys.push(pair("discard-alignment", image.discard_alignment));
        keys.push(pair("discard-secure", u32::from(secure)));
    }
    keys
}

const EINVAL: i32 = libc::EINVAL;

/// Reads what the frontend chose.
///
/// # Errors
/// When it names something that was not offered, that does not exist, or twice the same.
pub fn agree(keys: &Keys, limits: &Limits) -> Result<Agreed, Fault> {
    let protocol = Protocol::parse(keys.get("protocol"))
        .ok_or_else(|| keys.fault(libc::ENOSYS, &format!("unknown protocol {:?}", keys.get("protocol"))))?;
    let persistent = limits.persistent && keys.parse_bool("feature-persistent")?;
    let count = keys.parse_u32("multi-queue-num-queues")?.unwrap_or(1);
    if count == 0 || count > limits.queues {
        let text = format!("multi-queue-num-queues is {count}, not between 1 and {}", limits.queues);
        return Err(keys.fault(EINVAL, &text));
    }
    let pages = ring_pages(keys, limits)?;
    let queues = (0..count)
        .map(|queue| {
            // A frontend with one queue writes its keys where they were before there were several.
            let prefix = if count == 1 { String::new() } else { format!("queue-{queue}/") };
            read_queue(keys, &prefix, pages)
        })
        .collect::<Result<Vec<_>, _>>()?;

    let mut refs = HashSet::new();
    if let Some(twice) = queues.iter().flat_map(|queue| &queue.ring).find(|&&gref| !refs.insert(gref)) {
        return Err(keys.fault(EINVAL, &format!("grant {twice} is named as two pages of the rings")));
    }
    let mut ports = HashSet::new();
    if let Some(twice) = queues.iter().map(|queue| queue.port).find(|&port| !ports.insert(port)) {
        return Err(keys.fault(EINVAL, &format!("event channel {twice} is named for two queues")));
    }
    Ok(Agreed { protocol, persistent, queues })
}

/// Pages of each ring, and whether the frontend speaks of several pages at all.
fn ring_pages(keys: &Keys, limits: &Limits) -> Result<Option<u32>, Fault> {
    let order = match (keys.parse_u32("ring-page-order")?, keys.parse_u32("num-ring-pages")?) {
        (Some(order), _) => order,
        (None, None) => return Ok(None),
        // What frontends wrote before ring-page-order was agreed on.
        (None, Some(pages)) if pages.is_power_of_two() => pages.trailing_zeros(),
        (None, Some(pages)) => return Err(keys.fault(EINVAL, &format!("num-ring-pages is {pages}, no power of two"))),
    };
    if order > limits.ring_page_order {
        let text = format!("ring-page-order is {order}, more than {}", limits.ring_page_order);
        return Err(keys.fault(EINVAL, &text));
    }
    Ok(Some(1 << order))
}

fn read_queue(keys: &Keys, prefix: &str, pages: Option<u32>) -> Result<QueueKeys, Fault> {
    let gref = |name: &str| keys.parse_u32(&format!("{prefix}{name}"));
    let (single, numbered) = (gref("ring-ref")?, gref("ring-ref0")?);
    let ring = match (pages, single, numbered) {
        // Both names of the only page are in use in the wild. Which one counts where both stand there: the one that
        // goes with ring-page-order being there or not; the other is stale.
        (None, Some(only), _) | (None, None, Some(only)) | (Some(1), _, Some(only)) | (Some(1), Some(only), None) => {
            vec![GrantRef(only)]
        }
        (None | Some(1), None, None) => return Err(keys.fault(libc::ENOENT, &format!("{prefix}ring-ref is missing"))),
        (Some(pages), _, _) => (0..pages)
            .map(|page| keys.require_u32(&format!("{prefix}ring-ref{page}")).map(GrantRef))
            .collect::<Result<_, _>>()?,
    };
    let port = Port(keys.require_u32(&format!("{prefix}event-channel"))?);
    Ok(QueueKeys { ring, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        ring_page_order: 4,
        queues: 4,
        indirect_segments: 256,
        persistent: true,
        flush: true,
        barrier: true,
        discard: true,
    };

    fn agreed(pairs: &[(&str, &str)]) -> Result<Agreed, Fault> {
        agree(&Keys::from_pairs(pairs.iter().copied()), &LIMITS)
    }

    fn rings(pairs: &[(&str, &str)]) -> Vec<Vec<u32>> {
        let agreed = agreed(pairs).unwrap();
        agreed.queues.iter().map(|queue| queue.ring.iter().map(|gref| gref.0).collect()).collect()
    }

    #[test]
    fn one_page_under_every_name() {
        let port = ("event-channel", "9");
        assert_eq!(rings(&[("ring-ref", "8"), port]), [[8]]);
        assert_eq!(rings(&[("ring-ref0", "8"), port]), [[8]]);
        assert_eq!(rings(&[("ring-page-order", "0"), ("ring-ref0", "8"), port]), [[8]]);
        assert_eq!(rings(&[("ring-page-order", "0"), ("ring-ref", "8"), port]), [[8]]);
        assert_eq!(rings(&[("num-ring-pages", "1"), ("ring-ref", "8"), port]), [[8]]);
        // A guest that was resumed with fewer pages leaves ring-ref0 behind.
        assert_eq!(rings(&[("ring-ref", "8"), ("ring-ref0", "1"), port]), [[8]]);
        assert_eq!(rings(&[("ring-page-order", "0"), ("ring-ref", "8"), ("ring-ref0", "1"), port]), [[1]]);
    }

    #[test]
    fn several_pages_and_queues() {
        let port = ("event-channel", "9");
        let two = [("ring-page-order", "1"), ("ring-ref0", "5"), ("ring-ref1", "6"), port];
        assert_eq!(rings(&two), [[5, 6]]);
        let queues = [
            ("multi-queue-num-queues", "2"),
            ("queue-0/ring-ref", "5"),
            ("queue-0/event-channel", "1"),
            ("queue-1/ring-ref", "6"),
            ("queue-1/event-channel", "2"),
        ];
        assert_eq!(rings(&queues), [[5], [6]]);
        let one = [("multi-queue-num-queues", "1"), ("ring-ref", "5"), port];
        assert_eq!(rings(&one), [[5]]);
    }

    #[test]
    fn bad_choices_are_refused_with_a_reason() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (&[], "ring-ref is missing"),
            (&[("ring-ref", "8")], "event-channel is missing"),
            (&[("ring-ref", "-1"), ("event-channel", "9")], "ring-ref is not a number"),
            (&[("ring-ref", "8"), ("event-channel", "4294967296")], "event-channel is not a number"),
            (&[("protocol", "vax-abi"), ("ring-ref", "8"), ("event-channel", "9")], "unknown protocol"),
            (&[("ring-page-order", "5"), ("ring-ref0", "8")], "ring-page-order is 5, more than 4"),
            (&[("ring-page-order", "32")], "more than 4"),
            (&[("ring-page-order", "-1")], "not a number"),
            (&[("num-ring-pages", "3")], "no power of two"),
            (&[("num-ring-pages", "0")], "no power of two"),
            (&[("ring-page-order", "1"), ("ring-ref0", "5"), ("event-channel", "9")], "ring-ref1 is missing"),
            (
                &[("ring-page-order", "1"), ("ring-ref0", "5"), ("ring-ref1", "5"), ("event-channel", "9")],
                "grant 5 is named as two pages",
            ),
            (&[("multi-queue-num-queues", "0")], "not between 1 and 4"),
            (&[("multi-queue-num-queues", "5")], "not between 1 and 4"),
            (&[("multi-queue-num-queues", "99999999999")], "not a number"),
            (
                &[
                    ("multi-queue-num-queues", "2"),
                    ("queue-0/ring-ref", "5"),
                    ("queue-0/event-channel", "1"),
                    ("queue-1/ring-ref", "6"),
                    ("queue-1/event-channel", "1"),
                ],
                "event channel 1 is named for two queues",
            ),
        ];
        for (pairs, reason) in cases {
            let fault = agreed(pairs).expect_err(reason);
            assert!(fault.text.contains(reason), "{}", fault.text);
        }
    }

    #[test]
    fn persistent_grants_need_both_sides() {
        let keys = [("ring-ref", "8"), ("event-channel", "9"), ("feature-persistent", "1")];
        assert!(agreed(&keys).unwrap().persistent);
        assert!(!agreed(&keys[..2]).unwrap().persistent);
        let without = Limits { persistent: false, ..LIMITS };
        assert!(!agree(&Keys::from_pairs(keys), &without).unwrap().persistent);
    }
}
