//! How much a guest may send: `10Mb/s`, `1MB/s@20ms`.

use std::fmt;
use std::str::FromStr;

use xenstore_client::spec::{Fault, Param, SpecError};

/// A limit by credit: so many bytes, anew in each interval. The arithmetic is libxlu's (`tools/libs/util/libxlu_vif.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bytes_per_second: u64,
    interval_usecs: u32,
    bytes_per_interval: u64,
}

/// The interval where none is named, in microseconds.
const INTERVAL: u32 = 50_000;
const FORM: &str = "write a number with B/s or b/s, and K, M or G before that if you like: 10Mb/s, 250KB/s, 1MB/s@20ms";
const INTERVALS: &str = "write the interval as a number with us, ms or s: 1MB/s@20ms";
const LARGEST: &str = "the largest number before the unit is 4294967295";

/// Unit by unit what a rate can be written in: its letters, how many bits or bytes it stands for, whether bits.
const UNITS: [(&str, u64, bool); 8] = [
    ("B", 1, false),
    ("KB", 1_000, false),
    ("MB", 1_000_000, false),
    ("GB", 1_000_000_000, false),
    ("Kb", 1_000, true),
    ("Mb", 1_000_000, true),
    ("Gb", 1_000_000_000, true),
    // Last: it is the only one that loses something.
    ("b", 1, true),
];

impl Rate {
    /// Bytes that the guest may send in one interval; at least 1.
    #[must_use]
    pub fn bytes_per_interval(self) -> u64 {
        self.bytes_per_interval
    }

    /// Microseconds after which it may send as much again; at least 1.
    #[must_use]
    pub fn interval_usecs(self) -> u32 {
        self.interval_usecs
    }

    /// The value of the key `rate`: `bytes,usecs`.
    #[must_use]
    pub fn key(self) -> String {
        format!("{},{}", self.bytes_per_interval, self.interval_usecs)
    }

    pub(super) fn read(value: Param<'_>) -> Result<Self, Fault> {
        let at = value.text.find('@').unwrap_or(value.text.len());
        let rate = value.part(0..at);
        let bytes_per_second = bytes_per_second(rate)?;
        let interval_usecs = match value.text.get(at + 1..) {
            Some(_) => interval(value.part(at + 1..value.text.len()))?,
            None => INTERVAL,
        };
        let Some(product) = bytes_per_second.checked_mul(u64::from(interval_usecs)) else {
            return Err(
                value.fault("the rate is too large for its interval", "name a smaller rate, or a shorter interval")
            );
        };
        let bytes_per_interval = product / 1_000_000;
        if bytes_per_interval == 0 {
            let message = "the rate is less than one byte in an interval, so that nothing could ever be sent";
            return Err(value.fault(message, "name a larger rate, or a longer interval"));
        }
        Ok(Self { bytes_per_second, interval_usecs, bytes_per_interval })
    }
}

/// A decimal number from 1 to 2³²-1, and the place after it.
fn number(value: Param<'_>, help: &str) -> Result<(u64, usize), Fault> {
    let len = value.text.bytes().take_while(u8::is_ascii_digit).count();
    let digits = value.part(0..len);
    if len == 0 {
        return Err(value.unexpected(0, help));
    }
    if digits.text.starts_with('0') {
        let message = if len == 1 { "0 is no limit" } else { "the number begins with 0" };
        let help = if len == 1 { "leave it out for no limit" } else { "drop the zero: libxl would read it as octal" };
        return Err(digits.fault(message, help));
    }
    match digits.text.parse::<u32>() {
        Ok(number) => Ok((number.into(), len)),
        Err(_) => Err(digits.fault("the number is too large", LARGEST)),
    }
}

fn bytes_per_second(rate: Param<'_>) -> Result<u64, Fault> {
    if rate.text.is_empty() {
        return Err(rate.fault("no rate before the interval", FORM));
    }
    let (number, at) = number(rate, FORM)?;
    let tail = rate.part(at..rate.text.len());
    let unit = tail.text.strip_suffix("/s").and_then(|unit| UNITS.iter().find(|(name, ..)| *name == unit));
    let Some((_, factor, bits)) = unit else {
        if tail.text.is_empty() {
            return Err(tail.fault("no unit after the number", FORM));
        }
        return Err(tail.fault(format!("unknown unit `{}`", tail.text), FORM));
    };
    // 2³² times 10⁹ fits.
    Ok(number * factor / if *bits { 8 } else { 1 })
}

fn interval(text: Param<'_>) -> Result<u32, Fault> {
    let (number, at) = number(text, INTERVALS)?;
    let unit = text.part(at..text.text.len());
    let factor = match unit.text {
        // The bare letters are libxlu's, as is a bare number for seconds.
        "us" | "u" => 1,
        "ms" | "m" => 1_000,
        "s" | "" => 1_000_000,
        other => return Err(unit.fault(format!("unknown unit `{other}`"), INTERVALS)),
    };
    match u32::try_from(number * factor) {
        Ok(usecs) => Ok(usecs),
        Err(_) => Err(text.fault("the interval is too long", "the longest is 4294 s; 50ms is usual")),
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = UNITS.iter().find_map(|(unit, factor, bits)| {
            let amount = self.bytes_per_second.checked_mul(if *bits { 8 } else { 1 })?;
            let number = amount.is_multiple_of(*factor).then_some(amount / factor)?;
            u32::try_from(number).ok().map(|number| (number, unit))
        });
        // Every rate came from one of the units, and a rate that a bit's fraction was cut from is one of bytes.
        let (number, unit) = written.unwrap_or((u32::MAX, &"GB"));
        write!(f, "{number}{unit}/s")?;
        if self.interval_usecs != INTERVAL {
            write!(f, "@{}us", self.interval_usecs)?;
        }
        Ok(())
    }
}

impl FromStr for Rate {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        super::whole(text, Self::read)
    }
}
