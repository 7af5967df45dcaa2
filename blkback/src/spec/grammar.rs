//! One specification: parameters in, a [`DiskSpec`] out.
//!
//! A parameter is a `key=value`, a flag, or the next of the four positional fields that is still open. `target=` takes
//! the rest of its word. Before the target stand xend's prefixes; after one of them there is no format field.

use super::legacy::{self, Meaning};
use super::{Access, BackendType, DiskSpec, Format, TargetKind};
use crate::vdev::Vdev;
use std::ops::Range;
use xenstore_client::spec::{BLANK, Fault, Param, Slot, Word, nearest};

type Result<T> = std::result::Result<T, Fault>;

/// Keys and flags this parser does something with, for "did you mean".
const KEYS: [&str; 10] = [
    "format",
    "vdev",
    "access",
    "target",
    "devtype",
    "backend",
    "backendtype",
    "script",
    "specification",
    "sector-size",
];
const FLAGS: [&str; 6] = ["cdrom", "direct-io-safe", "discard", "no-discard", "trusted", "untrusted"];

const ACCESSES: &str = "write r, w or, for a disk that several guests share knowingly, w!";
const FORMATS: &str = "write raw (or nothing), qcow, qcow2, vhd, qed or empty";
const EXAMPLE: &str = "a whole specification is /dev/vg/disk,raw,xvda,rw or vdev=xvda,target=/dev/vg/disk";

/// A specification that is still being read, possibly over several words.
#[derive(Default)]
pub(super) struct Draft {
    target: Slot<String>,
    format: Slot<Format>,
    vdev: Slot<Vdev>,
    access: Slot<Access>,
    cdrom: Slot<bool>,
    backend: Slot<String>,
    backend_type: Slot<BackendType>,
    script: Slot<String>,
    specification: Slot<()>,
    sector_size: Slot<u32>,
    direct_io_safe: Slot<()>,
    discard: Slot<bool>,
    trusted: Slot<bool>,
    kind: Slot<TargetKind>,
    /// Prefixes met so far; having met one means the old syntax without a format field.
    prefixes: Vec<&'static str>,
    notes: Vec<String>,
}

impl Draft {
    /// Reads the parameters of one word.
    pub(super) fn feed(&mut self, word: &Word<'_>) -> Result<()> {
        let mut at = 0;
        while let Some(start) = word.skip_blank(at) {
            if !self.target.taken
                && let Some(prefix) = legacy::prefix_of(&word.text[start..])
            {
                at = start + prefix.name.len();
                self.prefix(prefix, Param::new(word, start..at))?;
                continue;
            }
            let rest = Param::new(word, start..word.text.len());
            if rest.text.starts_with("target=") {
                rest.no_control("a disk")?;
                // One comma at the end is still taken for a separator.
                let end = rest.text.strip_suffix(',').unwrap_or(rest.text).len();
                return self.named_target(rest.part("target=".len()..end));
            }
            let len = rest.text.find(',').unwrap_or(rest.text.len());
            at = word.text.len().min(start + len + 1);
            self.param(rest.part(0..len))?;
        }
        Ok(())
    }

    fn param(&mut self, param: Param<'_>) -> Result<()> {
        if let Some(equals) = param.text.find('=') {
            let (key, value) = (param.part(0..equals), param.part(equals + 1..param.text.len()));
            if !is_key(key.text) {
                return Err(param.part(equals..equals + 1).fault(
                    "`=` in a field that is not key=value",
                    "a path with = or , in it goes last, as target=PATH",
                ));
            }
            param.no_blank_after()?;
            param.no_control("a disk")?;
            return self.named(key, value);
        }
        let trimmed = param.part(0..param.text.trim_end_matches(BLANK).len());
        if FLAGS.contains(&trimmed.text) {
            param.no_blank_after()?;
            return self.flag(trimmed);
        }
        self.positional(param)
    }

