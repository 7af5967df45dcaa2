//! What backend and frontend agree on, as XenStore keys: pure functions (xen/include/public/io/netif.h).

use std::collections::HashSet;

use hypervisor::{GrantRef, Port};
use xenstore_client::xenbus::{Fault, Keys};

use crate::tap::Features;

/// The frontend's keys that we read; everything else in its directory is never looked at. Its `mac` is not among them:
/// the backend's directory, which the toolstack wrote, has the one that counts.
pub const FRONTEND_KEYS: &[&str] = &[
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
    "multi-queue-num-queues",
    "queue-#/tx-ring-ref",
    "queue-#/rx-ring-ref",
    "queue-#/event-channel",
    "queue-#/event-channel-tx",
    "queue-#/event-channel-rx",
    "ctrl-ring-ref",
    "event-channel-ctrl",
    "request-rx-copy",
    "request-multicast-control",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-gso-tcpv4-prefix",
    "feature-gso-tcpv6-prefix",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "xdp-headroom",
];

/// Largest `xdp-headroom` (XEN_NETIF_MAX_XDP_HEADROOM): more would not fit beside a frame in a page.
const HEADROOM_MAX: u32 = 0x7fff;

/// The frontend's ends of a queue's event channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// One for both directions.
    Shared(Port),
    /// One each (`feature-split-event-channels`).
    Split {
        /// For what the guest sends.
        tx: Port,
        /// For what it receives.
        rx: Port,
    },
}

/// One queue, as the frontend describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueKeys {
    /// The page of the transmit ring.
    pub tx: GrantRef,
    /// The page of the receive ring.
    pub rx: GrantRef,
    /// The event channels.
    pub ports: Ports,
}

/// How a frontend wants to be told that a frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gso {
    /// It cannot.
    #[default]
    No,
    /// By an extra.
    Extra,
    /// By a slot before the first (deprecated).
    Prefix,
}

/// What the guest copes with when it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Receives {
    /// Frames of several slots.
    pub sg: bool,
    /// Large TCP over IPv4.
    pub gso4: Gso,
    /// Large TCP over IPv6.
    pub gso6: Gso,
    /// Partial checksums of IPv4.
    pub checksum4: bool,
    /// Partial checksums of IPv6.
    pub checksum6: bool,
    /// It notifies when it has put requests into an empty ring.
    pub notifies: bool,
}

impl Receives {
    /// What the tap need not do for it.
    pub fn features(&self) -> Features {
        Features {
            checksum: self.checksum4 || self.checksum6,
            tso4: self.sg && self.checksum4 && self.gso4 != Gso::No,
            tso6: self.sg && self.checksum6 && self.gso6 != Gso::No,
        }
    }
}

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// At least one.
    pub queues: Vec<QueueKeys>,
    /// The control ring and its event channel, if there is one.
    pub control: Option<(GrantRef, Port)>,
    /// What the guest can receive.
    pub receives: Receives,
    /// Whether only groups that the guest joined are delivered.
    pub multicast_control: bool,
    /// Bytes to leave free before received frames.
    pub headroom: u16,
}

type Pairs = Vec<(String, String)>;

/// What is published before state 2. All of it stays true for the device's life, so that a frontend that connects
/// again reads the same.
pub fn offer(queues: u32) -> Pairs {
    let flags = [
        ("feature-sg", 1),
        ("feature-gso-tcpv4", 1),
        ("feature-gso-tcpv6", 1),
        ("feature-ipv6-csum-offload", 1),
        ("feature-rx-copy", 1),
        ("feature-rx-flip", 0),
        ("feature-multicast-control", 1),
        ("feature-dynamic-multicast-control", 1),
        ("feature-split-event-channels", 1),
        ("feature-ctrl-ring", 1),
        ("feature-xdp-headroom", 1),
    ];
    let mut keys: Pairs = flags.iter().map(|(key, value)| ((*key).to_owned(), value.to_string())).collect();
    keys.push(("multi-queue-max-queues".to_owned(), queues.to_string()));
    keys
}

const EINVAL: i32 = libc::EINVAL;

