//! Cuts a large TCP frame into segments: what the kernel does before a tap whose reader cannot, done here for the
//! frames it leaves to us (those with a VLAN tag, which no guest's driver looks through).

use hypervisor::memory::Mapping;

use crate::hash::PacketHash;
use crate::packet::{self, HEADERS_MAX, Layers, Network, Sum, Transport};

/// FIN, PSH: only on the last segment.
const LAST_ONLY: u8 = 1 | 8;
/// CWR: only on the first.
const FIRST_ONLY: u8 = 0x80;

/// A frame that is being cut.
#[derive(Debug)]
pub struct Segments {
    /// The whole frame.
    frame: Vec<u8>,
    layers: Layers,
    headers: usize,
    size: usize,
    /// Bytes of payload that are cut off already.
    done: usize,
    hash: Option<PacketHash>,
}

impl Segments {
    /// Takes over the frame of `len` bytes at `at`, to be cut into segments of `size` bytes of payload; none where it is
    /// no TCP, or `size` is 0.
    pub fn begin(arena: &Mapping, at: usize, len: usize, size: u16, hash: Option<PacketHash>) -> Option<Self> {
        let mut frame = vec![0; len];
        arena.copy_out(at, &mut frame);
        let layers = packet::parse(&frame[..len.min(HEADERS_MAX)]).ok()?;
        let headers = layers.headers_len(&frame).ok()?;
        let fits = layers.transport == Transport::Tcp && size > 0 && headers < len;
        fits.then_some(Self { frame, layers, headers, size: size.into(), done: 0, hash })
    }

    /// The frame's hash, which all its segments have.
    pub fn hash(&self) -> Option<PacketHash> {
        self.hash
    }

    /// Writes the next segment to `at` and returns its length; none when all are written.
    pub fn next(&mut self, arena: &Mapping, at: usize) -> Option<usize> {
        let payload = self.frame.len() - self.headers;
        if self.done == payload {
            return None;
        }
        let take = self.size.min(payload - self.done);
        let (number, first, last) = (self.done / self.size, self.done == 0, self.done + take == payload);
        let len = self.headers + take;
        let mut headers = [0; HEADERS_MAX];
        let headers = &mut headers[..self.headers];
        headers.copy_from_slice(&self.frame[..self.headers]);
        let Layers { network_at, transport_at, .. } = self.layers;
        match self.layers.network {
            Network::V4 => {
                put(headers, network_at + 2, (len - network_at) as u16);
                let id = get(headers, network_at + 4).wrapping_add(number as u16);
                put(headers, network_at + 4, id);
                put(headers, network_at + 10, 0);
                let mut sum = Sum::default();
                sum.add(&headers[network_at..network_at + usize::from(headers[network_at] & 15) * 4]);
                put(headers, network_at + 10, sum.checksum());
            }
            Network::V6 => put(headers, network_at + 4, (len - network_at - 40) as u16),
        }
        let sequence = u32::from(get(headers, transport_at + 4)) << 16 | u32::from(get(headers, transport_at + 6));
        let sequence = sequence.wrapping_add(self.done as u32);
        put(headers, transport_at + 4, (sequence >> 16) as u16);
        put(headers, transport_at + 6, sequence as u16);
        if !last {
            headers[transport_at + 13] &= !LAST_ONLY;
        }
        if !first {
            headers[transport_at + 13] &= !FIRST_ONLY;
        }
        let data = &self.frame[self.headers + self.done..][..take];
        put(headers, transport_at + 16, self.layers.pseudo_sum(headers, len));
        let mut sum = Sum::default();
        sum.add(&headers[transport_at..]);
        sum.add(data);
        put(headers, transport_at + 16, sum.checksum());
        arena.copy_in(at, headers);
        arena.copy_in(at + self.headers, data);
        self.done += take;
        Some(len)
    }
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::tests::{tcp, v4, v6};

    fn cut(frame: &[u8], size: u16) -> Vec<Vec<u8>> {
        let arena = Mapping::anonymous(1 << 17).unwrap();
        arena.copy_in(0, frame);
        let mut segments = Segments::begin(&arena, 0, frame.len(), size, None).unwrap();
        let mut all = Vec::new();
        while let Some(len) = segments.next(&arena, 1 << 16) {
            let mut bytes = vec![0; len];
            arena.copy_out(1 << 16, &mut bytes);
            all.push(bytes);
        }
        all
    }

    /// Every sum of a good frame adds up to all ones.
    fn check(segment: &[u8]) {
        let layers = packet::parse(segment).unwrap();
        let mut sum = Sum::default();
        sum.add(&segment[layers.transport_at..]);
        sum.add_number(u32::from(layers.pseudo_sum(segment, segment.len())));
        assert_eq!(sum.folded(), 0xffff);
        if layers.network == Network::V4 {
            let mut sum = Sum::default();
            sum.add(&segment[layers.network_at..layers.transport_at]);
            assert_eq!(sum.folded(), 0xffff);
        }
    }

    #[test]
    fn segments_add_up_to_the_frame() {
        let mut segment = tcp(10_000);
        segment[4..8].copy_from_slice(&0xffff_f000u32.to_be_bytes());
        segment[13] = 0x80 | 0x18 | 1;
        for (frame, tag) in [(v4(&[0x8100], 2, 6, &segment), 4), (v6(&[], 6, &segment), 0)] {
            let all = cut(&frame, 1448);
            assert_eq!(all.len(), 7);
            let headers = frame.len() - 10_000;
            let mut data = Vec::new();
            for (index, segment) in all.iter().enumerate() {
                check(segment);
                let layers = packet::parse(segment).unwrap();
                assert_eq!(layers.tagged, tag > 0);
                let at = layers.transport_at;
                let sequence = u32::from_be_bytes(segment[at + 4..at + 8].try_into().unwrap());
                assert_eq!(sequence, 0xffff_f000u32.wrapping_add(1448 * index as u32));
                let flags = if index == 0 {
                    0x90
                } else if index == 6 {
                    0x19
                } else {
                    0x10
                };
                assert_eq!(segment[at + 13], flags, "{index}");
                data.extend_from_slice(&segment[headers..]);
            }
            assert!(data == frame[headers..]);
        }
    }

    #[test]
    fn what_cannot_be_cut() {
        let arena = Mapping::anonymous(1 << 17).unwrap();
        for (frame, size) in [
            (v4(&[], 0, 17, &[0; 100]), 10),
            (v4(&[], 0, 6, &tcp(100)), 0),
            (v4(&[], 0, 6, &tcp(0)), 10),
            (vec![0; 60], 10),
        ] {
            arena.copy_in(0, &frame);
            assert!(Segments::begin(&arena, 0, frame.len(), size, None).is_none());
        }
    }
}