    fn prefix(&mut self, prefix: &'static legacy::Prefix, param: Param<'_>) -> Result<()> {
        let name = prefix.name;
        if self.prefixes.contains(&name) {
            return Err(param.fault(format!("the prefix {name} is given twice"), "leave one of the two out"));
        }
        match prefix.meaning {
            Meaning::Kind(kind) => self.kind.fill("how to open the target", Some(kind), param.span())?,
            Meaning::Format(format) => self.format.fill("the format", Some(format), param.span())?,
            Meaning::Script(script) => self.script.fill("the script", Some(script.to_owned()), param.span())?,
            Meaning::Nothing => {}
            Meaning::Gone(instead) => {
                return Err(param.fault(format!("the driver behind `{name}` is not replaced by this backend"), instead));
            }
        }
        self.prefixes.push(name);
        self.notes.push(format!("`{name}` is an old prefix: {}.", prefix.note));
        Ok(())
    }

    fn flag(&mut self, flag: Param<'_>) -> Result<()> {
        let span = flag.span();
        match flag.text {
            "cdrom" => self.cdrom.fill("the device type", Some(true), span),
            "direct-io-safe" => self.direct_io_safe.fill("direct-io-safe", Some(()), span),
            "discard" | "no-discard" => self.discard.fill("discard", Some(flag.text == "discard"), span),
            _ => self.trusted.fill("trust", Some(flag.text == "trusted"), span),
        }
    }

    fn named_target(&mut self, value: Param<'_>) -> Result<()> {
        self.target.fill("the target", value.given(), value.span())?;
        if let Some(prefix) = legacy::prefix_of(value.text) {
            let name = prefix.name;
            self.notes.push(format!("target= is taken literally: `{name}` is a part of the name here, no prefix."));
        } else if value.text != value.text.trim_matches(BLANK) {
            self.notes.push("target= is taken literally: white space around the name is a part of it.".to_owned());
        }
        Ok(())
    }

    fn named(&mut self, key: Param<'_>, value: Param<'_>) -> Result<()> {
        match key.text {
            "format" => self.set_format(value),
            "vdev" => self.set_vdev(value),
            "access" => self.set_access(value),
            "devtype" => {
                let cdrom = cdrom_of(value)?;
                self.cdrom.fill("the device type", Some(cdrom), value.span())
            }
            "backend" => self.backend.fill("the backend domain", value.given(), value.span()),
            "backendtype" => {
                let known = BackendType::parse(value.text).ok_or_else(|| {
                    let help = "write phy, tap, qdisk or standalone, or leave backendtype out";
                    value.fault(format!("unknown backend type `{}`", value.text), help)
                })?;
                self.backend_type.fill("the backend type", Some(known), value.span())
            }
            "script" => self.script.fill("the script", value.given(), value.span()),
            "sector-size" => match value.text {
                "512" => self.sector_size.fill("the sector size", Some(512), value.span()),
                other => Err(value.fault(
                    format!("sectors of `{other}` bytes cannot be asked for"),
                    "write sector-size=512 for a guest that needs such sectors, or leave it out for the storage's own",
                )),
            },
            "specification" => match value.text {
                "xen" => self.specification.fill("the specification", Some(()), value.span()),
                "virtio" => Err(value.fault(
                    "virtio disks are not served by a Xen block backend",
                    "write specification=xen, or leave it out",
                )),
                other => Err(value.fault(format!("unknown specification `{other}`"), "write specification=xen")),
            },
            "grant_usage" => Err(key.fault(
                "grant_usage is for virtio disks only",
                "leave it out: a Xen block backend always works through grants",
            )),
            "colo-host" | "colo-port" | "colo-export" | "active-disk" | "hidden-disk" => Err(key.fault(
                format!("{} belongs to COLO, which needs QEMU's block replication", key.text),
                "leave the COLO settings out, or keep this disk with backendtype=qdisk",
            )),
            unknown => {
                let help = if FLAGS.contains(&unknown) {
                    format!("{unknown} stands alone, without a value")
                } else if let Some(near) = nearest(unknown, KEYS.into_iter().chain(FLAGS)) {
                    format!("did you mean {near}?")
                } else {
                    format!("the parameters are {}; flags are {}", KEYS.join(", "), FLAGS.join(", "))
                };
                Err(key.fault(format!("unknown parameter `{unknown}`"), help))
            }
        }
    }

