//! `dom0-bench disk`: how fast a disk is through blkback, beside plain io_uring on the same file in the same run.
//!
//! The guest's requests go over the real protocol to a blkback in another process. Its data land in the guest's
//! granted pages, which are the program's buffers, as with a guest's O_DIRECT reads; the yardstick's data land in its
//! own buffers. Both look at the clock once for each batch of completions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkback::abi::op;
use blkback::front::{Frontend, Options, Piece, Queue};
use blkback::image::Image;
use blkback::patience::Patience;
use blkback::spec::{Access, DiskSpec};
use hdrhistogram::Histogram;
use hypervisor::emu::Counters;
use hypervisor::{DomId, Guest};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::Failure;
use crate::load::{Pattern, Requests, parse_size};
use crate::machine::Machine;
use crate::placement;
use crate::raw;
use crate::table::{Table, grouped};

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

/// One round of a load on one queue.
#[derive(Debug, Clone)]
pub struct Round {
    /// The pattern.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block: u64,
    /// Requests in flight.
    pub depth: u32,
    /// How long.
    pub time: Duration,
    /// Where progress is shown.
    pub bar: ProgressBar,
}

impl Round {
    /// Shows progress, now and then.
    #[inline]
    pub fn show(&self, measured: &Measured, elapsed: Duration) {
        if measured.batches.is_multiple_of(1 << 14) {
            self.bar.set_position(elapsed.min(self.time).as_millis() as u64);
        }
    }
}

/// What one thread measured in one round.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Requests done.
    pub requests: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Processor time of the measuring thread.
    pub cpu: Duration,
    /// Nanoseconds from a request to its completion.
    pub latency: Histogram<u64>,
    /// Looks at the clock.
    pub batches: u64,
}

impl Default for Measured {
    fn default() -> Self {
        // Three digits between 1 ns and a minute: constants that the histogram accepts.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap_or_else(|_| unreachable!("sound bounds"));
        Self { requests: 0, bytes: 0, elapsed: Duration::ZERO, cpu: Duration::ZERO, latency, batches: 0 }
    }
}

impl Measured {
    /// Counts a request.
    #[inline]
    pub fn record(&mut self, latency: Duration, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
        self.batches += 1;
        self.latency.saturating_record(latency.as_nanos() as u64);
    }

    /// Takes another thread's, or another round's, figures in. Threads of one round ran side by side, so the longer
    /// time counts; rounds add up.
    fn merge(&mut self, other: &Self, side_by_side: bool) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.cpu += other.cpu;
        self.elapsed = if side_by_side { self.elapsed.max(other.elapsed) } else { self.elapsed + other.elapsed };
        // All histograms here have the same bounds.
        let added = self.latency.add(&other.latency);
        debug_assert!(added.is_ok());
    }

    /// Requests a second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn micros(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }
}

