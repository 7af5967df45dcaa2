//! One client: a thread that reads requests and hands them to the disk, and a thread that sends what the disk answered
//! (proto.md, Transmission).

use super::check::{Plan, error_of, plan};
use super::disk::{Command, Completion, Disk, Geometry};
use super::handshake::{Export, Outcome, drain, handshake};
use super::outbox::{Limits, Outbox, Outgoing};
use super::protocol::*;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    outbox: Outbox,
    stopping: AtomicBool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, limits: Limits) -> Self {
        Self { stream, outbox: Outbox::new(limits), stopping: AtomicBool::new(false) }
    }

    /// Serves the client until it leaves. Returns when both threads are done.
    pub(super) fn run(self: &Arc<Self>, disk: &Arc<dyn Disk>, export: &Export<'_>) {
        match handshake(&mut &self.stream, export) {
            Ok(Outcome::Transmission) => self.transmission(disk, export.geometry),
            Ok(Outcome::Left) => {}
            Err(error) if self.is_stopping() => tracing::debug!(%error, "NBD handshake cut short by stop"),
            Err(error) => tracing::warn!(%error, "NBD handshake failed"),
        }
        // The server keeps no second handle of the socket, but answers that are still out do.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Take no further requests, answer those in flight, then end. Requests that were already sent get ESHUTDOWN.
    pub(super) fn wind_down(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// End now, whatever is in flight.
    pub(super) fn sever(&self) {
        self.outbox.break_off();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn transmission(self: &Arc<Self>, disk: &Arc<dyn Disk>, geometry: Geometry) {
        tracing::debug!("NBD client enters transmission");
        let (connection, its_disk) = (Arc::clone(self), Arc::clone(disk));
        let writer = thread::Builder::new().name("nbd-replies".into()).spawn(move || {
            let _sever = OnDrop(|| connection.sever());
            connection.send_replies(&*its_disk);
        });
        let writer = match writer {
            Ok(writer) => writer,
            Err(error) => return tracing::error!(%error, "no thread for an NBD connection"),
        };
        {
            // Dropped even if the disk panics in `submit`, so that the writer ends and the client hears of it.
            let _close = OnDrop(|| self.outbox.close());
            match self.take_requests(&**disk, &geometry) {
                Ok(requests) => tracing::debug!(requests, "NBD client left"),
                Err(error) => tracing::warn!(%error, "NBD client dropped"),
            }
        }
        if writer.join().is_err() {
            tracing::error!("the disk panicked; its NBD client was dropped");
        }
    }

    /// Reads and submits requests until the client leaves; returns how many there were.
    fn take_requests(self: &Arc<Self>, disk: &dyn Disk, geometry: &Geometry) -> io::Result<u64> {
        let mut reader = BufReader::with_capacity(64 << 10, &self.stream);
        let mut count = 0;
        loop {
            let Some(header) = read_header(&mut reader)? else { return Ok(count) };
            let request = Request::decode(&header).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            if request.command == NBD_CMD_DISC {
                return Ok(count);
            }
            count += 1;
            let verdict = if self.is_stopping() { Err(NBD_ESHUTDOWN) } else { plan(&request, geometry) };
            let payload = match verdict {
                Ok(Plan::Read | Plan::Write { .. }) => request.length.into(),
                _ => 0,
            };
            if !self.outbox.reserve(payload) {
                return Ok(count);
            }
            // An error from here on leaves the room reserved, and the writer would wait for its reply.
            let release = OnDrop(|| self.outbox.release(1, payload));
            let (offset, len) = (request.offset, request.length);
            let (command, then_flush) = match verdict {
                Err(error) => {
                    tracing::debug!(?request, error, "NBD request refused");
                    if request.command == NBD_CMD_WRITE {
                        drain(&mut reader, len.into())?;
                    }
                    release.forget();
                    self.reply(request.cookie, error, Vec::new(), payload);
                    continue;
                }
                Ok(Plan::Read) => (Command::Read { offset, len }, false),
                Ok(Plan::Write { fua }) => {
                    let mut data = vec![0; len as usize];
                    reader.read_exact(&mut data)?;
                    (Command::Write { offset, data, fua }, false)
                }
                Ok(Plan::Flush) => (Command::Flush, false),
                // A discard has no FUA of its own; the flush after it is what makes it durable.
                Ok(Plan::Trim { fua }) => (Command::Trim { offset, len }, fua),
                Ok(Plan::WriteZeroes { fua, may_punch }) => {
                    (Command::WriteZeroes { offset, len, fua, may_punch }, false)
                }
            };
            release.forget();
            disk.submit(command, self.completion(request, payload, then_flush));
        }
    }

    fn completion(self: &Arc<Self>, request: Request, payload: u64, then_flush: bool) -> Completion {
        let connection = Arc::clone(self);
        Completion::new(move |result| {
            let expected = if request.command == NBD_CMD_READ { request.length as usize } else { 0 };
            let (error, data) = match result {
                Ok(data) if data.len() == expected => (0, data),
                Ok(data) => {
                    tracing::error!(?request, bytes = data.len(), "the disk answered with the wrong amount of data");
                    (NBD_EIO, Vec::new())
                }
                Err(errno) => {
                    tracing::debug!(?request, errno, "NBD request failed");
                    (error_of(errno, matches!(request.command, NBD_CMD_READ | NBD_CMD_WRITE)), Vec::new())
                }
            };
            if then_flush && error == 0 {
                connection.outbox.push(Outgoing::Flush { cookie: request.cookie });
            } else {
                connection.reply(request.cookie, error, data, payload);
            }
        })
    }

    fn reply(&self, cookie: u64, error: u32, data: Vec<u8>, payload: u64) {
        self.outbox.push(Outgoing::Reply { cookie, error, data, payload });
    }

    /// Sends replies until the last one is out or the client no longer takes them.
    fn send_replies(self: &Arc<Self>, disk: &dyn Disk) {
        let mut batch = Vec::new();
        while self.outbox.take(&mut batch) {
            let (mut replies, mut payloads) = (Vec::with_capacity(batch.len()), 0);
            for outgoing in batch.drain(..) {
                match outgoing {
                    Outgoing::Reply { cookie, error, data, payload } => {
                        replies.push((SimpleReply { error, cookie }.encode(), data));
                        payloads += payload;
                    }
                    Outgoing::Flush { cookie } => {
                        let flush = Request { flags: 0, command: NBD_CMD_FLUSH, cookie, offset: 0, length: 0 };
                        disk.submit(Command::Flush, self.completion(flush, 0, false));
                    }
                }
            }
            if let Err(error) = send_all(&self.stream, &replies) {
                return tracing::debug!(%error, "NBD client no longer takes replies");
            }
            self.outbox.release(replies.len(), payloads);
        }
    }
}

/// None if the client left between two requests.
fn read_header(reader: &mut impl Read) -> io::Result<Option<[u8; REQUEST_SIZE]>> {
    let mut header = [0; REQUEST_SIZE];
    let mut filled = 0;
    while filled < header.len() {
        match reader.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(header))
}

fn send_all(mut stream: &UnixStream, replies: &[([u8; SIMPLE_REPLY_SIZE], Vec<u8>)]) -> io::Result<()> {
    let mut slices: Vec<_> = replies.iter().flat_map(|(head, data)| [IoSlice::new(head), IoSlice::new(data)]).collect();
    let mut slices = &mut slices[..];
    // Steps over empty slices, here and below, so that none are left when all is sent.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut slices, n),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Does something when it goes out of scope, by return, `?` or panic.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> OnDrop<F> {
    fn forget(self) {
        std::mem::forget(self);
    }
}

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