    fn positional(&mut self, param: Param<'_>) -> Result<()> {
        if !self.target.taken {
            return self.positional_target(param);
        }
        param.no_blank_after()?;
        param.no_control("a disk")?;
        if !self.format.taken && self.prefixes.is_empty() {
            let target = self.target.value.as_deref();
            // xend's empty drive, `,hdc:cdrom,r`.
            if target.is_none() && param.text.contains(':') {
                self.format.fill("the format", Some(Format::Empty), param.span())?;
                return self.set_vdev(param);
            }
            // xl strips ioemu: here, and having met a prefix expects no format any more. An NBD export would have
            // worn one in the old days, so that both orders are natural.
            let bare = target.is_some_and(legacy::is_nbd) && !param.text.is_empty();
            let skipped = param.text.starts_with("ioemu:") || bare && Format::parse(param.text).is_none();
            if !skipped {
                return self.set_format(param);
            }
            self.format.fill("the format", None, param.span())?;
        }
        if !self.vdev.taken {
            return self.set_vdev(param);
        }
        if !self.access.taken {
            return self.set_access(param);
        }
        if !self.prefixes.is_empty() && !self.backend.taken {
            if let Some(name) = param.given() {
                self.notes.push(format!("xend's fourth field is written backend={name} now."));
            }
            return self.backend.fill("the backend domain", param.given(), param.span());
        }
        let message = if param.text.is_empty() { "one comma too many" } else { "one field too many" };
        Err(param.fault(message, "target, format, vdev and access are all there; the rest is written key=value"))
    }

    fn positional_target(&mut self, param: Param<'_>) -> Result<()> {
        param.no_control("a disk")?;
        if !legacy::is_nbd(param.text)
            && let Some(prefix) = legacy::unknown_prefix(param.text)
        {
            let help = match super::written_here(param.text) {
                Some(help) => help.to_owned(),
                None => format!("if {prefix} is a part of the name, write the target last, as target={}", param.text),
            };
            return Err(param.part(0..prefix.len()).fault(format!("unknown prefix `{prefix}`"), help));
        }
        if param.text.ends_with(BLANK) {
            self.notes.push("The target's name ends in white space: xl keeps it, and so does this.".to_owned());
        }
        self.target.fill("the target", param.given(), param.span())
    }

    fn set_format(&mut self, value: Param<'_>) -> Result<()> {
        let format = match value.text {
            "" => None,
            text => Some(Format::parse(text).ok_or_else(|| {
                let help = match Vdev::parse(text.rsplit_once(':').map_or(text, |(name, _)| name)) {
                    Ok(_) => format!(
                        "the second field is the format: put an empty one before {text}, as in TARGET,,{text},w"
                    ),
                    Err(_) => FORMATS.to_owned(),
                };
                value.fault(format!("unknown format `{text}`"), help)
            })?),
        };
        self.format.fill("the format", format, value.span())
    }

    /// `hda`, and the old `ioemu:hda`, `hdc:cdrom`, `ioemu:hdc:cdrom`, `hda:disk`.
    fn set_vdev(&mut self, value: Param<'_>) -> Result<()> {
        let mut name = value;
        if let Some(rest) = name.text.strip_prefix("ioemu:") {
            name = name.part(name.text.len() - rest.len()..name.text.len());
            self.notes.push(format!(
                "`ioemu:{rest}`: emulated disks are the device model's; this is the paravirtual one beside it."
            ));
        }
        if let Some(colon) = name.text.rfind(':') {
            let devtype = name.part(colon + 1..name.text.len());
            let cdrom = cdrom_of(devtype)?;
            self.cdrom.fill("the device type", Some(cdrom), devtype.span())?;
            name = name.part(0..colon);
            self.notes.push(format!("`{}:{}` is written devtype={1} now.", name.text, devtype.text));
        }
        if name.text.is_empty() && value.text.is_empty() {
            return self.vdev.fill("the virtual device", None, value.span());
        }
        let vdev = Vdev::parse(name.text).map_err(|e| {
            let help = match Format::parse(name.text) {
                Some(_) if !self.prefixes.is_empty() => {
                    "after an old prefix there is no format field: leave it out, or leave out the prefix".to_owned()
                }
                _ => e.help,
            };
            name.part(e.offset..e.offset + e.len).fault(e.message, help)
        })?;
        if name.text.starts_with("/dev/") {
            self.notes.push(format!("`{}` is the guest's device {vdev}; the /dev/ is not needed.", name.text));
        }
        self.vdev.fill("the virtual device", Some(vdev), value.span())
    }

