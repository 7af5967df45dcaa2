//! Virtual device names and numbers: `xvda`, `hdc`, `sda1`, `d3p2`, `0x3` ↔ the integer in XenStore.
//!
//! The number is the name of the device's directory and the value of `virtual-device`; how disk and partition are
//! packed into it is laid down in xen-vbd-interface(7). What is accepted here is what `libxl` accepts
//! (`libxl__device_disk_dev_number`), plus `d0` alone (the manual has it, `libxl` does not) and xend's `/dev/xvda5`,
//! minus the slips of `libxl`'s scanner, each of which yields some other device's number: `xvd` without a letter
//! (disk -1), `hd` (taken for `hdb`), an empty string (device 0).

use std::fmt;
use std::str::FromStr;

/// Set in numbers of the form `1 << 28 | disk << 8 | partition`.
const EXTENDED: u32 = 1 << 28;
/// The first number xen-vbd-interface(7) reserves; Linux' blkfront ignores devices from here on.
const RESERVED: u32 = 2 << 28;
/// Linux' block majors, which the short encodings borrow.
const XVD_MAJOR: u32 = 202;
/// SCSI disks in the order Linux numbers them, 16 to a major. Only the first is still valid as a name.
const SD_MAJORS: [u32; 16] = [8, 65, 66, 67, 68, 69, 70, 71, 128, 129, 130, 131, 132, 133, 134, 135];
/// IDE disks, two to a major. Only the first two majors are still valid as names.
const HD_MAJORS: [u32; 10] = [3, 22, 33, 34, 56, 57, 88, 89, 90, 91];

const FORMS: &str = "write xvda, xvdb2, hda, sda1, d0p0 or a number (xen-vbd-interface(7))";

/// A guest's virtual block device, as the number that stands in XenStore.
///
/// Two spellings of one number are the same device: `d0p0`, `/dev/xvda`, `0xca00` and `xvda` are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vdev {
    number: u32,
}

/// Why a text is not a virtual device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {help}")]
pub struct VdevError {
    /// Where the trouble begins, in bytes from the start of the text.
    pub offset: usize,
    /// How many bytes it covers; 0 where something is missing.
    pub len: usize,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl VdevError {
    fn new(offset: usize, len: usize, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { offset, len, message: message.into(), help: help.into() }
    }
}

/// A family of names and how far its encodings reach.
struct Family {
    prefix: &'static str,
    max_disk: u32,
    max_partition: u32,
    encode: fn(u32, u32) -> u32,
}

const FAMILIES: [Family; 3] = [
    Family { prefix: "xvd", max_disk: (1 << 20) - 1, max_partition: 255, encode: xvd_number },
    Family { prefix: "sd", max_disk: 15, max_partition: 15, encode: sd_number },
    Family { prefix: "hd", max_disk: 3, max_partition: 63, encode: hd_number },
];

fn xvd_number(disk: u32, partition: u32) -> u32 {
    // The manual wants the short form wherever it fits: guests from before the extended one know no other.
    if disk <= 15 && partition <= 15 {
        XVD_MAJOR << 8 | disk << 4 | partition
    } else {
        EXTENDED | disk << 8 | partition
    }
}

fn sd_number(disk: u32, partition: u32) -> u32 {
    SD_MAJORS[(disk / 16) as usize] << 8 | (disk % 16) << 4 | partition
}

fn hd_number(disk: u32, partition: u32) -> u32 {
    HD_MAJORS[(disk / 2) as usize] << 8 | (disk % 2) << 6 | partition
}

impl Vdev {
    /// Reads a device name, a `dNpM` pair, or a plain number (decimal, `0x` hexadecimal, leading-0 octal); a leading
    /// `/dev/` is skipped.
    pub fn parse(text: &str) -> Result<Self, VdevError> {
        let name = text.strip_prefix("/dev/").unwrap_or(text);
        let at = text.len() - name.len();
        let number = if name.is_empty() {
            return Err(VdevError::new(at, 0, "the virtual device is missing", FORMS));
        } else if name.starts_with(|c: char| c.is_ascii_digit()) {
            plain_number(name, at)?
        } else if let Some(family) = FAMILIES.iter().find(|f| name.starts_with(f.prefix)) {
            family.number(name, at)?
        } else if name.starts_with('d') && name[1..].starts_with(|c: char| c.is_ascii_digit()) {
            disk_and_partition(name, at)?
        } else {
            let lower = name.to_ascii_lowercase();
            let help = if lower != name && Self::parse(&lower).is_ok() {
                format!("names are in small letters: write {lower}")
            } else {
                FORMS.to_owned()
            };
            return Err(VdevError::new(at, name.len(), format!("unknown virtual device `{name}`"), help));
        };
        Ok(Self { number })
    }

