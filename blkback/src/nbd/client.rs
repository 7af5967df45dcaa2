//! A disk's connections to its server: requests go in from the queues' threads, answers come back to their mailboxes.
//!
//! Each connection has a thread that sends and one that receives; one more, the keeper, makes the connections and makes
//! them anew. A request stays in the table until it is answered, so that it can be sent again. A write that was answered
//! stays in the log until a flush has covered it, so that it can be written again to a server that forgot it.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::export::Export;
use super::link::{Info, Link, Stream};
use super::protocol::*;

/// Most connections of one disk, where the server says that they are as good as one.
const CONNECTIONS: usize = 4;
/// Bytes of writes that were answered and not flushed, from which on we ask for a flush of our own.
const LOG_SOFT: u64 = 32 << 20;
/// Bytes of such writes beyond which further writes wait.
const LOG_HARD: u64 = 128 << 20;
/// How long a server may say nothing to a queue that is being closed before it counts as hung.
const SILENCE: Duration = Duration::from_secs(5);
/// How long the connections of a disk that is let go of may take to end.
const GOODBYE: Duration = Duration::from_secs(1);
/// The first pause before a new attempt to connect, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What a queue asks for.
#[derive(Debug, Clone)]
pub(super) enum Ask {
    Read { offset: u64, len: u32 },
    Write { offset: u64, data: Arc<Vec<u8>> },
    Flush,
    Trim { offset: u64, len: u32 },
}

/// How it ended; a read brings its bytes.
pub(super) type Answer = io::Result<Vec<u8>>;

/// Where a queue's answers go.
#[derive(Debug)]
pub(super) struct Mailbox {
    answers: Mutex<VecDeque<(u32, Answer)>>,
    count: AtomicUsize,
    bell: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { answers: Mutex::default(), count: AtomicUsize::new(0), bell })
    }

    fn put(&self, token: u32, answer: Answer) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.push_back((token, answer));
        self.count.fetch_add(1, Ordering::Release);
        // Full means that it rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    pub(super) fn take(&self) -> Option<(u32, Answer)> {
        if self.is_empty() {
            return None;
        }
        let taken = self.answers.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        if taken.is_some() {
            self.count.fetch_sub(1, Ordering::Release);
        }
        taken
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }
}

/// A request that has no answer yet.
#[derive(Debug)]
struct Request {
    ask: Ask,
    /// Who waits; nobody for a flush of our own.
    whose: Option<(Arc<Mailbox>, u32)>,
    /// Of a flush: the last write of the log that it covers.
    covers: u64,
}

/// A write that was answered and not yet flushed.
#[derive(Debug)]
struct Logged {
    number: u64,
    offset: u64,
    data: Arc<Vec<u8>>,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    /// Connections are up.
    connected: bool,
    /// One of them is lost, and the others with it.
    broken: bool,
    streams: Vec<Stream>,
    /// Threads that send and have not ended.
    senders: usize,
    /// Nothing is left of this client's threads.
    ended: bool,
    /// When the server last answered something.
    heard: Option<Instant>,
    /// Requests to be sent, by their cookies.
    outgoing: VecDeque<u64>,
    requests: BTreeMap<u64, Request>,
    next_cookie: u64,
    log: VecDeque<Logged>,
    log_bytes: u64,
    last_logged: u64,
    /// A flush of our own is under way.
    trimming: bool,
    /// Writes that were answered could not be written again: no flush will ever be true.
    forgotten: bool,
}

#[derive(Debug)]
struct Shared {
    export: Export,
    info: Info,
    state: Mutex<State>,
    /// There is something to send, or everything is to end.
    to_send: Condvar,
    /// For the keeper.
    changed: Condvar,
}

