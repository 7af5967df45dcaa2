//! Who else on this machine uses a file or a block device, as far as the kernel tells: loop devices over a file, mounts,
//! swap, and what is built on a device.
//!
//! Locks are seen by those who take locks. A loop device takes none, and neither does a mount; so they are looked for:
//! in sysfs (Documentation/ABI/testing/sysfs-block-loop, …/sysfs-block, …/sysfs-fs-btrfs of Linux), /proc/self/mountinfo
//! and /proc/swaps (proc(5)). Something that is set up later is not seen, except on a block device that was claimed with O_EXCL.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::spec::Access;

/// Major and minor number of a block device.
pub type DeviceNumber = (u32, u32);

/// File systems that are made to be mounted by several machines at once.
const CLUSTER: [&str; 2] = ["ocfs2", "gfs2"];

/// One that uses a file or device besides us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// In words: "/dev/loop3 is set up over it".
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// It may write.
    pub writes: bool,
    /// It goes through the page cache, and would not see what others write.
    pub cached: bool,
}

/// The neighbour that forbids `access`, if any does.
pub fn in_the_way(access: Access, neighbours: &[Neighbour]) -> Option<&Neighbour> {
    neighbours.iter().find(|neighbour| match access {
        Access::ReadOnly => neighbour.writes,
        Access::Write => true,
        Access::SharedWrite => neighbour.cached,
    })
}

/// A loop device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Loop {
    name: String,
    backing: PathBuf,
    direct: bool,
    read_only: bool,
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// All loop devices that have a file.
fn loops() -> Vec<Loop> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let of = |name: String| {
        let folder = Path::new("/sys/block").join(&name);
        let backing = PathBuf::from(read(folder.join("loop/backing_file"))?);
        let direct = read(folder.join("loop/dio")).as_deref() == Some("1");
        let read_only = read(folder.join("ro")).as_deref() == Some("1");
        Some(Loop { name, backing, direct, read_only })
    };
    names.filter(|name| name.starts_with("loop")).filter_map(of).collect()
}

/// One line of /proc/self/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    device: DeviceNumber,
    place: String,
    kind: String,
    /// What was mounted: for some file systems the only hint at the device.
    source: String,
    read_only: bool,
}

/// Reads `36 35 98:0 /root /place rw,noatime master:1 - ext3 /dev/root rw,errors=continue` (proc_pid_mountinfo(5)).
fn mounts(text: &str) -> Vec<Mount> {
    let of = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let (major, minor) = left.next()?.split_once(':')?;
        let place = unescaped(left.nth(1)?);
        let mut right = right.split(' ');
        let kind = right.next()?.to_owned();
        let source = unescaped(right.next()?);
        // The superblock's options: a read-only bind mount of a file system that is written elsewhere is no comfort.
        let read_only = right.next()?.split(',').any(|option| option == "ro");
        Some(Mount { device: (major.parse().ok()?, minor.parse().ok()?), place, kind, source, read_only })
    };
    text.lines().filter_map(of).collect()
}

/// As the kernel has it before it writes blanks and backslashes in octal.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (octal, character)| text.replace(octal, character))
}

/// The mounts of file systems that are on a device. btrfs and bcachefs, which can span several devices, show a device
/// number of their own making; of those, the devices are found by what was mounted (`number_of` a path, or several with
/// colons between), and by `spans`, the devices of each file system.
fn mounts_on<'a>(
    device: DeviceNumber,
    mounts: &'a [Mount],
    spans: &[Vec<DeviceNumber>],
    number_of: impl Fn(&str) -> Option<DeviceNumber>,
) -> Vec<&'a Mount> {
    let is_on = |mount: &Mount| {
        let anonymous = mount.device.0 == 0 && mount.source.starts_with('/');
        mount.device == device
            || anonymous
                && mount.source.split(':').filter_map(&number_of).any(|source| {
                    source == device || spans.iter().any(|span| span.contains(&source) && span.contains(&device))
                })
    };
    mounts.iter().filter(|mount| is_on(mount)).collect()
}

