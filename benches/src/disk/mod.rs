//! `dom0-bench disk`: how fast a disk is through blkback, beside plain io_uring on the same file in the same run.
//!
//! The guest's requests go over the real protocol to a blkback in another process. Its data land in the guest's
//! granted pages, which are the program's buffers, as with a guest's O_DIRECT reads; the yardstick's data land in its
//! own buffers. Both look at the clock once for each batch of completions.

mod guest_load;
mod measured;
mod report;
mod subject;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blkback::front::{Frontend, Options, Queue};
use hypervisor::emu::Counters;
use hypervisor::{DomId, Guest};
use indicatif::{ProgressBar, ProgressStyle};

pub use measured::{Measured, Round};
pub use report::Report;
pub use subject::filled_file;

use self::report::list;
use self::subject::Subject;
use crate::Failure;
use crate::load::{Pattern, Requests, parse_size};
use crate::machine::{BLKBACK, Machine};
use crate::placement;
use crate::raw;

/// Measure a disk through blkback, beside plain io_uring on the same file
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// The disk, as in xl.cfg, or just a path (default: a file of --size in /dev/shm, filled with data)
    #[arg(long, value_name = "SPEC")]
    pub disk: Option<String>,
    /// The pattern: randread, randwrite, randrw, read, write
    #[arg(long, default_value = "randread", value_name = "PATTERN")]
    pub rw: Pattern,
    /// Bytes of a request: a multiple of 512
    #[arg(long, default_value = "4k", value_parser = parse_size)]
    pub bs: u64,
    /// Requests in flight, for each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub depth: u32,
    /// Queues, a thread each on both sides
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub queues: u32,
    /// Seconds to measure each of the two, in three rounds by turns
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Size of the default disk
    #[arg(long, default_value = "512m", value_parser = parse_size)]
    pub size: u64,
    /// Let a pattern that writes destroy the contents of the --disk given
    #[arg(long)]
    pub destroy: bool,
    /// Copy all data instead of keeping the guest's pages mapped
    #[arg(long)]
    pub no_persistent: bool,
    /// Keep both sides on one processor
    #[arg(long)]
    pub same_core: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs the measurement and prints it.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn run(arguments: &Arguments) -> Result<Report, Failure> {
    if !arguments.bs.is_multiple_of(512) || arguments.bs > 1 << 20 {
        return Err(format!("--bs {} is not a multiple of 512 up to 1 MiB", arguments.bs).into());
    }
    if !(0.1..=3600.0).contains(&arguments.seconds) {
        return Err("--seconds is a number from 0.1 to 3600".into());
    }
    let subject = subject::find(arguments)?;
    let (front_cpus, back_cpus) = place(arguments);
    let cpus = list(&back_cpus).replace(' ', "");
    let queues = arguments.queues.to_string();
    let mut serve = vec!["--cpus", &cpus, "--queues", &queues];
    if arguments.no_persistent {
        serve.push("--no-persistent");
    }
    let machine = Machine::start(&serve)?;
    let pages = pool_pages(arguments);
    let memory = (pages + 512 + 16) * arguments.queues as usize + 64;
    let guest = Arc::new(machine.join_guest("bench", memory as u32)?);
    machine.attach(Guest::domid(&*guest), &subject.spec)?;
    // 4 KiB requests need one slot each; a ring of one page has 32.
    let ring_order = arguments.depth.div_ceil(32).next_power_of_two().ilog2();
    let options = Options { ring_order, queues: arguments.queues, pool_pages: pages, ..Options::default() };
    let mut front = Frontend::connect(guest.clone(), subject.spec.vdev.number(), &options)?;
    let mut queues = front.take_queues();
    if queues.len() != arguments.queues as usize {
        return Err(format!("the backend offers only {} queue(s)", queues.len()).into());
    }

    let domid = Guest::domid(&*guest);
    let counters = || Counted {
        all: machine.counters(),
        by_guest: machine.counters_between(domid, DomId::DOM0).notifications,
        by_backend: machine.counters_between(DomId::DOM0, domid).notifications,
    };
    let found = rounds(arguments, &subject, &machine, &mut queues, (&front_cpus, &back_cpus), counters)?;
    front.close(queues)?;
    machine.detach(Guest::domid(&*guest), subject.spec.vdev)?;

    let report = report(arguments, &subject, (front_cpus, back_cpus), found);
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(report)
}

/// What the machine counted.
#[derive(Default)]
struct Counted {
    all: Counters,
    by_guest: u64,
    by_backend: u64,
}

impl Counted {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            all: self.all.since(&earlier.all),
            by_guest: self.by_guest - earlier.by_guest,
            by_backend: self.by_backend - earlier.by_backend,
        }
    }
}

