//! What was gathered is copied, described to the kernel, sent and answered.

use hypervisor::GrantStatus;

use super::{Packet, Refusal, Tx, Verdict};
use crate::abi::{GsoType, TxResponse, status, tx_flag};
use crate::broken::Broken;
use crate::packet::{self, HEADERS_MAX, Network, Transport};
use crate::tap::Tap;
use crate::vnet::{Offload, Partial};

/// Bytes of a packet that are to be in one piece whatever its headers say (XSA-423; Linux: XEN_NETBACK_TX_COPY_LEN).
const LINEAR: usize = 128;

impl Tx {
    /// Copies, sends and answers what was gathered.
    pub(super) fn send(&mut self, tap: &Tap) -> Result<(), Broken> {
        let mut outcome = Ok(());
        if !self.ops.is_empty()
            && let Err(error) = self.xen.copy(self.peer, &self.arena, &mut self.ops)
        {
            // The statuses say nothing then; every packet is answered all the same.
            self.ops.iter_mut().for_each(|op| op.status = GrantStatus::GeneralError);
            outcome = Err(Broken::Copy(error));
        }
        let mut packets = std::mem::take(&mut self.packets);
        for packet in packets.drain(..) {
            let status = match self.send_one(&packet, tap) {
                Ok(status) => status,
                Err(broken) => {
                    outcome = outcome.and(Err(broken));
                    status::DROPPED
                }
            };
            self.answer(&packet, status);
        }
        self.packets = packets;
        self.ops.clear();
        self.ids.clear();
        self.used = 0;
        outcome
    }

    fn send_one(&mut self, packet: &Packet, tap: &Tap) -> Result<i16, Broken> {
        let offload = match packet.verdict {
            Verdict::Done => return Ok(status::OKAY),
            Verdict::Refused(reason) => return Ok(self.refuse(reason)),
            Verdict::Send => {
                if self.ops[packet.ops.clone()].iter().any(|op| op.status != GrantStatus::Okay) {
                    return Ok(self.refuse(Refusal::Grant));
                }
                match self.describe(packet) {
                    Ok(offload) => offload,
                    Err(reason) => return Ok(self.refuse(reason)),
                }
            }
        };
        self.arena.copy_in(packet.at, &offload.encode());
        self.memory.clear();
        self.memory.push(&self.arena, packet.at, Offload::SIZE + packet.len);
        match tap.write(&self.memory) {
            Ok(_) => {
                self.counters.tx_packets.add(1);
                self.counters.tx_bytes.add(packet.len as u64);
                Ok(status::OKAY)
            }
            Err(error) => match error.raw_os_error() {
                // No room; or the interface is down (EIO): what a cable does that nobody has plugged in.
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EIO | libc::EINTR) => {
                    self.counters.tx_dropped.add(1);
                    Ok(status::DROPPED)
                }
                Some(libc::EINVAL | libc::EMSGSIZE) => Ok(self.refuse(Refusal::Kernel)),
                _ => Err(Broken::Host { what: "writing to the tap", source: error }),
            },
        }
    }

    /// What the kernel has to know of a packet, from its headers and the guest's flags.
    fn describe(&self, packet: &Packet) -> Result<Offload, Refusal> {
        let blank = packet.flags & tx_flag::CSUM_BLANK != 0;
        let plain = Offload {
            validated: packet.flags & tx_flag::DATA_VALIDATED != 0,
            headers: packet.len.min(LINEAR) as u16,
            ..Offload::NONE
        };
        if !blank && packet.gso.is_none() {
            return Ok(plain);
        }
        let mut headers = [0; HEADERS_MAX];
        let headers = &mut headers[..packet.len.min(HEADERS_MAX)];
        self.arena.copy_out(packet.at + Offload::SIZE, headers);
        let wrong = if packet.gso.is_some() { Refusal::Gso } else { Refusal::Checksum };
        let layers = packet::parse(headers).map_err(|_| wrong)?;
        let mut linear = LINEAR;
        if let Some((kind, _)) = packet.gso {
            let fits = match kind {
                GsoType::TcpV4 => layers.network == Network::V4,
                GsoType::TcpV6 => layers.network == Network::V6,
                GsoType::None => false,
            };
            if !fits || layers.transport != Transport::Tcp {
                return Err(Refusal::Gso);
            }
            linear = linear.max(layers.headers_len(headers).map_err(|_| Refusal::Gso)?);
            if !blank {
                // Cutting makes new checksums from the pseudo header's sum, so that has to stand there.
                let sum = layers.pseudo_sum(headers, packet.len);
                let at = packet.at + Offload::SIZE + layers.transport_at + layers.checksum_offset();
                self.arena.copy_in(at, &sum.to_be_bytes());
                self.counters.tx_checksum_fixups.add(1);
            }
        }
        let partial = Partial { start: layers.transport_at as u16, offset: layers.checksum_offset() as u16 };
        Ok(Offload { partial: Some(partial), gso: packet.gso, headers: packet.len.min(linear) as u16, ..plain })
    }

    fn refuse(&mut self, reason: Refusal) -> i16 {
        self.counters.refuse(reason);
        if let Some(unsaid) = self.log.admit() {
            tracing::warn!(?reason, unsaid, "packet refused");
        }
        status::ERROR
    }

    /// One response for each slot. What stands in the place of extras says nothing.
    fn answer(&mut self, packet: &Packet, status: i16) {
        let extras = 1..1 + packet.extras;
        for (index, &id) in self.ids[packet.ids.clone()].iter().enumerate() {
            let status = if extras.contains(&index) { status::NULL } else { status };
            self.ring.respond(&TxResponse { id, status }.encode());
        }
    }
}