/// A disk on an NBD server.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flushes(&self) -> bool {
        self.info.flags & NBD_FLAG_SEND_FLUSH != 0
    }

    /// Waits as long as `condition` holds, and not longer than `longest`.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        longest: Duration,
        condition: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout_while(state, longest, |state| condition(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Request {
    fn is_for(&self, mailbox: &Arc<Mailbox>) -> bool {
        self.whose.as_ref().is_some_and(|(whose, _)| Arc::ptr_eq(whose, mailbox))
    }
}

impl Client {
    /// Connects to a server and begins to keep the connection.
    ///
    /// # Errors
    /// When the server cannot be had now.
    pub fn connect(export: Export) -> io::Result<Self> {
        let link = Link::make(&export)?;
        let shared = Arc::new(Shared {
            export,
            info: link.info,
            state: Mutex::default(),
            to_send: Condvar::new(),
            changed: Condvar::new(),
        });
        let keeper = {
            let shared = Arc::clone(&shared);
            let body = move || {
                let _ended = Ended(&shared);
                keep(&shared, link);
            };
            std::thread::Builder::new().name("nbd-keeper".into()).spawn(body)?
        };
        Ok(Self { shared, keeper: Some(keeper) })
    }

    /// What the server said of the export.
    pub fn info(&self) -> Info {
        self.shared.info
    }

    /// The export.
    pub fn export(&self) -> &Export {
        &self.shared.export
    }

    /// Whether the server is there at this moment.
    pub fn is_connected(&self) -> bool {
        self.shared.state().connected
    }

    pub(super) fn ask(&self, ask: Ask, mailbox: &Arc<Mailbox>, token: u32) {
        let mut state = self.shared.state();
        if matches!(ask, Ask::Flush) {
            if state.forgotten {
                return mailbox.put(token, Err(io::Error::other("the server forgot writes that it had answered")));
            }
            if !self.shared.flushes() {
                return mailbox.put(token, Ok(Vec::new()));
            }
        }
        state.add(Request { ask, whose: Some((Arc::clone(mailbox), token)), covers: 0 });
        self.shared.to_send.notify_one();
    }

    /// A queue is being closed: what it waits for ends with an error if there is no server that could answer it, or none
    /// that has answered anything for some seconds of the `asked` for which the queue has been asking.
    pub(super) fn give_up(&self, mailbox: &Arc<Mailbox>, asked: Duration) {
        let mut state = self.shared.state();
        if state.connected {
            let silent = state.heard.is_none_or(|heard| heard.elapsed() > SILENCE);
            let waits = state.requests.values().any(|request| request.is_for(mailbox));
            if !(waits && silent && asked > SILENCE) {
                return;
            }
            tracing::warn!(export = %self.shared.export, "the NBD server has hung: its connections are ended");
            // It may still carry out what it has got; from here on nothing that it says is heard.
            state.connected = false;
            state.broken = true;
            state.streams.iter().for_each(Stream::end);
            self.shared.changed.notify_all();
            self.shared.to_send.notify_all();
        }
        let cookies: Vec<u64> =
            state.requests.iter().filter(|(_, request)| request.is_for(mailbox)).map(|(&cookie, _)| cookie).collect();
        for cookie in cookies {
            state.outgoing.retain(|&other| other != cookie);
            if let Some(Request { whose: Some((mailbox, token)), .. }) = state.requests.remove(&cookie) {
                mailbox.put(token, Err(io::ErrorKind::NotConnected.into()));
            }
        }
    }
}

impl Drop for Client {
    /// The server sees its connections end; a server that hangs cannot hold us up, because this is the control thread.
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stopping = true;
        self.shared.to_send.notify_all();
        self.shared.changed.notify_all();
        let longest = 2 * GOODBYE;
        state = self.shared.wait(state, longest, |state| !state.ended);
        let ended = state.ended;
        // One that is being made is ended by its thread.
        state.streams.iter().for_each(Stream::end);
        drop(state);
        if !ended {
            tracing::warn!(export = %self.shared.export, "a connection to the NBD server ends later: it is being made");
            return;
        }
        if self.keeper.take().is_some_and(|keeper| keeper.join().is_err()) {
            tracing::error!("the thread that keeps an NBD connection had panicked");
        }
    }
}

impl State {
    fn add(&mut self, mut request: Request) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if matches!(request.ask, Ask::Flush) {
            request.covers = self.last_logged;
        }
        self.requests.insert(cookie, request);
        self.outgoing.push_back(cookie);
    }

    /// The next request to send.
    fn pick(&mut self) -> Option<u64> {
        let full = self.log_bytes > LOG_HARD;
        let may_go = |cookie: &u64| !(full && matches!(self.requests[cookie].ask, Ask::Write { .. }));
        let at = self.outgoing.iter().position(may_go)?;
        self.outgoing.remove(at)
    }

    /// No flush can be true from now on: what was kept for one is of no use, and must not make writes wait.
    fn forget(&mut self) {
        self.forgotten = true;
        self.log.clear();
        self.log_bytes = 0;
    }

    /// Takes an answer in.
    fn finish(&mut self, cookie: u64, answer: Answer, flushes: bool) {
        let Some(request) = self.requests.remove(&cookie) else { return };
        match (&request.ask, answer.is_ok()) {
            (Ask::Write { offset, data }, true) if flushes && !self.forgotten => {
                self.last_logged += 1;
                self.log_bytes += data.len() as u64;
                self.log.push_back(Logged { number: self.last_logged, offset: *offset, data: Arc::clone(data) });
            }
            (Ask::Flush, true) => {
                while self.log.front().is_some_and(|logged| logged.number <= request.covers) {
                    self.log_bytes -= self.log.pop_front().map_or(0, |logged| logged.data.len() as u64);
                }
            }
            _ => {}
        }
        match request.whose {
            Some((mailbox, token)) => mailbox.put(token, answer),
            None => {
                self.trimming = false;
                if let Err(error) = answer {
                    // The guest was promised nothing; but nothing can be promised any more.
                    tracing::error!(%error, "the NBD server cannot flush");
                    self.forget();
                }
            }
        }
        if self.log_bytes > LOG_SOFT && !self.trimming && !self.forgotten {
            self.trimming = true;
            self.add(Request { ask: Ask::Flush, whose: None, covers: 0 });
        }
    }
}