    /// The device with this number. Every number is taken as it is, for XenStore may hold what no name stands for.
    pub fn from_number(n: u32) -> Self {
        Self { number: n }
    }

    /// The number: `virtual-device` in the frontend's directory, and the last part of both directories' paths.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The canonical name, to be written to the backend's `dev` key: `xvda`, `hda`, `sda1`, `xvdtq37`.
    ///
    /// A number that no name stands for (NetBSD guests' 3, Linux' majors beyond `sdp` and `hdd`, an extended number
    /// that should have been a short one) is its own name, in decimal. So `parse(name())` is always the same device
    /// as long as the number is below the reserved range.
    pub fn name(&self) -> String {
        let (major, minor) = (self.number >> 8, self.number & 0xff);
        match major {
            XVD_MAJOR => named("xvd", minor >> 4, minor & 15),
            8 => named("sd", minor >> 4, minor & 15),
            3 if minor < 128 => named("hd", minor >> 6, minor & 63),
            22 if minor < 128 => named("hd", 2 + (minor >> 6), minor & 63),
            _ => {
                let disk = major & 0xf_ffff;
                if self.number >> 28 == 1 && (disk > 15 || minor > 15) {
                    named("xvd", disk, minor)
                } else {
                    self.number.to_string()
                }
            }
        }
    }
}

impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl FromStr for Vdev {
    type Err = VdevError;

    fn from_str(text: &str) -> Result<Self, VdevError> {
        Self::parse(text)
    }
}

fn named(prefix: &str, disk: u32, partition: u32) -> String {
    let mut name = format!("{prefix}{}", letters(disk));
    if partition > 0 {
        name.push_str(&partition.to_string());
    }
    name
}

/// 0 → a, 25 → z, 26 → aa, 701 → zz, 702 → aaa: base 26 in which no digit is zero.
fn letters(disk: u32) -> String {
    let mut reversed = Vec::new();
    let mut rest = disk + 1;
    while rest > 0 {
        rest -= 1;
        reversed.push(b'a' + (rest % 26) as u8);
        rest /= 26;
    }
    reversed.iter().rev().map(|&b| char::from(b)).collect()
}

impl Family {
    fn number(&self, name: &str, at: usize) -> Result<u32, VdevError> {
        let Self { prefix, max_disk, max_partition, encode } = self;
        let tail = &name[prefix.len()..];
        let digits = tail.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let word = &tail[..tail.len() - digits.len()];
        let (word_at, digits_at) = (at + prefix.len(), at + name.len() - digits.len());
        if word.is_empty() {
            return Err(VdevError::new(
                word_at,
                digits.chars().next().map_or(0, char::len_utf8),
                format!("`{prefix}` needs a disk letter"),
                format!("write {prefix}a for the first disk"),
            ));
        }
        let disk = word
            .bytes()
            .try_fold(0u32, |disk, b| disk.checked_mul(26)?.checked_add(u32::from(b - b'a') + 1))
            .map(|counted_from_one| counted_from_one - 1);
        let partition = partition(digits, digits_at)?;
        let Some(disk) = disk.filter(|d| d <= max_disk) else {
            return Err(VdevError::new(
                word_at,
                word.len(),
                format!("there is no disk {prefix}{word}: the last one is {prefix}{}", letters(*max_disk)),
                beyond(prefix, disk, partition.unwrap_or(u32::MAX)),
            ));
        };
        let Some(partition) = partition.filter(|p| p <= max_partition) else {
            return Err(VdevError::new(
                digits_at,
                digits.len(),
                format!("{prefix} disks have no partition {digits}: the last one is {max_partition}"),
                if *prefix == "xvd" { "choose a lower number" } else { "name the device xvd…, which reaches to 255" },
            ));
        };
        Ok(encode(disk, partition))
    }
}

/// What to use for a disk past the end of its family. xend still knew the higher SCSI and IDE disks; a guest that was
/// installed under such a name can be given the very number xend wrote.
fn beyond(prefix: &str, disk: Option<u32>, partition: u32) -> String {
    let old = match (prefix, disk) {
        ("sd", Some(d)) if d < 256 && partition < 16 => Some(sd_number(d, partition)),
        ("hd", Some(d)) if d < 20 && partition < 64 => Some(hd_number(d, partition)),
        _ => None,
    };
    match old {
        Some(n) => format!("use an xvd name, or the number {n}, which is what xend wrote for it"),
        None if prefix == "xvd" => "choose a lower letter".to_owned(),
        None => "use an xvd name, which reaches further".to_owned(),
    }
}

/// Digits after a disk's letters: none is the whole disk (0). `None` for a number too large for any family.
fn partition(digits: &str, at: usize) -> Result<Option<u32>, VdevError> {
    if let Some((i, c)) = digits.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        return Err(unexpected(c, at + i));
    }
    if digits.starts_with('0') {
        return Err(VdevError::new(
            at,
            digits.len(),
            "a partition number does not begin with 0",
            "leave the number out for the whole disk; the first partition is 1",
        ));
    }
    Ok(if digits.is_empty() { Some(0) } else { digits.parse().ok() })
}

