//! Numbers and layouts of the NBD protocol, as pure functions over bytes. Everything on the wire is big-endian.
//!
//! Names are the specification's. Only what a fixed newstyle server with simple replies needs is here.

/// First magic of the server's greeting, "NBDMAGIC" (proto.md, Newstyle negotiation).
pub const NBD_INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and the first field of every option, "IHAVEOPT" (proto.md, Newstyle negotiation).
pub const NBD_OPTS_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First field of every option reply (proto.md, Fixed newstyle negotiation).
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First field of every request (proto.md, Request message).
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First field of every simple reply (proto.md, Simple reply message).
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Server: options are answered one by one (proto.md, Handshake flags).
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Server: willing to leave out the 124 zeroes after `NBD_OPT_EXPORT_NAME` (proto.md, Handshake flags).
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client: speaks fixed newstyle (proto.md, Client flags).
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client: does not want the 124 zeroes (proto.md, Client flags).
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Always set (proto.md, Transmission flags).
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Writes are refused with `NBD_EPERM`.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// `NBD_CMD_FLUSH` is understood.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// `NBD_CMD_FLAG_FUA` is understood, on every command.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// `NBD_CMD_TRIM` is understood.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE` are understood.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// A flush on one connection covers what was answered on every other.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// Choose an export the old way, without a way to be told no (proto.md, Option types).
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// End the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// List the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Start TLS; not supported here.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Ask about an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Ask about an export and enter transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Use structured replies; not supported here.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;

/// The option is done (proto.md, Option reply types).
pub const NBD_REP_ACK: u32 = 1;
/// One export of the list.
pub const NBD_REP_SERVER: u32 = 2;
/// One piece of information about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Unknown option.
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) | 1;
/// The option's data make no sense.
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) | 3;
/// No such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) | 6;
/// The option's data are too long.
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) | 9;

/// Size and transmission flags (proto.md, Option reply types, `NBD_REP_INFO`).
pub const NBD_INFO_EXPORT: u16 = 0;
/// The export's canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// A description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Minimum and preferred block, maximum payload (proto.md, Size constraints).
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Read (proto.md, Request types).
pub const NBD_CMD_READ: u16 = 0;
/// Write; the only request followed by a payload.
pub const NBD_CMD_WRITE: u16 = 1;
/// Disconnect; has no reply.
pub const NBD_CMD_DISC: u16 = 2;
/// Make everything answered so far durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// The range's contents are no longer needed.
pub const NBD_CMD_TRIM: u16 = 4;
/// The range shall read as zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;

/// Answer only when durable (proto.md, Command flags).
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// `NBD_CMD_WRITE_ZEROES` must leave the range allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// Operation not permitted (proto.md, Error values).
pub const NBD_EPERM: u32 = 1;
/// Input/output error.
pub const NBD_EIO: u32 = 5;
/// Cannot allocate memory.
pub const NBD_ENOMEM: u32 = 12;
/// Invalid argument.
pub const NBD_EINVAL: u32 = 22;
/// No space left on device.
pub const NBD_ENOSPC: u32 = 28;
/// Value too large.
pub const NBD_EOVERFLOW: u32 = 75;
/// The server is being shut down.
pub const NBD_ESHUTDOWN: u32 = 108;

/// Largest payload of one read or write: 2^25 bytes, which every client may rely upon (proto.md, Size constraints).
pub const MAX_PAYLOAD: u32 = 1 << 25;
/// No string on the wire is longer than this many bytes (proto.md, Conventions).
pub const MAX_STRING: usize = 4096;
/// The zeroes that follow the reply to `NBD_OPT_EXPORT_NAME`.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Bytes of the server's greeting.
pub const GREETING_SIZE: usize = 18;
/// Bytes of an option's header.
pub const OPTION_SIZE: usize = 16;
/// Bytes of an option reply's header.
pub const OPTION_REPLY_SIZE: usize = 20;
/// Bytes of a request's header.
pub const REQUEST_SIZE: usize = 28;
/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_SIZE: usize = 16;

const _: () = {
    assert!(GREETING_SIZE == 8 + 8 + 2);
    assert!(OPTION_SIZE == 8 + 4 + 4);
    assert!(OPTION_REPLY_SIZE == 8 + 4 + 4 + 4);
    assert!(REQUEST_SIZE == 4 + 2 + 2 + 8 + 8 + 4);
    assert!(SIMPLE_REPLY_SIZE == 4 + 4 + 8);
};

