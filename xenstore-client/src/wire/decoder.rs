//! From a stream of bytes to packets.

use super::{HEADER_LEN, Header, PAYLOAD_MAX, Packet};

/// What the bytes pushed so far amount to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// At least this many more bytes are needed for the next packet (or for its header).
    NeedMore(usize),
    /// One whole packet. There may be another behind it: ask again.
    Packet(Packet),
    /// The stream is broken for good: there is no way to find the next packet. Close the connection.
    Failed(&'static str),
}

/// Cuts a byte stream into packets, however the stream was chopped up on its way.
///
/// Holds at most what was pushed and not yet taken; a caller that drains packets after each push therefore holds less
/// than one packet plus one push.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
    failed: Option<&'static str>,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        if self.failed.is_none() {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Takes the next packet, if it is complete.
    pub fn next_packet(&mut self) -> Decoded {
        if let Some(reason) = self.failed {
            return Decoded::Failed(reason);
        }
        let rest = &self.bytes[self.start..];
        let Some((head, rest)) = rest.split_first_chunk::<HEADER_LEN>() else {
            return Decoded::NeedMore(HEADER_LEN - rest.len());
        };
        let header = Header::from_bytes(head);
        // Judged before the payload arrives: a length is the one field that could make us wait for, or buffer, too much.
        let len = match usize::try_from(header.len) {
            Ok(len) if len <= PAYLOAD_MAX => len,
            _ => {
                self.bytes = Vec::new();
                self.start = 0;
                self.failed = Some("a message claims more than 4096 payload bytes");
                return self.next_packet();
            }
        };
        if rest.len() < len {
            return Decoded::NeedMore(len - rest.len());
        }
        let payload = rest[..len].to_vec();
        self.start += HEADER_LEN + len;
        Decoded::Packet(Packet { kind: header.kind, req_id: header.req_id, tx_id: header.tx_id, payload })
    }
}
