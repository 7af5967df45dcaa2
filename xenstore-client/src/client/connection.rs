//! One connection: who waits for which reply, and the thread that reads them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, poll};

use super::queue::Queue;
use super::silent;
use crate::wake::Wake;
use crate::wire::{Decoded, Decoder, ErrorCode, HEADER_LEN, MessageType, PAYLOAD_MAX, Packet};
use crate::{Error, Result};

/// What carries the bytes.
#[derive(Debug)]
pub(super) enum Link {
    /// A stream to a xenstored.
    Socket(UnixStream),
    /// `/dev/xen/xenbus` (Linux `xenbus_dev_frontend.c`). It differs from a socket in four ways: a request has to be
    /// handed over in one write of at most 4096 bytes, header included; the kernel may refuse the write itself with
    /// an errno; its own answers to WATCH and UNWATCH carry request number 0 on old kernels; and **there may be one
    /// request at a time**, because an open file has one buffer and one mutex for requests. The kernel sends the body
    /// of a request from that buffer after the write has returned: a second write in between changes the first
    /// request, which the store then refuses (EINVAL) or, worse, carries out. And a WATCH waits for its reply inside of
    /// the write, holding that mutex, which the kernel's only thread for XenStore wants for the reply of the request
    /// before: nobody in the whole domain gets an answer from XenStore any more.
    Device(File),
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(stream) => stream.as_fd(),
            Self::Device(file) => file.as_fd(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    link: Arc<Link>,
    /// Held over the write of a request; on the device until its reply is there.
    turn: Mutex<()>,
    shared: Arc<Shared>,
    next_request: AtomicU32,
    next_watcher: AtomicU64,
    stop: Arc<Wake>,
    reader: Option<JoinHandle<()>>,
}

/// What callers and the reader thread share.
#[derive(Debug)]
pub(super) struct Shared {
    /// `None` once the connection is broken.
    live: Mutex<Option<Live>>,
}

#[derive(Debug, Default)]
struct Live {
    waiting: HashMap<u32, Waiting>,
    queues: HashMap<u64, Arc<Queue>>,
}

/// A request without its reply.
#[derive(Debug)]
struct Waiting {
    kind: MessageType,
    path: String,
    since: Instant,
    reply: Sender<Packet>,
}

/// A poisoned lock only means that a caller panicked between two whole updates; the data is as good as before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    pub(super) fn start(link: Link) -> Result<Self> {
        let link = Arc::new(link);
        let shared = Arc::new(Shared { live: Mutex::new(Some(Live::default())) });
        let stop = Arc::new(Wake::new().map_err(|e| Error::io("eventfd", e))?);
        let reader = {
            let (link, shared, stop) = (link.clone(), shared.clone(), stop.clone());
            std::thread::Builder::new().name("xenstore-reader".into()).spawn(move || {
                let reason = read_all(&link, &shared, &stop);
                if let Some(reason) = reason {
                    tracing::warn!("xenstore connection lost: {reason}");
                }
                shared.die();
            })
        };
        let reader = Some(reader.map_err(|e| Error::io("reader thread", e))?);
        silent::note(&link, &shared);
        Ok(Self {
            link,
            turn: Mutex::new(()),
            shared,
            next_request: AtomicU32::new(1),
            next_watcher: AtomicU64::new(1),
            stop,
            reader,
        })
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Adds a queue for a new watcher and returns the watcher's number.
    pub(super) fn add_queue(&self, queue: Arc<Queue>) -> Result<u64> {
        let number = self.next_watcher.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.live).as_mut().ok_or(Error::Disconnected)?.queues.insert(number, queue);
        Ok(number)
    }

    pub(super) fn remove_queue(&self, number: u64) {
        if let Some(live) = lock(&self.shared.live).as_mut() {
            live.queues.remove(&number);
        }
    }

    /// Sends one request and waits for its reply.
    pub(super) fn request(&self, kind: MessageType, tx_id: u32, path: &str, payload: &[&[u8]]) -> Result<Vec<u8>> {
        let payload = payload.concat();
        let most = match *self.link {
            Link::Socket(_) => PAYLOAD_MAX,
            Link::Device(_) => PAYLOAD_MAX - HEADER_LEN,
        };
        let too_long = || Error::Invalid { path: path.to_owned(), reason: "the request does not fit one message" };
        if payload.len() > most {
            return Err(too_long());
        }
        let turn = lock(&self.turn);
        let (req_id, reply) = self.expect_reply(kind, path)?;
        let packet = Packet { kind, req_id, tx_id, payload };
        self.send(&packet.encode().ok_or_else(too_long)?, &packet, path)?;
        let _until_answered = match *self.link {
            Link::Socket(_) => {
                drop(turn);
                None
            }
            Link::Device(_) => Some(turn),
        };
        let reply = reply.recv().map_err(|_| Error::Disconnected)?;
        match reply.kind {
            got if got == kind => Ok(reply.payload),
            MessageType::Error => {
                let text = reply.payload.strip_suffix(b"\0").unwrap_or(&reply.payload);
                let code = ErrorCode::from_name(&String::from_utf8_lossy(text));
                Err(Error::Store { op: kind, path: path.to_owned(), code })
            }
            _ => Err(Error::Reply { op: kind, path: path.to_owned(), reason: "the reply has another type" }),
        }
    }

    fn expect_reply(&self, kind: MessageType, path: &str) -> Result<(u32, Receiver<Packet>)> {
        let (sender, receiver) = bounded(1);
        let mut live = lock(&self.shared.live);
        let waiting = &mut live.as_mut().ok_or(Error::Disconnected)?.waiting;
        loop {
            // Zero is what watch events carry; and after 2^32 requests a patient one may still hold a number.
            let req_id = self.next_request.fetch_add(1, Ordering::Relaxed);
            if req_id != 0 && !waiting.contains_key(&req_id) {
                waiting.insert(req_id, Waiting { kind, path: path.to_owned(), since: Instant::now(), reply: sender });
                return Ok((req_id, receiver));
            }
        }
    }

    /// Writes a request; the caller has the turn.
    fn send(&self, bytes: &[u8], packet: &Packet, path: &str) -> Result<()> {
        match &*self.link {
            Link::Socket(stream) => (&*stream).write_all(bytes).map_err(|error| {
                // Part of a message may have been sent: nothing that follows could be understood.
                tracing::warn!("xenstore connection lost: write: {error}");
                self.shared.die();
                Error::Disconnected
            }),
            Link::Device(file) => {
                let written = loop {
                    match (&*file).write(bytes) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        other => break other,
                    }
                };
                let refusal = match written {
                    Ok(count) if count == bytes.len() => return Ok(()),
                    Ok(_) => {
                        self.shared.die();
                        return Err(Error::Disconnected);
                    }
                    Err(error) => error,
                };
                // The kernel threw the request away as a whole; the connection lives on.
                if let Some(live) = lock(&self.shared.live).as_mut() {
                    live.waiting.remove(&packet.req_id);
                }
                Err(Error::io(format!("{} {path:?}", packet.kind), refusal))
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            tracing::error!("the xenstore reader thread panicked");
        }
    }
}