fn unexpected(c: char, at: usize) -> VdevError {
    VdevError::new(at, c.len_utf8(), format!("unexpected {c:?} in a virtual device"), FORMS)
}

/// `dN` and `dNpM`. libxl reads the numbers as C does, so that d010p1 is disk 8: refused here, as nobody means it.
fn disk_and_partition(name: &str, at: usize) -> Result<u32, VdevError> {
    let (disk, partition) = match name[1..].split_once('p') {
        Some((disk, partition)) => (disk, Some(partition)),
        None => (&name[1..], None),
    };
    let part_at = at + 1 + disk.len() + 1;
    let disk = decimal(disk, at + 1, "disk", (1 << 20) - 1)?;
    let partition = partition.map_or(Ok(0), |p| decimal(p, part_at, "partition", 255))?;
    Ok(xvd_number(disk, partition))
}

fn decimal(digits: &str, at: usize, what: &str, max: u32) -> Result<u32, VdevError> {
    if let Some((i, c)) = digits.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        return Err(unexpected(c, at + i));
    }
    if digits.is_empty() {
        return Err(VdevError::new(at, 0, format!("the {what} number is missing"), "write d0p0 for all of disk 0"));
    }
    if digits.len() > 1 && digits.starts_with('0') {
        let help = "drop the zero: libxl would read the number as octal";
        return Err(VdevError::new(at, digits.len(), format!("the {what} number begins with 0"), help));
    }
    digits.parse().ok().filter(|n| *n <= max).ok_or_else(|| {
        VdevError::new(at, digits.len(), format!("{what} {digits} is out of range"), format!("the last one is {max}"))
    })
}

