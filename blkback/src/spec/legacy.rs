//! The prefixes of xend's days, `phy:` to `tap:qcow:`, and what has become of each.

use super::{Format, TargetKind};

/// What a prefix says about the disk.
pub(super) enum Meaning {
    /// How the target is opened.
    Kind(TargetKind),
    /// What is inside the image.
    Format(Format),
    /// A hotplug program that makes the target a block device.
    Script(&'static str),
    /// Nothing any more.
    Nothing,
    /// It named a driver this backend does not replace; the text says what does.
    Gone(&'static str),
}

/// A prefix, with its colon, what it means and the note that its reader gets.
pub(super) struct Prefix {
    pub(super) name: &'static str,
    pub(super) meaning: Meaning,
    pub(super) note: &'static str,
}

const fn prefix(name: &'static str, meaning: Meaning, note: &'static str) -> Prefix {
    Prefix { name, meaning, note }
}

const BLKTAP: &str = "blktap is not involved: the backend opens the target itself";

/// All known prefixes. The order does not matter, as each ends in a colon and none contains another one.
pub(super) const PREFIXES: [Prefix; 19] = [
    prefix("phy:", Meaning::Kind(TargetKind::Phy), "the target is opened as a block device"),
    prefix(
        "file:",
        Meaning::Kind(TargetKind::File),
        "the target is opened as a file; no loop device is needed any more",
    ),
    prefix("tap:", Meaning::Nothing, BLKTAP),
    prefix("tap2:", Meaning::Nothing, BLKTAP),
    prefix("tapdisk:", Meaning::Nothing, BLKTAP),
    prefix("aio:", Meaning::Nothing, "asynchronous I/O is the only kind there is"),
    prefix(
        "sync:",
        Meaning::Nothing,
        "the disk is served asynchronously; the guest's flushes decide what is on the medium",
    ),
    prefix("ioemu:", Meaning::Nothing, "emulated disks are the device model's; this is the paravirtual one"),
    prefix("raw:", Meaning::Format(Format::Raw), "write format=raw"),
    prefix("qcow:", Meaning::Format(Format::Qcow), "write format=qcow"),
    prefix("qcow2:", Meaning::Format(Format::Qcow2), "write format=qcow2"),
    prefix("vhd:", Meaning::Format(Format::Vhd), "write format=vhd"),
    prefix("qed:", Meaning::Format(Format::Qed), "write format=qed"),
    prefix("iscsi:", Meaning::Script("block-iscsi"), "write script=block-iscsi"),
    prefix("nbd:", Meaning::Script("block-nbd"), "write script=block-nbd"),
    prefix("enbd:", Meaning::Script("block-enbd"), "write script=block-enbd"),
    prefix("drbd:", Meaning::Script("block-drbd"), "write script=block-drbd"),
    prefix(
        "vmdk:",
        Meaning::Gone("make it a block device with `qemu-nbd -f vmdk -c /dev/nbd0 IMAGE` and attach phy:/dev/nbd0"),
        "",
    ),
    prefix("ram:", Meaning::Gone("put a raw image on a tmpfs, or load brd and give /dev/ram0"), ""),
];

/// The prefix this text begins with. `nbd:unix:` and `nbd://` are no prefixes but whole targets.
pub(super) fn prefix_of(text: &str) -> Option<&'static Prefix> {
    if is_nbd(text) { None } else { PREFIXES.iter().find(|p| text.starts_with(p.name)) }
}

/// The two spellings of an NBD export that the backend opens by itself: `nbd:unix:PATH[:EXPORT]` and
/// `nbd://HOST[:PORT]/EXPORT`. Neither was of use in xl's old syntax: it refuses the first as an unknown prefix, and
/// hands the second to a block-nbd script as the host `//HOST`.
pub(super) fn is_nbd(target: &str) -> bool {
    target.starts_with("nbd:unix:") || target.starts_with("nbd://")
}

/// A word that looks like a prefix to xl (small letters and digits up to a colon, then nothing a host name or an
/// iSCSI name would go on with), colon included.
pub(super) fn unknown_prefix(text: &str) -> Option<&str> {
    let colon = text.find(':')?;
    let (word, rest) = (&text[..colon], &text[colon + 1..]);
    let is_word = word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let ends = !rest.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    (is_word && ends).then_some(&text[..=colon])
}