/// A message began with something else than its magic number; the stream cannot be trusted any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected magic {expected:#x}, found {found:#x}")]
pub struct BadMagic {
    /// What the specification puts there.
    pub expected: u64,
    /// What came.
    pub found: u64,
}

/// Header of an option (proto.md, Newstyle negotiation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of `NBD_OPT_*`.
    pub option: u32,
    /// Bytes that follow.
    pub length: u32,
}

/// Header of a request (proto.md, Request message).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// One of `NBD_CMD_*`.
    pub command: u16,
    /// The client's name for the request, given back as it came.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Header of a simple reply (proto.md, Simple reply message).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0 or one of `NBD_E*`.
    pub error: u32,
    /// The request's cookie.
    pub cookie: u64,
}

fn bytes_at<const N: usize, const SIZE: usize>(bytes: &[u8; SIZE], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

fn expect(expected: u64, found: u64) -> Result<(), BadMagic> {
    if expected == found { Ok(()) } else { Err(BadMagic { expected, found }) }
}

fn put<const SIZE: usize>(parts: &[&[u8]]) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let mut at = 0;
    for part in parts {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert_eq!(at, SIZE, "the parts fill the layout");
    bytes
}

/// The server's first words (proto.md, Newstyle negotiation).
pub fn greeting(flags: u16) -> [u8; GREETING_SIZE] {
    put(&[&NBD_INIT_MAGIC.to_be_bytes(), &NBD_OPTS_MAGIC.to_be_bytes(), &flags.to_be_bytes()])
}

impl OptionHeader {
    /// Reads the header, its magic checked.
    pub fn decode(bytes: &[u8; OPTION_SIZE]) -> Result<Self, BadMagic> {
        expect(NBD_OPTS_MAGIC, u64::from_be_bytes(bytes_at(bytes, 0)))?;
        Ok(Self { option: u32::from_be_bytes(bytes_at(bytes, 8)), length: u32::from_be_bytes(bytes_at(bytes, 12)) })
    }

    /// The header as a client sends it.
    pub fn encode(self) -> [u8; OPTION_SIZE] {
        put(&[&NBD_OPTS_MAGIC.to_be_bytes(), &self.option.to_be_bytes(), &self.length.to_be_bytes()])
    }
}

/// Appends one option reply, header and data (proto.md, Fixed newstyle negotiation).
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[&[u8]]) {
    // What this server sends are strings of at most MAX_STRING and a few numbers: no overflow to fear.
    let length = data.iter().map(|part| part.len()).sum::<usize>() as u32;
    let header: [u8; OPTION_REPLY_SIZE] =
        put(&[&NBD_REP_MAGIC.to_be_bytes(), &option.to_be_bytes(), &reply.to_be_bytes(), &length.to_be_bytes()]);
    out.extend_from_slice(&header);
    data.iter().for_each(|part| out.extend_from_slice(part));
}

impl Request {
    /// Reads the header, its magic checked.
    pub fn decode(bytes: &[u8; REQUEST_SIZE]) -> Result<Self, BadMagic> {
        expect(NBD_REQUEST_MAGIC.into(), u32::from_be_bytes(bytes_at(bytes, 0)).into())?;
        Ok(Self {
            flags: u16::from_be_bytes(bytes_at(bytes, 4)),
            command: u16::from_be_bytes(bytes_at(bytes, 6)),
            cookie: u64::from_be_bytes(bytes_at(bytes, 8)),
            offset: u64::from_be_bytes(bytes_at(bytes, 16)),
            length: u32::from_be_bytes(bytes_at(bytes, 24)),
        })
    }

    /// The header as a client sends it.
    pub fn encode(self) -> [u8; REQUEST_SIZE] {
        put(&[
            &NBD_REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.command.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.length.to_be_bytes(),
        ])
    }
}

impl SimpleReply {
    /// Reads the header, its magic checked.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_SIZE]) -> Result<Self, BadMagic> {
        expect(NBD_SIMPLE_REPLY_MAGIC.into(), u32::from_be_bytes(bytes_at(bytes, 0)).into())?;
        Ok(Self { error: u32::from_be_bytes(bytes_at(bytes, 4)), cookie: u64::from_be_bytes(bytes_at(bytes, 8)) })
    }

    /// The header as the server sends it.
    pub fn encode(self) -> [u8; SIMPLE_REPLY_SIZE] {
        put(&[&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes(), &self.error.to_be_bytes(), &self.cookie.to_be_bytes()])
    }
}

