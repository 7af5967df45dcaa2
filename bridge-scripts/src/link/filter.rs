//! A filter at a device's ingress (tc-bpf(8), tc-police(8)): a clsact qdisc, and a classifier of the kind bpf for each
//! program, tried in the order of their priorities.
//!
//! A program whose answer is the verdict has direct action. One that only says whether a limit holds for a frame has a
//! police action behind it instead: what conforms goes on to the next classifier (TC_ACT_UNSPEC: cls_bpf_classify and
//! __tcf_classify of the kernel's net/sched go on where an action's result is below zero; TC_ACT_PIPE would end there and
//! let the frame pass), and what exceeds is dropped.

use super::wire::{Message, attrs, text, u32_at, u64_at};
use super::{Error, Link};
use crate::filter::{Classifier, Limit};

/// TC_H_CLSACT, its handle, and TC_H_MIN_INGRESS and TC_H_MIN_EGRESS at it (linux/pkt_sched.h).
pub(super) const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
pub(super) const EGRESS: u32 = 0xffff_fff3;
/// Our classifier of a priority.
const HANDLE: u32 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// TCA_BPF_* and TCA_POLICE_* of linux/pkt_cls.h, TCA_ACT_* of the same.
const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_POLICE_TBF: u16 = 1;
const TCA_POLICE_RESULT: u16 = 5;
const TCA_POLICE_PKTRATE64: u16 = 10;
const TCA_POLICE_PKTBURST64: u16 = 11;
const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
/// Length of struct tc_police, and where its action is.
const TBF_LENGTH: usize = 56;
const TBF_ACTION: usize = 4;
/// NLA_TYPE_MASK.
const KIND: u16 = 0x3fff;
const ACK: i32 = libc::NLM_F_ACK;

/// A filter as a kernel has it, or is to have it: classifiers by their priorities.
pub(crate) type Placed = Vec<(u32, Told)>;

/// A classifier as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    code: Vec<u8>,
    /// Frames a second and the burst in ticks, of what drops the rest; none with direct action.
    police: Option<(u64, u64)>,
}

impl From<&Classifier> for Told {
    fn from(classifier: &Classifier) -> Self {
        let code = classifier.code.iter().flat_map(|instruction| instruction.bytes()).collect();
        Self { code, police: classifier.limit.map(|limit| (limit.rate.into(), ticks(limit))) }
    }
}

/// A burst as the kernel counts it: the time that so many frames take, in its scheduler's ticks of 64 ns (PSCHED_SHIFT of
/// the kernel's net/pkt_sched.h).
fn ticks(limit: Limit) -> u64 {
    u64::from(limit.burst) * 1_000_000_000 / u64::from(limit.rate.max(1)) / 64
}

/// Where each classifier stands. Priorities stay the same where there are no rates.
pub(crate) fn placed(classifiers: &[Classifier], rates: bool) -> Placed {
    let all = (1..).zip(classifiers).filter(|(_, classifier)| rates || classifier.limit.is_none());
    all.map(|(priority, classifier)| (priority, classifier.into())).collect()
}

/// struct tcmsg.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut fixed = [0; 20];
    for (at, number) in [(4, index), (8, handle), (12, parent), (16, info)] {
        fixed[at..at + 4].copy_from_slice(&number.to_ne_bytes());
    }
    fixed
}

/// The priority, and ETH_P_ALL in the network's byte order.
fn info(priority: u32) -> u32 {
    const ALL: u16 = 3;
    priority << 16 | u32::from(ALL.to_be())
}

impl Link {
    /// The filter of ours at a device; empty if there is none, or no such device.
    pub(crate) fn filter(&mut self, name: &str) -> Result<Placed, Error> {
        let Some(index) = self.find(name)? else { return Ok(Vec::new()) };
        let mut found: Placed = self.classifiers(index, INGRESS)?.iter().filter_map(|body| ours(body)).collect();
        found.sort_unstable_by_key(|(priority, _)| *priority);
        Ok(found)
    }