/// Says that the keeper is gone when it is dropped: also if it panicked.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.changed.notify_all();
    }
}

/// The keeper's life: connections come, go, and come again.
fn keep(shared: &Arc<Shared>, first: Link) {
    let mut link = Some(first);
    loop {
        let links = match link.take().map_or_else(|| connect_again(shared), Some) {
            Some(link) => with_companions(shared, link),
            None => return,
        };
        let threads = start(shared, links);
        let mut state = shared.state();
        while !state.broken && !state.stopping {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let stopping = state.stopping;
        drop(state);
        if stopping {
            // The senders say goodbye first.
            shared.to_send.notify_all();
        }
        let (senders, receivers): (Vec<_>, Vec<_>) = threads.into_iter().unzip();
        if stopping {
            // One that is stuck in the middle of a write says none.
            drop(shared.wait(shared.state(), GOODBYE, |state| state.senders > 0));
        }
        end(shared);
        shared.to_send.notify_all();
        join(senders);
        join(receivers);
        if stopping {
            return;
        }
        tracing::warn!(export = %shared.export, "the NBD server is gone; the guest waits until it is back");
        let mut state = shared.state();
        (state.connected, state.broken) = (false, false);
        state.outgoing = state.requests.keys().copied().collect();
    }
}

fn end(shared: &Shared) {
    shared.state().streams.drain(..).for_each(|stream| stream.end());
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a thread of an NBD connection had panicked");
        }
    }
}

