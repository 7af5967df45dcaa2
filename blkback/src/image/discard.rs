//! Whether and how a block device discards, as its limits in sysfs say (Documentation/ABI/stable/sysfs-block of Linux).

use std::fs;
use std::path::{Path, PathBuf};

/// What a block device says of discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Discards {
    /// It can.
    pub(super) can: bool,
    /// It can also write zeros by freeing: a hole made in it reads as zeros. Thin volumes cannot.
    pub(super) zeroes: bool,
    /// Bytes it frees at a time.
    pub(super) granularity: u32,
    /// Bytes from its beginning to the first unit that can be freed.
    pub(super) alignment: u32,
}

/// The folder of a device, or of a partition, in sysfs.
pub(super) fn folder((major, minor): (u32, u32)) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// Reads the limits of the device with this folder.
pub(super) fn look(folder: &Path) -> Discards {
    let number = |path: PathBuf| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    // A partition has its disk's queue, and an alignment of its own.
    let queue =
        |name: &str| number(folder.join("queue").join(name)).or_else(|| number(folder.join("../queue").join(name)));
    let bytes = |value: Option<u64>| value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
    let can = queue("discard_max_bytes").is_some_and(|most| most > 0);
    Discards {
        can,
        zeroes: can && queue("write_zeroes_max_bytes").is_some_and(|most| most > 0),
        granularity: bytes(queue("discard_granularity")),
        alignment: bytes(number(folder.join("discard_alignment"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(folder: &Path, limits: &[(&str, &str)]) -> Discards {
        for (name, value) in limits {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        look(folder)
    }

    #[test]
    fn what_devices_say() {
        let root = tempfile::tempdir().unwrap();
        // As dm-thin of Linux 6.12 has it, with blocks of 64 KiB.
        let thin = device(
            &root.path().join("thin"),
            &[
                ("queue/discard_max_bytes", "17179869184"),
                ("queue/write_zeroes_max_bytes", "0"),
                ("queue/discard_granularity", "65536"),
                ("discard_alignment", "0"),
            ],
        );
        assert_eq!(thin, Discards { can: true, zeroes: false, granularity: 65536, alignment: 0 });
        let disk = root.path().join("sda");
        let ssd = device(
            &disk,
            &[
                ("queue/discard_max_bytes", "2147450880"),
                ("queue/write_zeroes_max_bytes", "2147450880"),
                ("queue/discard_granularity", "4096"),
                ("discard_alignment", "512"),
            ],
        );
        assert_eq!(ssd, Discards { can: true, zeroes: true, granularity: 4096, alignment: 512 });
        let partition = device(&disk.join("sda1"), &[("discard_alignment", "1024")]);
        assert_eq!(partition, Discards { alignment: 1024, ..ssd });
        let rust = device(&root.path().join("sdb"), &[("queue/discard_max_bytes", "0")]);
        assert_eq!(rust, Discards { can: false, zeroes: false, granularity: 0, alignment: 0 });
    }
}
