//! The tour: one disk from the toolstack's keys to the last byte, checked, and measured.

use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blkback::front::{Frontend, Options};
use blkback::spec::DiskSpec;
use hypervisor::{DomId, Guest};
use xenstore_client::Store;

use crate::Failure;
use crate::disk;
use crate::guest_disk::GuestDisk;
use crate::load::Pattern;
use crate::machine::Machine;
use crate::nbd::{Command, Completion, Disk as _};
use crate::table::{Table, grouped};

const IMAGE_SIZE: u64 = 1 << 30;
/// What is written: blocks of many sizes, spread over the whole disk.
const BLOCKS: u64 = 1500;

struct Steps {
    began: Instant,
}

impl Steps {
    fn say(&self, text: impl std::fmt::Display) {
        println!("{:7.3} s  {text}", self.began.elapsed().as_secs_f64());
        // Nothing can be done about a terminal that has gone away.
        let _ = std::io::stdout().flush();
    }
}

/// Block `number`: where it is, and how long.
fn block(number: u64) -> (u64, usize) {
    let spread = IMAGE_SIZE / BLOCKS / 512 * 512;
    let sectors = 1 + (number * 7919) % 256;
    (number * spread, (sectors * 512) as usize)
}

/// What is written there: every 8 bytes say where they belong and in which generation.
fn contents(offset: u64, len: usize, generation: u64) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|word| ((offset + word * 8) ^ generation << 48 ^ 0x5aa5).to_le_bytes()).collect()
}

/// Commands to the guest's disk, many at a time.
fn all(disk: &GuestDisk, commands: impl Iterator<Item = Command>) -> Result<Vec<(usize, Vec<u8>)>, Failure> {
    let (sender, answers) = mpsc::channel();
    let mut sent = 0;
    for (number, command) in commands.enumerate() {
        let sender = sender.clone();
        disk.submit(
            command,
            Completion::new(move |answer| {
                // The receiver outlives all answers, or nobody wants them any more.
                let _ = sender.send((number, answer));
            }),
        );
        sent += 1;
    }
    let mut done = Vec::with_capacity(sent);
    for _ in 0..sent {
        let (number, answer) = answers.recv_timeout(Duration::from_secs(30)).map_err(|_| "an answer did not come")?;
        done.push((number, answer.map_err(|errno| format!("request {number} failed: errno {errno}"))?));
    }
    Ok(done)
}

fn check(what: &str, offset: u64, found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None if found.len() == expected.len() => Ok(()),
        at => Err(format!("{what}: byte {} is not what was written", offset + at.unwrap_or(0) as u64).into()),
    }
}

/// Runs the tour.
///
/// # Errors
/// When anything is not as it should be.
pub fn run() -> Result<(), Failure> {
    println!("dom0-bench: a disk, from the toolstack's keys to the last byte\n");
    let steps = Steps { began: Instant::now() };
    let machine = Machine::start(&[])?;
    steps.say("an emulated Xen machine runs, and blkback in its dom0 (processes of their own)");
    let image = machine.folder().join("disk.img");
    std::fs::File::create(&image)?.set_len(IMAGE_SIZE)?;
    let guest = Arc::new(machine.join_guest("tour", 0)?);
    let domid = Guest::domid(&*guest);
    let spec: DiskSpec = format!("{},raw,xvda,rw", image.display()).parse()?;
    machine.attach(domid, &spec)?;
    steps.say(format!("a sparse image of {} MiB is attached to domain {domid}, as xl would do it", IMAGE_SIZE >> 20));
    let before = machine.counters();
    let options = Options { pool_pages: 2048, queues: 2, ring_order: 1, ..Options::default() };
    let mut front = Frontend::connect(guest.clone(), spec.vdev.number(), &options)?;
    steps.say("the guest is connected: rings granted and mapped, event channels bound, both sides in state 4");
    show_keys(&machine, domid, spec.vdev.number())?;

    let (disk, threads) = GuestDisk::start(&front.disk().clone(), front.take_queues())?;
    let verified = verify(&steps, &disk, &image);
    let queues = disk.stop(threads)?;
    let (verified, requests) = verified?;
    let counted = machine.counters().since(&before);
    front.close(queues)?;
    machine.detach(domid, spec.vdev)?;
    // A guest's seat is its domain: it had to outlive the disk.
    drop(guest);
    check_file(&image)?;
    steps.say("detached; the file itself, read by the host, holds the same");

    let mut table = Table::new(["what happened", ""]);
    table.row(["bytes verified".into(), grouped(verified)]);
    table.row(["commands to the guest's disk".into(), grouped(requests)]);
    table.row(["pages mapped once and kept (persistent grants)".into(), grouped(counted.maps)]);
    table.row(["grant copies".into(), grouped(counted.copies)]);
    table.row(["notifications, both ways".into(), grouped(counted.notifications)]);
    table.row(["grants refused".into(), grouped(counted.refused_grants())]);
    table.row(["pages still mapped after the detach".into(), grouped(machine.still_mapped()?)]);
    println!("\n{table}");
    measure(&steps)?;
    left_out();
    Ok(())
}

