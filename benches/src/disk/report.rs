//! The figures of a run, for people and as JSON.

use serde::Serialize;

use crate::table::{Table, grouped};

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

/// Numbers of processors, as text.
pub(super) fn list(cpus: &[usize]) -> String {
    cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
