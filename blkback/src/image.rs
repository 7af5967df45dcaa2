//! Files and block devices as disks: opened, claimed, and asked what they can do.

mod claim;
mod direct;
mod discard;
mod problem;
mod size;

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::FallocateFlags;

pub use problem::{ImageError, Problem};
pub use size::Size;

use claim::{LAST_WRITES, Means, claim, open_file, wait_for_the_dead};
use problem::{io_problem, remote_problem};
use size::size;

use crate::abi::SECTOR;
use crate::device_model::DeviceModel;
use crate::doubt;
use crate::erase::{self, Erase};
use crate::host_users::Target;
use crate::lock;
use crate::nbd::protocol::{NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_TRIM};
use crate::nbd::{Client, Export, link::Link};
use crate::spec::Access;

/// An open disk image, claimed for as long as it lives.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    identity: String,
    target: Target,
    /// Files under a loop device, claimed along with it.
    _under: Vec<File>,
    /// The server, if the image is not on this machine.
    remote: Option<Arc<Client>>,
    /// Whole sectors of 512 bytes. See [`sectors`](Self::sectors).
    sectors: AtomicU64,
    /// What the last [`measure`](Self::measure) found; never [`Size::Grown`].
    found: Mutex<Size>,
    /// Bytes of the disk's own sectors: the unit of a request.
    pub sector_size: u32,
    /// Bytes the storage prefers to be written at once.
    pub physical_sector_size: u32,
    /// Whether the page cache is left out.
    pub direct: bool,
    /// Bytes that the storage reads and writes at least: more than [`sector_size`](Self::sector_size) where smaller
    /// requests go through [`Bounced`](crate::bounce::Bounced).
    pub unit: u32,
    /// Whether DISCARD frees storage.
    pub discard: bool,
    /// Whether what was discarded reads as zeros.
    pub zeroes: bool,
    /// Bytes that DISCARD frees at a time.
    pub discard_granularity: u32,
    /// Bytes from the disk's beginning to the first unit that DISCARD can free.
    pub discard_alignment: u32,
    /// Whether the storage erases for good.
    pub secure: bool,
    /// How the storage erases for good, or discards without making holes, if it does either.
    pub erase: Option<Arc<dyn Erase>>,
    /// Whether it is a file on a network file system, which may send pages again after it said that they are written.
    pub over_network: bool,
    /// Linux device number, for a block device.
    pub device: Option<(u32, u32)>,
    /// What an administrator should know about how this image is served.
    pub notes: Vec<String>,
}

impl Image {
    /// Opens and claims `path`.
    ///
    /// # Errors
    /// When it is no disk, cannot be opened, or is in use in a way that `access` forbids.
    pub fn open(path: &Path, access: Access) -> Result<Self, ImageError> {
        let fail = |problem| ImageError { path: path.to_owned(), problem };
        match export(path) {
            Some(text) => Self::open_remote(text, access).map_err(fail),
            None => {
                let own = |file: &File| lock::claim(file, access);
                Self::open_inner(path, access, &own).map_err(fail)
            }
        }
    }

