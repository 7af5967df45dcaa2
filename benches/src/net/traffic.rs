//! Traffic between two namespaces, every byte of it checked: TCP streams, UDP datagrams, and one byte to and fro.
//!
//! Sockets are made inside the namespaces and used by threads of this process: a socket stays in its namespace.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::netns::Namespace;
use crate::Failure;

/// How long anything may stand still before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest piece given to one call.
pub const LARGEST: usize = 65536;
/// After how many bytes a stream's contents repeat: a prime, so that no power of two of lost bytes goes unnoticed.
const PERIOD: usize = 65521;

/// One way for traffic: from whom, to whom, and under which address they are found.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// The sender's namespace.
    pub from: &'a Namespace,
    /// The receiver's.
    pub to: &'a Namespace,
    /// The receiver's address.
    pub address: IpAddr,
}

impl Way<'_> {
    fn listener(&self) -> Result<(TcpListener, SocketAddr), Failure> {
        let address = SocketAddr::new(self.address, 0);
        let listener = self.to.run(|| TcpListener::bind(address))?;
        let listener = listener.map_err(|error| format!("listening on {address}: {error}"))?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }

    /// A connection: the sender's end, and the receiver's.
    fn connect(&self, listener: &TcpListener, address: SocketAddr) -> Result<(TcpStream, TcpStream), Failure> {
        let sender = self.from.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
        let sender = sender.map_err(|error| format!("connecting to {address}: {error}"))?;
        let (receiver, _) = listener.accept()?;
        for end in [&sender, &receiver] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        Ok((sender, receiver))
    }

    /// Sends a byte through and says from which address the receiver saw it come.
    ///
    /// # Errors
    /// When there is no way.
    pub fn seen_from(&self) -> Result<IpAddr, Failure> {
        let (listener, address) = self.listener()?;
        let (_sender, receiver) = self.connect(&listener, address)?;
        Ok(receiver.peer_addr()?.ip())
    }
}

/// The contents of a stream: the same for both ends, without end.
#[derive(Debug)]
struct Contents(Vec<u8>);

impl Contents {
    fn new(stream: u64) -> Self {
        let mut state = stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes: Vec<u8> = (0..PERIOD)
            .map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                (state >> 56) as u8
            })
            .collect();
        bytes.extend_from_within(..);
        bytes.extend_from_within(..LARGEST - PERIOD);
        Self(bytes)
    }

    /// `len` bytes from byte `offset` of the stream on.
    fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + len]
    }
}

/// What arrived.
#[derive(Debug, Clone, Copy, Default)]
pub struct Arrived {
    /// Bytes that arrived and were what was sent.
    pub bytes: u64,
    /// Datagrams that arrived.
    pub packets: u64,
    /// Datagrams that were sent.
    pub sent: u64,
    /// From the first send to the last receipt.
    pub elapsed: Duration,
}

impl Arrived {
    /// 10^9 bits a second.
    pub fn gigabits(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Datagrams a second.
    pub fn packet_rate(&self) -> f64 {
        self.packets as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Adds another round.
    pub fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.packets += other.packets;
        self.sent += other.sent;
        self.elapsed += other.elapsed;
    }
}

/// When senders stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so long.
    Time(Duration),
    /// After so many bytes each.
    Bytes(u64),
}

/// Sends `streams` TCP streams along each way, all at once, in pieces of `size` bytes, and checks what arrives.
///
/// # Errors
/// When a connection fails or stands still, or a byte is not what was sent.
///
/// # Panics
/// When `size` is 0 or more than [`LARGEST`].
pub fn tcp(ways: &[Way<'_>], streams: usize, size: usize, until: Until) -> Result<Arrived, Failure> {
    assert!((1..=LARGEST).contains(&size), "pieces of {size} bytes");
    let mut pairs = Vec::new();
    for way in ways {
        let (listener, address) = way.listener()?;
        for _ in 0..streams {
            pairs.push(way.connect(&listener, address)?);
        }
    }
    let contents: Vec<Contents> = (0..pairs.len()).map(|stream| Contents::new(stream as u64 + 1)).collect();
    let began = Instant::now();
    let arrived = std::thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for ((sender, receiver), contents) in pairs.into_iter().zip(&contents) {
            senders.push(spawn(scope, move || send_stream(sender, contents, size, began, until))?);
            receivers.push(spawn(scope, move || receive_stream(receiver, contents))?);
        }
        // A receiver that gives up closes its end, which ends the sender: its reason comes first.
        let arrived = receivers.into_iter().map(join).collect::<Result<Vec<u64>, _>>()?;
        let sent = senders.into_iter().map(join).collect::<Result<Vec<u64>, _>>()?;
        if arrived != sent {
            return Err(format!("of streams of {sent:?} bytes {arrived:?} arrived").into());
        }
        Ok::<_, Failure>(arrived)
    })?;
    Ok(Arrived { bytes: arrived.iter().sum(), elapsed: began.elapsed(), ..Arrived::default() })
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, Result<T, Failure>>, Failure> {
    Ok(std::thread::Builder::new().name("traffic".into()).spawn_scoped(scope, work)?)
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T, Failure>>) -> Result<T, Failure> {
    thread.join().map_err(|_| "a thread of the traffic panicked")?
}

