//! The tour: one disk from the toolstack's keys to the last byte, and three guests' network from end to end; checked, and
//! measured.

mod network;

use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use blkback::front::{Frontend, Options};
use blkback::spec::DiskSpec;
use hypervisor::{DomId, Guest};
use xenstore_client::Store;

use crate::Failure;
use crate::disk;
use crate::guest_disk::GuestDisk;
use crate::load::Pattern;
use crate::machine::Machine;
use crate::net::netns;
use crate::table::{Table, grouped};
use crate::verify;

const IMAGE_SIZE: u64 = 1 << 30;

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

/// Runs the tour.
///
/// # Errors
/// When anything is not as it should be.
pub fn run() -> Result<(), Failure> {
    println!("dom0-bench: a disk from the toolstack's keys to the last byte, and a network from guest to guest\n");
    // Before the first thread and the first part: dom0 is to be a namespace of its own.
    let apart = netns::leave_the_host();
    let steps = Steps { began: Instant::now() };
    let mut machine = Machine::start(&[])?;
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
    let verified = verify::run(&disk, |done| steps.say(done));
    let queues = disk.stop(threads)?;
    let verified = verified?;
    let counted = machine.counters().since(&before);
    front.close(queues)?;
    machine.detach(domid, spec.vdev)?;
    // A guest's seat is its domain: it had to outlive the disk.
    drop(guest);
    let on_the_host = verify::check_file(&image)?;
    let taken = std::fs::metadata(&image)?.blocks() * 512;
    steps.say(format!(
        "detached; the file, read by the host, holds the same, and takes {} MiB of its {}",
        taken >> 20,
        IMAGE_SIZE >> 20
    ));

    let mut table = Table::new(["what happened", ""]);
    table.row(["bytes compared, by the guest and by the host".into(), grouped(verified.bytes + on_the_host)]);
    table.row(["commands to the guest's disk".into(), grouped(verified.commands)]);
    table.row(["pages mapped once and kept (persistent grants)".into(), grouped(counted.maps)]);
    table.row(["grant copies".into(), grouped(counted.copies)]);
    table.row(["notifications, both ways".into(), grouped(counted.notifications)]);
    table.row(["grants refused".into(), grouped(counted.refused_grants())]);
    table.row(["pages still mapped after the detach".into(), grouped(machine.still_mapped()?)]);
    println!("\n{table}");
    let with_network = network::possible(apart);
    match &with_network {
        Ok(()) => network::run(&steps, &mut machine)?,
        Err(reason) => steps.say(format!("no network: {reason}")),
    }
    drop(machine);
    measure(&steps)?;
    if with_network.is_ok() {
        network::measure(&steps)?;
    }
    steps.say("done");
    left_out(with_network.is_ok());
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
    Ok(())
}

/// What this machine cannot show.
fn left_out(with_network: bool) {
    if !with_network {
        println!("           left out: the guests' network, for the reason above");
    }
    if !Path::new("/dev/xen").exists() {
        println!("           left out: real Xen, because this machine has no /dev/xen (it is not a dom0)");
    }
}