/// The figures of a run. The names are those of the JSON file.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names and the table say it")]
pub struct Report {
    pub disk: String,
    pub rw: String,
    pub bs: u64,
    pub depth: u32,
    pub queues: u32,
    pub persistent: bool,
    pub direct: bool,
    pub front_cpus: Vec<usize>,
    pub back_cpus: Vec<usize>,
    pub iops: f64,
    pub mb_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub front_cpu_us: f64,
    pub back_cpu_us: f64,
    /// System calls that told the other side of something, both ways.
    pub kicks_per_request: f64,
    pub guest_kicks_per_request: f64,
    pub back_kicks_per_request: f64,
    pub copies_per_request: f64,
    pub maps_per_request: f64,
    pub raw_iops: f64,
    pub raw_mb_s: f64,
    pub raw_p50_us: f64,
    pub raw_p99_us: f64,
    pub raw_p999_us: f64,
    pub raw_cpu_us: f64,
    /// Median of the rounds' ratios.
    pub ratio_to_raw: f64,
    pub ratios: Vec<f64>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.direct { "O_DIRECT" } else { "through the page cache" };
        writeln!(
            f,
            "{} of {} bytes, depth {}, {} queue(s), {how}, {}",
            self.rw, self.bs, self.depth, self.queues, self.disk
        )?;
        writeln!(
            f,
            "guest on processor {}, blkback on {}; plain io_uring on {}",
            list(&self.front_cpus),
            list(&self.back_cpus),
            list(&self.back_cpus)
        )?;
        let mut table = Table::new(["", "IOPS", "MB/s", "p50 µs", "p99 µs", "p99.9 µs", "CPU µs/request"]);
        let number = |value: f64| format!("{value:.1}");
        table.row([
            "through blkback".into(),
            grouped(self.iops as u64),
            grouped(self.mb_s as u64),
            number(self.p50_us),
            number(self.p99_us),
            number(self.p999_us),
            format!("{:.2} guest + {:.2} blkback", self.front_cpu_us, self.back_cpu_us),
        ]);
        table.row([
            "plain io_uring".into(),
            grouped(self.raw_iops as u64),
            grouped(self.raw_mb_s as u64),
            number(self.raw_p50_us),
            number(self.raw_p99_us),
            number(self.raw_p999_us),
            format!("{:.2}", self.raw_cpu_us),
        ]);
        write!(f, "{table}")?;
        writeln!(
            f,
            "  ratio {:.2} (rounds: {})\n  per request: {:.4} kicks by the guest, {:.4} by blkback, {:.3} grant copies, {:.5} grant maps",
            self.ratio_to_raw,
            self.ratios.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(", "),
            self.guest_kicks_per_request,
            self.back_kicks_per_request,
            self.copies_per_request,
            self.maps_per_request,
        )
    }
}

