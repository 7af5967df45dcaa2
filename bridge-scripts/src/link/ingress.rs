//! Programs of classic BPF at a device's ingress (tc-bpf(8)): a clsact qdisc, and a filter of the kind bpf with direct
//! action for each program, tried in the order of their priorities.

use super::wire::{Message, attrs, text, u32_at};
use super::{Error, Link};
use crate::nft::bpf::Instruction;

/// TC_H_CLSACT, its handle, and TC_H_MIN_INGRESS and TC_H_MIN_EGRESS at it (linux/pkt_sched.h).
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const ACK: i32 = libc::NLM_F_ACK;

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
    /// A number that tells the programs at a device's ingress apart from others; none if there are none.
    pub(super) fn ingress_programs(&mut self, index: u32) -> Result<Option<u64>, Error> {
        let mut found: Vec<(u32, Vec<u8>)> = self.filters(index, INGRESS)?.into_iter().filter_map(ours).collect();
        found.sort_unstable();
        let programs: Vec<Vec<u8>> = found.into_iter().map(|(_, bytes)| bytes).collect();
        Ok((!programs.is_empty()).then(|| fingerprint(&programs)))
    }

    /// The bodies of what RTM_GETTFILTER tells.
    fn filters(&mut self, index: u32, parent: u32) -> Result<Vec<Vec<u8>>, Error> {
        let mut told = Vec::new();
        let request = || Message::new(libc::RTM_GETTFILTER, libc::NLM_F_DUMP, &header(index, 0, parent, 0));
        self.dump(request, |body| told.push(body.to_vec()))?;
        // The first message of each priority tells of no filter.
        told.retain(|body| u32_at(body, 8) != 0);
        Ok(told)
    }

    fn has_clsact(&mut self, index: u32) -> Result<bool, Error> {
        let mut found = false;
        let request = || Message::new(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &header(index, 0, 0, 0));
        self.dump(request, |body| {
            let kind = attrs(body.get(20..).unwrap_or_default()).find(|(kind, _)| *kind == TCA_KIND);
            found |= u32_at(body, 4) == index && kind.is_some_and(|(_, kind)| text(kind) == "clsact");
        })?;
        Ok(found)
    }

    /// Makes these the programs at a device's ingress; none takes away those that are there.
    pub(super) fn set_ingress(&mut self, name: &str, programs: &[Vec<Instruction>]) -> Result<(), Error> {
        let index = self.index(name)?;
        if !programs.is_empty() {
            let flags = ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
            let mut message = Message::new(libc::RTM_NEWQDISC, flags, &header(index, CLSACT_HANDLE, CLSACT, 0));
            message.text(TCA_KIND, "clsact");
            match self.change(message) {
                // Somebody's own is as good.
                Err(error) if error.errno() == Some(libc::EEXIST) => {}
                other => other?,
            }
        }
        let mut priority = 0;
        for program in programs {
            priority += 1;
            let length = u16::try_from(program.len()).unwrap_or(u16::MAX);
            let bytes: Vec<u8> = program.iter().flat_map(|instruction| instruction.bytes()).collect();
            let fixed = header(index, 1, INGRESS, info(priority));
            let mut message = Message::new(libc::RTM_NEWTFILTER, ACK | libc::NLM_F_CREATE, &fixed);
            message.text(TCA_KIND, "bpf").nest(TCA_OPTIONS, |options| {
                options.u16(TCA_BPF_OPS_LEN, length).attr(TCA_BPF_OPS, &bytes);
                options.u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
            });
            self.change(message)?;
        }
        let there = self.filters(index, INGRESS)?;
        let others = there.len() - there.iter().filter(|body| ours((*body).clone()).is_some()).count();
        for (old, _) in there.into_iter().filter_map(ours).filter(|(old, _)| *old > priority) {
            let mut message = Message::new(libc::RTM_DELTFILTER, ACK, &header(index, 1, INGRESS, info(old)));
            message.text(TCA_KIND, "bpf");
            self.change(message)?;
        }
        let unused = programs.is_empty() && others == 0 && self.has_clsact(index)?;
        if unused && self.filters(index, EGRESS)?.is_empty() {
            let mut message = Message::new(libc::RTM_DELQDISC, ACK, &header(index, CLSACT_HANDLE, CLSACT, 0));
            message.text(TCA_KIND, "clsact");
            self.change(message)?;
        }
        Ok(())
    }
}

/// The priority and program of a filter that is like ours.
fn ours(body: Vec<u8>) -> Option<(u32, Vec<u8>)> {
    let all = || attrs(body.get(20..).unwrap_or_default());
    let find = |wanted| all().find(|(kind, _)| kind & 0x3fff == wanted).map(|(_, value)| value);
    let kind = find(TCA_KIND).map(text)?;
    let program = attrs(find(TCA_OPTIONS)?).find(|(kind, _)| *kind == TCA_BPF_OPS).map(|(_, value)| value.to_vec())?;
    (kind == "bpf" && u32_at(&body, 8) == 1).then(|| (u32_at(&body, 16) >> 16, program))
}

/// FNV-1a of all bytes.
fn fingerprint(programs: &[Vec<u8>]) -> u64 {
    let bytes =
        programs.iter().flat_map(|program| program.len().to_be_bytes().into_iter().chain(program.iter().copied()));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The number that [`Link::ingress_programs`] tells of these programs.
pub(crate) fn fingerprint_of(programs: &[Vec<Instruction>]) -> u64 {
    let bytes = |program: &Vec<Instruction>| program.iter().flat_map(|instruction| instruction.bytes()).collect();
    fingerprint(&programs.iter().map(bytes).collect::<Vec<_>>())
}
