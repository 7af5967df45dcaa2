//! Everything that can be wrong with the answer to "how large is the disk", at the two places where a served disk asks:
//! when it may have grown, and when another one is put into its drive.

use std::fmt;
use std::fs::File;

use blkback::device::{MEDIUM_STATUS, RESIZE_STATUS};
use blkback::drive;
use hypervisor::DomId;

use super::bench::What;
use super::fuse::Failure;
use super::served::{Disk, Served};

/// When the size is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// `blkback resize`.
    Resize,
    /// `blkback insert`.
    Insert,
}

/// The two rows.
pub const ROWS: [(&str, Asked); 2] = [("resize: size", Asked::Resize), ("insert: size", Asked::Insert)];

/// What is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// An error.
    Error(i32),
    /// So many bytes, whatever the file has.
    Bytes(u64),
}

/// Bytes of the file at first, and when it has grown.
const SMALL: u64 = 64 << 10;
/// See [`SMALL`].
const GROWN: u64 = 96 << 10;

/// All columns.
pub const ANSWERS: [(&str, Answer); 9] = [
    ("EIO", Answer::Error(libc::EIO)),
    ("ENOSPC", Answer::Error(libc::ENOSPC)),
    ("ESTALE", Answer::Error(libc::ESTALE)),
    ("EAGAIN", Answer::Error(libc::EAGAIN)),
    ("EINTR", Answer::Error(libc::EINTR)),
    ("smaller", Answer::Bytes(SMALL / 2)),
    ("zero", Answer::Bytes(0)),
    ("ragged", Answer::Bytes(GROWN - 4096 + 7)),
    ("too large", Answer::Bytes(GROWN + (1 << 20))),
];

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Whoever asked was told what is wrong; the guest has what it had.
    Refused,
    /// The guest has a disk of so many sectors.
    Sectors(u64),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.pad("refused"),
            Self::Sectors(sectors) => f.pad(&sectors.to_string()),
        }
    }
}

/// What must become of it.
pub fn expected(asked: Asked, answer: Answer) -> Verdict {
    match (asked, answer) {
        // Asked again.
        (Asked::Resize, Answer::Error(libc::EAGAIN | libc::EINTR)) => Verdict::Sectors(GROWN / 512),
        (_, Answer::Error(_) | Answer::Bytes(0)) => Verdict::Refused,
        (Asked::Resize, Answer::Bytes(bytes)) if bytes < SMALL => Verdict::Refused,
        (_, Answer::Bytes(bytes)) => Verdict::Sectors(bytes / 512),
    }
}

/// Plays a cell. `Err(None)` where this process may not mount.
///
/// # Errors
/// What is wrong.
pub fn play(asked: Asked, answer: Answer) -> Result<Verdict, Option<String>> {
    let served = Served::new(SMALL as usize).map_err(|error| {
        println!("NOT TESTED: {asked:?} with {answer:?} from a real kernel: {error}");
        None
    })?;
    match asked {
        Asked::Resize => resize(&served, answer),
        Asked::Insert => insert(&served, answer),
    }
    .map_err(Some)
}

fn set(served: &Served, answer: Option<Answer>, times: u32) {
    let mut medium = served.mounted.medium();
    medium.claimed = None;
    medium.failure = None;
    match answer {
        Some(Answer::Error(errno)) => {
            medium.failure = Some(Failure { what: What::Size, after: 0, errno: Some(errno), times });
        }
        Some(Answer::Bytes(bytes)) => medium.claimed = Some(bytes),
        None => {}
    }
}

fn expect(what: &str, is_it: bool) -> Result<(), String> {
    if is_it { Ok(()) } else { Err(what.to_owned()) }
}

/// The disk has `sectors`, and is `byte` as far as the file of `there` bytes goes; past that there is nothing but errors.
fn check(disk: &mut Disk, sectors: u64, there: u64, byte: u8) -> Result<(), String> {
    expect("another size is published", disk.key("sectors")? == Some(sectors.to_string()))?;
    expect("state 4 is gone", disk.key("state")?.as_deref() == Some("4"))?;
    let last = sectors.min(there / 512) - 8;
    expect("the last sectors cannot be read", disk.read(last)? == Ok(byte))?;
    expect("the last sectors cannot be written", disk.write(last, byte)? == 0)?;
    for past in [sectors - 4, sectors, there / 512, u64::MAX / 512] {
        if past + 8 > sectors.min(there / 512) {
            expect("OK for a read of what is not there", disk.read(past)? == Err(-1))?;
            expect("OK for a write to what is not there", disk.write(past, 1)? == -1)?;
        }
    }
    Ok(())
}

