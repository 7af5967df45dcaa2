//! The fixed newstyle handshake: the client haggles over options until it has chosen the one export there is
//! (proto.md, Fixed newstyle negotiation and Option types).

use super::check::transmission_flags;
use super::disk::Geometry;
use super::protocol::*;
use std::io::{self, Read, Write};

/// Longest option this server looks into; longer ones are answered `NBD_REP_ERR_TOO_BIG`.
const MAX_OPTION_READ: u32 = 16 << 10;
/// Longest option this server skips to do so. Beyond it the client is thrown out, as the specification permits against
/// denial of service (proto.md, Termination of the session during option haggling).
const MAX_OPTION_SKIPPED: u32 = 1 << 20;

/// The one export of a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Export<'a> {
    pub(super) name: &'a str,
    pub(super) description: &'a str,
    pub(super) geometry: Geometry,
}

/// How a handshake ended when nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Requests follow.
    Transmission,
    /// The client took its leave.
    Left,
}

/// Why a client was thrown out of the handshake.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("the connection broke off in the handshake: {0}")]
    Io(#[from] io::Error),
    #[error("not the NBD protocol: {0}")]
    Magic(#[from] BadMagic),
    #[error("the client set unknown flags {0:#x}")]
    ClientFlags(u32),
    #[error("option {option} with {length} bytes of data, more than anyone needs")]
    Oversized { option: u32, length: u32 },
    #[error("the client asked for export {0:?} in the old way, which has no answer for an unknown name")]
    UnknownExport(String),
}

/// Leads a client from the greeting to the transmission phase. Reads not a byte more than the handshake.
pub(super) fn handshake(stream: &mut (impl Read + Write), export: &Export<'_>) -> Result<Outcome, HandshakeError> {
    stream.write_all(&greeting(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))?;
    let client = u32::from_be_bytes(read_array(stream)?);
    if client & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
        return Err(HandshakeError::ClientFlags(client));
    }
    loop {
        let OptionHeader { option, length } = OptionHeader::decode(&read_array(stream)?)?;
        if length > MAX_OPTION_SKIPPED || (length > MAX_OPTION_READ && option == NBD_OPT_EXPORT_NAME) {
            return Err(HandshakeError::Oversized { option, length });
        }
        let mut out = Vec::new();
        if length > MAX_OPTION_READ {
            drain(stream, length.into())?;
            put_option_reply(&mut out, option, NBD_REP_ERR_TOO_BIG, &[b"too much data"]);
            stream.write_all(&out)?;
            continue;
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        let outcome = match option {
            NBD_OPT_EXPORT_NAME => {
                if !export.answers_to(&data) {
                    return Err(HandshakeError::UnknownExport(String::from_utf8_lossy(&data).into_owned()));
                }
                out.extend_from_slice(&export.geometry.size_bytes.to_be_bytes());
                out.extend_from_slice(&transmission_flags(&export.geometry).to_be_bytes());
                if client & NBD_FLAG_C_NO_ZEROES == 0 {
                    out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
                }
                Some(Outcome::Transmission)
            }
            NBD_OPT_ABORT => {
                put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
                // The client may be gone already, and that is fine by the specification.
                let _ = stream.write_all(&out);
                return Ok(Outcome::Left);
            }
            NBD_OPT_LIST => {
                list(&mut out, &data, export);
                None
            }
            NBD_OPT_INFO | NBD_OPT_GO => {
                let known = info(&mut out, option, &data, export);
                (known && option == NBD_OPT_GO).then_some(Outcome::Transmission)
            }
            _ => {
                put_option_reply(&mut out, option, NBD_REP_ERR_UNSUP, &[]);
                None
            }
        };
        stream.write_all(&out)?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
    }
}

impl Export<'_> {
    /// The empty name stands for the default export, and there is only one.
    fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

fn list(out: &mut Vec<u8>, data: &[u8], export: &Export<'_>) {
    if !data.is_empty() {
        return put_option_reply(out, NBD_OPT_LIST, NBD_REP_ERR_INVALID, &[b"NBD_OPT_LIST carries no data"]);
    }
    let length = (export.name.len() as u32).to_be_bytes();
    let server: [&[u8]; 3] = [&length, export.name.as_bytes(), export.description.as_bytes()];
    put_option_reply(out, NBD_OPT_LIST, NBD_REP_SERVER, &server);
    put_option_reply(out, NBD_OPT_LIST, NBD_REP_ACK, &[]);
}

/// True if the export was found and described.
fn info(out: &mut Vec<u8>, option: u32, data: &[u8], export: &Export<'_>) -> bool {
    let Some(query) = ExportQuery::decode(data) else {
        put_option_reply(out, option, NBD_REP_ERR_INVALID, &[b"lengths and data disagree"]);
        return false;
    };
    if !export.answers_to(query.name) {
        put_option_reply(out, option, NBD_REP_ERR_UNKNOWN, &[b"no such export"]);
        return false;
    }
    let geometry = &export.geometry;
    let (size, flags) = (geometry.size_bytes.to_be_bytes(), transmission_flags(geometry).to_be_bytes());
    put_option_reply(out, option, NBD_REP_INFO, &[&NBD_INFO_EXPORT.to_be_bytes(), &size, &flags]);
    // Sent even to those who did not ask: the constraints are enforced upon everybody.
    let sizes = [geometry.block, geometry.preferred, geometry.max_payload].map(u32::to_be_bytes);
    let block_size: [&[u8]; 2] = [&NBD_INFO_BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()];
    put_option_reply(out, option, NBD_REP_INFO, &block_size);
    for (kind, text) in [(NBD_INFO_NAME, export.name), (NBD_INFO_DESCRIPTION, export.description)] {
        if query.infos.contains(&kind) {
            put_option_reply(out, option, NBD_REP_INFO, &[&kind.to_be_bytes(), text.as_bytes()]);
        }
    }
    put_option_reply(out, option, NBD_REP_ACK, &[]);
    true
}

fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads `length` bytes and throws them away.
pub(super) fn drain(stream: &mut impl Read, length: u64) -> io::Result<()> {
    let read = io::copy(&mut stream.take(length), &mut io::sink())?;
    if read == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// What the client will have said, and what it has heard.
    struct Script {
        said: Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.said.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.heard.write(buf)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Plays the client's part and returns the outcome and what was heard after the greeting.
    fn play(flags: u32, options: &[(u32, &[u8])]) -> (Result<Outcome, HandshakeError>, Vec<u8>) {
        let mut said = flags.to_be_bytes().to_vec();
        for (option, data) in options {
            said.extend(OptionHeader { option: *option, length: data.len() as u32 }.encode());
            said.extend_from_slice(data);
        }
        play_bytes(said)
    }

    fn play_bytes(said: Vec<u8>) -> (Result<Outcome, HandshakeError>, Vec<u8>) {
        let geometry = Geometry { trim: false, ..Geometry::writable(0x10_0000) };
        let export = Export { name: "xvda", description: "a guest", geometry };
        let mut script = Script { said: Cursor::new(said), heard: Vec::new() };
        let outcome = handshake(&mut script, &export);
        assert_eq!(&script.heard[..GREETING_SIZE], b"NBDMAGICIHAVEOPT\0\x03");
        (outcome, script.heard.split_off(GREETING_SIZE))
    }

    fn replies(expected: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (option, reply, data) in expected {
            put_option_reply(&mut out, *option, *reply, &[data]);
        }
        out
    }

    const EXPORT: &[u8] = b"\0\0\0\0\0\0\0\x10\0\0\x01\x4d";
    const BLOCK_SIZE: &[u8] = b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0";

    #[test]
    fn export_name_with_and_without_zeroes() {
        let (outcome, heard) = play(3, &[(NBD_OPT_EXPORT_NAME, b"xvda")]);
        assert_eq!(outcome.unwrap(), Outcome::Transmission);
        assert_eq!(heard, &EXPORT[2..]);
        let (outcome, heard) = play(0, &[(NBD_OPT_EXPORT_NAME, b"")]);
        assert_eq!(outcome.unwrap(), Outcome::Transmission);
        assert_eq!(heard, [&EXPORT[2..], &[0; 124]].concat());
    }

    #[test]
    fn unknown_export() {
        let (outcome, heard) = play(3, &[(NBD_OPT_EXPORT_NAME, b"xvdb")]);
        assert!(matches!(outcome, Err(HandshakeError::UnknownExport(_))) && heard.is_empty());
        let (outcome, heard) =
            play(3, &[(NBD_OPT_GO, &ExportQuery { name: b"xvdb", infos: vec![] }.encode()), (NBD_OPT_ABORT, b"")]);
        assert_eq!(outcome.unwrap(), Outcome::Left);
        let unknown = (NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, &b"no such export"[..]);
        assert_eq!(heard, replies(&[unknown, (NBD_OPT_ABORT, NBD_REP_ACK, b"")]));
    }

    #[test]
    fn info_then_go() {
        let all = ExportQuery { name: b"", infos: vec![1, 2, 3, 99] }.encode();
        let plain = ExportQuery { name: b"xvda", infos: vec![] }.encode();
        let (outcome, heard) = play(3, &[(NBD_OPT_INFO, &all), (NBD_OPT_GO, &plain)]);
        assert_eq!(outcome.unwrap(), Outcome::Transmission);
        assert_eq!(
            heard,
            replies(&[
                (NBD_OPT_INFO, NBD_REP_INFO, EXPORT),
                (NBD_OPT_INFO, NBD_REP_INFO, BLOCK_SIZE),
                (NBD_OPT_INFO, NBD_REP_INFO, b"\0\x01xvda"),
                (NBD_OPT_INFO, NBD_REP_INFO, b"\0\x02a guest"),
                (NBD_OPT_INFO, NBD_REP_ACK, b""),
                (NBD_OPT_GO, NBD_REP_INFO, EXPORT),
                (NBD_OPT_GO, NBD_REP_INFO, BLOCK_SIZE),
                (NBD_OPT_GO, NBD_REP_ACK, b""),
            ])
        );
    }

    #[test]
    fn what_is_not_supported_is_said_so() {
        let options: [(u32, &[u8]); 5] = [
            (NBD_OPT_STARTTLS, b""),
            (NBD_OPT_STRUCTURED_REPLY, b""),
            (12345, b"whatever"),
            (NBD_OPT_LIST, b"x"),
            (NBD_OPT_LIST, b""),
        ];
        let (outcome, heard) = play(3, &options);
        assert!(matches!(outcome, Err(HandshakeError::Io(_))), "the script ends before the client has chosen");
        assert_eq!(
            heard,
            replies(&[
                (NBD_OPT_STARTTLS, NBD_REP_ERR_UNSUP, b""),
                (NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b""),
                (12345, NBD_REP_ERR_UNSUP, b""),
                (NBD_OPT_LIST, NBD_REP_ERR_INVALID, b"NBD_OPT_LIST carries no data"),
                (NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x04xvdaa guest"),
                (NBD_OPT_LIST, NBD_REP_ACK, b""),
            ])
        );
    }

    #[test]
    fn oversized_options() {
        let long = vec![0; MAX_OPTION_READ as usize + 1];
        let (outcome, heard) = play(3, &[(NBD_OPT_GO, &long), (NBD_OPT_ABORT, b"")]);
        assert_eq!(outcome.unwrap(), Outcome::Left);
        let too_big = (NBD_OPT_GO, NBD_REP_ERR_TOO_BIG, &b"too much data"[..]);
        assert_eq!(heard, replies(&[too_big, (NBD_OPT_ABORT, NBD_REP_ACK, b"")]));
        assert!(matches!(play(3, &[(NBD_OPT_EXPORT_NAME, &long)]).0, Err(HandshakeError::Oversized { .. })));
        for option in [NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_LIST, 999] {
            let mut said = 3u32.to_be_bytes().to_vec();
            said.extend(OptionHeader { option, length: u32::MAX }.encode());
            assert!(matches!(play_bytes(said).0, Err(HandshakeError::Oversized { length: u32::MAX, .. })));
        }
    }

    #[test]
    fn not_nbd_at_all() {
        assert!(matches!(play(4, &[]).0, Err(HandshakeError::ClientFlags(4))));
        assert!(matches!(play_bytes(b"GET / HTTP/1.1\r\n\r\n".to_vec()).0, Err(HandshakeError::ClientFlags(_))));
        assert!(matches!(play_bytes([&[0, 0, 0, 3], &[7; 16][..]].concat()).0, Err(HandshakeError::Magic(_))));
    }

    #[test]
    fn broken_off_anywhere() {
        let mut said = 3u32.to_be_bytes().to_vec();
        let query = ExportQuery { name: b"xvda", infos: vec![3] }.encode();
        said.extend(OptionHeader { option: NBD_OPT_GO, length: query.len() as u32 }.encode());
        said.extend(query);
        for end in 0..said.len() {
            assert!(matches!(play_bytes(said[..end].to_vec()).0, Err(HandshakeError::Io(_))), "after {end} bytes");
        }
        assert_eq!(play_bytes(said).0.unwrap(), Outcome::Transmission);
    }
}
