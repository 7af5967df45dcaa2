//! Disks in doubt: a flush of theirs has failed, and nobody has looked at them since.
//!
//! The kernel reports a failed write-back once, to whoever has the file open then (errseq_t), and takes the pages for
//! clean. Who opens the file afterwards sees no error, flushes, and is told that all is well. So the failure is noted in
//! XenStore, where it outlives the disk's detachment and this process, though not the machine's next start; then the page
//! cache, which can show what never reached the storage, is gone as well. The nodes are, below the backend's own home:
//!
//! ```text
//! blkback/in-doubt/<identity>/image     what the administrator called it
//! blkback/in-doubt/<identity>/reason    what went wrong
//! ```

mod identity;

use std::path::Path;

pub use identity::{identity_of, identity_of_export};

use xenstore_client::{Client, DomId, Result, Store};

use crate::image;
use crate::spec::Access;

fn identity_at(path: &Path) -> Option<String> {
    match image::export(path) {
        Some(export) => Some(identity_of_export(export)),
        None => std::fs::metadata(path).ok().map(|metadata| identity_of(&metadata)),
    }
}

fn folder(backend: DomId) -> String {
    format!("{}/blkback/in-doubt", backend.home())
}

/// Notes that a flush of a disk has failed.
///
/// # Errors
/// When XenStore refuses.
pub fn note(store: &Client, backend: DomId, identity: &str, image: &Path, reason: &str) -> Result<()> {
    let node = format!("{}/{identity}", folder(backend));
    store.transaction(|tx| {
        tx.write(&format!("{node}/image"), &image.to_string_lossy())?;
        tx.write(&format!("{node}/reason"), reason)
    })
}

/// Whether a disk may be opened for `access`: one in doubt is not written to. Reading is how one looks at it.
///
/// # Errors
/// What went wrong and what to do, as a sentence; or that XenStore refuses.
pub fn check(store: &Client, backend: DomId, image: &Path, access: Access) -> std::result::Result<(), String> {
    let Some(identity) = identity_at(image).filter(|_| access != Access::ReadOnly) else { return Ok(()) };
    check_writable(store, backend, image, &identity)
}

/// The same for a disk that is open for writing, without a look at its storage.
///
/// # Errors
/// As [`check`].
pub fn check_writable(store: &Client, backend: DomId, image: &Path, identity: &str) -> std::result::Result<(), String> {
    let reason = store.read_opt(&format!("{}/{identity}/reason", folder(backend)));
    match reason.map_err(|error| error.to_string())? {
        None => Ok(()),
        Some(reason) => Err(format!(
            "{0}: {reason}. Check what is on it (attach it with access r, run fsck), and then run: blkback checked {0}",
            image.display()
        )),
    }
}

/// All disks in doubt: how they were called, and what went wrong.
///
/// # Errors
/// When XenStore refuses.
pub fn all(store: &Client, backend: DomId) -> Result<Vec<(String, String)>> {
    let folder = folder(backend);
    let mut found = Vec::new();
    for identity in store.directory_opt(&folder)?.unwrap_or_default() {
        let value = |name: &str| store.read_opt(&format!("{folder}/{identity}/{name}"));
        found.push((value("image")?.unwrap_or(identity.clone()), value("reason")?.unwrap_or_default()));
    }
    Ok(found)
}

/// The administrator has checked a disk. False if it was not in doubt.
///
/// # Errors
/// When XenStore refuses.
pub fn checked(store: &Client, backend: DomId, image: &Path) -> Result<bool> {
    let folder = folder(backend);
    let here = identity_at(image);
    let mut found = false;
    for identity in store.directory_opt(&folder)?.unwrap_or_default() {
        let node = format!("{folder}/{identity}");
        // By name too: what is gone can be forgotten as well.
        let called = store.read_opt(&format!("{node}/image"))?;
        if here.as_ref() == Some(&identity) || called.as_deref().map(Path::new) == Some(image) {
            store.rm_if_exists(&node)?;
            found = true;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use xenstore_client::server::Server;

    use super::*;

    #[test]
    fn a_disk_is_known_by_every_name_until_it_was_checked() {
        let server = Server::new().unwrap();
        let (store, dom0) = (server.connect(DomId::DOM0).unwrap(), DomId::DOM0);
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let file = |name: &str| -> PathBuf {
            File::create(place(name)).unwrap().set_len(4096).unwrap();
            place(name)
        };
        let (one, two) = (file("one.img"), file("two.img"));
        std::fs::hard_link(&one, place("link.img")).unwrap();
        let metadata = std::fs::metadata(&one).unwrap();
        note(&store, dom0, &identity_of(&metadata), &one, "flush failed").unwrap();
        let nbd = Path::new("nbd:unix:/run/a b.sock:x");
        note(&store, dom0, &identity_of_export("nbd:unix:/run/a b.sock:x"), nbd, "flush failed").unwrap();
        let refused = |path: &Path, access| check(&store, dom0, path, access).is_err();
        for access in [Access::Write, Access::SharedWrite] {
            assert!(refused(&one, access) && refused(&place("link.img"), access) && refused(nbd, access));
            assert!(!refused(&two, access) && !refused(Path::new("nbd:unix:/run/other"), access));
        }
        assert!(!refused(&one, Access::ReadOnly));
        assert_eq!(all(&store, dom0).unwrap().len(), 2);
        assert!(!checked(&store, dom0, &two).unwrap());
        assert!(checked(&store, dom0, &place("link.img")).unwrap() && checked(&store, dom0, nbd).unwrap());
        assert!(!refused(&one, Access::Write) && !refused(nbd, Access::Write));
        // Another file under the old name is another file; and what is gone can be forgotten.
        note(&store, dom0, &identity_of(&metadata), &one, "flush failed").unwrap();
        std::fs::remove_file(&one).unwrap();
        std::fs::remove_file(place("link.img")).unwrap();
        file("one.img");
        assert!(!refused(&one, Access::Write));
        std::fs::remove_file(&one).unwrap();
        assert!(checked(&store, dom0, &one).unwrap());
        assert_eq!(all(&store, dom0).unwrap(), []);
    }
}
