//! The key `vlan` (xl-network-configuration(5), since Xen 4.19): which VLANs an interface is in.
//!
//! `ID[p|u]`, `FIRST-LAST[u]` or `FIRST+STEPxCOUNT[u]`, joined by `/`. `p` marks the VLAN of untagged frames (PVID), `u`
//! one whose frames leave untagged; a single VLAN alone is the PVID. The manual's text and its last example disagree
//! about COUNT; as its text says, so many entries are added to the first.

use serde::{Deserialize, Serialize};
use xenstore_client::spec::{Fault, Param, SpecError, Word};

use super::words::unexpected;

const LAST: u32 = 4094;
const FORM: &str = "write VLANs from 1 to 4094 with / between: 10, 10p/20, 10p/100-120, 10p/100+10x4";

/// The VLANs of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vlans {
    /// The one of untagged frames; it leaves untagged too.
    pub pvid: u16,
    /// Others that leave untagged, in order.
    pub untagged: Vec<u16>,
    /// Those with tags both ways, in order.
    pub tagged: Vec<u16>,
}

impl Vlans {
    /// All of them, in order: number, whether it is the PVID, whether it leaves untagged.
    pub fn all(&self) -> Vec<(u16, bool, bool)> {
        let mut all = vec![(self.pvid, true, true)];
        all.extend(self.untagged.iter().map(|id| (*id, false, true)));
        all.extend(self.tagged.iter().map(|id| (*id, false, false)));
        all.sort_unstable();
        all
    }

    /// The tagged ones as ranges, first and last.
    pub fn tagged_ranges(&self) -> Vec<(u16, u16)> {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for id in &self.tagged {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == *id => *last = *id,
                _ => ranges.push((*id, *id)),
            }
        }
        ranges
    }
}

#[derive(PartialEq)]
enum Mark {
    None,
    Pvid,
    Untagged,
}

/// Reads the key.
///
/// # Errors
/// With the place.
pub fn parse(text: &str) -> Result<Vlans, SpecError> {
    let word = Word::at(text, 0);
    read(Param::new(&word, 0..text.len())).map_err(|fault| SpecError::new(text, fault))
}

fn read(all: Param<'_>) -> Result<Vlans, Fault> {
    let mut pvid = None;
    let (mut untagged, mut tagged) = (Vec::new(), Vec::new());
    let mut seen = std::collections::BTreeSet::new();
    let mut at = 0;
    let pieces = all.text.split('/').count();
    for piece in all.text.split('/') {
        let part = all.part(at..at + piece.len());
        at += piece.len() + 1;
        let (ids, single, mark) = term(part)?;
        if let Some(twice) = ids.iter().find(|id| !seen.insert(**id)) {
            return Err(part.fault(format!("VLAN {twice} is named twice"), "name each VLAN once"));
        }
        match mark {
            Mark::None if single && pieces == 1 => pvid = ids.first().copied(),
            Mark::None => tagged.extend(ids),
            Mark::Untagged => untagged.extend(ids),
            Mark::Pvid if pvid.is_some() => {
                let help = "untagged frames belong to one VLAN: mark the others with u, or with nothing";
                return Err(part.fault("a second VLAN is marked p", help));
            }
            Mark::Pvid => pvid = ids.first().copied(),
        }
    }
    let Some(pvid) = pvid else {
        let help = "mark the one that untagged frames belong to with p: 10p/20";
        return Err(all.fault("no VLAN is marked p", help));
    };
    untagged.sort_unstable();
    tagged.sort_unstable();
    Ok(Vlans { pvid, untagged, tagged })
}

