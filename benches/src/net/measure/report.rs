//! The figures of a run, for people and as JSON.

use serde::Serialize;

use super::Arguments;
use super::subject::Found;
use crate::placement;
use crate::table::{Table, grouped};

/// The figures of a run. The names are those of the JSON file.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names and the table say it")]
pub struct Report {
    pub topology: String,
    pub guests: u32,
    pub streams: u32,
    pub size: u64,
    pub datagram: u64,
    pub mtu: u32,
    pub queues: u32,
    pub offload: bool,
    pub seconds: f64,
    pub processors: Vec<usize>,
    pub rows: Vec<Row>,
}

/// The figures of one kind of network.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names and the table say it")]
pub struct Row {
    pub name: &'static str,
    pub gbit_s: f64,
    /// Of each round, to those of veth in the same round.
    pub gbit_ratios: Vec<f64>,
    /// Their median.
    pub gbit_ratio: f64,
    /// Milliseconds of processor time for each Gbit, of the whole machine: kernel, traffic and all.
    pub cpu_ms_per_gbit: f64,
    /// Of it, netback's or the copying program's.
    pub backend_cpu_ms_per_gbit: f64,
    /// Of it, the guests' network cards'.
    pub guests_cpu_ms_per_gbit: f64,
    pub packets_s: f64,
    pub packets_ratios: Vec<f64>,
    pub packets_ratio: f64,
    /// Of the datagrams sent, those that did not arrive.
    pub lost: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

impl Report {
    /// The figures are set in relation to those of the second, which is the kernel alone.
    pub(super) fn new(arguments: &Arguments, found: &[(&'static str, Found)]) -> Self {
        let yardstick = &found[1].1;
        let rows = found.iter().map(|(name, found)| Row::new(name, found, yardstick)).collect();
        Self {
            topology: arguments.topology.to_string(),
            guests: arguments.guests,
            streams: arguments.streams,
            size: arguments.size,
            datagram: arguments.datagram,
            mtu: arguments.mtu,
            queues: arguments.queues,
            offload: !arguments.no_offload,
            seconds: arguments.seconds,
            processors: placement::processors(),
            rows,
        }
    }
}

impl Row {
    fn new(name: &'static str, found: &Found, yardstick: &Found) -> Self {
        let ratios = |ours: &[f64], theirs: &[f64]| -> Vec<f64> {
            ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs.max(1e-9)).collect()
        };
        let gbit_ratios = ratios(&found.tcp_rounds, &yardstick.tcp_rounds);
        let packets_ratios = ratios(&found.udp_rounds, &yardstick.udp_rounds);
        let gigabits = (found.tcp.bytes as f64 * 8e-9).max(1e-9);
        let each = |time: std::time::Duration| time.as_secs_f64() * 1e3 / gigabits;
        let micros = |quantile| found.turns.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            name,
            gbit_s: found.tcp.gigabits(),
            gbit_ratio: median(&gbit_ratios),
            gbit_ratios,
            cpu_ms_per_gbit: each(found.cpu.machine),
            backend_cpu_ms_per_gbit: each(found.cpu.backend),
            guests_cpu_ms_per_gbit: each(found.cpu.guests),
            packets_s: found.udp.packet_rate(),
            packets_ratio: median(&packets_ratios),
            packets_ratios,
            lost: 1.0 - found.udp.packets as f64 / found.udp.sent.max(1) as f64,
            p50_us: micros(0.5),
            p99_us: micros(0.99),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{}, {} guest(s), {} TCP stream(s) each in sends of {} bytes, datagrams of {} bytes, MTU {}{}",
            self.topology,
            self.guests,
            self.streams,
            self.size,
            self.datagram,
            self.mtu,
            if self.offload { "" } else { ", guests without offloads" },
        )?;
        let cpus = self.processors.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        writeln!(f, "processors {cpus}, which all threads share: nothing is pinned")?;
        let mut table = Table::new([
            "",
            "Gbit/s",
            "ratio",
            "CPU ms/Gbit",
            "backend",
            "guests",
            "packets/s",
            "ratio",
            "lost",
            "p50 µs",
            "p99 µs",
        ]);
        for row in &self.rows {
            table.row([
                row.name.to_owned(),
                format!("{:.2}", row.gbit_s),
                format!("{:.2}", row.gbit_ratio),
                format!("{:.1}", row.cpu_ms_per_gbit),
                format!("{:.1}", row.backend_cpu_ms_per_gbit),
                format!("{:.1}", row.guests_cpu_ms_per_gbit),
                grouped(row.packets_s as u64),
                format!("{:.2}", row.packets_ratio),
                format!("{:.0} %", row.lost * 100.0),
                format!("{:.1}", row.p50_us),
                format!("{:.1}", row.p99_us),
            ]);
        }
        write!(f, "{table}")?;
        for row in self.rows.iter().filter(|row| row.gbit_ratios.iter().any(|&ratio| ratio != 1.0)) {
            let list = |ratios: &[f64]| ratios.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(", ");
            writeln!(
                f,
                "  rounds of {}: Gbit/s {}; packets/s {}",
                row.name,
                list(&row.gbit_ratios),
                list(&row.packets_ratios)
            )?;
        }
        writeln!(
            f,
            "  CPU is the whole machine's, kernel and traffic included; of it the backend's (netback, or the copying \
             program) and the guests' network cards'"
        )?;
        if !self.offload {
            writeln!(f, "  only netback's guests are without offloads: veth and taps keep theirs")?;
        }
        writeln!(
            f,
            "  left out: real Xen, where grant copies and events are hypercalls; vifs without filters (netback's have \
             theirs, as by default; the others have none)"
        )
    }
}