    /// Opens `path` for writing and keeps it from everybody but `device_model`, which may have it, or come. Nothing may be
    /// read or written before [`claim_reserved`](Self::claim_reserved).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn reserve(path: &Path, device_model: &DeviceModel) -> Result<Self, ImageError> {
        let own = |file: &File| lock::reserve(file, &|| has_open(device_model, file));
        Self::open_inner(path, Access::Write, &own).map_err(|problem| ImageError { path: path.to_owned(), problem })
    }

    /// Claims a reserved image whole: nobody else has it now.
    ///
    /// # Errors
    /// Who has it; it stays reserved.
    pub fn claim_reserved(&self) -> Result<(), ImageError> {
        // A descriptor that was just closed is gone a moment before its locks are.
        wait_for_the_dead(&self.file, Access::Write, Duration::from_secs(1));
        let locked = lock::claim_reserved(&self.file);
        locked.map_err(|text| ImageError { path: self.path.clone(), problem: Problem::Locked(text) })
    }

    /// Whether somebody is in the way of [`claim_reserved`](Self::claim_reserved), for who has reserved it or not.
    pub fn is_used(path: &Path) -> bool {
        open_file(path, Access::ReadOnly, false).is_ok_and(|(file, _)| lock::is_used(&file))
    }

    /// Lets a device model of this guest have it again: as [`reserve`](Self::reserve) left it.
    pub fn give_way(&self) {
        lock::give_way(&self.file);
    }

    /// What it is, for finding out who has it open.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Whether [`open`](Self::open) would succeed, if need be after the last writes of a process that was killed. Returns
    /// the device number of a block device.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn check(path: &Path, access: Access) -> Result<Option<(u32, u32)>, ImageError> {
        Self::check_after(path, access, LAST_WRITES, &|file| lock::check(file, access))
    }

    /// Whether [`open`](Self::open) would succeed now.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn check_now(path: &Path, access: Access) -> Result<Option<(u32, u32)>, ImageError> {
        Self::check_after(path, access, Duration::ZERO, &|file| lock::check(file, access))
    }

    /// Whether [`reserve`](Self::reserve) would succeed now.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn check_reserve(path: &Path, device_model: &DeviceModel) -> Result<Option<(u32, u32)>, ImageError> {
        let own = |file: &File| lock::check_reserve(file, &|| has_open(device_model, file));
        Self::check_after(path, Access::Write, Duration::ZERO, &own)
    }

    fn check_after(
        path: &Path,
        access: Access,
        longest: Duration,
        own: &dyn Fn(&File) -> Result<(), String>,
    ) -> Result<Option<(u32, u32)>, ImageError> {
        let checked = || {
            if let Some(text) = export(path) {
                let link = Link::make(&parse(text)?).map_err(remote_problem)?;
                check_remote(link.info.size, link.info.flags, access)?;
                return Ok(None);
            }
            let (mut file, metadata) = open_file(path, access, access == Access::Write)?;
            wait_for_the_dead(&file, access, longest);
            claim(&file, &metadata, access, Means { own, whole: lock::check, part: lock::check_part })?;
            size(&mut file)?;
            Ok(metadata.file_type().is_block_device().then(|| device_number(metadata.rdev())))
        };
        checked().map_err(|problem| ImageError { path: path.to_owned(), problem })
    }

    /// What a disk will be that cannot be had yet: looked at, not claimed, and not open any more. There is nothing behind
    /// it to be read or written.
    ///
    /// # Errors
    /// When it is no disk.
    pub fn foresee(path: &Path, access: Access) -> Result<Self, ImageError> {
        let foreseen = || {
            let (file, metadata) = open_file(path, access, false)?;
            let mut image = Self::learn(path, access, file, &metadata)?;
            image.file = Self::none().map_err(io_problem("an idle descriptor"))?.file;
            Ok(image)
        };
        foreseen().map_err(|problem| ImageError { path: path.to_owned(), problem })
    }

    fn open_inner(path: &Path, access: Access, own: &dyn Fn(&File) -> Result<(), String>) -> Result<Self, Problem> {
        let (file, metadata) = open_file(path, access, access == Access::Write)?;
        let means = Means { own, whole: lock::claim, part: lock::claim_part };
        let under = claim(&file, &metadata, access, means)?;
        let mut image = Self::learn(path, access, file, &metadata)?;
        image._under = under;
        Ok(image)
    }

    /// What a file or device can do.
    fn learn(path: &Path, access: Access, mut file: File, metadata: &Metadata) -> Result<Self, Problem> {
        let bytes = size(&mut file)?;
        let mut image = Self {
            path: path.to_owned(),
            identity: doubt::identity_of(metadata),
            target: Target::of(metadata),
            sectors: AtomicU64::new(bytes / SECTOR),
            found: Mutex::default(),
            sector_size: SECTOR as u32,
            physical_sector_size: SECTOR as u32,
            direct: false,
            unit: SECTOR as u32,
            discard: false,
            zeroes: true,
            discard_granularity: 0,
            discard_alignment: 0,
            secure: false,
            erase: None,
            over_network: false,
            device: None,
            notes: Vec::new(),
            file,
            _under: Vec::new(),
            remote: None,
        };
        if bytes % SECTOR != 0 {
            image.notes.push(format!("the last {} bytes are no whole sector and are not served", bytes % SECTOR));
        }
        if metadata.file_type().is_block_device() {
            image.learn_device(metadata.rdev(), access != Access::ReadOnly)?;
        } else {
            image.learn_file(metadata.blksize(), bytes, access != Access::ReadOnly);
        }
        image.choose_unit(access)?;
        Ok(image)
    }

    fn open_remote(text: &str, access: Access) -> Result<Self, Problem> {
        let client = Client::connect(parse(text)?).map_err(remote_problem)?;
        let info = client.info();
        check_remote(info.size, info.flags, access)?;
        let unit = info.block.max(SECTOR as u32);
        // A request that begins and ends inside of units takes a unit more.
        if info.payload < LARGEST_REQUEST + 2 * unit {
            let source = io::Error::other(format!("it takes at most {} bytes at a time, too few", info.payload));
            return Err(Problem::Io { what: "the NBD server", source });
        }
        let mut image = Self::none().map_err(io_problem("an idle descriptor"))?;
        image.path = text.into();
        image.identity = doubt::identity_of_export(text);
        // What is no whole unit at the end cannot be read.
        let served = info.size / u64::from(unit) * u64::from(unit);
        if served < SECTOR {
            return Err(Problem::Empty(served));
        }
        image.sectors = AtomicU64::new(served / SECTOR);
        image.unit = unit;
        image.physical_sector_size = image.unit.max(4096);
        image.discard = access != Access::ReadOnly && info.flags & NBD_FLAG_SEND_TRIM != 0;
        image.zeroes = false;
        image.discard_granularity = image.unit;
        image.direct = true;
        if info.flags & NBD_FLAG_SEND_FLUSH == 0 {
            let note = "the server takes no flushes: what it has answered is all that is promised of it";
            image.notes.push(note.to_owned());
        }
        if access == Access::Write {
            let note = "NBD has no locks: that nobody else writes to this export is the administrator's to see to";
            image.notes.push(note.to_owned());
        }
        image.remote = Some(Arc::new(client));
        Ok(image)
    }

    /// The server, if the image is not on this machine.
    pub fn remote(&self) -> Option<&Arc<Client>> {
        self.remote.as_ref()
    }

    fn learn_device(&mut self, device: u64, writable: bool) -> Result<(), Problem> {
        self.device = Some(device_number(device));
        self.sector_size = rustix::fs::ioctl_blksszget(&self.file).map_err(io_problem("BLKSSZGET"))?;
        self.physical_sector_size = rustix::fs::ioctl_blkpbszget(&self.file).map_err(io_problem("BLKPBSZGET"))?;
        let discards = discard::look(&discard::folder(device_number(device)));
        self.discard = writable && discards.can;
        self.zeroes = discards.zeroes;
        let second = io_problem("a second descriptor");
        if self.discard && self.zeroes {
            // A hole punched into a device is zeros written by freeing (fallocate(2) on a block device).
            self.erase = erase::of_device(&self.file).map_err(second)?;
            // Secure discard ends with such zeros.
            self.secure = self.erase.is_some();
        } else if self.discard {
            self.erase = Some(erase::discards_of_device(&self.file).map_err(second)?);
        }
        self.discard_granularity = discards.granularity.max(self.sector_size);
        self.discard_alignment = discards.alignment;
        Ok(())
    }

    fn learn_file(&mut self, block: u64, bytes: u64, writable: bool) {
        let block = u32::try_from(block).unwrap_or(4096).clamp(512, 4096);
        // What is below the file system, not its blocks: guests lay out file systems and databases by this number, and
        // must find the same one on a file that was a loop device's before. Where no one device is below, sectors are 512.
        let below = self.file.metadata().map_or(0, |metadata| size::physical_sectors(device_number(metadata.dev())));
        self.physical_sector_size = below.max(SECTOR as u32);
        // Freeing what lies past the end changes nothing, and shows whether the file system knows how. Past the end of
        // the file: the disk's may come before it, and what lies between is not ours to free.
        let past = bytes.next_multiple_of(4096);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.discard = writable && rustix::fs::fallocate(&self.file, flags, past, 4096).is_ok();
        self.discard_granularity = block;
        self.over_network = rustix::fs::fstatfs(&self.file).is_ok_and(|fs| NETWORK.contains(&(fs.f_type as u32)));
    }

    /// A drive without a disk in it: no sectors, nothing to read or write.
    ///
    /// # Errors
    /// When the machine is out of descriptors.
    pub fn none() -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("no-medium", rustix::fs::MemfdFlags::CLOEXEC)?);
        Ok(Self {
            target: Target::of(&file.metadata()?),
            file,
            path: PathBuf::new(),
            identity: "none".to_owned(),
            _under: Vec::new(),
            remote: None,
            sectors: AtomicU64::new(0),
            found: Mutex::default(),
            sector_size: SECTOR as u32,
            physical_sector_size: SECTOR as u32,
            direct: false,
            unit: SECTOR as u32,
            discard: false,
            zeroes: true,
            discard_granularity: 0,
            discard_alignment: 0,
            secure: false,
            erase: None,
            over_network: false,
            device: None,
            notes: Vec::new(),
        })
    }

    /// What distinguishes it from all others ([`doubt`]). Found out when it was opened: a device that is being lost does
    /// not tell any more.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn has_open(device_model: &DeviceModel, file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| device_model.user(Target::of(&metadata)).is_some())
}

