//! A guest that takes a disk over from its own former self.
//!
//! `xl migrate` attaches the disks of the arriving domain when its memory has come, and destroys the departing one only
//! when the arriving one runs (libxl_create.c, domcreate_rebuild_done; xl_migrate.c). In between both domains have the
//! disk: on one machine, or on two that share a file. The departing one is suspended, but the backend is not told so, and
//! it may yet be resumed, if the migration fails. So its lock stays, and the arriving guest waits for it: its disk
//! connects, and nothing of it is read or written before the lock is ours. Nothing can be written by both, however the
//! migration ends. Anybody else is refused at once.

use std::path::Path;
use std::time::{Duration, Instant};

use xenstore_client::{Client, DomId, Result, Store};

use crate::device::{KINDS, YIELD, YIELDED};
use crate::doubt;
use crate::host_users::Target;
use crate::image::{self, Image, ImageError, Problem};
use crate::opener::{self, Hung};
use crate::spec::Access;

/// How long a disk may take to be free whose last device has just gone: the backend hears of that by XenStore.
const MOMENT: Duration = Duration::from_millis(500);
/// What xl adds to the name of a domain that is arriving.
const INCOMING: &str = "--incoming";

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// What is wrong with it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its storage does not answer.
    #[error(transparent)]
    Hung(#[from] Hung),
    /// A flush of it has failed.
    #[error("{0}")]
    InDoubt(String),
}

/// Looks whether a disk can be had, as a command does that has to end: see [`check`] and [`doubt::check`]. `frontend` is the
/// domain that it is for, if that is known. Returns the device number of a block device.
///
/// # Errors
/// When XenStore refuses. The inner error: why the disk cannot be had.
pub fn look(
    store: &Client,
    backend: DomId,
    frontend: Option<DomId>,
    image: &Path,
    access: Access,
) -> Result<std::result::Result<Option<(u32, u32)>, Refusal>> {
    let (store, path) = (store.clone(), image.to_owned());
    let looked = opener::ask(image, opener::PATIENCE, move || {
        let checked = match frontend {
            Some(frontend) => check(&store, frontend, &path, access)?,
            None => Image::check(&path, access),
        };
        Ok(match (checked, doubt::check(&store, backend, &path, access)) {
            (Ok(device), Ok(())) => Ok(device),
            (Ok(_), Err(text)) => Err(Refusal::InDoubt(text)),
            (Err(error), _) => Err(error.into()),
        })
    });
    looked.unwrap_or_else(|hung| Ok(Err(hung.into())))
}