fn list(cpus: &[usize]) -> String {
    cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// A measured disk: the file, and how the backend opens it.
struct Subject {
    spec: DiskSpec,
    path: PathBuf,
    bytes: u64,
    direct: bool,
    /// Deleted at the end, if it is ours.
    _own: Option<tempfile::TempPath>,
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
    let subject = subject(arguments)?;
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
    let before = counters();
    let (ours, plain, ratios, back_cpu) = rounds(arguments, &subject, &machine, &mut queues, &front_cpus, &back_cpus)?;
    let counted = counters().since(&before);
    front.close(queues)?;
    machine.detach(Guest::domid(&*guest), subject.spec.vdev)?;

    let report = report(arguments, &subject, (front_cpus, back_cpus), (&ours, &plain), ratios, back_cpu, &counted);
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(report)
}

/// What the machine counted.
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
    (ours, plain): (&Measured, &Measured),
    ratios: Vec<f64>,
    back_cpu: Duration,
    counted: &Counted,
) -> Report {
    let requests = ours.requests.max(1) as f64;
    let each = |time: Duration, measured: &Measured| time.as_secs_f64() * 1e6 / measured.requests.max(1) as f64;
    let megabytes = |measured: &Measured| measured.bytes as f64 / 1e6 / measured.elapsed.as_secs_f64().max(1e-9);
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
        mb_s: megabytes(ours),
        p50_us: ours.micros(0.5),
        p99_us: ours.micros(0.99),
        p999_us: ours.micros(0.999),
        front_cpu_us: each(ours.cpu, ours),
        back_cpu_us: each(back_cpu, ours),
        kicks_per_request: counted.all.notifications as f64 / requests,
        guest_kicks_per_request: counted.by_guest as f64 / requests,
        back_kicks_per_request: counted.by_backend as f64 / requests,
        copies_per_request: counted.all.copies as f64 / requests,
        maps_per_request: counted.all.maps as f64 / requests,
        raw_iops: plain.iops(),
        raw_mb_s: megabytes(plain),
        raw_p50_us: plain.micros(0.5),
        raw_p99_us: plain.micros(0.99),
        raw_p999_us: plain.micros(0.999),
        raw_cpu_us: each(plain.cpu, plain),
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

type Rounds = (Measured, Measured, Vec<f64>, Duration);

/// Both loads by turns, so that a machine that changes its speed changes it for both.
fn rounds(
    arguments: &Arguments,
    subject: &Subject,
    machine: &Machine,
    queues: &mut [Queue],
    front_cpus: &[usize],
    back_cpus: &[usize],
) -> Result<Rounds, Failure> {
    let time = Duration::from_secs_f64(arguments.seconds / f64::from(ROUNDS));
    let bar = bar("measuring", time.as_millis() as u64);
    let round = Round { pattern: arguments.rw, block: arguments.bs, depth: arguments.depth, time, bar: bar.clone() };
    let total = arguments.queues.into();
    let requests = |queue| {
        Requests::new(arguments.rw, subject.bytes, arguments.bs, queue, total)
            .ok_or("the disk is smaller than one request for each queue")
    };
    let (mut ours, mut plain) = (Measured::default(), Measured::default());
    let (mut ratios, mut back_cpu) = (Vec::new(), Duration::ZERO);
    // What is mapped at first sight is mapped, and both have warmed up.
    let warm_up = Round { time: time / 10, ..round.clone() };
    for number in 0..=ROUNDS {
        let (round, counts) = if number == 0 { (&warm_up, false) } else { (&round, true) };
        bar.set_message(format!("round {number} of {ROUNDS}: plain io_uring"));
        let plain_now = side_by_side(back_cpus, |queue| {
            raw::run(&subject.path, subject.direct, &mut requests(queue as u64)?, round)
        })?;
        bar.set_message(format!("round {number} of {ROUNDS}: through blkback"));
        let cpu = placement::process_time(machine.blkback_pid());
        let ours_now = guests(queues, front_cpus, |queue, ring| ours_run(ring, &mut requests(queue as u64)?, round))?;
        if counts {
            back_cpu += placement::process_time(machine.blkback_pid()).saturating_sub(cpu);
            ratios.push(ours_now.iops() / plain_now.iops());
            ours.merge(&ours_now, false);
            plain.merge(&plain_now, false);
        }
    }
    bar.finish_and_clear();
    Ok((ours, plain, ratios, back_cpu))
}

/// Runs `each` on a thread for each processor.
fn side_by_side(cpus: &[usize], each: impl Fn(usize) -> Result<Measured, Failure> + Sync) -> Result<Measured, Failure> {
    let mut sum = Measured::default();
    std::thread::scope(|scope| {
        let each = &each;
        let threads: Vec<_> = cpus
            .iter()
            .enumerate()
            .map(|(queue, &cpu)| {
                scope.spawn(move || {
                    placement::pin(cpu);
                    each(queue)
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let measured = thread.join().map_err(|_| "a measuring thread panicked")??;
            sum.merge(&measured, true);
            Ok::<_, Failure>(())
        })
    })?;
    Ok(sum)
}

/// Runs `each` on a thread for each of the guest's queues.
fn guests(
    queues: &mut [Queue],
    cpus: &[usize],
    each: impl Fn(usize, &mut Queue) -> Result<Measured, Failure> + Sync,
) -> Result<Measured, Failure> {
    let mut sum = Measured::default();
    std::thread::scope(|scope| {
        let each = &each;
        let threads: Vec<_> = queues
            .iter_mut()
            .zip(cpus)
            .enumerate()
            .map(|(queue, (ring, &cpu))| {
                scope.spawn(move || {
                    placement::pin(cpu);
                    each(queue, ring)
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let measured = thread.join().map_err(|_| "a guest's thread panicked")??;
            sum.merge(&measured, true);
            Ok::<_, Failure>(())
        })
    })?;
    Ok(sum)
}

/// The guest's side of a round.
fn ours_run(queue: &mut Queue, requests: &mut Requests, round: &Round) -> Result<Measured, Failure> {
    let pages = (round.block as usize).div_ceil(4096) as u32;
    let pieces: Vec<Vec<Piece>> = (0..round.depth)
        .map(|slot| {
            (0..pages)
                .map(|page| {
                    let sectors = (round.block / 512 - u64::from(page) * 8).min(8) as u8;
                    Piece { page: slot * pages + page, first: 0, last: sectors - 1 }
                })
                .collect()
        })
        .collect();
    let mut started = vec![Instant::now(); round.depth as usize];
    let mut ready: Vec<u32> = (0..round.depth).collect();
    let mut in_flight = 0;
    let mut patience = Patience::default();
    let mut measured = Measured::default();
    let (began, cpu) = (Instant::now(), placement::thread_time());
    let mut now = began;
    loop {
        let over = now.duration_since(began) >= round.time;
        for slot in ready.drain(..) {
            if over {
                continue;
            }
            let request = requests.next_request();
            let operation = if request.write { op::WRITE } else { op::READ };
            started[slot as usize] = now;
            queue.submit(operation, request.offset / 512, &pieces[slot as usize], slot.into());
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        queue.publish()?;
        wait(queue, &mut patience)?;
        now = Instant::now();
        while let Some(outcome) = queue.outcome()? {
            if outcome.status != 0 {
                return Err(format!("a request failed with status {}", outcome.status).into());
            }
            let slot = outcome.tag as u32;
            measured.record(now.duration_since(started[slot as usize]), round.block);
            ready.push(slot);
            in_flight -= 1;
        }
        round.show(&measured, now.duration_since(began));
    }
    measured.elapsed = began.elapsed();
    measured.cpu = placement::thread_time().saturating_sub(cpu);
    Ok(measured)
}

/// Looks for an answer for a while, then sleeps.
fn wait(queue: &mut Queue, patience: &mut Patience) -> Result<(), Failure> {
    let longest = patience.look();
    if !longest.is_zero() {
        let began = Instant::now();
        while began.elapsed() < longest {
            for _ in 0..16 {
                if queue.has_outcome()? {
                    patience.found();
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        patience.found_nothing();
    }
    let began = Instant::now();
    while !queue.wait(None, Duration::from_secs(1))? {}
    patience.slept(began.elapsed());
    Ok(())
}

/// A bar of so many steps, on a terminal only.
pub fn bar(what: &str, steps: u64) -> ProgressBar {
    // The template is a constant; should it ever be wrong, a plain bar does.
    let style = ProgressStyle::with_template("{msg:40} {bar:30} {percent:>3} %")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style).with_message(what.to_owned())
}

fn subject(arguments: &Arguments) -> Result<Subject, Failure> {
    let access = if arguments.rw.writes() { "w" } else { "r" };
    let (text, own) = match &arguments.disk {
        Some(text) if text.contains(',') => (text.clone(), None),
        Some(path) => (format!("{path},raw,xvda,{access}"), None),
        None => {
            let path = filled_file(Path::new("/dev/shm"), arguments.size)?;
            (format!("{},raw,xvda,{access}", path.display()), Some(path))
        }
    };
    let spec: DiskSpec = text.parse()?;
    if own.is_none() && arguments.rw.writes() && !arguments.destroy {
        return Err(format!("--rw {} overwrites {text}; say --destroy if that is meant", arguments.rw).into());
    }
    if arguments.rw.writes() && spec.access == Access::ReadOnly {
        return Err(format!("--rw {} needs a disk with access w", arguments.rw).into());
    }
    let path = std::path::absolute(spec.target.as_deref().unwrap_or_default())?;
    let image = Image::open(&path, spec.access)?;
    let (bytes, direct) = (image.sectors * 512, image.direct);
    Ok(Subject { spec, path, bytes, direct, _own: own })
}

/// A file of data: holes would read faster than any disk.
pub fn filled_file(folder: &Path, bytes: u64) -> Result<tempfile::TempPath, Failure> {
    use std::io::Write;

    let bytes = bytes / 4096 * 4096;
    if bytes == 0 {
        return Err("a disk of less than 4096 bytes measures nothing".into());
    }
    let mut file = tempfile::Builder::new()
        .prefix("dom0-bench-")
        .suffix(".img")
        .tempfile_in(folder)
        .map_err(|error| format!("{}: {error}; name a disk with --disk", folder.display()))?;
    let bar = bar("filling a file with data", bytes);
    let mut state = 1u64;
    let mut chunk = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = left.min(chunk.len() as u64);
        file.write_all(&chunk[..part as usize])
            .map_err(|error| format!("filling {}: {error}; --size makes it smaller", file.path().display()))?;
        left -= part;
        bar.inc(part);
    }
    bar.finish_and_clear();
    Ok(file.into_temp_path())
}