/// The NBD export that a path stands for; `None` if it is a path.
pub fn export(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| Export::is_one(text))
}

fn parse(text: &str) -> Result<Export, Problem> {
    text.parse().map_err(|error: String| Problem::Io { what: "NBD export", source: io::Error::other(error) })
}

fn check_remote(size: u64, flags: u16, access: Access) -> Result<(), Problem> {
    if size < SECTOR {
        return Err(Problem::Empty(size));
    }
    if access != Access::ReadOnly && flags & NBD_FLAG_READ_ONLY != 0 {
        return Err(Problem::ReadOnlyStorage);
    }
    Ok(())
}

/// Numbers of network file systems (statfs(2), linux/magic.h): nfs, cifs, smb2, 9p, ceph, afs.
const NETWORK: [u32; 6] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400, 0x5346_414f];

/// Bytes of the largest request of a guest: 256 segments of a page.
const LARGEST_REQUEST: u32 = 256 * 4096;

/// The number of the block device that a path leads to.
pub fn device_at(path: &Path) -> Option<(u32, u32)> {
    let metadata = std::fs::metadata(path).ok().filter(|metadata| metadata.file_type().is_block_device())?;
    Some(device_number(metadata.rdev()))
}

fn device_number(device: u64) -> (u32, u32) {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &Path, access: Access) -> String {
        Image::open(path, access).expect_err("it should not open").to_string()
    }

    #[test]
    fn what_is_no_disk_is_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert!(problem(&dir.path().join("none.img"), Access::Write).contains("no such file"));
        assert!(problem(dir.path(), Access::Write).contains("directory"));
        assert!(problem(Path::new("/dev/null"), Access::Write).contains("neither a regular file"));
        let empty = dir.path().join("empty.img");
        File::create(&empty).unwrap();
        assert!(problem(&empty, Access::Write).contains("holds 0 bytes"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(problem(&fifo, Access::ReadOnly).contains("neither a regular file"));
    }

    /// As a loop device over it has it: not the file system's blocks of 4096 bytes.
    #[test]
    fn a_file_has_the_physical_sectors_of_the_storage_below_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = Image::open(file.path(), Access::Write).unwrap();
        let (major, minor) = device_number(file.as_file().metadata().unwrap().dev());
        // Which of the two a machine has is its own affair.
        let sys = format!("/sys/dev/block/{major}:{minor}");
        let below = ["queue", "../queue"].iter().find_map(|at| {
            std::fs::read_to_string(format!("{sys}/{at}/physical_block_size")).ok()?.trim().parse().ok()
        });
        assert_eq!(image.physical_sector_size, below.unwrap_or(512).max(image.unit), "{sys}");
    }

    #[test]
    fn a_sparse_file_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(10 * 512 + 7).unwrap();
        let image = Image::open(&path, Access::Write).unwrap();
        assert_eq!((image.sectors(), image.sector_size, image.device), (10, 512, None));
        assert!(image.notes.iter().any(|note| note.contains("7 bytes")), "{:?}", image.notes);
    }

    /// Anywhere else io_uring answers EAGAIN for ever, if what is below cannot do without waiting.
    #[test]
    fn only_files_on_tmpfs_are_nonblocking() {
        use rustix::fs::{OFlags, fcntl_getfl};
        let nonblocking = |file: &tempfile::NamedTempFile| {
            file.as_file().set_len(8192).unwrap();
            [Access::ReadOnly, Access::Write].map(|access| {
                let image = Image::open(file.path(), access).unwrap();
                fcntl_getfl(&image.file).unwrap().contains(OFlags::NONBLOCK)
            })
        };
        let in_memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert_eq!(nonblocking(&in_memory), [true, true]);
        // The folder of the program under test, wherever that is built.
        let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let elsewhere = tempfile::NamedTempFile::new_in(&folder).unwrap();
        if rustix::fs::fstatfs(elsewhere.as_file()).unwrap().f_type == 0x0102_1994 {
            println!("NOT TESTED: files that are not on tmpfs: {} is on one", folder.display());
            return;
        }
        assert_eq!(nonblocking(&elsewhere), [false, false]);
    }

    #[test]
    fn who_may_open_an_image_with_whom() {
        use Access::{ReadOnly, SharedWrite, Write};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let link = dir.path().join("link.img");
        File::create(&path).unwrap().set_len(4096).unwrap();
        std::fs::hard_link(&path, &link).unwrap();
        let allowed = [(ReadOnly, ReadOnly), (SharedWrite, SharedWrite)];
        for first in [ReadOnly, Write, SharedWrite] {
            for second in [ReadOnly, Write, SharedWrite] {
                let _held = Image::open(&path, first).unwrap();
                let outcome = Image::open(&link, second);
                assert_eq!(
                    outcome.is_ok(),
                    allowed.contains(&(first, second)),
                    "{first:?} then {second:?}: {outcome:?}"
                );
            }
        }
        Image::open(&path, Write).expect("all claims are gone");
    }
}