impl Shared {
    /// Lets every waiting caller and every watcher know that the connection is gone.
    pub(super) fn die(&self) {
        // Dropping the senders is what wakes the callers.
        if let Some(live) = lock(&self.live).take() {
            for queue in live.queues.values() {
                queue.die();
            }
        }
    }

    /// The request that has waited longest, and since when.
    pub(super) fn oldest(&self) -> Option<(Instant, String)> {
        let live = lock(&self.live);
        let oldest = live.as_ref()?.waiting.values().min_by_key(|waiting| waiting.since)?;
        Some((oldest.since, format!("{} {:?}", oldest.kind, oldest.path)))
    }

    pub(super) fn forget_watches(&self) {
        if let Some(live) = lock(&self.live).as_ref() {
            for queue in live.queues.values() {
                queue.forget_all();
            }
        }
    }

    /// Hands a packet to whom it belongs; an error means that the stream cannot be trusted any more.
    fn dispatch(&self, packet: Packet) -> Result<(), &'static str> {
        let mut live = lock(&self.live);
        let Some(live) = live.as_mut() else { return Ok(()) };
        if packet.kind == MessageType::WatchEvent {
            let (path, token) = event_strings(&packet.payload).ok_or("a malformed watch event")?;
            // A token of another form, or of a watcher that is gone, is not ours to answer: somebody may have watched
            // through Store::request.
            let number = token.split_once(':').and_then(|(n, rest)| Some((n.parse().ok()?, rest)));
            if let Some((number, token)) = number
                && let Some(queue) = live.queues.get(&number)
            {
                queue.push(path, token);
            }
            return Ok(());
        }
        let mut req_id = packet.req_id;
        if req_id == 0 && matches!(packet.kind, MessageType::Watch | MessageType::Unwatch) {
            let only = live.waiting.iter().find(|(_, waiting)| waiting.kind == packet.kind);
            req_id = only.map_or(0, |(id, _)| *id);
        }
        let waiting = live.waiting.remove(&req_id).ok_or("a reply to a request that was not made")?;
        // The caller cannot have left: it waits without a limit.
        waiting.reply.send(packet).map_err(|_| "nobody waits for the reply")
    }
}

fn event_strings(payload: &[u8]) -> Option<(&str, &str)> {
    let mut texts = std::str::from_utf8(payload).ok()?.strip_suffix('\0')?.split('\0');
    Some((texts.next()?, texts.next()?))
}

/// Reads until the connection ends. Always drains: what it hands on is bounded by itself (one packet per request under
/// way, coalesced watch events), and the kernel queues events on `/dev/xen/xenbus` without a bound (XSA-349).
fn read_all(link: &Link, shared: &Shared, stop: &Wake) -> Option<String> {
    let mut decoder = Decoder::new();
    let mut buffer = [0u8; 8192];
    loop {
        let mut fds = [PollFd::new(link, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Some(format!("poll: {error}")),
            Ok(_) if !fds[1].revents().is_empty() => return None,
            Ok(_) => {}
        }
        let count = match link {
            Link::Socket(stream) => (&*stream).read(&mut buffer),
            Link::Device(file) => (&*file).read(&mut buffer),
        };
        match count {
            Ok(0) => return Some("closed by the store".into()),
            Ok(count) => decoder.push(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
            Err(error) => return Some(format!("read: {error}")),
        }
        loop {
            match decoder.next_packet() {
                Decoded::NeedMore(_) => break,
                Decoded::Failed(reason) => return Some(reason.into()),
                Decoded::Packet(packet) => {
                    if let Err(reason) = shared.dispatch(packet) {
                        return Some(reason.into());
                    }
                }
            }
        }
    }
}