/// Tries until there is a connection to the same disk, with everything on it that it had answered. `None` when stopped.
fn connect_again(shared: &Shared) -> Option<Link> {
    let (mut pause, longest) = PAUSES;
    loop {
        let attempt = Link::make(&shared.export).and_then(|link| restore(shared, link));
        match attempt {
            Ok(link) => {
                tracing::info!(export = %shared.export, "the NBD server is back");
                return Some(link);
            }
            Err(error) => tracing::debug!(export = %shared.export, %error, "no NBD server yet"),
        }
        let state = shared.state();
        let waited = shared.changed.wait_timeout_while(state, pause, |state| !state.stopping);
        if waited.unwrap_or_else(PoisonError::into_inner).0.stopping {
            return None;
        }
        pause = (2 * pause).min(longest);
    }
}

/// Writes again what the server had answered and may have forgotten.
fn restore(shared: &Shared, mut link: Link) -> io::Result<Link> {
    let same = |info: Info| (info.size, info.flags & NBD_FLAG_READ_ONLY, info.flags & NBD_FLAG_SEND_FLUSH);
    if same(link.info) != same(shared.info) {
        return Err(io::Error::other("the export is not the one it was: another size, or other abilities"));
    }
    let log: Vec<_> = shared.state().log.iter().map(|logged| (logged.offset, Arc::clone(&logged.data))).collect();
    for (offset, data) in log {
        if shared.state().stopping {
            return Err(io::Error::other("the disk is let go of"));
        }
        let header = Request::header(&Ask::Write { offset, data: Arc::clone(&data) }, u64::MAX);
        send(&mut link.stream, &header, &data)?;
        let mut reply = [0; SIMPLE_REPLY_SIZE];
        link.stream.read_exact(&mut reply)?;
        let reply = SimpleReply::decode(&reply).map_err(io::Error::other)?;
        if reply.error != 0 {
            tracing::error!(offset, error = reply.error, "what the NBD server forgot cannot be written again");
            shared.state().forget();
            break;
        }
    }
    Ok(link)
}

/// More connections, where a flush on one counts for all.
fn with_companions(shared: &Shared, link: Link) -> Vec<Link> {
    let several = link.info.flags & NBD_FLAG_CAN_MULTI_CONN != 0;
    let mut links = vec![link];
    while several && links.len() < CONNECTIONS {
        match Link::make(&shared.export) {
            Ok(link) => links.push(link),
            Err(error) => {
                tracing::debug!(%error, connections = links.len(), "no further connection");
                break;
            }
        }
    }
    links
}

type Threads = Vec<(JoinHandle<()>, JoinHandle<()>)>;

fn start(shared: &Arc<Shared>, links: Vec<Link>) -> Threads {
    let mut threads = Vec::new();
    for link in links {
        let spawned = (|| -> io::Result<_> {
            link.stream.be_patient()?;
            let (reader, handle) = (link.stream.another()?, link.stream.another()?);
            let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
                std::thread::Builder::new().name(name.to_owned()).spawn(body)
            };
            let (one, two) = (Arc::clone(shared), Arc::clone(shared));
            let receiver = spawn("nbd-replies", Box::new(move || run(&two, |shared| receive(shared, reader))))?;
            shared.state().streams.push(handle);
            shared.state().senders += 1;
            let body = move || {
                run(&one, |shared| send_all(shared, link.stream));
                one.state().senders -= 1;
                one.changed.notify_all();
            };
            match spawn("nbd-requests", Box::new(body)) {
                Ok(sender) => Ok((sender, receiver)),
                Err(error) => {
                    shared.state().senders -= 1;
                    Err(error)
                }
            }
        })();
        match spawned {
            Ok(pair) => threads.push(pair),
            Err(error) => {
                tracing::error!(%error, "no threads for an NBD connection");
                shared.state().broken = true;
            }
        }
    }
    let mut state = shared.state();
    // It has not had the time to say anything.
    state.heard = Some(Instant::now());
    state.connected = !state.broken;
    drop(state);
    shared.to_send.notify_all();
    threads
}

