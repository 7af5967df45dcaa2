//! What distinguishes a disk from all others, for as long as the machine runs.
//!
//! Device numbers do not: device mapper, loop, md and nbd hand theirs out anew at each activation, and the next volume
//! gets the number of the last. So a device is known by what it says of itself in sysfs (Documentation/ABI of Linux:
//! sysfs-block, sysfs-block-dm, sysfs-block-loop), a partition by its disk and where it begins, a loop device by its
//! file. A device that says nothing has the number that the kernel counts disks with (diskseq, since Linux 5.15): with
//! that no other disk is mistaken for it, but it is not known again when it was taken down and set up anew.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Loop devices over files on loop devices, and partitions of those.
const DEEPEST: u32 = 8;

/// What distinguishes a file or device from all others, whatever it is called, as the name of a node.
pub fn identity_of(metadata: &Metadata) -> String {
    of_metadata(Path::new("/sys"), metadata, DEEPEST)
}

/// The same for an export of an NBD server.
pub fn identity_of_export(export: &str) -> String {
    format!("nbd-{:x}", hash(export))
}

/// FNV-1a: names of nodes may not have all characters that names of devices and exports may.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn of_metadata(sysfs: &Path, metadata: &Metadata, depth: u32) -> String {
    if metadata.file_type().is_block_device() {
        return of_device(sysfs, metadata.rdev(), depth);
    }
    // A file that was deleted leaves its number to the next one, which was made later.
    let made = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let made = made.map(|made| made.as_nanos());
    let on = match (rustix::fs::major(metadata.dev()), made) {
        // A number of the file system's own making, anew at each mount. When the file was made says enough.
        (0, Some(_)) => "0".to_owned(),
        (0, None) => format!("{:x}", metadata.dev()),
        _ => of_device(sysfs, metadata.dev(), depth),
    };
    format!("file-{on}-{:x}-{:x}", metadata.ino(), made.unwrap_or(0))
}

fn of_device(sysfs: &Path, device: u64, depth: u32) -> String {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let folder = sysfs.join(format!("dev/block/{major}:{minor}"));
    // The whole disk's folder is found by name: sysfs has it above the partition's.
    let folder = fs::canonicalize(&folder).unwrap_or(folder);
    of_folder(sysfs, &folder, depth).unwrap_or_else(|| format!("device-{device:x}"))
}

/// The first line of an attribute, if it says something.
fn attribute(folder: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    let text = text.lines().next()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn of_folder(sysfs: &Path, folder: &Path, depth: u32) -> Option<String> {
    let depth = depth.checked_sub(1)?;
    if folder.join("partition").exists() {
        let disk = of_folder(sysfs, folder.parent()?, depth)?;
        return Some(format!("{disk}-from-{}", attribute(folder, "start")?));
    }
    if let Some(file) = attribute(folder, "loop/backing_file") {
        // A file that was deleted, or is out of our sight, is known by its name.
        let file = fs::metadata(PathBuf::from(&file))
            .map_or_else(|_| format!("{:x}", hash(&file)), |metadata| of_metadata(sysfs, &metadata, depth));
        return Some(format!("loop-{file}-{}", attribute(folder, "loop/offset").unwrap_or_default()));
    }
    // Of the kernel's names for what a device is, those that do not depend on when it was found.
    let says = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "backend", "dm/name"];
    let says = says.into_iter().find_map(|name| Some(format!("{name} {}", attribute(folder, name)?)));
    match says {
        Some(says) => Some(format!("disk-{:x}", hash(&says))),
        None => attribute(folder, "diskseq").map(|number| format!("diskseq-{number}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with these attributes, and what identifies the device 253:MINOR.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }

        /// Gives a device of the tree a number.
        fn number(&self, number: &str, device: &str) {
            let link = self.0.path().join("dev/block").join(number);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(self.0.path().join(device), link).unwrap();
        }

        fn identity(&self, minor: u32) -> String {
            of_device(self.0.path(), rustix::fs::makedev(253, minor), DEEPEST)
        }
    }

    #[test]
    fn a_volume_is_known_by_its_uuid_and_not_by_its_minor() {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.put("devices/dm-a/dm/uuid", "LVM-one");
        tree.put("devices/dm-b/dm/uuid", "LVM-two");
        tree.number("253:0", "devices/dm-a");
        tree.number("253:1", "devices/dm-b");
        let (one, two) = (tree.identity(0), tree.identity(1));
        assert_ne!(one, two);
        // Taken down and activated again, in the other order.
        tree.number("253:0", "devices/dm-b");
        tree.number("253:1", "devices/dm-a");
        assert_eq!((tree.identity(1), tree.identity(0)), (one, two));
    }

    #[test]
    fn disks_partitions_loops_and_what_says_nothing() {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.put("devices/sda/device/wwid", "t10.ATA     Some Disk: 1.0");
        tree.put("devices/sda/sda1/partition", "1");
        tree.put("devices/sda/sda1/start", "2048");
        tree.put("devices/sda/sda2/partition", "2");
        tree.put("devices/sda/sda2/start", "1050624");
        tree.put("devices/vda/serial", "0123");
        tree.put("devices/vda/diskseq", "3");
        tree.put("devices/vdb/serial", "");
        tree.put("devices/vdb/diskseq", "4");
        let file = tempfile::NamedTempFile::new().unwrap();
        tree.put("devices/loop0/loop/backing_file", file.path().to_str().unwrap());
        tree.put("devices/loop0/loop/offset", "0");
        tree.put("devices/loop1/loop/backing_file", file.path().to_str().unwrap());
        tree.put("devices/loop1/loop/offset", "512");
        tree.put("devices/loop2/loop/backing_file", "/srv/gone.img (deleted)");
        tree.put("devices/empty/size", "0");
        let devices = ["sda", "sda/sda1", "sda/sda2", "vda", "vdb", "loop0", "loop1", "loop2", "empty"];
        let all: Vec<String> = (0..)
            .zip(devices)
            .map(|(minor, device)| {
                tree.number(&format!("253:{minor}"), &format!("devices/{device}"));
                tree.identity(minor)
            })
            .collect();
        for (at, one) in all.iter().enumerate() {
            assert!(one.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{one} is no name of a node");
            assert!(!all[..at].contains(one), "{one} is two devices: {all:?}");
        }
        assert!(all[1].starts_with(&all[0]) && all[2].starts_with(&all[0]), "{all:?}");
        assert_eq!(all[4], "diskseq-4");
        assert_eq!(all[8], format!("device-{:x}", rustix::fs::makedev(253, 8)));
        let file = of_metadata(tree.0.path(), &file.as_file().metadata().unwrap(), DEEPEST);
        assert_eq!(all[5], format!("loop-{file}-0"));
    }

    #[test]
    fn a_device_of_this_machine() {
        let Some(device) = fs::read_dir("/sys/block").unwrap().flatten().find_map(|entry| {
            let path = Path::new("/dev").join(entry.file_name());
            fs::metadata(path).ok().filter(|m| m.file_type().is_block_device())
        }) else {
            println!("NOT TESTED: the identity of a real block device: this machine has none");
            return;
        };
        let identity = identity_of(&device);
        assert!(!identity.starts_with("device-"), "{identity} would be another disk's after a while");
    }
}