    fn set_access(&mut self, value: Param<'_>) -> Result<()> {
        let access = match value.text {
            "" => None,
            text => {
                let known = Access::parse(text);
                Some(known.ok_or_else(|| value.fault(format!("unknown access `{text}`"), ACCESSES))?)
            }
        };
        if access == Some(Access::SharedWrite) {
            self.notes.push(format!(
                "`{}` shares the disk: other writers are let in, and every one must know of the others.",
                value.text
            ));
        }
        self.access.fill("the access", access, value.span())
    }

    /// Puts the parts together; `end` is where something missing is pointed at. Also tells where the virtual device
    /// was named.
    pub(super) fn finish(self, end: usize) -> Result<(DiskSpec, Range<usize>)> {
        let mut notes = self.notes;
        let missing = |taken: bool, span: &Range<usize>| if taken { span.clone() } else { end..end };
        let Some(vdev) = self.vdev.value else {
            let span = missing(self.vdev.taken, &self.vdev.span);
            return Err(Fault::new(span, "no virtual device", EXAMPLE));
        };
        let cdrom = self.cdrom.value.unwrap_or(false);
        let format = match (&self.target.value, self.format.value) {
            (None, _) if cdrom => Format::Empty,
            (_, Some(Format::Empty)) if !cdrom => {
                let help = "name the target, or make it a drive with devtype=cdrom";
                return Err(Fault::new(self.format.span, "only a CD-ROM drive can be empty", help));
            }
            (None, _) => {
                let span = missing(self.target.taken, &self.target.span);
                return Err(Fault::new(span, "no target, and the device is no CD-ROM drive", EXAMPLE));
            }
            (Some(_), Some(Format::Empty)) => {
                let help = "leave out the target for an empty drive, or the format for one with a disc in it";
                return Err(Fault::new(self.format.span, "the format says empty, but there is a target", help));
            }
            (Some(_), format) => format.unwrap_or(Format::Raw),
        };
        let access = match self.access.value {
            Some(Access::Write | Access::SharedWrite) if cdrom => {
                notes.push("A CD-ROM is read-only, whatever the access says, as in xl.".to_owned());
                Access::ReadOnly
            }
            None if cdrom => Access::ReadOnly,
            access => access.unwrap_or(Access::Write),
        };
        if access == Access::SharedWrite && self.sector_size.value.is_some() {
            let help = "leave sector-size out: backends that share a disk cannot keep out of each other's sectors";
            return Err(Fault::new(self.sector_size.span, "a disk that is shared has the storage's own sectors", help));
        }
        let mut target = self.target.value;
        let mut kind = self.kind.value.unwrap_or_default();
        // A script's target is a matter between it and the administrator.
        if let (Some(name), None) = (&mut target, &self.script.value) {
            if kind == TargetKind::Unspecified && legacy::is_nbd(name) {
                kind = TargetKind::Nbd;
            } else if let Some(help) = super::written_here(name)
                // Those are noted instead: there may be a file of such a name.
                && legacy::prefix_of(name).is_none_or(|prefix| matches!(prefix.meaning, Meaning::Script(_)))
            {
                let message = "this is another program's spelling, and no file or device here";
                return Err(Fault::new(self.target.span, message, help));
            } else if kind == TargetKind::Phy && !name.starts_with('/') {
                notes.push(format!("`{name}` is no full path: /dev/{name} is meant."));
                name.insert_str(0, "/dev/");
            }
        }
        if target.is_none() {
            kind = TargetKind::Unspecified;
        }
        let spec = DiskSpec {
            target,
            format,
            vdev,
            access,
            cdrom,
            backend: self.backend.value,
            backend_type: self.backend_type.value,
            script: self.script.value,
            direct_io_safe: self.direct_io_safe.value.is_some(),
            discard: self.discard.value.unwrap_or(true),
            trusted: self.trusted.value,
            sector_size: self.sector_size.value,
            kind,
            notes,
        };
        Ok((spec, self.vdev.span))
    }
}

fn cdrom_of(devtype: Param<'_>) -> Result<bool> {
    match devtype.text {
        "cdrom" => Ok(true),
        "disk" => Ok(false),
        other => Err(devtype.fault(format!("unknown device type `{other}`"), "write cdrom or disk")),
    }
}

/// Whether xl could ever take this for a parameter's name.
fn is_key(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}