fn report(
    arguments: &Arguments,
    subject: &Subject,
    (front_cpus, back_cpus): (Vec<usize>, Vec<usize>),
    found: Found,
) -> Report {
    let Found { ours, plain, ratios, back_cpu, counted } = found;
    let requests = ours.requests.max(1) as f64;
    Report {
        disk: subject.path.display().to_string(),
        rw: arguments.rw.to_string(),
        bs: arguments.bs,
        depth: arguments.depth,
        queues: arguments.queues,
        persistent: !arguments.no_persistent,
        direct: subject.direct,
        front_cpus,
        back_cpus,
        iops: ours.iops(),
        mb_s: ours.megabytes(),
        p50_us: ours.micros(0.5),
        p99_us: ours.micros(0.99),
        p999_us: ours.micros(0.999),
        front_cpu_us: ours.each(ours.cpu),
        back_cpu_us: ours.each(back_cpu),
        kicks_per_request: counted.all.notifications as f64 / requests,
        guest_kicks_per_request: counted.by_guest as f64 / requests,
        back_kicks_per_request: counted.by_backend as f64 / requests,
        copies_per_request: counted.all.copies as f64 / requests,
        maps_per_request: counted.all.maps as f64 / requests,
        raw_iops: plain.iops(),
        raw_mb_s: plain.megabytes(),
        raw_p50_us: plain.micros(0.5),
        raw_p99_us: plain.micros(0.99),
        raw_p999_us: plain.micros(0.999),
        raw_cpu_us: plain.each(plain.cpu),
        ratio_to_raw: median(&ratios),
        ratios,
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Pages of data for each queue.
fn pool_pages(arguments: &Arguments) -> usize {
    arguments.depth as usize * (arguments.bs as usize).div_ceil(4096)
}

/// Guests' and backend's processors, a pair for each queue.
fn place(arguments: &Arguments) -> (Vec<usize>, Vec<usize>) {
    let processors = placement::processors();
    let pick = |place: usize| processors[place % processors.len()];
    (0..arguments.queues as usize)
        .map(|queue| (pick(2 * queue), pick(2 * queue + usize::from(!arguments.same_core))))
        .unzip()
}

const ROUNDS: u32 = 3;

/// What all rounds together found.
#[derive(Default)]
struct Found {
    ours: Measured,
    plain: Measured,
    /// Of requests a second, round by round.
    ratios: Vec<f64>,
    /// Processor time of blkback.
    back_cpu: Duration,
    counted: Counted,
}

/// Both loads by turns, so that a machine that changes its speed changes it for both.
fn rounds(
    arguments: &Arguments,
    subject: &Subject,
    machine: &Machine,
    queues: &mut [Queue],
    (front_cpus, back_cpus): (&[usize], &[usize]),
    counters: impl Fn() -> Counted,
) -> Result<Found, Failure> {
    let time = Duration::from_secs_f64(arguments.seconds / f64::from(ROUNDS));
    let bar = bar("measuring", time.as_millis() as u64);
    let round = Round { pattern: arguments.rw, block: arguments.bs, depth: arguments.depth, time, bar: bar.clone() };
    let total = arguments.queues.into();
    let requests = |queue| {
        Requests::new(arguments.rw, subject.bytes, arguments.bs, queue, total)
            .ok_or("the disk is smaller than one request for each queue")
    };
    let mut found = Found::default();
    let mut before = None;
    // What is mapped at first sight is mapped, and both have warmed up.
    let warm_up = Round { time: time / 10, ..round.clone() };
    for number in 0..=ROUNDS {
        let round = if number == 0 { &warm_up } else { &round };
        bar.set_message(format!("round {number} of {ROUNDS}: plain io_uring"));
        let plain_now = side_by_side(back_cpus, back_cpus.iter(), |queue, _| {
            raw::run(&subject.path, subject.direct, &mut requests(queue)?, round)
        })?;
        bar.set_message(format!("round {number} of {ROUNDS}: through blkback"));
        let cpu = placement::process_time(machine.pid(BLKBACK));
        let ours_now = side_by_side(front_cpus, queues.iter_mut(), |queue, ring| {
            guest_load::run(ring, &mut requests(queue)?, round)
        })?;
        if number == 0 {
            before = Some(counters());
            continue;
        }
        found.back_cpu += placement::process_time(machine.pid(BLKBACK)).saturating_sub(cpu);
        found.ratios.push(ours_now.iops() / plain_now.iops());
        found.ours.merge(&ours_now, false);
        found.plain.merge(&plain_now, false);
    }
    found.counted = before.map(|before| counters().since(&before)).unwrap_or_default();
    bar.finish_and_clear();
    Ok(found)
}

/// Runs `each` for every item, with its number, on a thread of its own on a processor of its own.
fn side_by_side<T: Send>(
    cpus: &[usize],
    items: impl Iterator<Item = T>,
    each: impl Fn(u64, T) -> Result<Measured, Failure> + Sync,
) -> Result<Measured, Failure> {
    let mut sum = Measured::default();
    std::thread::scope(|scope| {
        let each = &each;
        let run = |((number, item), &cpu): ((u64, T), &usize)| {
            scope.spawn(move || {
                placement::pin(cpu);
                each(number, item)
            })
        };
        let threads: Vec<_> = (0..).zip(items).zip(cpus).map(run).collect();
        threads.into_iter().try_for_each(|thread| {
            sum.merge(&thread.join().map_err(|_| "a measuring thread panicked")??, true);
            Ok::<_, Failure>(())
        })
    })?;
    Ok(sum)
}

/// A bar of so many steps, on a terminal only.
pub fn bar(what: &str, steps: u64) -> ProgressBar {
    // The template is a constant; should it ever be wrong, a plain bar does.
    let style = ProgressStyle::with_template("{msg:40} {bar:30} {percent:>3} %")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style).with_message(what.to_owned())
}