/// Sends the contents of stream number `stream` into a socket, in pieces of `size` bytes. Returns bytes sent.
///
/// # Errors
/// When the connection breaks or stands still.
pub fn send(socket: TcpStream, stream: u64, size: usize, until: Until) -> Result<u64, Failure> {
    send_stream(socket, &Contents::new(stream), size, Instant::now(), until)
}

/// Receives the contents of stream number `stream` to their end. Returns bytes received.
///
/// # Errors
/// When a byte is not what was sent, or the connection breaks or stands still.
pub fn receive(socket: TcpStream, stream: u64) -> Result<u64, Failure> {
    receive_stream(socket, &Contents::new(stream))
}

fn send_stream(
    mut socket: TcpStream,
    contents: &Contents,
    size: usize,
    began: Instant,
    until: Until,
) -> Result<u64, Failure> {
    let mut offset = 0u64;
    loop {
        let left = match until {
            Until::Time(time) if began.elapsed() >= time => 0,
            Until::Time(_) => size,
            Until::Bytes(bytes) => (bytes - offset).min(size as u64) as usize,
        };
        if left == 0 {
            break;
        }
        socket.write_all(contents.at(offset, left)).map_err(|error| stuck("sending", offset, &error))?;
        offset += left as u64;
    }
    socket.shutdown(std::net::Shutdown::Write)?;
    Ok(offset)
}

fn receive_stream(mut socket: TcpStream, contents: &Contents) -> Result<u64, Failure> {
    let mut buffer = vec![0; LARGEST];
    let mut offset = 0u64;
    loop {
        let len = match socket.read(&mut buffer) {
            Ok(0) => return Ok(offset),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(stuck("receiving", offset, &error)),
        };
        let expected = contents.at(offset, len);
        if buffer[..len] != *expected {
            let wrong = buffer.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
            return Err(format!("byte {} of a TCP stream is not what was sent", offset + wrong as u64).into());
        }
        offset += len as u64;
    }
}

fn stuck(doing: &str, offset: u64, error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            format!("{doing}: a TCP stream stood still for {} s after {offset} bytes", PATIENCE.as_secs()).into()
        }
        _ => format!("{doing}: a TCP stream broke after {offset} bytes: {error}").into(),
    }
}

/// Bytes of a datagram's number, which comes first in it.
const NUMBER: usize = 8;
/// How long the receiver waits for the last datagrams; for the first it has patience.
const LAST: Duration = Duration::from_millis(100);

/// Sends datagrams of `size` bytes along each way as fast as the sender can, for `time`, and checks what arrives.
///
/// # Errors
/// When nothing arrives, or a datagram is not what was sent.
///
/// # Panics
/// When `size` is less than 8 or more than [`LARGEST`].
pub fn udp(ways: &[Way<'_>], size: usize, time: Duration) -> Result<Arrived, Failure> {
    assert!((NUMBER..=LARGEST).contains(&size), "datagrams of {size} bytes");
    let mut pairs = Vec::new();
    for way in ways {
        // A port of a bridge forwards up to a second after its link came up, and who has an address is asked first:
        // until then datagrams are lost, all of them if the time is short. TCP tries again.
        way.seen_from()?;
        let receiver = way.to.run(|| UdpSocket::bind(SocketAddr::new(way.address, 0)))??;
        receiver.set_read_timeout(Some(LAST))?;
        let address = receiver.local_addr()?;
        let sender = way.from.run(|| {
            let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.connect(address)?;
            Ok::<_, std::io::Error>(socket)
        })??;
        pairs.push((sender, receiver));
    }
    let contents = Contents::new(0);
    let over = AtomicBool::new(false);
    let began = Instant::now();
    let (sent, arrived) = std::thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for (sender, receiver) in pairs {
            let (contents, over) = (&contents, &over);
            receivers.push(spawn(scope, move || receive_datagrams(&receiver, contents, size, began, over))?);
            senders.push(spawn(scope, move || send_datagrams(&sender, contents, size, time))?);
        }
        let sent = senders.into_iter().map(join).collect::<Result<Vec<u64>, _>>();
        over.store(true, Ordering::Release);
        let arrived = receivers.into_iter().map(join).collect::<Result<Vec<(u64, Duration)>, _>>()?;
        Ok::<_, Failure>((sent?, arrived))
    })?;
    let packets: u64 = arrived.iter().map(|(packets, _)| packets).sum();
    if packets == 0 {
        return Err(format!("of {} datagrams of {size} bytes none arrived", sent.iter().sum::<u64>()).into());
    }
    let elapsed = arrived.iter().map(|(_, last)| *last).max().unwrap_or_default();
    Ok(Arrived { bytes: packets * size as u64, packets, sent: sent.iter().sum(), elapsed })
}