/// The devices of each btrfs that is mounted, in any mount namespace; `sysfs` is where that is mounted.
fn spans_of_btrfs(sysfs: &Path) -> Vec<Vec<DeviceNumber>> {
    let folder = sysfs.join("fs/btrfs");
    let devices = |name: String| {
        let devices = folder.join(name).join("devices");
        names_in(&devices).into_iter().filter_map(|name| number_in(&devices.join(name))).collect()
    };
    names_in(&folder).into_iter().map(devices).filter(|span: &Vec<_>| !span.is_empty()).collect()
}

fn number_at(path: &str) -> Option<DeviceNumber> {
    fs::metadata(path).ok().filter(|m| m.file_type().is_block_device()).map(|m| number(m.rdev()))
}

fn number(device: u64) -> DeviceNumber {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

fn sysfs((major, minor): DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Who uses the file with this device and inode number.
pub fn of_file(file: &fs::Metadata) -> Vec<Neighbour> {
    let same = |path: &Path| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (file.dev(), file.ino()));
    let mut found: Vec<_> = loops()
        .into_iter()
        .filter(|one| same(&one.backing))
        .map(|one| Neighbour {
            what: format!("/dev/{} is set up over it", one.name),
            remedy: format!("unmount what is on it and run losetup -d /dev/{}", one.name),
            writes: !one.read_only,
            cached: !one.direct,
        })
        .collect();
    found.extend(swap(same));
    found
}

/// The lines of /proc/swaps that `is_it` recognises.
fn swap(is_it: impl Fn(&Path) -> bool) -> Vec<Neighbour> {
    let text = read("/proc/swaps").unwrap_or_default();
    let paths = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let of = |path: &str| Neighbour {
        what: "this machine swaps to it".to_owned(),
        remedy: format!("run swapoff {path}"),
        writes: true,
        cached: true,
    };
    paths.filter(|path| is_it(Path::new(path))).map(of).collect()
}

/// Who uses a block device, one of its partitions, or the disk it is a partition of.
pub fn of_device(device: u64) -> Vec<Neighbour> {
    let mounts = mounts(&read("/proc/self/mountinfo").unwrap_or_default());
    let spans = spans_of_btrfs(Path::new("/sys"));
    let mut found = Vec::new();
    for (relative, called) in family(number(device)) {
        let here = mounts_on(relative, &mounts, &spans, number_at);
        if here.is_empty() && spans.iter().any(|span| span.contains(&relative)) {
            found.push(Neighbour {
                what: format!("{called} is part of a btrfs that is mounted elsewhere (another mount namespace)"),
                remedy: "unmount it there (lsns -t mnt, findmnt -N PID)".to_owned(),
                writes: true,
                cached: true,
            });
        }
        found.extend(here.into_iter().map(|mount| Neighbour {
            what: format!("{called} is mounted at {} ({})", mount.place, mount.kind),
            remedy: format!("run umount {}", mount.place),
            writes: !mount.read_only,
            cached: !CLUSTER.contains(&mount.kind.as_str()),
        }));
        found.extend(names_in(&sysfs(relative).join("holders")).into_iter().map(|holder| Neighbour {
            what: format!("{called} is part of /dev/{holder}"),
            remedy: format!("attach /dev/{holder}, or take it apart first"),
            writes: true,
            cached: false,
        }));
        found.extend(swap(|path| {
            fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device() && number(m.rdev()) == relative)
        }));
    }
    found
}

/// A device, its partitions, and the disk that it is a partition of; each with what to call it.
fn family(device: DeviceNumber) -> Vec<(DeviceNumber, String)> {
    let mut found = vec![(device, "it".to_owned())];
    let own = sysfs(device);
    if own.join("partition").exists() {
        found.extend(number_in(&own.join("..")).map(|whole| (whole, "its disk".to_owned())));
    }
    for name in names_in(&own) {
        let part = own.join(&name);
        if part.join("partition").exists() {
            found.extend(number_in(&part).map(|number| (number, format!("its partition {name}"))));
        }
    }
    found
}

