//! The device model (QEMU) of a guest with emulated hardware, as far as it concerns the guest's disks.
//!
//! libxl starts it after our hotplug program, on the same images (libxl_create.c, libxl_dm.c: domcreate_launch_dm,
//! libxl__build_device_model_args). It takes QEMU's locks on them. When the guest's kernel has its PV drivers, it tells the
//! device model to unplug the emulated disks (xen-emulated-unplug); the image is closed then, and the locks are gone, for
//! the rest of the domain's life. A guest without PV drivers stays on the emulated disk for ever.

use std::path::Path;

use xenstore_client::{Client, DomId, Result, Store};

use crate::host_users::{HostUser, Target, processes};
use crate::image;
use crate::spec::Access;

/// The device model of a domain, whether it runs already or not.
#[derive(Debug, Clone)]
pub struct DeviceModel {
    store: Client,
    guest: DomId,
}

impl DeviceModel {
    /// The device model of `guest`, if one is to be expected to open `image` beside a backend in the domain `backend`.
    ///
    /// A guest that nobody says to be an HVM guest has none: then the disk is its vbd's alone from the beginning. If that
    /// is wrong, the device model does not get the image, and the domain does not start; nothing is written by two.
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn expected(
        store: &Client,
        backend: DomId,
        guest: DomId,
        access: Access,
        image: &Path,
    ) -> Result<Option<Self>> {
        // Device models run in domain 0. A driver domain's disks are not emulated (libxl__device_disk_find_local_path).
        // Readers are no trouble to each other, and xl knows no shared writing.
        if backend != DomId::DOM0 || access != Access::Write || image::export(image).is_some() {
            return Ok(None);
        }
        let emulated = match store.read_opt(&format!("/libxl/{guest}/type"))? {
            Some(kind) => kind == "hvm",
            None => {
                let traces =
                    [format!("{}/hvmloader", guest.home()), format!("{}/device-model/{guest}", backend.home())];
                let mut found = false;
                for trace in &traces {
                    found |= store.directory_opt(trace)?.is_some();
                }
                found
            }
        };
        Ok(emulated.then(|| Self::of(store, guest)))
    }

    /// The device model of `guest`.
    pub fn of(store: &Client, guest: DomId) -> Self {
        Self { store: store.clone(), guest }
    }

    /// Its process, if that has `target` open, with or without locks on it: while the guest is saved, or has just
    /// arrived, QEMU keeps an image open that it has let go of and will lock again (bdrv_inactivate_all).
    pub fn user(&self, target: Target) -> Option<HostUser> {
        // Written by the toolstack where the guest can only read.
        match self.store.read_opt(&format!("{}/image/device-model-pid", self.guest.home())) {
            Ok(Some(pid)) => pid.trim().parse().ok().and_then(|pid| target.user(pid)),
            _ => self.processes().find_map(|pid| target.user(pid)),
        }
    }

    /// Processes that were started as this domain's device model: `-xen-domid N`.
    fn processes(&self) -> impl Iterator<Item = u32> {
        let guest = self.guest.to_string();
        processes().filter_map(move |(pid, folder)| {
            let command = std::fs::read(folder.join("cmdline")).ok()?;
            let mut words = command.split(|&byte| byte == 0);
            let named = words.any(|word| word == b"-xen-domid") && words.next() == Some(guest.as_bytes());
            named.then_some(pid)
        })
    }

    /// Whether the guest's firmware has a PV driver of its own, while the emulated disk is live. UEFI (OVMF) does, and
    /// waits for its backend without a limit: it has to be told no, and boots from the emulated disk.
    ///
    /// # Errors
    /// When XenStore refuses.
    pub fn boots_by_uefi(&self) -> Result<bool> {
        Ok(self.store.read_opt(&format!("{}/hvmloader/bios", self.guest.home()))?.as_deref() == Some("ovmf"))
    }
}

#[cfg(test)]
mod tests {
    use xenstore_client::server::Server;

    use super::*;

    #[test]
    fn who_has_a_device_model() {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        let has = |backend, guest, access, image: &str| {
            DeviceModel::expected(&store, DomId(backend), DomId(guest), access, Path::new(image)).unwrap().is_some()
        };
        for (guest, kind) in [(1, "hvm"), (2, "pv"), (3, "pvh")] {
            store.write(&format!("/libxl/{guest}/type"), kind).unwrap();
        }
        store.write("/local/domain/4/hvmloader/bios", "seabios").unwrap();
        store.write("/local/domain/0/device-model/5/state", "running").unwrap();
        let found: Vec<_> = (1..=6).filter(|&guest| has(0, guest, Access::Write, "/x.img")).collect();
        assert_eq!(found, [1, 4, 5]);
        assert!(!has(7, 1, Access::Write, "/x.img"), "in a driver domain");
        assert!(!has(0, 1, Access::ReadOnly, "/x.iso") && !has(0, 1, Access::SharedWrite, "/x.img"));
        assert!(!has(0, 1, Access::Write, "nbd://host/export"));
    }

    #[test]
    fn its_process_is_found_by_the_toolstacks_word() {
        let server = Server::new().unwrap();
        let store = server.connect(DomId::DOM0).unwrap();
        let model = DeviceModel::of(&store, DomId(7));
        let file = tempfile::NamedTempFile::new().unwrap();
        let target = Target::of(&file.as_file().metadata().unwrap());
        assert_eq!(model.user(target), None);
        store.write("/local/domain/7/image/device-model-pid", &std::process::id().to_string()).unwrap();
        assert_eq!(model.user(target).map(|user| user.pid), Some(std::process::id()));
        store.write("/local/domain/7/hvmloader/bios", "ovmf").unwrap();
        assert!(model.boots_by_uefi().unwrap());
    }
}