/// Whether `frontend` can be given a disk, now or ([`may_wait`]) when it is let go of. Returns the device number of a block
/// device, or what is wrong with the disk.
///
/// # Errors
/// When XenStore refuses.
pub fn check(store: &Client, frontend: DomId, image: &Path, access: Access) -> Result<Checked> {
    if let Err(error) = Image::check_now(image, access)
        && may_wait(store, frontend, &error)?
    {
        return Ok(Ok(image::device_at(image)));
    }
    let began = Instant::now();
    loop {
        let checked = Image::check(image, access);
        let taken = matches!(checked, Err(ImageError { problem: Problem::Locked(_), .. }));
        if !taken || began.elapsed() > MOMENT {
            return Ok(checked);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

type Checked = std::result::Result<Option<(u32, u32)>, ImageError>;

/// Whether `frontend` may wait for a disk that cannot be had for this reason.
///
/// # Errors
/// When XenStore refuses.
pub fn may_wait(store: &Client, frontend: DomId, error: &ImageError) -> Result<bool> {
    Ok(error.is_locked() && is_arriving(store, frontend)?)
}

/// Whether a domain is arriving: xl calls it so, or it has the identity (`vm`) of another domain of this machine.
fn is_arriving(store: &Client, domain: DomId) -> Result<bool> {
    let value = |domain: &str, key: &str| store.read_opt(&format!("/local/domain/{domain}/{key}"));
    let own = domain.to_string();
    if value(&own, "name")?.is_some_and(|name| name.ends_with(INCOMING)) {
        return Ok(true);
    }
    let Some(vm) = value(&own, "vm")?.filter(|vm| !vm.is_empty()) else { return Ok(false) };
    for other in store.directory_opt("/local/domain")?.unwrap_or_default() {
        if other != own && value(&other, "vm")?.as_ref() == Some(&vm) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Has a disk of ours that the former self of `frontend` still uses make way for the device model of `frontend`, which the
/// toolstack is about to start: that opens the image while the former self, suspended by now, may yet be resumed. Its disk
/// stops to read and write, and keeps everybody but device models away. `folder` is the backend's, of all kinds.
///
/// # Errors
/// When XenStore refuses. The inner error: it did not make way in time.
pub fn make_way(
    store: &Client,
    folder: &str,
    frontend: DomId,
    image: &Path,
) -> Result<std::result::Result<(), String>> {
    let Ok(target) = std::fs::metadata(image).map(|metadata| Target::of(&metadata)) else { return Ok(Ok(())) };
    for kind in KINDS {
        let kind = format!("{folder}/{kind}");
        for domain in store.directory_opt(&kind)?.unwrap_or_default() {
            if domain == frontend.to_string() {
                continue;
            }
            for device in store.directory_opt(&format!("{kind}/{domain}"))?.unwrap_or_default() {
                let path = format!("{kind}/{domain}/{device}");
                let used = store.read_opt(&format!("{path}/physical-device-path"))?;
                if used.is_some_and(|used| std::fs::metadata(used).is_ok_and(|metadata| target.is(&metadata)))
                    && !wait_for_way(store, &path, frontend)?
                {
                    return Ok(Err(format!(
                        "{}: domain {domain} has it and did not let go of it within {} s",
                        image.display(),
                        WAY.as_secs()
                    )));
                }
            }
        }
    }
    Ok(Ok(()))
}

/// How long a disk may take to finish what is in flight; libxl gives its hotplug program 40 s.
const WAY: Duration = Duration::from_secs(20);

/// Asks one disk, and waits. False if it does not make way.
fn wait_for_way(store: &Client, path: &str, frontend: DomId) -> Result<bool> {
    let frontend = frontend.to_string();
    let asked = store.transaction(|tx| {
        let there = tx.read_opt(&format!("{path}/state"))?.is_some();
        if there { tx.write(&format!("{path}/{YIELD}"), &frontend).map(|()| true) } else { Ok(false) }
    })?;
    let began = Instant::now();
    while asked && store.read_opt(&format!("{path}/{YIELDED}"))?.as_ref() != Some(&frontend) {
        if store.read_opt(&format!("{path}/state"))?.is_none() {
            break;
        }
        if began.elapsed() > WAY {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use xenstore_client::server::Server;

    use super::*;

    /// libxl names a backend's directory by a path relative to its own home.
    #[test]
    fn the_departing_ones_disk_makes_way() {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        let home = "/local/domain/0/backend";
        for (domain, file) in [(3, &other), (4, &image), (5, &image)] {
            let path = format!("{home}/vbd/{domain}/768");
            store.write(&format!("{path}/state"), "4").unwrap();
            store.write(&format!("{path}/physical-device-path"), file.path().to_str().unwrap()).unwrap();
        }
        for folder in ["backend", home] {
            let backend = server.connect(DomId::DOM0).unwrap();
            let answers = std::thread::spawn(move || {
                let asked = format!("{home}/vbd/4/768/{YIELD}");
                while backend.read_opt(&asked).unwrap().as_deref() != Some("5") {
                    std::thread::sleep(Duration::from_millis(5));
                }
                backend.write(&format!("{home}/vbd/4/768/{YIELDED}"), "5").unwrap();
            });
            make_way(&store, folder, DomId(5), image.path()).unwrap().unwrap();
            answers.join().unwrap();
            for bystander in [3, 5] {
                assert_eq!(store.read_opt(&format!("{home}/vbd/{bystander}/768/{YIELD}")).unwrap(), None);
            }
            for key in [YIELD, YIELDED] {
                store.rm_if_exists(&format!("{home}/vbd/4/768/{key}")).unwrap();
            }
        }
    }
}
