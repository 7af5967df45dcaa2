//! simdisk: simulated crashes of a disk under blkback's queue.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use system_tests::sim::explore::{Explorer, Failure, Totals};
use system_tests::sim::plant::Bug;

/// Plays histories of a guest and its disk, and looks at every crash in them: first all short histories, then random
/// ones by seed.
#[derive(Debug, Parser)]
struct Arguments {
    /// Crashes in random histories, after all the enumerated ones.
    #[arg(default_value_t = 1_000_000)]
    crashes: u64,
    /// The first seed, rounded down to a multiple of 256.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Plays one history again and shows what happens in it: a seed, or the name of an enumerated one.
    #[arg(long, value_name = "SEED")]
    replay: Option<String>,
    /// Leaves the enumeration out.
    #[arg(long)]
    random_only: bool,
    /// Plants a bug: one of flush-does-nothing, flush-answered-early, write-answered-early, barrier-per-queue,
    /// retry-after-error, discard-rounded-outward, lock-on-path, answer-twice.
    #[arg(long, value_name = "BUG", value_parser = bug)]
    plant: Option<Bug>,
}

fn bug(name: &str) -> Result<Bug, String> {
    Bug::ALL.into_iter().find(|bug| bug.name() == name).ok_or_else(|| format!("there is no bug {name:?}; see --help"))
}

/// Shows how far it is, once a second.
struct Progress {
    began: Instant,
    said: Instant,
}

impl Progress {
    fn say(&mut self, crashes: u64, of: u64) {
        if self.said.elapsed() >= Duration::from_secs(1) {
            self.said = Instant::now();
            println!("{crashes:>12} of {of} crashes, {:.0} a second", rate(crashes, self.began));
        }
    }
}

fn rate(crashes: u64, began: Instant) -> f64 {
    crashes as f64 / began.elapsed().as_secs_f64()
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(id) = &arguments.replay {
        return match Explorer::replay(arguments.plant, id) {
            Ok(trace) => {
                println!("{trace}");
                ExitCode::SUCCESS
            }
            Err(problem) => {
                eprintln!("simdisk: {problem}");
                ExitCode::FAILURE
            }
        };
    }
    match explore(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            println!("\n{}: {}", failure.finding.class, failure.finding.text);
            match Explorer::replay(arguments.plant, &failure.id) {
                Ok(trace) => println!("{trace}"),
                Err(problem) => println!("{problem}"),
            }
            println!("replay it with: simdisk --replay {}", failure.id);
            ExitCode::FAILURE
        }
    }
}

fn explore(arguments: &Arguments) -> Result<(), Failure> {
    let mut explorer = Explorer::new(arguments.plant);
    let outcome = run(arguments, &mut explorer);
    println!("{}", explorer.totals);
    outcome
}

fn run(arguments: &Arguments, explorer: &mut Explorer) -> Result<(), Failure> {
    let began = Instant::now();
    if !arguments.random_only {
        for length in 1..=3 {
            explorer.enumerate(length, true, u64::MAX)?;
            explorer.enumerate(length, false, 200)?;
            let Totals { sequences, histories, .. } = &explorer.totals;
            println!("all sequences of up to {length} requests: {sequences}, in {histories} orders");
        }
        let crashes = explorer.totals.all_crashes();
        println!("{crashes} crashes in enumerated histories, {:.0} a second", rate(crashes, began));
    }
    let before = explorer.totals.all_crashes();
    let mut progress = Progress { began: Instant::now(), said: Instant::now() };
    let mut seed = arguments.seed & !255;
    loop {
        let done = explorer.totals.all_crashes() - before;
        if done >= arguments.crashes {
            println!("{done:>12} of {} crashes, {:.0} a second", arguments.crashes, rate(done, progress.began));
            return Ok(());
        }
        progress.say(done, arguments.crashes);
        explorer.seed(seed)?;
        seed += 1;
    }
}