fn resize(served: &Served, answer: Answer) -> Result<Verdict, String> {
    let guest = served.guest("resized").map_err(|error| error.to_string())?;
    let mut disk = served.connect(&guest, &served.mounted.path(), "xvda", ",w")?;
    check(&mut disk, SMALL / 512, SMALL, 0)?;
    served.mounted.medium().seen.resize(GROWN as usize, 7);
    set(served, Some(answer), 1);
    let order = |disk: &Disk| drive::resize(&served.store, DomId::DOM0, disk.guest, disk.vdev);
    let verdict = match order(&disk) {
        Ok((before, after)) => {
            expect("it was told another size before", before == SMALL / 512)?;
            Verdict::Sectors(after)
        }
        Err(error) => {
            let (text, listed) = (error.to_string(), served.list(&guest)?);
            let status = disk.key(RESIZE_STATUS)?.unwrap_or_default();
            expect(&format!("the answer says {text:?}, and the key {status:?}"), text == status)?;
            expect(&format!("the list says nothing of it: {listed}"), listed.contains(&text))?;
            expect(&format!("{text:?} does not say what the guest has"), text.contains("keeps its 128 sectors"))?;
            Verdict::Refused
        }
    };
    let sectors = if let Verdict::Sectors(sectors) = verdict { sectors } else { SMALL / 512 };
    match answer {
        // The kernel gives nothing past what it takes for the end.
        Answer::Bytes(bytes) if bytes < SMALL => {
            expect("another size is published", disk.key("sectors")? == Some(sectors.to_string()))?;
            expect("what is left cannot be read", disk.read(0)? == if bytes > 0 { Ok(0) } else { Err(-1) })?;
            expect("OK for a read past the end of the storage", disk.read(bytes / 512)? == Err(-1))?;
            expect("OK for a write past the end of the disk", disk.write(sectors, 1)? == -1)?;
        }
        // What was there is 0, what came is 7.
        _ => check(&mut disk, sectors, GROWN, if sectors > SMALL / 512 { 7 } else { 0 })?,
    }
    // And then all is well.
    set(served, None, 0);
    let wanted = sectors.max(GROWN / 512);
    match order(&disk) {
        Ok((before, after)) => expect("it has not grown to what is there", (before, after) == (sectors, wanted))?,
        // It was said to be larger than it is; that cannot be taken back.
        Err(error) => expect(&error.to_string(), sectors > GROWN / 512)?,
    }
    check(&mut disk, wanted, GROWN, 7)?;
    let quiet = !served.list(&guest)?.contains("keeps its");
    expect("the list does not say what is wrong, or goes on saying what is not", quiet == (wanted == GROWN / 512))?;
    disk.close()?;
    Ok(verdict)
}

fn insert(served: &Served, answer: Answer) -> Result<Verdict, String> {
    let guest = served.guest("drive").map_err(|error| error.to_string())?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let old = folder.path().join("old.iso");
    let made = File::create(&old).and_then(|file| file.set_len(SMALL));
    made.map_err(|error| error.to_string())?;
    let mut disk = served.connect(&guest, &old, "xvdd", ":cdrom,r")?;
    let holds = |disk: &mut Disk, sectors: u64, byte: u8| {
        expect("another size is published", disk.key("sectors")? == Some(sectors.to_string()))?;
        expect("its start cannot be read", disk.read(0)? == Ok(byte))?;
        expect("OK for what is not there", disk.read(sectors)? == Err(-1))
    };
    holds(&mut disk, SMALL / 512, 0)?;
    served.mounted.medium().seen = vec![9; GROWN as usize];
    let new = served.mounted.path();
    let new = new.to_str().ok_or("a path that is no UTF-8")?;
    // Past the command, which would have looked first.
    set(served, Some(answer), u32::MAX);
    disk.tell("params", new)?;
    disk.wait(MEDIUM_STATUS, |status| status.is_some_and(|status| status != "inserted") || is_new(&disk))?;
    let verdict = match disk.key(MEDIUM_STATUS)?.as_deref() {
        Some("inserted") => {
            let sectors = disk.key("sectors")?.and_then(|text| text.parse().ok());
            Verdict::Sectors(sectors.ok_or("no sectors")?)
        }
        Some(_) => Verdict::Refused,
        None => return Err("nothing was said".to_owned()),
    };
    match verdict {
        Verdict::Refused => holds(&mut disk, SMALL / 512, 0)?,
        Verdict::Sectors(sectors) => {
            expect("its start cannot be read", disk.read(0)? == Ok(9))?;
            expect("OK for what is not there", disk.read(sectors)? == Err(-1))?;
            expect("OK for what the file does not have", disk.read(GROWN / 512)? == Err(-1))?;
        }
    }
    // And then the command, and all is well.
    set(served, None, 0);
    let change = |target| drive::change(&served.store, DomId::DOM0, disk.guest, disk.vdev, target);
    change(None).map_err(|error| error.to_string())?;
    change(Some(new)).map_err(|error| error.to_string())?;
    disk.wait("sectors", |sectors| sectors == Some(&(GROWN / 512).to_string()))?;
    holds(&mut disk, GROWN / 512, 9)?;
    disk.close()?;
    Ok(verdict)
}

/// Whether the size of the new disk has come.
fn is_new(disk: &Disk) -> bool {
    disk.key("sectors").is_ok_and(|sectors| sectors != Some((SMALL / 512).to_string()))
}