/// Data of `NBD_OPT_GO` and `NBD_OPT_INFO` (proto.md, Option types).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery<'a> {
    /// Name of the export; empty means the default one.
    pub name: &'a [u8],
    /// The `NBD_INFO_*` asked for.
    pub infos: Vec<u16>,
}

impl<'a> ExportQuery<'a> {
    /// None if lengths and data disagree.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let (length, rest) = data.split_first_chunk()?;
        let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*length).try_into().ok()?)?;
        let (count, rest) = rest.split_first_chunk()?;
        let (infos, odd) = rest.as_chunks::<2>();
        let fits = infos.len() == usize::from(u16::from_be_bytes(*count)) && odd.is_empty() && name.len() <= MAX_STRING;
        fits.then(|| Self { name, infos: infos.iter().map(|info| u16::from_be_bytes(*info)).collect() })
    }

    /// The data as a client sends them.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = (self.name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(self.name);
        data.extend_from_slice(&(self.infos.len() as u16).to_be_bytes());
        self.infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The bytes below were written by hand from proto.md, not printed by this code.

    #[test]
    fn greeting_bytes() {
        assert_eq!(&greeting(3), b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn option_bytes() {
        let bytes = b"IHAVEOPT\0\0\0\x07\0\0\x01\x02";
        let header = OptionHeader { option: NBD_OPT_GO, length: 0x102 };
        assert_eq!(OptionHeader::decode(bytes), Ok(header));
        assert_eq!(&header.encode(), bytes);
        assert!(OptionHeader::decode(b"IHAVEOPX\0\0\0\x07\0\0\x01\x02").is_err());
    }

    #[test]
    fn option_reply_bytes() {
        let mut out = Vec::new();
        put_option_reply(&mut out, NBD_OPT_INFO, NBD_REP_ERR_UNKNOWN, &[b"n", b"o"]);
        assert_eq!(out, b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x06\x80\0\0\x06\0\0\0\x02no");
    }

    #[test]
    fn request_bytes() {
        let bytes = b"\x25\x60\x95\x13\0\x01\0\x01ABCDEFGH\0\0\0\x01\0\0\0\x02\0\0\x10\0";
        let request = Request {
            flags: NBD_CMD_FLAG_FUA,
            command: NBD_CMD_WRITE,
            cookie: u64::from_be_bytes(*b"ABCDEFGH"),
            offset: 0x1_0000_0002,
            length: 4096,
        };
        assert_eq!(Request::decode(bytes), Ok(request));
        assert_eq!(&request.encode(), bytes);
        // The magic of Linux 2.1 (proto.md, Reserved Magic values) is not ours.
        let old = b"\x12\x56\x09\x53\0\x01\0\x01ABCDEFGH\0\0\0\x01\0\0\0\x02\0\0\x10\0";
        assert_eq!(Request::decode(old), Err(BadMagic { expected: 0x2560_9513, found: 0x1256_0953 }));
    }

    #[test]
    fn simple_reply_bytes() {
        let bytes = b"\x67\x44\x66\x98\0\0\0\x1cABCDEFGH";
        let reply = SimpleReply { error: NBD_ENOSPC, cookie: u64::from_be_bytes(*b"ABCDEFGH") };
        assert_eq!(&reply.encode(), bytes);
        assert_eq!(SimpleReply::decode(bytes), Ok(reply));
    }

    #[test]
    fn export_query_bytes() {
        let data = b"\0\0\0\x03xvd\0\x02\0\x00\0\x03";
        let query = ExportQuery { name: b"xvd", infos: vec![NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE] };
        assert_eq!(ExportQuery::decode(data), Some(query.clone()));
        assert_eq!(query.encode(), data);
    }

    #[test]
    fn export_query_that_lies_about_its_lengths() {
        for data in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0",
            b"\0\0\0\0\0",
            b"\0\0\0\x03xv\0\0",
            b"\xff\xff\xff\xffxvd\0\0",
            b"\0\0\0\0\0\x01",
            b"\0\0\0\0\0\x01\0",
            b"\0\0\0\0\0\x01\0\x03\0",
            b"\0\0\0\0\0\0\0\x03",
        ] {
            assert_eq!(ExportQuery::decode(data), None, "{data:?}");
        }
        let long = ExportQuery { name: &[b'x'; MAX_STRING + 1], infos: vec![] }.encode();
        assert_eq!(ExportQuery::decode(&long), None);
    }
}
