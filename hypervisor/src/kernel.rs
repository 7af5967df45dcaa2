//! The kernel's own backends, which take every device of their kind: nothing else can serve those while one is loaded.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Machine;

/// How often a server looks whether the kernel's backend has been loaded beside it.
const OFTEN: Duration = Duration::from_secs(1);

/// A backend that is a module of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelBackend {
    /// The folder below `backend/` that it takes (`struct xenbus_device_id` in its xenbus.c).
    pub kind: &'static str,
    /// The module.
    pub module: &'static str,
    /// What a device is called in sentences.
    pub device: &'static str,
}

/// drivers/block/xen-blkback. It does not know `vbd3`.
pub const XEN_BLKBACK: KernelBackend = KernelBackend { kind: "vbd", module: "xen-blkback", device: "disk" };
/// drivers/net/xen-netback.
pub const XEN_NETBACK: KernelBackend = KernelBackend { kind: "vif", module: "xen-netback", device: "interface" };

impl KernelBackend {
    /// Whether it is loaded: the bus `xen-backend` has a driver of its kind's name. An emulated machine has that folder
    /// too, in the place of sysfs, and whoever wants to see what happens may make one there.
    pub fn is_loaded(&self, machine: &Machine) -> bool {
        self.driver(machine).exists()
    }

    fn driver(&self, machine: &Machine) -> PathBuf {
        let drivers = match machine {
            Machine::Xen => PathBuf::from("/sys/bus/xen-backend/drivers"),
            Machine::Emulated(dir) => dir.join("xen-backend/drivers"),
        };
        drivers.join(Path::new(self.kind))
    }

    /// Why `program` does not start beside it, and what to do.
    pub fn refusal(&self, program: &str) -> String {
        let Self { module, device, .. } = self;
        format!(
            "the kernel's own backend, {module}, is loaded and takes every {device}: unload it (modprobe -r {module}), and \
             keep it away with the line `blacklist {module}` in /etc/modprobe.d/{program}.conf"
        )
    }

    /// Has a thread look, for the rest of the process' life, whether it is loaded; each time it comes, that is an error in
    /// the log.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn watch(self, machine: Machine, program: &'static str) -> std::io::Result<()> {
        let watch = move || {
            let mut loaded = false;
            loop {
                let now = self.is_loaded(&machine);
                let Self { module, device, .. } = self;
                if now && !loaded {
                    tracing::error!(
                        "the kernel's own backend, {module}, has been loaded beside this process: both take every \
                         {device}, and guests lose those they have; unload it (modprobe -r {module}), or stop {program}"
                    );
                } else if loaded && !now {
                    tracing::warn!("the kernel's own backend, {module}, is gone again");
                }
                loaded = now;
                std::thread::sleep(OFTEN);
            }
        };
        std::thread::Builder::new().name("kernel-backend".to_owned()).spawn(watch).map(drop)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn a_driver_on_the_bus_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::Emulated(dir.path().into());
        assert!(!XEN_BLKBACK.is_loaded(&machine));
        std::fs::create_dir_all(dir.path().join("xen-backend/drivers/vbd")).unwrap();
        assert!(XEN_BLKBACK.is_loaded(&machine) && !XEN_NETBACK.is_loaded(&machine));
        let said = XEN_BLKBACK.refusal("blkback");
        assert!(said.contains("modprobe -r xen-blkback") && said.contains("/etc/modprobe.d/blkback.conf"), "{said}");
    }
}
