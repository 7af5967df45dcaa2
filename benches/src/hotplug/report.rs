//! The figures of a run, for people and as JSON.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::Arguments;
use super::rounds::Found;
use super::subject::Kind;
use crate::table::Table;

/// One attach.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// From its beginning to the backend's state 4.
    pub(super) connected: Duration,
    /// Of it, from the backend's state 2 to `hotplug-status`.
    pub(super) hotplug: Duration,
    /// Processor time of the toolstack and the hotplug program.
    pub(super) work: Duration,
}

/// The figures of a run. The names are those of the JSON file.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names and the table say it")]
pub struct Report {
    pub topology: String,
    pub rounds: u32,
    pub toolstack_cpu: usize,
    pub others_cpu: usize,
    /// The program that was executed as our script.
    pub ours: String,
    /// Where the stock scripts were.
    pub stock: Option<String>,
    pub rows: Vec<Row>,
}

/// The figures of one kind of hotplug program, times in milliseconds.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names and the table say it")]
pub struct Row {
    pub name: &'static str,
    pub connected_ms: Spread,
    pub hotplug_ms: Spread,
    pub work_ms: Spread,
    pub processes: Option<u32>,
    /// How often the stock script's time is this one's, each round's.
    pub connected_ratio: Option<Spread>,
    /// The same of the hotplug program alone.
    pub hotplug_ratio: Option<Spread>,
}

/// The median, and the tenth part from below and from above.
#[derive(Debug, Clone, Copy, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Spread {
    pub median: f64,
    pub p10: f64,
    pub p90: f64,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |part: usize| sorted.get((sorted.len() * part / 10).min(sorted.len().saturating_sub(1)));
        let at = |part| at(part).copied().unwrap_or(0.0);
        Self { median: at(5), p10: at(1), p90: at(9) }
    }

    fn cells(&self, digits: usize) -> [String; 2] {
        [format!("{:.digits$}", self.median), format!("{:.digits$} - {:.digits$}", self.p10, self.p90)]
    }
}

impl Report {
    pub(super) fn new(arguments: &Arguments, ours: &Path, cpus: (usize, usize), found: &[Found]) -> Self {
        let stock = found.iter().find(|found| found.kind == Kind::Stock);
        let ours = ours.canonicalize().unwrap_or_else(|_| ours.to_owned());
        Self {
            topology: arguments.topology.to_string(),
            rounds: arguments.rounds,
            toolstack_cpu: cpus.0,
            others_cpu: cpus.1,
            ours: ours.display().to_string(),
            stock: arguments.stock.as_ref().map(ToString::to_string),
            rows: found.iter().map(|found| Row::new(found, stock)).collect(),
        }
    }
}

impl Row {
    fn new(found: &Found, stock: Option<&Found>) -> Self {
        let millis =
            |what: fn(&Times) -> Duration| Spread::of(found.rounds.iter().map(|times| what(times).as_secs_f64() * 1e3));
        let ratio = |what: fn(&Times) -> Duration| {
            let stock = stock.filter(|stock| stock.kind != found.kind)?;
            let pairs = stock.rounds.iter().zip(&found.rounds);
            Some(Spread::of(pairs.map(|(stock, ours)| what(stock).as_secs_f64() / what(ours).as_secs_f64().max(1e-9))))
        };
        Self {
            name: match found.kind {
                Kind::Built => "ours, in the toolstack's process",
                Kind::Executed => "ours, executed",
                Kind::Stock => "stock, executed",
            },
            connected_ms: millis(|times| times.connected),
            hotplug_ms: millis(|times| times.hotplug),
            work_ms: millis(|times| times.work),
            processes: found.processes,
            connected_ratio: ratio(|times| times.connected),
            hotplug_ratio: ratio(|times| times.hotplug),
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let script = format!("vif-{}", self.topology);
        writeln!(f, "{script}, attach to Connected, {} round(s) by turns after one that does not count", self.rounds)?;
        writeln!(
            f,
            "toolstack and hotplug program on processor {}; XenStore, netback and the guest's driver on {}",
            self.toolstack_cpu, self.others_cpu
        )?;
        writeln!(f, "ours: {}, which also filters what the guest sends", self.ours)?;
        if let Some(stock) = &self.stock {
            writeln!(f, "stock: {script} in {stock}, with that system's shell, xenstore-read, ip and brctl")?;
        }
        let mut table =
            Table::new(["ms", "connected", "p10 - p90", "of it hotplug", "p10 - p90", "CPU ms", "processes"]);
        for row in &self.rows {
            let [connected, connected_spread] = row.connected_ms.cells(2);
            let [hotplug, hotplug_spread] = row.hotplug_ms.cells(2);
            let processes = row.processes.map_or_else(|| "?".to_owned(), |count| count.to_string());
            let work = format!("{:.1}", row.work_ms.median);
            table.row([row.name.into(), connected, connected_spread, hotplug, hotplug_spread, work, processes]);
        }
        write!(f, "{table}")?;
        for row in &self.rows {
            let Some((connected, hotplug)) = row.connected_ratio.zip(row.hotplug_ratio) else { continue };
            let [connected, connected_spread] = connected.cells(1);
            let [hotplug, hotplug_spread] = hotplug.cells(1);
            writeln!(
                f,
                "  {}: {connected} times as fast as stock (rounds: {connected_spread}); its hotplug part {hotplug} times \
                 ({hotplug_spread})",
                row.name
            )?;
        }
        if self.stock.is_none() {
            writeln!(
                f,
                "NOT MEASURED: the stock scripts: --stock FOLDER names a system that has them in /etc/xen/scripts, and \
                 --help says how to get one"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let spread = Spread::of((1..=20).map(f64::from));
        assert_eq!((spread.p10, spread.median, spread.p90), (3.0, 11.0, 19.0));
        let one = Spread::of([7.0]);
        assert_eq!((one.p10, one.median, one.p90), (7.0, 7.0, 7.0));
    }

    #[test]
    fn ratios_are_those_of_each_round() {
        let times = |millis: u64| {
            let time = Duration::from_millis(millis);
            Times { connected: time, hotplug: time / 2, work: time }
        };
        let found = |kind, all: [u64; 3]| Found { kind, processes: Some(1), rounds: all.map(times).to_vec() };
        let (ours, stock) = (found(Kind::Executed, [1, 2, 4]), found(Kind::Stock, [30, 80, 80]));
        let row = Row::new(&ours, Some(&stock));
        assert_eq!(row.connected_ratio.map(|ratio| ratio.median), Some(30.0));
        assert!(Row::new(&stock, Some(&stock)).connected_ratio.is_none());
    }
}
