//! `dom0-bench net`: how fast guests' networks are through netback, beside a pair of the kernel's own interfaces and
//! beside taps with a program that only copies, in one run and by turns.

mod report;
mod subject;

use std::path::PathBuf;
use std::time::Duration;

use netback::front::Options;

pub use self::report::{Report, Row};
use self::subject::Subject;
use super::netns;
use super::plan::{MOST_GUESTS, Topology};
use super::scene::Cable;
use super::traffic;
use crate::Failure;
use crate::disk::bar;
use crate::load::parse_size;

/// Measure guests' network through netback, beside plain veth and beside taps with a copying program
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// How dom0 joins the guests: bridge, route, nat
    #[arg(long, default_value = "bridge", value_name = "TOPOLOGY")]
    pub topology: Topology,
    /// Guests; on a bridge or routed every second one sends to the next, behind NAT each sends to the outside
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=MOST_GUESTS as i64))]
    pub guests: u32,
    /// TCP streams of each sender
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub streams: u32,
    /// Bytes of each send into a TCP stream: 64 to 64k
    #[arg(long, default_value = "64k", value_parser = parse_size)]
    pub size: u64,
    /// Bytes of each datagram, when datagrams are counted: 8 to MTU - 28
    #[arg(long, default_value = "64", value_parser = parse_size)]
    pub datagram: u64,
    /// Seconds of TCP for each kind of network, in three rounds by turns; datagrams and round trips get half of it each
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Largest packet of all interfaces
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(68..=65000))]
    pub mtu: u32,
    /// Queues the guests ask for, a thread each on both sides
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub queues: u32,
    /// The guests know neither scatter-gather nor GSO nor checksums to be finished by others
    #[arg(long)]
    pub no_offload: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Arguments {
    fn front_options(&self) -> Options {
        let on = !self.no_offload;
        let options = Options { queues: self.queues, ..Options::default() };
        // A packet larger than a page has to come in pieces, offloads or not.
        Options { sg: on || self.mtu > 1500, gso_v4: on, gso_v6: on, csum_v4: on, csum_v6: on, ..options }
    }

    fn check(&self) -> Result<(), Failure> {
        if !(64..=traffic::LARGEST as u64).contains(&self.size) {
            return Err(format!("--size {} is not from 64 to 64k", self.size).into());
        }
        if !(8..=u64::from(self.mtu) - 28).contains(&self.datagram) {
            return Err(format!("--datagram {} is not from 8 to {}", self.datagram, self.mtu - 28).into());
        }
        if !(0.1..=3600.0).contains(&self.seconds) {
            return Err("--seconds is a number from 0.1 to 3600".into());
        }
        if self.topology != Topology::Nat && !self.guests.is_multiple_of(2) {
            return Err(format!("--guests {}: on a bridge or routed they come in pairs", self.guests).into());
        }
        Ok(())
    }
}

/// Runs the measurement.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn run(arguments: &Arguments) -> Result<Report, Failure> {
    arguments.check()?;
    netns::leave_the_host().map_err(|error| format!("nothing can be measured: {error}"))?;
    let report = measure(arguments, &CABLES)?;
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(report)
}

const ROUNDS: u32 = 3;

/// The kinds of network beside netback's. The first is the yardstick.
const CABLES: [(&str, Cable); 3] = [
    ("veth, the kernel alone", Cable::Veth),
    ("taps, copied, offloads", Cable::Taps { offload: true }),
    ("taps, copied, no offloads", Cable::Taps { offload: false }),
];

/// A short measurement of two guests on a bridge through netback and over veth, with TCP for `time` each, in a namespace of
/// its own.
///
/// # Errors
/// A sentence for whoever typed the command.
pub fn brief(time: Duration) -> Result<Report, Failure> {
    let arguments = Arguments {
        topology: Topology::Bridge,
        guests: 2,
        streams: 1,
        size: 65536,
        datagram: 64,
        seconds: time.as_secs_f64(),
        mtu: 1500,
        queues: 1,
        no_offload: false,
        json: None,
    };
    netns::Namespace::new()?.run(|| measure(&arguments, &CABLES[..1]))?
}

/// Measures with the calling thread's namespace as dom0.
fn measure(arguments: &Arguments, cables: &[(&'static str, Cable)]) -> Result<Report, Failure> {
    let mut subjects = vec![Subject::netback(arguments)?];
    for &(name, cable) in cables {
        subjects.push(Subject::plain(name, arguments, cable)?);
    }
    let time = Duration::from_secs_f64(arguments.seconds / f64::from(ROUNDS));
    let bar = bar("measuring", u64::from(ROUNDS + 1) * subjects.len() as u64);
    for number in 0..=ROUNDS {
        for subject in &mut subjects {
            bar.set_message(format!("round {number} of {ROUNDS}: {}", subject.name));
            bar.inc(1);
            // What has to be learnt, addresses and window sizes, is learnt in a round that does not count.
            subject.round(arguments, if number == 0 { time / 10 } else { time }, number > 0)?;
        }
    }
    bar.finish_and_clear();
    let found = subjects.into_iter().map(|subject| Ok((subject.name, subject.end()?)));
    Ok(Report::new(arguments, &found.collect::<Result<Vec<_>, Failure>>()?))
}