/// The VLANs of a term, whether it is a single one, and its mark.
fn term(text: Param<'_>) -> Result<(Vec<u16>, bool, Mark), Fault> {
    let (first, mut at) = number(text, 0)?;
    let mut single = true;
    let (mut step, mut last) = (1, first);
    match text.text[at..].chars().next() {
        Some('-') => {
            let begin = at + 1;
            (last, at) = number(text, begin)?;
            single = false;
            if last < first {
                return Err(text.part(0..at).fault("the range runs backwards", format!("write {last}-{first}")));
            }
        }
        Some('+') => {
            (step, at) = number(text, at + 1)?;
            if !text.text[at..].starts_with('x') {
                return Err(unexpected(text, at, "write FIRST+STEPxCOUNT, such as 100+10x4"));
            }
            let count;
            (count, at) = number(text, at + 1)?;
            single = false;
            last = step.saturating_mul(count).saturating_add(first);
            if last > LAST {
                return Err(text.part(0..at).fault("this reaches beyond VLAN 4094", FORM));
            }
        }
        _ => {}
    }
    let mark = match &text.text[at..] {
        "" => Mark::None,
        "u" => Mark::Untagged,
        "p" if single => Mark::Pvid,
        "p" => {
            let help = "mark a single VLAN with p";
            return Err(text.part(at..at + 1).fault("a range is not the VLAN of untagged frames", help));
        }
        _ => return Err(unexpected(text, at, FORM)),
    };
    let ids = (first..=last).step_by(usize::try_from(step).unwrap_or(usize::MAX));
    Ok((ids.filter_map(|id| u16::try_from(id).ok()).collect(), single, mark))
}

/// A number from 1 to 4094, and where it ends.
fn number(text: Param<'_>, at: usize) -> Result<(u32, usize), Fault> {
    let len = text.text[at..].bytes().take_while(u8::is_ascii_digit).count();
    if len == 0 {
        return Err(unexpected(text, at, FORM));
    }
    let digits = text.part(at..at + len);
    let number = digits.text.parse().ok().filter(|number| (1..=LAST).contains(number));
    let number = number.ok_or_else(|| digits.fault(format!("there is no VLAN {}", digits.text), FORM))?;
    Ok((number, at + len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual() {
        let cases: [(&str, u16, &[u16], &[u16]); 7] = [
            ("10", 10, &[], &[]),
            ("10p", 10, &[], &[]),
            ("10p/20", 10, &[], &[20]),
            ("20/10p", 10, &[], &[20]),
            ("10p/100+10x4", 10, &[], &[100, 110, 120, 130, 140]),
            ("1p/2-4u/4094", 1, &[2, 3, 4], &[4094]),
            ("5u/7p", 7, &[5], &[]),
        ];
        for (text, pvid, untagged, tagged) in cases {
            let vlans = parse(text).unwrap();
            assert_eq!((vlans.pvid, &vlans.untagged[..], &vlans.tagged[..]), (pvid, untagged, tagged), "{text}");
        }
        assert_eq!(parse("1p/5-7/9/11-12").unwrap().tagged_ranges(), [(5, 7), (9, 9), (11, 12)]);
        assert_eq!(parse("5p/2u/9").unwrap().all(), [(2, false, true), (5, true, true), (9, false, false)]);
    }

    #[test]
    fn mistakes_in_their_place() {
        let cases = [
            ("", 0, 0, "missing"),
            ("0", 0, 1, "no VLAN 0"),
            ("4095", 0, 4, "no VLAN 4095"),
            ("99999999999", 0, 11, "no VLAN"),
            ("10/20", 0, 5, "no VLAN is marked p"),
            ("10u", 0, 3, "no VLAN is marked p"),
            ("10-20", 0, 5, "no VLAN is marked p"),
            ("10p/20p", 4, 3, "a second VLAN"),
            ("10p/20-10", 4, 5, "backwards"),
            ("10p/20-30p", 9, 1, "a range"),
            ("10p/100+10", 10, 0, "missing"),
            ("10p/4000+50x2", 4, 9, "beyond"),
            ("10p/10", 4, 2, "named twice"),
            ("10p//20", 4, 0, "missing"),
            ("10q", 2, 1, "unexpected 'q'"),
            ("-5", 0, 1, "unexpected '-'"),
        ];
        for (text, offset, len, words) in cases {
            let error = parse(text).expect_err(text);
            assert_eq!((error.offset, error.len), (offset, len), "{text}: {error}");
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }
}