/// Reads what the frontend chose; at most `most` queues.
///
/// # Errors
/// When it names something that was not offered, that does not exist, or twice the same.
pub fn agree(keys: &Keys, most: u32) -> Result<Agreed, Fault> {
    if !keys.parse_bool("request-rx-copy")? {
        let text =
            "request-rx-copy is not 1: this backend only copies, it does not flip pages; the guest's driver is too old";
        return Err(keys.fault(libc::EOPNOTSUPP, text));
    }
    let count = keys.parse_u32("multi-queue-num-queues")?.unwrap_or(1);
    if count == 0 || count > most {
        return Err(keys.fault(EINVAL, &format!("multi-queue-num-queues is {count}, not between 1 and {most}")));
    }
    let queues = (0..count)
        .map(|queue| {
            // A frontend with one queue writes its keys where they were before there were several.
            let prefix = if count == 1 { String::new() } else { format!("queue-{queue}/") };
            read_queue(keys, &prefix)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let control = match keys.parse_u32("ctrl-ring-ref")? {
        None => None,
        Some(gref) => Some((GrantRef(gref), Port(keys.require_u32("event-channel-ctrl")?))),
    };
    no_duplicates(keys, &queues, control)?;
    Ok(Agreed {
        queues,
        control,
        receives: read_receives(keys)?,
        multicast_control: keys.parse_bool("request-multicast-control")?,
        headroom: read_headroom(keys)?,
    })
}

fn read_receives(keys: &Keys) -> Result<Receives, Fault> {
    let gso = |name: &str| {
        let prefix = keys.parse_bool(&format!("{name}-prefix"))?;
        Ok::<_, Fault>(match (keys.parse_bool(name)?, prefix) {
            (true, _) => Gso::Extra,
            (false, true) => Gso::Prefix,
            (false, false) => Gso::No,
        })
    };
    Ok(Receives {
        sg: keys.parse_bool("feature-sg")?,
        gso4: gso("feature-gso-tcpv4")?,
        gso6: gso("feature-gso-tcpv6")?,
        // The older of the two was there before there was a key for it: what is not denied is offered.
        checksum4: !keys.parse_bool("feature-no-csum-offload")?,
        checksum6: keys.parse_bool("feature-ipv6-csum-offload")?,
        notifies: keys.parse_bool("feature-rx-notify")?,
    })
}

/// The key `xdp-headroom`, which a frontend may change while it is in state Reconfiguring.
///
/// # Errors
/// When it is no number, or larger than the protocol allows, or leaves no room for a frame in a page.
pub fn read_headroom(keys: &Keys) -> Result<u16, Fault> {
    let headroom = keys.parse_u32("xdp-headroom")?.unwrap_or(0);
    match u16::try_from(headroom) {
        Ok(headroom) if usize::from(headroom) <= hypervisor::PAGE_SIZE / 2 => Ok(headroom),
        _ => {
            let most = HEADROOM_MAX.min(hypervisor::PAGE_SIZE as u32 / 2);
            Err(keys.fault(EINVAL, &format!("xdp-headroom is {headroom}, more than {most}")))
        }
    }
}

fn read_queue(keys: &Keys, prefix: &str) -> Result<QueueKeys, Fault> {
    let gref = |name: &str| keys.require_u32(&format!("{prefix}{name}")).map(GrantRef);
    let port = |name: &str| Ok::<_, Fault>(keys.parse_u32(&format!("{prefix}{name}"))?.map(Port));
    let ports = match (port("event-channel-tx")?, port("event-channel-rx")?, port("event-channel")?) {
        (Some(tx), Some(rx), _) => Ports::Split { tx, rx },
        (_, _, Some(port)) => Ports::Shared(port),
        (None, None, None) => {
            return Err(keys.fault(libc::ENOENT, &format!("{prefix}event-channel is missing")));
        }
        _ => {
            let text = format!("{prefix}event-channel-tx and {prefix}event-channel-rx: only one of them is there");
            return Err(keys.fault(libc::ENOENT, &text));
        }
    };
    Ok(QueueKeys { tx: gref("tx-ring-ref")?, rx: gref("rx-ring-ref")?, ports })
}

fn no_duplicates(keys: &Keys, queues: &[QueueKeys], control: Option<(GrantRef, Port)>) -> Result<(), Fault> {
    let mut refs = HashSet::new();
    let control_ref = control.map(|(gref, _)| gref);
    let named = queues.iter().flat_map(|queue| [queue.tx, queue.rx]).chain(control_ref);
    for gref in named {
        if !refs.insert(gref) {
            return Err(keys.fault(EINVAL, &format!("grant {gref} is named for two rings")));
        }
    }
    let mut ports = HashSet::new();
    let of_queues = queues.iter().flat_map(|queue| match queue.ports {
        Ports::Shared(port) => [Some(port), None],
        Ports::Split { tx, rx } => [Some(tx), Some(rx)],
    });
    for port in of_queues.flatten().chain(control.map(|(_, port)| port)) {
        if !ports.insert(port) {
            return Err(keys.fault(EINVAL, &format!("event channel {port} is named twice")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &[(&str, &str)] =
        &[("request-rx-copy", "1"), ("tx-ring-ref", "8"), ("rx-ring-ref", "9"), ("event-channel", "3")];

    fn agreed(more: &[(&str, &str)]) -> Result<Agreed, Fault> {
        agree(&Keys::from_pairs(GOOD.iter().chain(more).copied()), 4)
    }

    #[test]
    fn the_least_a_frontend_says() {
        let agreed = agreed(&[]).unwrap();
        let queue = QueueKeys { tx: GrantRef(8), rx: GrantRef(9), ports: Ports::Shared(Port(3)) };
        assert_eq!(agreed.queues, [queue]);
        // Partial checksums of IPv4 are the only thing that has to be denied.
        assert_eq!(agreed.receives, Receives { checksum4: true, ..Receives::default() });
        assert_eq!(agreed.receives.features(), Features { checksum: true, tso4: false, tso6: false });
        assert_eq!((agreed.control, agreed.multicast_control, agreed.headroom), (None, false, 0));
    }

    #[test]
    fn all_that_linux_netfront_says() {
        let agreed = agreed(&[
            ("event-channel-tx", "3"),
            ("event-channel-rx", "4"),
            ("feature-rx-notify", "1"),
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", "1"),
            ("feature-gso-tcpv6", "1"),
            ("feature-ipv6-csum-offload", "1"),
            ("xdp-headroom", "256"),
            ("request-multicast-control", "1"),
            ("ctrl-ring-ref", "10"),
            ("event-channel-ctrl", "5"),
        ])
        .unwrap();
        assert_eq!(agreed.queues[0].ports, Ports::Split { tx: Port(3), rx: Port(4) });
        assert_eq!(agreed.receives.features(), Features { checksum: true, tso4: true, tso6: true });
        assert!(agreed.receives.notifies && agreed.multicast_control);
        assert_eq!((agreed.control, agreed.headroom), (Some((GrantRef(10), Port(5))), 256));
    }

    #[test]
    fn several_queues() {
        let agreed = agree(
            &Keys::from_pairs([
                ("request-rx-copy", "1"),
                ("multi-queue-num-queues", "2"),
                ("queue-0/tx-ring-ref", "1"),
                ("queue-0/rx-ring-ref", "2"),
                ("queue-0/event-channel-tx", "1"),
                ("queue-0/event-channel-rx", "2"),
                ("queue-1/tx-ring-ref", "3"),
                ("queue-1/rx-ring-ref", "4"),
                ("queue-1/event-channel", "3"),
            ]),
            2,
        );
        assert_eq!(agreed.unwrap().queues.len(), 2);
    }

    #[test]
    fn what_a_guest_cannot_use_is_left_to_the_kernel() {
        let features = |more: &[(&str, &str)]| agreed(more).unwrap().receives.features();
        let none = Features::default();
        let gso = [("feature-gso-tcpv4", "1"), ("feature-gso-tcpv6", "1")];
        assert_eq!(features(&[&gso[..], &[("feature-no-csum-offload", "1"), ("feature-sg", "1")]].concat()), none);
        let sum = Features { checksum: true, ..none };
        assert_eq!(features(&gso), sum, "without sg");
        assert_eq!(features(&[&gso[..], &[("feature-sg", "1")]].concat()), Features { tso4: true, ..sum });
        let prefix = agreed(&[("feature-gso-tcpv4-prefix", "1"), ("feature-sg", "1")]).unwrap().receives;
        assert_eq!((prefix.gso4, prefix.features().tso4), (Gso::Prefix, true));
    }

    #[test]
    fn bad_choices_are_refused_with_a_reason() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (&[("request-rx-copy", "0")], "only copies"),
            (&[("request-rx-copy", "yes")], "not a number"),
            (&[("tx-ring-ref", "-1")], "tx-ring-ref is not a number"),
            (&[("event-channel", "4294967296")], "event-channel is not a number"),
            (&[("rx-ring-ref", "8")], "grant 8 is named for two rings"),
            (&[("ctrl-ring-ref", "9"), ("event-channel-ctrl", "7")], "grant 9 is named for two rings"),
            (&[("ctrl-ring-ref", "10"), ("event-channel-ctrl", "3")], "event channel 3 is named twice"),
            (&[("ctrl-ring-ref", "10")], "event-channel-ctrl is missing"),
            (&[("event-channel-tx", "4"), ("event-channel-rx", "4")], "event channel 4 is named twice"),
            (&[("multi-queue-num-queues", "0")], "not between 1 and 4"),
            (&[("multi-queue-num-queues", "5")], "not between 1 and 4"),
            (&[("multi-queue-num-queues", "4294967297")], "not a number"),
            (&[("multi-queue-num-queues", "2")], "queue-0/event-channel is missing"),
            (&[("xdp-headroom", "32768")], "xdp-headroom is 32768"),
            (&[("xdp-headroom", "4096")], "xdp-headroom is 4096"),
            (&[("feature-sg", "maybe")], "feature-sg is not a number"),
        ];
        for (pairs, reason) in cases {
            let fault = agreed(pairs).expect_err(reason);
            assert!(fault.text.contains(reason), "{}", fault.text);
        }
        let half = [("request-rx-copy", "1"), ("tx-ring-ref", "8"), ("rx-ring-ref", "9"), ("event-channel-tx", "3")];
        assert!(agree(&Keys::from_pairs(half), 4).unwrap_err().text.contains("only one of them"));
    }
}
