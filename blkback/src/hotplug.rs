//! The hotplug program for disks: what libxl runs as the script `block` (docs/misc/block-scripts.txt of Xen).
//!
//! libxl calls it with `add` once the backend is in state 2, and with `remove` after state 6; XENBUS_PATH names the
//! backend's directory, relative to this domain's home (`backend/vbd/1/51712`) from xl, and absolute from tools of older
//! days and from ourselves. It says in `hotplug-status` whether the disk can be had; the backend waits for that before it
//! opens anything. There is no loop device to set up, and so nothing to take down.

use std::path::{Path, PathBuf};

use xenstore_client::{Client, DomId, Store};

use crate::device_model::DeviceModel;
use crate::nbd::Export;
use crate::spec::{Access, written_here};
use crate::takeover::{self, Refusal};

/// What libxl wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Event {
    /// A disk is about to be served.
    Add,
    /// A disk is gone.
    Remove,
}

/// What access the keys `mode` and `device-type` stand for. The exclamation mark is xend's way to say that a disk is
/// knowingly shared; a CD-ROM is read whatever its mode.
pub fn access(mode: &str, device_type: Option<&str>) -> Access {
    match (mode.contains('w'), mode.contains('!')) {
        _ if device_type == Some("cdrom") => Access::ReadOnly,
        (_, true) => Access::SharedWrite,
        (true, false) => Access::Write,
        (false, false) => Access::ReadOnly,
    }
}

/// The file or device that `params` names; a name without a folder is a device, as the stock script has it.
pub fn path(params: &str) -> PathBuf {
    let params = params.strip_prefix("aio:").unwrap_or(params);
    if params.starts_with('/') || Export::is_one(params) { params.into() } else { Path::new("/dev").join(params) }
}

/// Handles one event for the backend in `xenbus_path`.
///
/// # Errors
/// A sentence, which is also in the key `hotplug-error` for xl to show.
pub fn run(store: &Client, xenbus_path: &str, event: Event) -> Result<(), String> {
    let outcome = match event {
        Event::Add => add(store, xenbus_path),
        Event::Remove => Ok(()),
    };
    outcome.map_err(|Failure { text, status }| {
        let told = store.transaction(|tx| {
            tx.write(&format!("{xenbus_path}/hotplug-error"), &text)?;
            tx.write(&format!("{xenbus_path}/hotplug-status"), status)
        });
        match told {
            Ok(()) => text,
            Err(error) => format!("{text} (and XenStore could not be told: {error})"),
        }
    })
}

/// Why a disk cannot be had; `status` is the value of `hotplug-status`.
struct Failure {
    text: String,
    status: &'static str,
}

impl From<xenstore_client::Error> for Failure {
    fn from(error: xenstore_client::Error) -> Self {
        Self { text: error.to_string(), status: "error" }
    }
}

fn add(store: &Client, xenbus_path: &str) -> Result<(), Failure> {
    let params = store.read_str(&format!("{xenbus_path}/params"))?;
    let mode = store.read_str(&format!("{xenbus_path}/mode"))?;
    let device_type = store.read_opt(&format!("{xenbus_path}/device-type"))?;
    let access = access(&mode, device_type.as_deref());
    if !params.starts_with('/')
        && !Export::is_one(&params)
        && !path(&params).exists()
        && let Some(help) = written_here(&params)
    {
        let text = format!("{params}: this is another program's spelling, and no file or device here; {help}");
        return Err(Failure { text, status: "error" });
    }
    let path = match path(&params) {
        export if Export::is_one(&params) => export,
        path => std::path::absolute(path)
            .map_err(|error| Failure { text: format!("{params}: {error}"), status: "error" })?,
    };
    // The backend opens it when it sees hotplug-status. What is wrong with it is known here, where xl can still show
    // it.
    let frontend = store.read_opt(&format!("{xenbus_path}/frontend-id"))?.and_then(|id| id.parse().ok());
    let backend = backend_of(store, xenbus_path)?;
    let device = takeover::look(store, backend, frontend, &path, access)?.map_err(|refusal| {
        let busy = matches!(&refusal, Refusal::Image(error) if error.is_in_use());
        Failure { text: refusal.to_string(), status: if busy { "busy" } else { "error" } }
    })?;
    if let Some(frontend) = frontend
        && DeviceModel::expected(store, backend, frontend, access, &path)?.is_some()
    {
        let folder = xenbus_path.rsplitn(4, '/').nth(3).unwrap_or("backend");
        takeover::make_way(store, folder, frontend, &path)?.map_err(|text| Failure { text, status: "busy" })?;
    }
    let path = path.into_os_string().into_string();
    let path = path.map_err(|_| Failure { text: format!("{params}: not UTF-8"), status: "error" })?;
    store.transaction(|tx| {
        tx.write(&format!("{xenbus_path}/physical-device-path"), &path)?;
        if let Some((major, minor)) = device {
            tx.write(&format!("{xenbus_path}/physical-device"), &format!("{major:x}:{minor:x}"))?;
        }
        tx.write(&format!("{xenbus_path}/hotplug-status"), "connected")
    })?;
    Ok(())
}

