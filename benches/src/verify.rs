//! Every byte of a disk's journey checked: blocks of many sizes all over the disk, written, written over, flushed, read
//! back, some of them discarded; and the file looked at from the host's side afterwards.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use crate::Failure;
use crate::guest_disk::GuestDisk;
use crate::nbd::{Command, Completion, Disk as _};

/// Most blocks of a disk.
const MOST_BLOCKS: u64 = 1500;
/// Largest block.
const LARGEST: u64 = 128 << 10;

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Verified {
    /// Bytes compared.
    pub bytes: u64,
    /// Commands given to the disk.
    pub commands: u64,
}

/// Where the blocks are on a disk of this size.
#[derive(Debug, Clone, Copy)]
struct Layout {
    blocks: u64,
    /// Bytes from one block to the next.
    spread: u64,
}

impl Layout {
    fn new(disk_bytes: u64) -> Result<Self, Failure> {
        let blocks = MOST_BLOCKS.min(disk_bytes / LARGEST);
        if blocks < 5 {
            return Err(format!("a disk of {disk_bytes} bytes is too small to show anything: 1 MiB at least").into());
        }
        Ok(Self { blocks, spread: disk_bytes / blocks / 512 * 512 })
    }

    /// Block `number`: where it is, and how long.
    fn block(self, number: u64) -> (u64, usize) {
        let sectors = 1 + (number * 7919) % (LARGEST / 512);
        (number * self.spread, (sectors * 512) as usize)
    }

    /// What block `number` holds in the end. Every third was written twice.
    fn expected(self, number: u64) -> Vec<u8> {
        let (offset, len) = self.block(number);
        contents(offset, len, if number.is_multiple_of(3) { 2 } else { 1 })
    }
}

/// Every fifth block is discarded in the end.
fn is_discarded(number: u64) -> bool {
    number % 5 == 4
}

/// Every 8 bytes say where they belong and in which generation they were written.
fn contents(offset: u64, len: usize, generation: u64) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|word| ((offset + word * 8) ^ (generation << 48) ^ 0x5aa5).to_le_bytes()).collect()
}

/// Gives commands to the disk, many at a time, and waits for all answers.
fn all(disk: &GuestDisk, commands: impl Iterator<Item = Command>) -> Result<Vec<(u64, Vec<u8>)>, Failure> {
    let (sender, answers) = mpsc::channel();
    let mut sent = 0;
    for (number, command) in commands.enumerate() {
        let sender = sender.clone();
        // The receiver outlives all answers, or nobody wants them any more.
        let answer = move |answer| drop(sender.send((number as u64, answer)));
        disk.submit(command, Completion::new(answer));
        sent += 1;
    }
    let mut done = Vec::with_capacity(sent);
    for _ in 0..sent {
        let (number, answer) = answers.recv_timeout(Duration::from_secs(60)).map_err(|_| "an answer did not come")?;
        done.push((number, answer.map_err(|errno| format!("request {number} failed: errno {errno}"))?));
    }
    Ok(done)
}

fn compare(what: &str, offset: u64, found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None if found.len() == expected.len() => Ok(()),
        at => Err(format!("{what}: byte {} is not what was written", offset + at.unwrap_or(0) as u64).into()),
    }
}

/// Writes all over the disk, checks it, and tells `say` of each step.
///
/// # Errors
/// When a request fails or a byte is not what was written.
pub fn run(disk: &GuestDisk, say: impl Fn(String)) -> Result<Verified, Failure> {
    let layout = Layout::new(disk.geometry().size_bytes)?;
    let mut commands = 0;
    let mut give = |given: &mut dyn Iterator<Item = Command>| {
        let answers = all(disk, given)?;
        commands += answers.len() as u64;
        Ok::<_, Failure>(answers)
    };
    let write = |generation: u64, every: usize| {
        (0..layout.blocks).step_by(every).map(move |number| {
            let (offset, len) = layout.block(number);
            Command::Write { offset, data: contents(offset, len, generation), fua: false }
        })
    };
    give(&mut write(1, 1))?;
    give(&mut write(2, 3))?;
    give(&mut std::iter::once(Command::Flush))?;
    let bytes: u64 = (0..layout.blocks).map(|number| layout.block(number).1 as u64).sum();
    let blocks = layout.blocks;
    say(format!("{blocks} blocks of 512 bytes to 128 KiB written all over the disk ({} MiB), flushed", bytes >> 20));

    let mut reads = (0..layout.blocks).map(|number| {
        let (offset, len) = layout.block(number);
        Command::Read { offset, len: len as u32 }
    });
    for (number, data) in give(&mut reads)? {
        compare("read by the guest", layout.block(number).0, &data, &layout.expected(number))?;
    }
    say("read back by the guest: every byte is what was written last".to_owned());

    if disk.geometry().trim {
        let mut discards = (0..layout.blocks).filter(|&number| is_discarded(number)).map(|number| {
            let (offset, len) = layout.block(number);
            Command::Trim { offset, len: len as u32 }
        });
        give(&mut discards)?;
        give(&mut std::iter::once(Command::Flush))?;
        say("a fifth of the blocks discarded".to_owned());
    } else {
        say("discard is not offered here".to_owned());
    }
    Ok(Verified { bytes, commands })
}

/// Compares the file, as the host sees it after the guest has let go, with what [`run`] left in it. Returns bytes
/// compared.
///
/// # Errors
/// When a byte is not what was written; what was discarded may also be zeros.
pub fn check_file(image: &Path) -> Result<u64, Failure> {
    let file = std::fs::File::open(image)?;
    let layout = Layout::new(file.metadata()?.len())?;
    let mut bytes = 0;
    for number in 0..layout.blocks {
        let (offset, len) = layout.block(number);
        let mut data = vec![0; len];
        file.read_exact_at(&mut data, offset)?;
        if !(is_discarded(number) && data.iter().all(|&byte| byte == 0)) {
            compare("read by the host", offset, &data, &layout.expected(number))?;
        }
        bytes += len as u64;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_do_not_overlap_and_stay_on_the_disk() {
        for bytes in [1 << 20, (1 << 20) + 512, 32 << 20, 1 << 30, 1 << 40] {
            let layout = Layout::new(bytes).unwrap();
            for number in 0..layout.blocks {
                let (offset, len) = layout.block(number);
                assert!(offset + len as u64 <= bytes && len as u64 <= layout.spread, "block {number} of {bytes}");
            }
        }
        assert!(Layout::new(1 << 18).is_err());
    }

    #[test]
    fn a_file_that_differs_is_found_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let layout = Layout::new(8 << 20).unwrap();
        for number in 0..layout.blocks {
            file.as_file().write_all_at(&layout.expected(number), layout.block(number).0).unwrap();
        }
        assert!(check_file(file.path()).unwrap() > 0);
        file.as_file().write_all_at(&[1], layout.block(7).0).unwrap();
        assert!(check_file(file.path()).unwrap_err().to_string().contains("read by the host"));
    }
}