/// Does one direction of a connection; however that ends, the whole of it is over.
fn run(shared: &Shared, direction: impl FnOnce(&Shared) -> io::Result<()>) {
    let outcome = direction(shared);
    let mut state = shared.state();
    if let Err(error) = outcome
        && !state.stopping
        && !state.broken
    {
        tracing::warn!(export = %shared.export, %error, "NBD connection lost");
    }
    state.broken = true;
    drop(state);
    shared.changed.notify_all();
    shared.to_send.notify_all();
}

impl Request {
    fn header(ask: &Ask, cookie: u64) -> [u8; REQUEST_SIZE] {
        let (command, offset, length) = match ask {
            Ask::Read { offset, len } => (NBD_CMD_READ, *offset, *len),
            Ask::Write { offset, data } => (NBD_CMD_WRITE, *offset, data.len() as u32),
            Ask::Flush => (NBD_CMD_FLUSH, 0, 0),
            Ask::Trim { offset, len } => (NBD_CMD_TRIM, *offset, *len),
        };
        super::protocol::Request { flags: 0, command, cookie, offset, length }.encode()
    }
}

/// Header and payload in one piece, if the socket takes it.
fn send(stream: &mut Stream, header: &[u8], payload: &[u8]) -> io::Result<()> {
    let sent = match stream.write_vectored(&[IoSlice::new(header), IoSlice::new(payload)]) {
        Ok(sent) => sent,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        Err(error) => return Err(error),
    };
    if sent < header.len() {
        stream.write_all(&header[sent..])?;
    }
    stream.write_all(&payload[sent.saturating_sub(header.len())..])
}

fn send_all(shared: &Shared, mut stream: Stream) -> io::Result<()> {
    loop {
        let mut state = shared.state();
        let cookie = loop {
            if state.broken {
                return Ok(());
            }
            if state.stopping {
                drop(state);
                stream.hurry()?;
                let goodbye =
                    super::protocol::Request { flags: 0, command: NBD_CMD_DISC, cookie: 0, offset: 0, length: 0 };
                return stream.write_all(&goodbye.encode());
            }
            match state.pick() {
                Some(cookie) => break cookie,
                None => state = shared.to_send.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let ask = state.requests[&cookie].ask.clone();
        drop(state);
        let header = Request::header(&ask, cookie);
        match &ask {
            Ask::Write { data, .. } => send(&mut stream, &header, data)?,
            _ => stream.write_all(&header)?,
        }
    }
}

fn receive(shared: &Shared, stream: Stream) -> io::Result<()> {
    let mut stream = io::BufReader::with_capacity(64 << 10, stream);
    loop {
        let mut header = [0; SIMPLE_REPLY_SIZE];
        stream.read_exact(&mut header)?;
        let SimpleReply { error, cookie } = SimpleReply::decode(&header).map_err(io::Error::other)?;
        let len = match shared.state().requests.get(&cookie).map(|request| &request.ask) {
            Some(Ask::Read { len, .. }) if error == 0 => *len as usize,
            Some(_) => 0,
            None => return Err(io::Error::other("a reply to a request that nobody made")),
        };
        let mut data = vec![0; len];
        stream.read_exact(&mut data)?;
        let answer = match error {
            0 => Ok(data),
            NBD_EPERM | NBD_EIO | NBD_ENOMEM | NBD_EINVAL | NBD_ENOSPC | NBD_EOVERFLOW => {
                Err(io::Error::from_raw_os_error(error.cast_signed()))
            }
            // Everything else: try again on another connection, once the server is back.
            NBD_ESHUTDOWN => return Err(io::Error::other("the server shuts down")),
            other => Err(io::Error::other(format!("NBD error {other}"))),
        };
        let mut state = shared.state();
        state.heard = Some(Instant::now());
        state.finish(cookie, answer, shared.flushes());
        if !state.outgoing.is_empty() {
            drop(state);
            shared.to_send.notify_one();
        }
    }
}