    /// Makes these the filter at a device. There is no moment at which more passes than the former or the new one lets
    /// through: what drops the rest comes first. The limits come last, and it is no error but in the answer if the kernel
    /// has none.
    pub(crate) fn set_filter(&mut self, name: &str, filter: &[(u32, Told)]) -> Result<Option<Error>, Error> {
        let index = self.index(name)?;
        let flags = ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut message = Message::new(libc::RTM_NEWQDISC, flags, &header(index, CLSACT_HANDLE, CLSACT, 0));
        message.text(TCA_KIND, "clsact");
        match self.change(message) {
            // Somebody's own is as good.
            Err(error) if error.errno() == Some(libc::EEXIST) => {}
            other => other.map_err(|error| no_filter(name, error))?,
        }
        let (limits, verdicts): (Vec<_>, Vec<_>) = filter.iter().partition(|(_, told)| told.police.is_some());
        for (priority, told) in verdicts.iter().rev().take(1).chain(&verdicts) {
            self.change(classifier(index, *priority, told)).map_err(|error| no_filter(name, error))?;
        }
        let (mut missing, mut made): (_, Vec<u32>) = (None, verdicts.iter().map(|(priority, _)| *priority).collect());
        for (priority, told) in limits {
            match self.change(classifier(index, *priority, told)) {
                // The kernel does not know police.
                Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => missing = Some(error),
                other => {
                    other?;
                    made.push(*priority);
                }
            }
        }
        self.remove_but(index, &made)?;
        Ok(missing)
    }

