//! Disk specifications, as administrators have written them since xend: `phy:/dev/vg/x,xvda,w`,
//! `/dev/vg/x,raw,xvda,rw`, `vdev=xvda, access=ro, target=/x`.
//!
//! The grammar is that of xl-disk-configuration(5), which see; where the manual and `libxlu_disk_l.l` differ, the
//! scanner was followed. Beyond both, this accepts `w!` (several guests share the disk knowingly; `xl` refuses the
//! spelling), `sector-size=512`, xend's `/dev/xvda` and its fourth field, and NBD exports as targets. It is stricter in this: nothing is
//! given twice, and nothing that this backend does not do is passed over in silence.

mod elsewhere;
mod grammar;
mod legacy;
mod list;

#[cfg(test)]
mod tests;

use crate::vdev::Vdev;
pub use elsewhere::written_here;
use grammar::Draft;
use std::fmt;
use std::str::FromStr;
use xenstore_client::spec::{Fault, Word};

pub use xenstore_client::spec::SpecError;

/// Who may do what with the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `r`, `ro`.
    ReadOnly,
    /// `w`, `rw`: this guest and nobody else.
    Write,
    /// `w!`, `rw!`, `!`: shared with other writers, who know of each other (OCFS2, GFS2, a cluster's volume manager).
    SharedWrite,
}

/// What is inside the target. This backend serves [`Format::Raw`] and [`Format::Empty`]; see
/// [`DiskSpec::unsupported`] for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are those of the formats")]
pub enum Format {
    Raw,
    Qcow,
    Qcow2,
    Vhd,
    Qed,
    /// A CD-ROM drive with nothing in it.
    Empty,
}

/// `backendtype=`: which of its backends `libxl` is told to use. For `libxl` only; nothing here depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are those of xl-disk-configuration(5)")]
pub enum BackendType {
    Phy,
    Tap,
    Qdisk,
    Standalone,
}

/// How the target is to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TargetKind {
    /// Nothing was said: whatever the path turns out to be.
    #[default]
    Unspecified,
    /// `file:`
    File,
    /// `phy:`
    Phy,
    /// The target is an NBD export, `nbd:unix:PATH[:EXPORT]` or `nbd://HOST[:PORT]/EXPORT`, and stands in
    /// [`DiskSpec::target`] whole. Not to be mixed up with xend's `nbd:HOST PORT`, which runs block-nbd.
    Nbd,
}

/// One disk of a guest, as written in its configuration.
///
/// Two specifications are equal if they mean the same disk: [`notes`](Self::notes) are about the spelling and do not
/// count. `Display` writes the canonical form, which `xl` reads too unless it says `w!` or `sector-size`, and which parses back to an
/// equal value.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Path, NBD export, or whatever the script understands. `None` only with [`Format::Empty`]. A relative path under
    /// `phy:` has been given its `/dev/`; any other is as it was written.
    pub target: Option<String>,
    /// What is inside.
    pub format: Format,
    /// The guest's name for it.
    pub vdev: Vdev,
    /// Always [`Access::ReadOnly`] for a CD-ROM, as in `xl`.
    pub access: Access,
    /// `devtype=cdrom`, `cdrom`, `hdc:cdrom`.
    pub cdrom: bool,
    /// `backend=`: the driver domain, by name or number. `None` is domain 0.
    pub backend: Option<String>,
    /// `backendtype=`.
    pub backend_type: Option<BackendType>,
    /// `script=`: the hotplug program that turns the target into a block device.
    pub script: Option<String>,
    /// `direct-io-safe`.
    pub direct_io_safe: bool,
    /// `discard` (the default), `no-discard`.
    pub discard: bool,
    /// `trusted`, `untrusted`; `None` where nothing was said.
    pub trusted: Option<bool>,
    /// `sector-size=512`: bytes of the disk's sectors, whatever the storage's are; `None` for the storage's own.
    pub sector_size: Option<u32>,
    /// How to open the target.
    pub kind: TargetKind,
    /// Sentences for the log: which old spellings were accepted, and what they mean now.
    pub notes: Vec<String>,
}

impl DiskSpec {
    /// Why this backend cannot serve the disk although the specification is sound, and what to do about it. `None` if
    /// it can.
    pub fn unsupported(&self) -> Option<String> {
        if self.backend_type == Some(BackendType::Standalone) {
            return Some(
                "backendtype=standalone is for virtio disks only: leave it out, or write backendtype=phy or tap"
                    .to_owned(),
            );
        }
        let qemu_name = match self.format {
            Format::Raw | Format::Empty => return None,
            // QEMU knows the format by the name of its first program.
            Format::Vhd => "vpc",
            other => other.word(),
        };
        if self.kind == TargetKind::Nbd {
            let name = self.format.word();
            return Some(format!("an NBD server hands out raw disks: let it do the {name}, and write format=raw here"));
        }
        let (name, image) = (self.format.word(), self.target.as_deref().unwrap_or("IMAGE"));
        Some(format!(
            "this backend reads raw images only, not {name}: make it a block device with \
             `qemu-nbd --persistent --format={qemu_name} --connect=/dev/nbd0 {image}` and attach phy:/dev/nbd0, or turn \
             it into a raw image with `qemu-img convert -f {qemu_name} -O raw {image} {image}.raw`",
        ))
    }
}

