//! What is in a drive: an image and how it is served, from what the toolstack wrote into our directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xenstore_client::xenbus::{Fault, Keys};

use crate::device_model::DeviceModel;
use crate::hotplug;
use crate::image::{Image, ImageError, Problem};
use crate::negotiate::{self, Limits};
use crate::request::Shape;
use crate::spec::Access;

/// An open image, or an empty drive.
#[derive(Debug, Clone)]
pub struct Medium {
    /// The image.
    pub image: Arc<Image>,
    /// What the guest is to see.
    pub kind: negotiate::Kind,
    /// Whether the guest's own pages may go to the storage. If not, their data are copied first: storage beyond a
    /// network may send a page again after it said that it is written, and by then the guest has changed it.
    pub pages_stay: bool,
    /// Whether writes wait when the storage is full (key `on-enospc`).
    pub hold_when_full: bool,
}

/// The toolstack's key for the bytes of the disk's sectors; `sector-size` is what the guest is told of them.
pub const SECTOR_SIZE: &str = "logical-block-size";

impl Medium {
    /// Opens what `backend`, our directory's keys, name.
    ///
    /// # Errors
    /// When a key is missing or makes no sense, or the image cannot be served as they say.
    pub fn open(backend: &Keys) -> Result<Self, Fault> {
        Self::open_by(backend, Image::open)
    }

    /// The same, kept from everybody but the guest's device model ([`Image::reserve`]).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn reserve(backend: &Keys, device_model: &DeviceModel) -> Result<Self, Fault> {
        Self::open_by(backend, |path, _| Image::reserve(path, device_model))
    }

    /// What it will be when whoever has it lets go ([`Image::foresee`]).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn foresee(backend: &Keys) -> Result<Self, Fault> {
        Self::open_by(backend, Image::foresee)
    }

    fn open_by(backend: &Keys, open: impl FnOnce(&Path, Access) -> Result<Image, ImageError>) -> Result<Self, Fault> {
        let flag = |key| backend.get(key) == Some("1");
        let cdrom = backend.get("device-type") == Some("cdrom");
        let access = access(backend)?;
        let mut image = match target(backend) {
            Some(path) => open(&path, access).map_err(|error| image_fault(&error))?,
            None if cdrom => Image::none()
                .map_err(|error| Fault::host(libc::EMFILE, format!("an empty drive cannot be made: {error}")))?,
            None => return Err(backend.fault(libc::ENOENT, "neither physical-device-path nor params name a disk")),
        };
        match backend.get(SECTOR_SIZE) {
            None => {}
            Some("512") => image.have_small_sectors(access).map_err(|error| image_fault(&error))?,
            Some(other) => {
                let text = format!("{SECTOR_SIZE} is {other:?}: write 512, or nothing for the storage's own sectors");
                return Err(backend.fault(libc::EINVAL, &text));
            }
        }
        let hold_when_full = match backend.get("on-enospc") {
            None | Some("hold") => true,
            Some("report") => false,
            Some(other) => {
                let text = format!("on-enospc is {other:?}: write hold (writes wait for room) or report (they fail)");
                return Err(backend.fault(libc::EINVAL, &text));
            }
        };
        let read_only = access == Access::ReadOnly;
        let discard = image.discard && !read_only && backend.get("discard-enable") != Some("0");
        let secure = discard && image.secure;
        let kind = negotiate::Kind { read_only, cdrom, removable: flag("removable"), discard, secure };
        let pages_stay = pages_stay(image.over_network, flag("direct-io-safe"));
        Ok(Self { image: Arc::new(image), kind, pages_stay, hold_when_full })
    }

    /// The keys that show it to the guest.
    pub fn describe(&self, limits: &Limits) -> Vec<(String, String)> {
        let discard = self.kind.discard && limits.discard;
        negotiate::describe(&self.image, limits, negotiate::Kind { discard, ..self.kind })
    }

    /// What requests are checked against.
    pub fn shape(&self, limits: &Limits) -> Shape {
        Shape {
            sectors: self.image.sectors(),
            block: u64::from(self.image.sector_size / 512),
            read_only: self.kind.read_only,
            discard: self.kind.discard && limits.discard,
            secure: self.kind.secure && limits.discard,
            barrier: limits.barrier && !self.kind.read_only,
            indirect: limits.indirect_segments as usize,
        }
    }
}

