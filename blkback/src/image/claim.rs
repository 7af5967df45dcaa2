//! Opening a file or device so that nobody writes to it who must not.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::problem::{Problem, io_problem, open_problem};
use crate::lock;
use crate::neighbours::{self, Neighbour};
use crate::spec::Access;

/// Opens what can be a disk, and nothing else; `alone` claims a block device.
pub(super) fn open_file(path: &Path, access: Access, alone: bool) -> Result<(File, Metadata), Problem> {
    // Looked at before it is opened: opening a pipe or a device can have effects.
    let kind = std::fs::metadata(path).map_err(|error| open_problem(error, path, access))?.file_type();
    if kind.is_dir() {
        return Err(Problem::Directory);
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Problem::NotADisk);
    }
    // O_NONBLOCK: a drive without a disk in it, a lease of somebody else's, are answers and nothing to wait for. O_EXCL
    // claims a block device against mounts and other claims.
    let exclusive = kind.is_block_device() && alone;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | if exclusive { OFlags::EXCL } else { OFlags::empty() };
    let file = File::options()
        .read(true)
        .write(access != Access::ReadOnly)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| busy_or(path, access, open_problem(error, path, access)))?;
    let metadata = file.metadata().map_err(io_problem("fstat"))?;
    rustix::fs::fcntl_setfl(&file, status_flags(&file)).map_err(io_problem("switching O_NONBLOCK off"))?;
    Ok((file, metadata))
}

/// The number of tmpfs (linux/magic.h).
const TMPFS: u32 = 0x0102_1994;

/// The flags an image is served with, O_DIRECT apart. O_NONBLOCK lets io_uring try a file on tmpfs at once instead of
/// handing each operation to its workers, which halves the speed. Nowhere else does it help, and storage that cannot
/// answer without waiting, such as device-mapper's in Linux 6.1, then answers EAGAIN to everything.
pub(super) fn status_flags(file: &File) -> OFlags {
    let on_tmpfs = rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type as u32 == TMPFS);
    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    // A device's node lies on a tmpfs too (devtmpfs).
    if on_tmpfs && regular { OFlags::NONBLOCK } else { OFlags::empty() }
}

/// How an image is claimed, or looked at.
#[derive(Clone, Copy)]
pub(super) struct Means<'a> {
    /// What is opened.
    pub(super) own: &'a dyn Fn(&File) -> Result<(), String>,
    /// The whole of a file below it.
    pub(super) whole: Lock,
    /// A part of a file below it.
    pub(super) part: Lock,
}

type Lock = fn(&File, Access) -> Result<(), String>;

/// Claims what was opened, by these means, and looks for others who use it without a lock. Returns what else has to stay
/// open for the claim to hold.
pub(super) fn claim(file: &File, metadata: &Metadata, access: Access, means: Means<'_>) -> Result<Vec<File>, Problem> {
    (means.own)(file).map_err(Problem::Locked)?;
    if metadata.is_file() {
        refuse_neighbours(access, &neighbours::of_file(metadata))?;
        return Ok(Vec::new());
    }
    let device = metadata.rdev();
    refuse_neighbours(access, &neighbours::of_device(device))?;
    for path in neighbours::relatives(device) {
        // A partition that is served is locked on its own node. One that cannot be opened is served by nobody.
        let Ok(relative) = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(&path)
        else {
            continue;
        };
        lock::check(&relative, access)
            .map_err(|text| Problem::InUse(format!("shares its sectors with {}, which {text}", path.display())))?;
    }
    let mut under = Vec::new();
    for (path, whole) in neighbours::files_under(device) {
        // A file that was deleted under its loop device cannot be opened by anybody else either.
        let Ok(below) = File::options().read(true).write(access != Access::ReadOnly).open(&path) else { continue };
        let lock = if whole { means.whole } else { means.part };
        let claimed = lock(&below, access);
        claimed.map_err(|text| Problem::InUse(format!("is a loop device over {}, which {text}", path.display())))?;
        under.push(below);
    }
    Ok(under)
}

fn refuse_neighbours(access: Access, neighbours: &[Neighbour]) -> Result<(), Problem> {
    match neighbours::in_the_way(access, neighbours) {
        None => Ok(()),
        Some(Neighbour { what, remedy, .. }) => Err(Problem::InUse(format!("is in use here: {what}; {remedy} first"))),
    }
}

/// How long the last writes of a killed process are waited for.
pub(super) const LAST_WRITES: Duration = Duration::from_secs(20);

/// Waits while a file is locked by nobody who lives. Direct writes of a process that was killed go on landing until they
/// are done, and only then is its lock gone: whoever writes before would be overwritten.
pub(super) fn wait_for_the_dead(file: &File, access: Access, longest: Duration) {
    let began = Instant::now();
    while began.elapsed() < longest && lock::check(file, access).is_err() && !lock::has_live_holder(file) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Says who, where the kernel only said busy.
fn busy_or(path: &Path, access: Access, problem: Problem) -> Problem {
    let neighbours = match &problem {
        Problem::Locked(_) => std::fs::metadata(path).map(|m| neighbours::of_device(m.rdev())).unwrap_or_default(),
        _ => Vec::new(),
    };
    refuse_neighbours(access, &neighbours).err().unwrap_or(problem)
}