impl PartialEq for DiskSpec {
    fn eq(&self, other: &Self) -> bool {
        // Taken apart by name, so that a new field cannot be forgotten here.
        let Self {
            target,
            format,
            vdev,
            access,
            cdrom,
            backend,
            backend_type,
            script,
            direct_io_safe,
            discard,
            trusted,
            sector_size,
            kind,
            notes: _,
        } = self;
        *target == other.target
            && *format == other.format
            && *vdev == other.vdev
            && *access == other.access
            && *cdrom == other.cdrom
            && *backend == other.backend
            && *backend_type == other.backend_type
            && *script == other.script
            && *direct_io_safe == other.direct_io_safe
            && *discard == other.discard
            && *trusted == other.trusted
            && *sector_size == other.sector_size
            && *kind == other.kind
    }
}

impl Eq for DiskSpec {}

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        one(&Word::at(text, 0)).map(|(spec, _)| spec).map_err(|fault| SpecError::new(text, fault))
    }
}

/// Reads one specification and tells where its virtual device was named.
fn one(word: &Word<'_>) -> Result<(DiskSpec, std::ops::Range<usize>), Fault> {
    let mut draft = Draft::default();
    draft.feed(word)?;
    draft.finish(word.end())
}

/// Reads what a domain configuration has after `disk =`: a list of quoted specifications. The assignment itself may
/// stand in front, as may comments; the list may run over several lines, break them with a backslash (as xm's files
/// do, inside the quotes even), and end in a comma. A bare specification is taken for a list of one.
pub fn parse_list(text: &str) -> Result<Vec<DiskSpec>, SpecError> {
    list::parse(text).map_err(|fault| SpecError::new(text, fault))
}

/// Reads the words that follow the domain in `xl block-attach` and `xm block-attach`.
///
/// `xl` scans each word by itself and lets the fields count on from word to word, so that `raw xvda w`, `raw,xvda w`
/// and `vdev=xvda access=w` all work, and `target=` ends with its word. xm's words (`phy:/dev/vg/x /dev/xvda5 w`, and
/// perhaps a backend domain) are the old syntax, word for comma. Errors point into the words joined by single spaces.
pub fn parse_xm_args(args: &[&str]) -> Result<DiskSpec, SpecError> {
    let input = args.join(" ");
    let mut draft = Draft::default();
    let mut offset = 0;
    for arg in args {
        draft.feed(&Word::at(arg, offset)).map_err(|fault| SpecError::new(&input, fault))?;
        offset += arg.len() + 1;
    }
    draft.finish(input.len()).map(|(spec, _)| spec).map_err(|fault| SpecError::new(&input, fault))
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "format={},vdev={},access={}", self.format.word(), self.vdev, self.access)?;
        if self.cdrom {
            f.write_str(",devtype=cdrom")?;
        }
        if let Some(backend) = &self.backend {
            write!(f, ",backend={backend}")?;
        }
        if let Some(backend_type) = self.backend_type {
            write!(f, ",backendtype={}", backend_type.word())?;
        }
        if let Some(script) = &self.script {
            write!(f, ",script={script}")?;
        }
        if self.direct_io_safe {
            f.write_str(",direct-io-safe")?;
        }
        if !self.discard {
            f.write_str(",no-discard")?;
        }
        match self.trusted {
            Some(true) => f.write_str(",trusted")?,
            Some(false) => f.write_str(",untrusted")?,
            None => {}
        }
        if let Some(bytes) = self.sector_size {
            write!(f, ",sector-size={bytes}")?;
        }
        let Some(target) = &self.target else { return Ok(()) };
        // Before `target=` xl takes the prefix as it does before a bare target; there is no key for it.
        let prefix = match self.kind {
            TargetKind::File => "file:",
            TargetKind::Phy => "phy:",
            TargetKind::Unspecified | TargetKind::Nbd => "",
        };
        // `target=` drops one comma from its end.
        let comma = if target.ends_with(',') { "," } else { "" };
        write!(f, ",{prefix}target={target}{comma}")
    }
}

impl fmt::Display for Access {
    /// The word for `access=`: `ro`, `rw` or `w!`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "ro",
            Self::Write => "rw",
            Self::SharedWrite => "w!",
        })
    }
}

impl Access {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "r" | "ro" => Some(Self::ReadOnly),
            "w" | "rw" => Some(Self::Write),
            "w!" | "rw!" | "!" => Some(Self::SharedWrite),
            _ => None,
        }
    }
}

impl Format {
    fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow => "qcow",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Qed => "qed",
            Self::Empty => "empty",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow, Self::Qcow2, Self::Vhd, Self::Qed, Self::Empty].into_iter().find(|f| f.word() == word)
    }
}

impl BackendType {
    fn word(self) -> &'static str {
        match self {
            Self::Phy => "phy",
            Self::Tap => "tap",
            Self::Qdisk => "qdisk",
            Self::Standalone => "standalone",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Phy, Self::Tap, Self::Qdisk, Self::Standalone].into_iter().find(|b| b.word() == word)
    }
}