/// Whether the guest's pages may go to the storage themselves.
fn pages_stay(over_network: bool, direct_io_safe: bool) -> bool {
    !over_network || direct_io_safe
}

/// What the toolstack says may be done with the disk.
///
/// # Errors
/// When it does not say.
pub fn access(backend: &Keys) -> Result<Access, Fault> {
    let device_type = backend.get("device-type");
    // An empty drive may have no mode.
    let mode = if device_type == Some("cdrom") { "r" } else { backend.require("mode")? };
    Ok(hotplug::access(mode, device_type))
}

/// Where the toolstack and the hotplug program say the disk is; `None` for an empty drive.
pub fn target(backend: &Keys) -> Option<PathBuf> {
    let named = |key| backend.get(key).filter(|value: &&str| !value.is_empty());
    match (named("physical-device-path"), named("params")) {
        // params is what changes when a disk is changed; the hotplug program's path is that of the first one.
        (_, None) => None,
        (Some(path), Some(_)) => Some(path.into()),
        (None, Some(params)) => Some(hotplug::path(params)),
    }
}

/// A fault of the device's, for an image that cannot be had.
pub fn image_fault(error: &ImageError) -> Fault {
    let errno = match &error.problem {
        Problem::Missing | Problem::NoDevice => libc::ENOENT,
        Problem::Permission(_) => libc::EACCES,
        Problem::Directory => libc::EISDIR,
        Problem::NotADisk | Problem::Empty(_) | Problem::NothingBehind(_) => libc::EINVAL,
        Problem::ReadOnlyStorage => libc::EROFS,
        Problem::InUse(_) | Problem::Locked(_) => libc::EBUSY,
        Problem::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
    };
    Fault::host(errno, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        Keys::from_pairs(pairs.iter().copied())
    }

    #[test]
    fn where_the_disk_is() {
        assert_eq!(target(&keys(&[("params", "aio:/x.img")])).as_deref(), Some(Path::new("/x.img")));
        let both = keys(&[("params", "/x.img"), ("physical-device-path", "/dev/vg/x")]);
        assert_eq!(target(&both).as_deref(), Some(Path::new("/dev/vg/x")));
        assert_eq!(target(&keys(&[("params", "")])), None);
        assert_eq!(target(&keys(&[("params", ""), ("physical-device-path", "/old.iso")])), None, "ejected");
    }

    #[test]
    fn an_empty_drive_is_a_cdrom_only() {
        let empty = Medium::open(&keys(&[("params", ""), ("device-type", "cdrom"), ("mode", "r")])).unwrap();
        assert_eq!((empty.image.sectors(), empty.kind.cdrom, empty.kind.read_only), (0, true, true));
        Medium::open(&keys(&[("params", ""), ("device-type", "disk"), ("mode", "w")])).unwrap_err();
    }

    #[test]
    fn network_file_systems_get_copies() {
        assert!(pages_stay(false, false) && pages_stay(false, true) && pages_stay(true, true));
        assert!(!pages_stay(true, false));
    }

    #[test]
    fn what_to_do_when_the_storage_is_full() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let with = |pairs: &[(&str, &str)]| {
            let mut all = vec![("params", file.path().to_str().unwrap()), ("mode", "w")];
            all.extend(pairs);
            Medium::open(&keys(&all)).map(|medium| medium.hold_when_full)
        };
        assert!(with(&[]).unwrap() && with(&[("on-enospc", "hold")]).unwrap());
        assert!(!with(&[("on-enospc", "report")]).unwrap());
        let error = with(&[("on-enospc", "maybe")]).unwrap_err();
        assert!(error.text.contains("hold"), "{}", error.text);
    }
}