fn send_datagrams(socket: &UdpSocket, contents: &Contents, size: usize, time: Duration) -> Result<u64, Failure> {
    // On a busy machine this thread may have begun late.
    let began = Instant::now();
    let mut datagram = vec![0; size];
    let mut number = 0u64;
    // The clock costs as much as a tenth of a send.
    while !number.is_multiple_of(16) || began.elapsed() < time {
        datagram.copy_from_slice(contents.at(number, size));
        datagram[..NUMBER].copy_from_slice(&number.to_le_bytes());
        match socket.send(&datagram) {
            Ok(_) => number += 1,
            // No room in the interface's queue, for the moment.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => return Err(format!("sending a datagram: {error}").into()),
        }
    }
    Ok(number)
}

fn receive_datagrams(
    socket: &UdpSocket,
    contents: &Contents,
    size: usize,
    began: Instant,
    over: &AtomicBool,
) -> Result<(u64, Duration), Failure> {
    let mut buffer = vec![0; LARGEST];
    let (mut packets, mut last) = (0, Duration::ZERO);
    let mut sent = None;
    loop {
        let was_over = over.load(Ordering::Acquire);
        if was_over && sent.is_none() {
            sent = Some(Instant::now());
        }
        let len = match socket.recv(&mut buffer) {
            Ok(len) => len,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let enough = packets > 0 || sent.is_some_and(|sent| sent.elapsed() > PATIENCE);
                if was_over && enough {
                    return Ok((packets, last));
                }
                continue;
            }
            Err(error) => return Err(format!("receiving a datagram: {error}").into()),
        };
        let (datagram, mut number) = (&buffer[..len], [0; NUMBER]);
        if len == size {
            number.copy_from_slice(&datagram[..NUMBER]);
        }
        let expected = contents.at(u64::from_le_bytes(number), size);
        if len != size || datagram[NUMBER..] != expected[NUMBER..] {
            return Err(format!("datagram {packets} is not what was sent ({len} bytes of {size})").into());
        }
        packets += 1;
        if packets % 16 == 1 {
            last = began.elapsed();
        }
    }
}

/// Sends one byte to and fro for `time` and returns how long each turn took, in nanoseconds.
///
/// # Errors
/// When the connection fails.
pub fn round_trips(way: &Way<'_>, time: Duration) -> Result<Histogram<u64>, Failure> {
    let (listener, address) = way.listener()?;
    let (mut sender, mut receiver) = way.connect(&listener, address)?;
    let mut turns = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
    std::thread::scope(|scope| {
        let echo = spawn(scope, move || {
            let mut byte = [0];
            loop {
                match receiver.read(&mut byte) {
                    Ok(0) => return Ok(()),
                    Ok(_) => receiver.write_all(&byte)?,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(stuck("echoing", 0, &error)),
                }
            }
        })?;
        let began = Instant::now();
        let mut now = began;
        let (mut byte, mut number) = ([0], 0u8);
        while now.duration_since(began) < time {
            number = number.wrapping_add(1);
            sender.write_all(&[number])?;
            sender.read_exact(&mut byte).map_err(|error| stuck("awaiting an echo", turns.len(), &error))?;
            if byte != [number] {
                return Err("an echo is not what was sent".into());
            }
            let then = std::mem::replace(&mut now, Instant::now());
            turns.saturating_record(now.duration_since(then).as_nanos() as u64);
        }
        drop(sender);
        join(echo)
    })?;
    Ok(turns)
}
