//! One connection to an NBD server, from connecting to the moment when requests can be sent
//! (proto.md, Newstyle negotiation).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::export::{Export, Place};
use super::protocol::*;

/// How long a server may take to be connected to, and then for the handshake as a whole.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest of the minimum block sizes that a server may name (proto.md, Size constraints).
const LARGEST_BLOCK: u32 = 1 << 16;
/// Longest reply to an option that is read: an error message.
const LONGEST_REPLY: u32 = 64 << 10;

/// Either kind of socket.
#[derive(Debug)]
pub enum Stream {
    /// A Unix socket.
    Unix(UnixStream),
    /// A TCP connection.
    Tcp(TcpStream),
}

impl Stream {
    fn connect(place: &Place) -> io::Result<Self> {
        match place {
            Place::Unix(path) => connect_unix(path).map(Self::Unix),
            Place::Tcp(host, port) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, PATIENCE) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            notice_silence(&stream)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience)),
            Self::Tcp(stream) => stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience)),
        }
    }

    /// From now on reads and writes wait for as long as it takes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn be_patient(&self) -> io::Result<()> {
        self.set_patience(None)
    }

    /// From now on a read or write that takes longer than a second fails.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hurry(&self) -> io::Result<()> {
        self.set_patience(Some(Duration::from_secs(1)))
    }

    /// Another handle of the same connection.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn another(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// Ends it: whoever reads or writes learns of it.
    pub fn end(&self) {
        // It may have ended by itself.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// Connects to a Unix socket. Where a server does not accept, and others wait for that already, connect(2) would wait for
/// ever.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let began = Instant::now();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::AGAIN) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it accepts no connection"));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Has the kernel end a connection whose other end is gone without a word: its machine lost power, or the network is cut.
/// Noticed after some 25 s of silence (tcp(7)).
fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    // Keepalive does not look while sent data wait for their acknowledgement.
    sockopt::set_tcp_user_timeout(stream, 25_000)?;
    Ok(())
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buffer),
            Self::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Bytes.
    pub size: u64,
    /// `NBD_FLAG_*`.
    pub flags: u16,
    /// Bytes that requests have to be multiples of.
    pub block: u32,
    /// Most bytes of one read or write.
    pub payload: u32,
}

/// A connection that is ready for requests.
#[derive(Debug)]
pub struct Link {
    /// The connection. Reads and writes fail after a few seconds, until it is told to [`be_patient`](Stream::be_patient).
    pub stream: Stream,
    /// What the server said.
    pub info: Info,
}

fn odd(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// A connection during its handshake, which has one deadline: a server that says a byte now and then is none.
struct Handshake {
    stream: Stream,
    deadline: Instant,
}

impl Read for Handshake {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "it does not come to an end with the handshake");
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.stream.set_patience(Some(left))?;
        self.stream.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
            _ => error,
        })
    }
}

fn read<const N: usize>(stream: &mut Handshake) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Link {
    /// Connects and asks for the export.
    ///
    /// # Errors
    /// When nobody listens, when it is no NBD server, when it has no such export.
    pub fn make(export: &Export) -> io::Result<Self> {
        let stream = Stream::connect(&export.place)?;
        stream.set_patience(Some(PATIENCE))?;
        let mut handshake = Handshake { stream, deadline: Instant::now() + PATIENCE };
        let greeting: [u8; GREETING_SIZE] = read(&mut handshake)?;
        let [init, magic] = [0, 8].map(|at| u64_at(&greeting, at));
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if (init, magic) != (NBD_INIT_MAGIC, NBD_OPTS_MAGIC) || flags & NBD_FLAG_FIXED_NEWSTYLE == 0 {
            return Err(odd("it is no NBD server, or one older than 2011 (fixed newstyle is needed)"));
        }
        let wanted = NBD_FLAG_C_FIXED_NEWSTYLE | if flags & NBD_FLAG_NO_ZEROES != 0 { NBD_FLAG_C_NO_ZEROES } else { 0 };
        handshake.stream.write_all(&wanted.to_be_bytes())?;
        let query = ExportQuery { name: export.name.as_bytes(), infos: vec![NBD_INFO_BLOCK_SIZE] }.encode();
        handshake.stream.write_all(&OptionHeader { option: NBD_OPT_GO, length: query.len() as u32 }.encode())?;
        handshake.stream.write_all(&query)?;
        let info = replies(&mut handshake)?;
        let stream = handshake.stream;
        // What follows, until it is told to be patient, has its time anew.
        stream.set_patience(Some(PATIENCE))?;
        Ok(Self { stream, info })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// Reads the replies to NBD_OPT_GO.
fn replies(stream: &mut Handshake) -> io::Result<Info> {
    let mut info = Info { size: 0, flags: 0, block: 1, payload: MAX_PAYLOAD };
    let mut known = false;
    loop {
        let header: [u8; OPTION_REPLY_SIZE] = read(stream)?;
        if u64_at(&header, 0) != NBD_REP_MAGIC {
            return Err(odd("it does not speak the NBD protocol"));
        }
        let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (reply, length) = (number(12), number(16));
        if length > LONGEST_REPLY {
            return Err(odd(format!("its reply is {length} bytes long")));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match reply {
            NBD_REP_ACK if known => return Ok(info),
            NBD_REP_ACK => return Err(odd("it does not say how large the export is")),
            NBD_REP_INFO => match data.split_first_chunk().map(|(kind, rest)| (u16::from_be_bytes(*kind), rest)) {
                Some((NBD_INFO_EXPORT, rest)) if rest.len() == 10 => {
                    info.size = u64_at(rest, 0);
                    if i64::try_from(info.size).is_err() {
                        return Err(odd(format!(
                            "it says that the export has {} bytes, more than there can be",
                            info.size
                        )));
                    }
                    info.flags = u16::from_be_bytes([rest[8], rest[9]]);
                    known = true;
                }
                Some((NBD_INFO_BLOCK_SIZE, rest)) if rest.len() == 12 => {
                    let word = |at: usize| u32::from_be_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
                    info.block = word(0).max(1);
                    if !info.block.is_power_of_two() || info.block > LARGEST_BLOCK {
                        return Err(odd(format!(
                            "it says that requests have to be multiples of {} bytes; the protocol has powers of two up to \
                             {LARGEST_BLOCK} for that",
                            info.block
                        )));
                    }
                    info.payload = word(8).min(MAX_PAYLOAD);
                }
                // The export's name or description; or something that was not asked for.
                _ => {}
            },
            NBD_REP_ERR_UNKNOWN => {
                return Err(io::Error::new(io::ErrorKind::NotFound, "the server has no such export"));
            }
            reply if reply & (1 << 31) != 0 => {
                let said = String::from_utf8_lossy(&data);
                let said = said.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
                return Err(odd(format!("the server refuses the export (error {}): {said}", reply & !(1 << 31))));
            }
            other => return Err(odd(format!("it gives an unknown reply {other}"))),
        }
    }
}