fn number_in(folder: &Path) -> Option<DeviceNumber> {
    let text = read(folder.join("dev"))?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Nodes in /dev of the partitions of a device, or of the disk that it is a partition of.
pub fn relatives(device: u64) -> Vec<PathBuf> {
    let node = |number| {
        let name = fs::canonicalize(sysfs(number)).ok()?.file_name()?.to_owned();
        Some(Path::new("/dev").join(name))
    };
    family(number(device)).into_iter().skip(1).filter_map(|(number, _)| node(number)).collect()
}

/// Files under a device: that of a loop device, wherever in the stack of partitions and volumes it is. With each,
/// whether the device is that loop device itself rather than a part of it.
pub fn files_under(device: u64) -> Vec<(PathBuf, bool)> {
    let mut found = Vec::new();
    // A stack of devices has no cycles, but what is read here can change meanwhile.
    look_under(&sysfs(number(device)), true, 8, &mut found);
    found
}

fn look_under(folder: &Path, whole: bool, depth: u32, found: &mut Vec<(PathBuf, bool)>) {
    if depth == 0 {
        return;
    }
    found.extend(read(folder.join("loop/backing_file")).map(|path| (PathBuf::from(path), whole)));
    if folder.join("partition").exists() {
        look_under(&folder.join(".."), false, depth - 1, found);
    }
    for name in names_in(&folder.join("slaves")) {
        look_under(&folder.join("slaves").join(name), false, depth - 1, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo() {
        let text = "36 35 98:0 /root /a\\040b rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                    37 35 7:1 / /mnt rw - ocfs2 /dev/loop1 ro\n\
                    nonsense\n";
        let mount = |device, place: &str, kind: &str, source: &str, read_only| Mount {
            device,
            place: place.to_owned(),
            kind: kind.to_owned(),
            source: source.to_owned(),
            read_only,
        };
        let expected =
            [mount((98, 0), "/a b", "ext3", "/dev/root", false), mount((7, 1), "/mnt", "ocfs2", "/dev/loop1", true)];
        assert_eq!(mounts(text), expected);
    }

    /// btrfs shows a number that is no device's (as on Linux 6.12): what was mounted tells, and sysfs for its others.
    #[test]
    fn file_systems_with_numbers_of_their_own() {
        let text = "40 1 0:35 /@ /srv rw - btrfs /dev/mapper/vg-a rw,space_cache=v2\n\
                    41 1 0:36 / /pool rw - bcachefs /dev/sdx:/dev/sdy rw\n\
                    42 1 0:37 / /tmp rw - tmpfs tmpfs rw\n";
        let mounts = mounts(text);
        let root = tempfile::tempdir().unwrap();
        let device = |uuid: &str, name: &str, number: &str| {
            let folder = root.path().join("fs/btrfs").join(uuid).join("devices").join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
        };
        device("one", "dm-0", "253:0");
        device("one", "sdb1", "8:17");
        device("other", "sdc", "8:32");
        fs::create_dir_all(root.path().join("fs/btrfs/features")).unwrap();
        let mut spans = spans_of_btrfs(root.path());
        spans.iter_mut().for_each(|span| span.sort_unstable());
        spans.sort();
        assert_eq!(spans, [vec![(8, 17), (253, 0)], vec![(8, 32)]]);
        let number_of = |path: &str| match path {
            "/dev/mapper/vg-a" => Some((253, 0)),
            "/dev/sdx" => Some((65, 112)),
            "/dev/sdy" => Some((65, 128)),
            _ => None,
        };
        let places = |device| -> Vec<_> {
            mounts_on(device, &mounts, &spans, number_of).into_iter().map(|mount| mount.place.as_str()).collect()
        };
        for device in [(253, 0), (8, 17)] {
            assert_eq!(places(device), ["/srv"], "{device:?}");
        }
        for device in [(65, 112), (65, 128)] {
            assert_eq!(places(device), ["/pool"], "{device:?}");
        }
        // Mounted, and nothing here says where; and a device that is none of theirs.
        assert!(places((8, 32)).is_empty() && places((8, 16)).is_empty());
    }

    #[test]
    fn who_is_in_the_way_of_whom() {
        let neighbour = |writes, cached| Neighbour { what: String::new(), remedy: String::new(), writes, cached };
        let cases = [
            // (writes, cached), r, w, w!
            ((true, true), [true, true, true]),
            ((true, false), [true, true, false]),
            ((false, true), [false, true, true]),
            ((false, false), [false, true, false]),
        ];
        for ((writes, cached), expected) in cases {
            let all = [Access::ReadOnly, Access::Write, Access::SharedWrite];
            let found = all.map(|access| in_the_way(access, &[neighbour(writes, cached)]).is_some());
            assert_eq!(found, expected, "writes {writes}, cached {cached}");
        }
    }
}