/// A number as C's `strtoul` reads it in base 0, written to XenStore as it is.
fn plain_number(text: &str, at: usize) -> Result<u32, VdevError> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    let digits_at = at + text.len() - digits.len();
    if digits.is_empty() {
        return Err(VdevError::new(digits_at, 0, "no digits after 0x", "write a hexadecimal number such as 0xca00"));
    }
    if let Some((i, c)) = digits.char_indices().find(|(_, c)| !c.is_digit(radix)) {
        let help = match radix {
            8 if c.is_ascii_digit() => "a leading 0 makes the number octal, with digits 0 to 7",
            10 if c.is_ascii_hexdigit() => "write 0x in front of a hexadecimal number",
            _ => FORMS,
        };
        let message = format!("{c:?} is not a digit of this number");
        return Err(VdevError::new(digits_at + i, c.len_utf8(), message, help));
    }
    u32::from_str_radix(digits, radix).ok().filter(|n| *n < RESERVED).ok_or_else(|| {
        VdevError::new(
            at,
            text.len(),
            format!("device number {text} is out of range"),
            format!("numbers end at {}; guests ignore what lies above", RESERVED - 1),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_numbers() {
        // Those with a comment stand in xen-vbd-interface(7).
        for (text, number, name) in [
            ("xvda", 51712, "xvda"), // d0, d0p0, xvda
            ("d0", 51712, "xvda"),
            ("d0p0", 51712, "xvda"),
            ("d1p2", 51730, "xvdb2"), // d1p2, xvdb2
            ("xvdb2", 51730, "xvdb2"),
            ("d536p37", 1 << 28 | 536 << 8 | 37, "xvdtq37"), // d536p37, xvdtq37
            ("xvdtq37", 1 << 28 | 536 << 8 | 37, "xvdtq37"),
            ("sdb3", 2067, "sdb3"), // sdb3
            ("hdc2", 5634, "hdc2"), // hdc2
            ("xvdp15", 51967, "xvdp15"),
            ("xvdp16", 1 << 28 | 15 << 8 | 16, "xvdp16"),
            ("xvdq", 1 << 28 | 16 << 8, "xvdq"),
            ("xvdz", 1 << 28 | 25 << 8, "xvdz"),
            ("xvdaa", 1 << 28 | 26 << 8, "xvdaa"),
            ("xvdzz", 1 << 28 | 701 << 8, "xvdzz"),
            ("xvdaaa", 1 << 28 | 702 << 8, "xvdaaa"),
            ("xvda255", 1 << 28 | 255, "xvda255"),
            ("d1048575p255", (2 << 28) - 1, "xvdbgqcv255"),
            ("hda", 768, "hda"),
            ("hdb63", 895, "hdb63"),
            ("hdd", 5696, "hdd"),
            ("sda1", 2049, "sda1"),
            ("sdp15", 2303, "sdp15"),
            ("/dev/xvda5", 51717, "xvda5"),
            ("/dev/hda", 768, "hda"),
            ("0x3", 3, "3"),
            ("3", 3, "3"),
            ("0", 0, "0"),
            ("0xCA00", 51712, "xvda"),
            ("51712", 51712, "xvda"),
            ("0145000", 51712, "xvda"),
            ("268435456", 1 << 28, "268435456"), // a short form exists: the name would be another number
            ("16640", 16640, "16640"),           // sdq, as xend wrote it
            ("536870911", (2 << 28) - 1, "xvdbgqcv255"),
        ] {
            let vdev = Vdev::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((vdev.number(), vdev.name().as_str()), (number, name), "{text}");
            assert_eq!(vdev, Vdev::from_number(number));
            assert_eq!(Vdev::parse(name), Ok(vdev), "{text} → {name}");
        }
        assert_eq!(Vdev::from_number(u32::MAX).name(), "4294967295");
    }

    #[test]
    fn refusals_point_at_the_character() {
        for (text, offset, len, word) in [
            ("", 0, 0, "missing"),
            ("/dev/", 5, 0, "missing"),
            ("xvd", 3, 0, "letter"),
            ("hd", 2, 0, "letter"),
            ("xvd1", 3, 1, "letter"),
            ("/dev/sd", 7, 0, "letter"),
            ("xvda0", 4, 1, "begin with 0"),
            ("xvda01", 4, 2, "begin with 0"),
            ("xvda256", 4, 3, "256"),
            ("xvda99999999999999999999", 4, 20, "no partition"),
            ("xvdbgqcw", 3, 5, "no disk"),
            ("xvdzzzzzzzzzzzz", 3, 12, "no disk"),
            ("xvdA", 3, 1, "letter"),
            ("xvda ", 4, 1, "' '"),
            ("xvda1p", 5, 1, "'p'"),
            ("xvda-1", 4, 1, "'-'"),
            ("sdq", 2, 1, "16640"),
            ("sda16", 3, 2, "xvd"),
            ("hde1", 2, 1, "8449"),
            ("hda64", 3, 2, "64"),
            ("XVDA", 0, 4, "small letters"),
            ("vda", 0, 3, "unknown"),
            ("d", 0, 1, "unknown"),
            ("d0p", 3, 0, "missing"),
            ("d-1p0", 0, 5, "unknown"),
            ("d010p1", 1, 3, "octal"),
            ("d1048576", 1, 7, "1048575"),
            ("d0p256", 3, 3, "255"),
            ("d0p1x", 4, 1, "'x'"),
            ("-1", 0, 2, "unknown"),
            ("0x", 2, 0, "no digits"),
            ("0xg", 2, 1, "'g'"),
            ("089", 1, 1, "octal"),
            ("12f", 2, 1, "0x"),
            ("536870912", 0, 9, "536870911"),
            ("99999999999999999999", 0, 20, "out of range"),
            ("/dev/é", 5, 2, "unknown"),
        ] {
            let e = Vdev::parse(text).expect_err(text);
            assert_eq!((e.offset, e.len), (offset, len), "{text}: {e}");
            assert!(e.to_string().contains(word), "{text}: {e}");
        }
    }

    #[test]
    fn every_short_number_returns() {
        for n in 0..1 << 16 {
            assert_eq!(Vdev::parse(&Vdev::from_number(n).name()), Ok(Vdev::from_number(n)), "{n}");
        }
    }

    proptest! {
        #[test]
        fn every_number_returns(n in 0..RESERVED) {
            let vdev = Vdev::from_number(n);
            prop_assert_eq!(Vdev::parse(&vdev.name()), Ok(vdev));
            prop_assert_eq!(Vdev::parse(&n.to_string()), Ok(vdev));
            prop_assert_eq!(Vdev::parse(&format!("{n:#x}")), Ok(vdev));
        }

        #[test]
        fn every_disk_has_one_number(disk in 0..1u32 << 20, partition in 0..256u32) {
            let vdev = Vdev::parse(&format!("d{disk}p{partition}")).unwrap();
            prop_assert_eq!(Vdev::parse(&named("xvd", disk, partition)), Ok(vdev));
            prop_assert_eq!(vdev.name(), named("xvd", disk, partition));
        }

        #[test]
        fn nothing_panics(text in "(/dev/)?(xvd|sd|hd|d|0x|)?[a-z0-9pé ]{0,12}|.*") {
            match Vdev::parse(&text) {
                Ok(vdev) => prop_assert!(vdev.number() < RESERVED),
                Err(e) => prop_assert!(text.get(e.offset..e.offset + e.len).is_some(), "{:?}", e),
            }
        }
    }
}