/// The domain whose backend's directory this is: /local/domain/B/backend/..., or backend/... in this domain's own home.
fn backend_of(store: &Client, xenbus_path: &str) -> Result<DomId, Failure> {
    let (text, from) = match xenbus_path.strip_prefix('/') {
        None => (Some(store.read_str("domid")?), "the key domid"),
        Some(path) => {
            let domain = path.strip_prefix("local/domain/").and_then(|rest| rest.split_once("/backend/"));
            (domain.map(|(domain, _)| domain.to_owned()), "XENBUS_PATH")
        }
    };
    text.and_then(|text| text.trim().parse().ok()).ok_or_else(|| Failure {
        text: format!(
            "{xenbus_path}: {from} does not say which domain's disk this is; libxl gives backend/vbd/DOMID/VDEV"
        ),
        status: "error",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doubt;
    use crate::image::Image;

    #[test]
    fn the_mode_key() {
        let cases = [
            ("r", Access::ReadOnly),
            ("w", Access::Write),
            ("rw", Access::Write),
            ("w!", Access::SharedWrite),
            ("!", Access::SharedWrite),
        ];
        for (mode, expected) in cases {
            assert_eq!(access(mode, Some("disk")), expected, "{mode}");
            assert_eq!(access(mode, None), expected, "{mode}");
            assert_eq!(access(mode, Some("cdrom")), Access::ReadOnly, "a CD-ROM of mode {mode}");
        }
    }

    #[test]
    fn params() {
        assert_eq!(path("/srv/x.img"), Path::new("/srv/x.img"));
        assert_eq!(path("aio:/srv/x.img"), Path::new("/srv/x.img"));
        assert_eq!(path("vg/disk"), Path::new("/dev/vg/disk"));
    }

    /// xl gives a path that is relative to this domain's home; our own attach, and older tools, an absolute one.
    #[test]
    fn add_says_whether_the_disk_can_be_had() {
        use xenstore_client::server::Server;

        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        store.write("domid", "0").unwrap();
        for (number, form) in ["backend/vbd/1/51712", "/local/domain/0/backend/vbd/2/51712"].into_iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("disk.img");
            std::fs::File::create(&image).unwrap().set_len(4096).unwrap();
            let back = format!("/local/domain/0/backend/vbd/{}/51712", number + 1);
            let key = |name: &str| store.read_opt(&format!("{back}/{name}")).unwrap();
            store.write(&format!("{back}/mode"), "w").unwrap();

            store.write(&format!("{back}/params"), "/no/such.img").unwrap();
            assert!(run(&store, form, Event::Add).unwrap_err().contains("no such file"));
            assert_eq!(key("hotplug-status").as_deref(), Some("error"));
            assert!(key("hotplug-error").unwrap().contains("no such file"));

            store.write(&format!("{back}/params"), "rbd:pool/img").unwrap();
            assert!(run(&store, form, Event::Add).unwrap_err().contains("rbd map"));
            store.write(&format!("{back}/params"), "vg/no-such-volume").unwrap();
            let error = run(&store, form, Event::Add).unwrap_err();
            assert!(error.contains("no such device") && !error.contains("truncate"), "{error}");

            store.write(&format!("{back}/params"), image.to_str().unwrap()).unwrap();
            let held = Image::open(&image, Access::Write).unwrap();
            run(&store, form, Event::Add).unwrap_err();
            assert_eq!(key("hotplug-status").as_deref(), Some("busy"));
            drop(held);

            let identity = doubt::identity_of(&std::fs::metadata(&image).unwrap());
            doubt::note(&store, DomId::DOM0, &identity, &image, "flush failed").unwrap();
            let error = run(&store, form, Event::Add).unwrap_err();
            assert!(error.contains("flush failed") && error.contains("blkback checked"), "{error}");
            assert_eq!(key("hotplug-error"), Some(error));
            assert!(doubt::checked(&store, DomId::DOM0, &image).unwrap());

            run(&store, form, Event::Add).unwrap();
            assert_eq!(key("hotplug-status").as_deref(), Some("connected"));
            assert_eq!(key("physical-device-path").as_deref(), image.to_str());
            run(&store, form, Event::Remove).unwrap();
        }
    }

    #[test]
    fn a_directory_of_nobody_is_refused() {
        use xenstore_client::server::Server;

        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        for (key, value) in [("mode", "w"), ("params", image.path().to_str().unwrap())] {
            store.write(&format!("/tool/backend/vbd/1/51712/{key}"), value).unwrap();
        }
        let error = run(&store, "/tool/backend/vbd/1/51712", Event::Add).unwrap_err();
        assert!(error.contains("which domain's"), "{error}");
    }
}