    /// Takes away our filter, and the qdisc if nothing else is there.
    pub(crate) fn remove_filter(&mut self, name: &str) -> Result<(), Error> {
        let index = self.index(name)?;
        self.remove_but(index, &[])?;
        let mut unused = self.has_clsact(index)?;
        for parent in [INGRESS, EGRESS] {
            unused = unused && self.classifiers(index, parent)?.is_empty();
        }
        if unused {
            let mut message = Message::new(libc::RTM_DELQDISC, ACK, &header(index, CLSACT_HANDLE, CLSACT, 0));
            message.text(TCA_KIND, "clsact");
            match self.change(message) {
                // Somebody is about to put a classifier there. An empty qdisc does no harm.
                Err(error) if error.errno() == Some(libc::EBUSY) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Removes our classifiers whose priorities are not among these.
    fn remove_but(&mut self, index: u32, keep: &[u32]) -> Result<(), Error> {
        let there = self.classifiers(index, INGRESS)?;
        for priority in there.iter().filter_map(|body| our_priority(body)).filter(|old| !keep.contains(old)) {
            let mut message = Message::new(libc::RTM_DELTFILTER, ACK, &header(index, HANDLE, INGRESS, info(priority)));
            message.text(TCA_KIND, "bpf");
            match self.change(message) {
                // Somebody else was quicker.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// The bodies of what RTM_GETTFILTER tells; nothing from a kernel without classifiers.
    fn classifiers(&mut self, index: u32, parent: u32) -> Result<Vec<Vec<u8>>, Error> {
        let mut told = Vec::new();
        let request = || Message::new(libc::RTM_GETTFILTER, libc::NLM_F_DUMP, &header(index, 0, parent, 0));
        match self.dump(request, |body| told.push(body.to_vec())) {
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => {}
            other => other?,
        }
        // The first message of each priority tells of no filter.
        told.retain(|body| u32_at(body, 8) != 0);
        Ok(told)
    }

    fn has_clsact(&mut self, index: u32) -> Result<bool, Error> {
        let mut found = false;
        let request = || Message::new(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &header(index, 0, 0, 0));
        self.dump(request, |body| {
            let kind = find(body.get(20..).unwrap_or_default(), TCA_KIND);
            found |= u32_at(body, 4) == index && kind.is_some_and(|kind| text(kind) == "clsact");
        })?;
        Ok(found)
    }
}

/// What a kernel says that knows no clsact or no bpf, in words that help.
fn no_filter(link: &str, error: Error) -> Error {
    match error.errno() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => Error::NoFilter { link: link.to_owned(), source: Box::new(error) },
        _ => error,
    }
}

/// The message that puts a classifier in place, whatever was there at its priority.
fn classifier(index: u32, priority: u32, told: &Told) -> Message {
    let fixed = header(index, HANDLE, INGRESS, info(priority));
    let mut message = Message::new(libc::RTM_NEWTFILTER, ACK | libc::NLM_F_CREATE, &fixed);
    message.text(TCA_KIND, "bpf").nest(TCA_OPTIONS, |options| {
        let length = u16::try_from(told.code.len() / 8).unwrap_or(u16::MAX);
        options.u16(TCA_BPF_OPS_LEN, length).attr(TCA_BPF_OPS, &told.code);
        match told.police {
            None => options.u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT),
            // The first and only action of a list.
            Some((rate, burst)) => options.nest(TCA_BPF_ACT, |list| {
                list.nest(1, |action| {
                    action.text(TCA_ACT_KIND, "police").nest(TCA_ACT_OPTIONS, |police| {
                        let mut tbf = [0; TBF_LENGTH];
                        tbf[TBF_ACTION..TBF_ACTION + 4].copy_from_slice(&TC_ACT_SHOT.to_ne_bytes());
                        police.attr(TCA_POLICE_TBF, &tbf).u32(TCA_POLICE_RESULT, TC_ACT_UNSPEC);
                        police.u64(TCA_POLICE_PKTRATE64, rate).u64(TCA_POLICE_PKTBURST64, burst);
                    });
                });
            }),
        };
    });
    message
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(kind, _)| kind & KIND == wanted).map(|(_, value)| value)
}

/// The priority of a classifier at a place of ours.
fn our_priority(body: &[u8]) -> Option<u32> {
    let kind = find(body.get(20..)?, TCA_KIND).map(text)?;
    (kind == "bpf" && u32_at(body, 8) == HANDLE).then(|| u32_at(body, 16) >> 16)
}

/// A classifier at a place of ours, and its priority. What is not as ours ever are has a program that ours never have.
fn ours(body: &[u8]) -> Option<(u32, Told)> {
    let priority = our_priority(body)?;
    let options = find(body.get(20..)?, TCA_OPTIONS).unwrap_or_default();
    let direct = find(options, TCA_BPF_FLAGS).is_some_and(|flags| u32_at(flags, 0) == TCA_BPF_FLAG_ACT_DIRECT);
    let actions = find(options, TCA_BPF_ACT);
    let told = match (direct, actions) {
        (true, None) => Some(None),
        (false, Some(list)) => police(list).map(Some),
        _ => None,
    };
    let code = find(options, TCA_BPF_OPS).filter(|_| told.is_some()).unwrap_or_default().to_vec();
    Some((priority, Told { code, police: told.flatten() }))
}

/// Rate and burst of a list with one action that drops what exceeds them, and lets the next classifier see the rest.
fn police(list: &[u8]) -> Option<(u64, u64)> {
    let mut actions = attrs(list);
    let (_, action) = actions.next().filter(|_| actions.next().is_none())?;
    let options = find(action, TCA_ACT_OPTIONS)?;
    let is_police = find(action, TCA_ACT_KIND).map(text)? == "police";
    let exceeds = u32_at(find(options, TCA_POLICE_TBF)?, TBF_ACTION) == TC_ACT_SHOT;
    let conforms = u32_at(find(options, TCA_POLICE_RESULT)?, 0) == TC_ACT_UNSPEC;
    let number = |kind| find(options, kind).map(|value| u64_at(value, 0));
    let numbers = (number(TCA_POLICE_PKTRATE64)?, number(TCA_POLICE_PKTBURST64)?);
    (is_police && exceeds && conforms).then_some(numbers)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::antispoof::{Rules, filter};
    use crate::state::Mac;

    /// What is sent for a classifier, as the kernel would tell of it.
    fn told(index: u32, priority: u32, told: &Told) -> Vec<u8> {
        classifier(index, priority, told).finish(1)[16..].to_vec()
    }

    #[test]
    fn what_is_sent_is_recognised() {
        let classifiers = filter(&Rules::new(Mac([0, 0x16, 0x3e, 0, 0, 1]))).classifiers().unwrap();
        let all = placed(&classifiers, true);
        let read: Placed = all.iter().map(|(priority, one)| ours(&told(7, *priority, one)).unwrap()).collect();
        assert_eq!(read, all);
        let without = placed(&classifiers, false);
        assert_eq!(without, all[3..]);
        assert_eq!(all.iter().filter_map(|(_, told)| told.police).next(), Some((10_000, 31_250_000)));
    }

    #[test]
    fn golden_bytes_of_a_limit() {
        let limit = Told { code: vec![6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], police: Some((500, 31_250_000)) };
        let bytes = told(7, 2, &limit);
        if cfg!(target_endian = "little") {
            // `tc filter add dev X ingress prio 2 handle 1 bpf bytecode '1,6 0 0 4294967295' action police pkts_rate 500
            // pkts_burst 1000 conform-exceed drop/continue`.
            assert_eq!(
                bytes[..20],
                [&[0; 4][..], &[7, 0, 0, 0, 1, 0, 0, 0, 0xf2, 0xff, 0xff, 0xff, 0, 3, 2, 0]].concat()
            );
            let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
            assert!(has(&[12, 0, 10, 0, 0xf4, 1, 0, 0, 0, 0, 0, 0]), "{bytes:x?}");
            assert!(has(&[12, 0, 11, 0, 0x50, 0xd6, 0xdc, 1, 0, 0, 0, 0]), "{bytes:x?}");
            assert!(has(&[8, 0, 5, 0, 0xff, 0xff, 0xff, 0xff]), "{bytes:x?}");
            assert!(has(&[60, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0]), "{bytes:x?}");
        }
    }

    #[test]
    fn what_somebody_else_made_is_not_taken_for_ours() {
        let limit = Told { code: vec![6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], police: Some((500, 31_250_000)) };
        let good = told(7, 2, &limit);
        assert_eq!(ours(&good), Some((2, limit.clone())));
        let spoilt = |was: &[u8], now: &[u8]| {
            let at = good.windows(was.len()).position(|window| window == was).unwrap();
            let mut bytes = good.clone();
            bytes[at..at + now.len()].copy_from_slice(now);
            ours(&bytes)
        };
        if cfg!(target_endian = "little") {
            // Conforming frames pass at once, and exceeding ones too.
            for (was, now) in [
                (&[8, 0, 5, 0, 0xff, 0xff, 0xff, 0xff][..], &[8, 0, 5, 0, 0, 0, 0, 0][..]),
                (&[60, 0, 1, 0, 0, 0, 0, 0, 2], &[60, 0, 1, 0, 0, 0, 0, 0, 0]),
            ] {
                let (priority, other) = spoilt(was, now).unwrap();
                assert_eq!(priority, 2);
                assert_ne!(other, limit);
            }
            // Another handle is another's.
            assert_eq!(spoilt(&[7, 0, 0, 0, 1], &[7, 0, 0, 0, 2]), None);
        }
    }

    #[test]
    fn a_kernel_without_classifiers_is_told_of() {
        let error = |errno| Error::Kernel { errno, text: Some("TC classifier not found".to_owned()) };
        let text = no_filter("vif1.0", error(libc::ENOENT)).to_string();
        for part in ["vif1.0", "sch_ingress", "cls_bpf", "antispoof=off", "TC classifier not found"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!no_filter("vif1.0", error(libc::EPERM)).to_string().contains("antispoof"));
    }
}