fn show_keys(machine: &Machine, domid: DomId, devid: u32) -> Result<(), Failure> {
    let mut table = Table::new(["XenStore key", "value"]);
    let backend = format!("/local/domain/0/backend/vbd/{domid}/{devid}");
    let frontend = format!("{}/device/vbd/{devid}", domid.home());
    for (path, keys) in [
        (&backend, &["state", "sectors", "multi-queue-max-queues", "feature-persistent", "feature-discard"][..]),
        (&frontend, &["state", "ring-page-order", "multi-queue-num-queues", "queue-0/ring-ref0", "protocol"][..]),
    ] {
        for key in keys {
            let path = format!("{path}/{key}");
            let value = machine.store().read_opt(&path)?.unwrap_or_else(|| "-".into());
            table.row([path, value]);
        }
    }
    println!("\n{table}");
    Ok(())
}

/// Writes, flushes, reads back, writes over, discards. Returns bytes verified and commands given.
fn verify(steps: &Steps, disk: &GuestDisk, image: &Path) -> Result<(u64, u64), Failure> {
    let write = |generation: u64, every: u64| {
        (0..BLOCKS).filter(move |number| number % every == 0).map(move |number| {
            let (offset, len) = block(number);
            Command::Write { offset, data: contents(offset, len, generation), fua: false }
        })
    };
    all(disk, write(1, 1))?;
    // Every third block is written over, so that an old version shows.
    all(disk, write(2, 3))?;
    all(disk, std::iter::once(Command::Flush))?;
    let bytes: u64 = (0..BLOCKS).map(|number| block(number).1 as u64).sum();
    steps.say(format!(
        "{BLOCKS} blocks of 512 bytes to 128 KiB written all over the disk ({} MiB), flushed",
        bytes >> 20
    ));

    let reads = (0..BLOCKS).map(|number| {
        let (offset, len) = block(number);
        Command::Read { offset, len: len as u32 }
    });
    for (number, data) in all(disk, reads)? {
        let (offset, len) = block(number as u64);
        check("read by the guest", offset, &data, &expected(number as u64, offset, len))?;
    }
    steps.say("read back by the guest: every byte is what was written last");

    let before = std::fs::metadata(image)?.blocks() * 512;
    if disk.geometry().trim {
        let discards = (0..BLOCKS).filter(|number| number % 5 == 4).map(|number| {
            let (offset, len) = block(number);
            Command::Trim { offset, len: len as u32 }
        });
        all(disk, discards)?;
        all(disk, std::iter::once(Command::Flush))?;
        let after = std::fs::metadata(image)?.blocks() * 512;
        let freed = before.saturating_sub(after) >> 20;
        steps.say(format!("a fifth of the blocks discarded: the file gave back {freed} MiB of {}", before >> 20));
    } else {
        steps.say("discard not shown: the file system here cannot punch holes");
    }
    Ok((2 * bytes, 2 * BLOCKS + BLOCKS / 3 + BLOCKS / 5 + 2))
}

fn expected(number: u64, offset: u64, len: usize) -> Vec<u8> {
    contents(offset, len, if number.is_multiple_of(3) { 2 } else { 1 })
}

/// The host's view of the image after the guest has let go of it.
fn check_file(image: &Path) -> Result<(), Failure> {
    let file = std::fs::File::open(image)?;
    for number in 0..BLOCKS {
        let (offset, len) = block(number);
        let mut data = vec![0; len];
        file.read_exact_at(&mut data, offset)?;
        let discarded = number % 5 == 4 && data.iter().all(|&byte| byte == 0);
        if !discarded {
            check("read by the host", offset, &data, &expected(number, offset, len))?;
        }
    }
    Ok(())
}

fn measure(steps: &Steps) -> Result<(), Failure> {
    let file = disk::filled_file(Path::new("/dev/shm"), 256 << 20);
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            steps.say(format!("not measured: {error}"));
            return Ok(());
        }
    };
    steps.say("measuring: the same load through blkback and by plain io_uring, on one file in memory, by turns\n");
    let mut table =
        Table::new(["on a file in /dev/shm", "blkback", "plain io_uring", "ratio", "p99 µs", "kicks/request"]);
    let mut placement = String::new();
    for (rw, bs, depth) in [
        (Pattern::RandRead, 4096, 32),
        (Pattern::RandWrite, 4096, 32),
        (Pattern::RandRead, 4096, 1),
        (Pattern::Read, 131_072, 8),
    ] {
        let arguments = disk::Arguments {
            disk: Some(file.to_str().ok_or("the file has a name that is not UTF-8")?.to_owned()),
            rw,
            bs,
            depth,
            queues: 1,
            seconds: 1.5,
            size: 0,
            destroy: true,
            no_persistent: false,
            same_core: false,
            json: None,
        };
        let report = disk::run(&arguments)?;
        placement = format!("guest on processor {:?}, blkback on {:?}", report.front_cpus, report.back_cpus);
        let speed = |iops: f64, mb: f64| {
            if bs > 4096 { format!("{} MB/s", grouped(mb as u64)) } else { format!("{} IOPS", grouped(iops as u64)) }
        };
        table.row([
            format!("{rw} {} KiB, depth {depth}", bs >> 10),
            speed(report.iops, report.mb_s),
            speed(report.raw_iops, report.raw_mb_s),
            format!("{:.2}", report.ratio_to_raw),
            format!("{:.1}", report.p99_us),
            format!("{:.3}", report.kicks_per_request),
        ]);
    }
    println!("{table}  {placement}\n");
    steps.say("done");
    Ok(())
}

/// What this machine cannot show.
fn left_out() {
    if !Path::new("/dev/xen").exists() {
        println!("           left out: real Xen, because this machine has no /dev/xen (it is not a dom0)");
    }
}
