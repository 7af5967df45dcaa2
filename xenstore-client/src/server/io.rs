//! One thread that serves all connections.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use crossbeam::channel::{Receiver, Sender};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::store::{ConnId, Outbox, Store};
use crate::DomId;
use crate::wake::Wake;
use crate::wire::{Decoded, Decoder};

/// A connection with this much unread output gets no further requests answered until it reads.
const PAUSE_BYTES: usize = 64 << 10;
/// A connection with this much unread output (events, then) is closed: whoever waits for a store that cannot be
/// reached learns of it, whoever does not read would make it grow without bound.
const MOST_BYTES: usize = 4 << 20;

/// What the handles ask the thread to do. `done` is answered when it is done.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve a stream.
    Attach { stream: UnixStream, dom: DomId, done: Sender<()> },
    /// See `Server::introduce`.
    Introduce { dom: DomId, done: Sender<()> },
    /// See `Server::release`.
    Release { dom: DomId, done: Sender<()> },
    /// End.
    Shutdown,
}

struct Peer {
    stream: UnixStream,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    /// Whole requests wait in the decoder because too much output is unread.
    paused: bool,
    broken: bool,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::new(), out: Vec::new(), sent: 0, paused: false, broken: false }
    }

    fn unread(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Writes what the socket takes.
    fn flush(&mut self) {
        while self.unread() > 0 && !self.broken {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(0) => self.broken = true,
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The peer is gone; there is nobody to tell.
                Err(_) => self.broken = true,
            }
        }
        if self.unread() == 0 {
            self.out.clear();
            self.sent = 0;
        } else if self.sent > PAUSE_BYTES {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// Serves until told to shut down, or until every handle is gone.
pub(super) fn serve(listener: Option<UnixListener>, commands: &Receiver<Command>, wake: &Wake) {
    let mut server = Loop { store: Store::new(), peers: BTreeMap::new() };
    loop {
        let ready = match server.poll(listener.as_ref(), wake) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::error!("embedded xenstore: poll: {error}");
                return;
            }
        };
        wake.clear();
        while let Ok(command) = commands.try_recv() {
            if !server.obey(command) {
                return;
            }
        }
        if let Some(listener) = &listener {
            server.accept(listener);
        }
        for conn in ready {
            server.read(conn);
            server.work(conn);
        }
        server.settle();
    }
}

struct Loop {
    store: Store,
    peers: BTreeMap<ConnId, Peer>,
}

impl Loop {
    /// Waits; returns the connections with something to do.
    fn poll(&self, listener: Option<&UnixListener>, wake: &Wake) -> Result<Vec<ConnId>, rustix::io::Errno> {
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let first = fds.len();
        for peer in self.peers.values() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, peer.unread() < PAUSE_BYTES);
            flags.set(PollFlags::OUT, peer.unread() > 0);
            fds.push(PollFd::new(&peer.stream, flags));
        }
        // Requests that were left lying make no fd readable.
        let resumed = |peer: &Peer| peer.paused && peer.unread() < PAUSE_BYTES;
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if self.peers.values().any(resumed) { Some(&now) } else { None };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let ready = self.peers.iter().zip(&fds[first..]);
        let ready = ready.filter(|((_, peer), fd)| resumed(peer) || !fd.revents().is_empty());
        Ok(ready.map(|((conn, _), _)| *conn).collect())
    }

    /// `false`: shut down.
    fn obey(&mut self, command: Command) -> bool {
        let done = match command {
            Command::Shutdown => return false,
            Command::Attach { stream, dom, done } => {
                self.peers.insert(self.store.connect(dom), Peer::new(stream));
                done
            }
            Command::Introduce { dom, done } => {
                let events = self.store.introduce(dom);
                self.queue(events);
                done
            }
            Command::Release { dom, done } => {
                let (closed, events) = self.store.release(dom);
                self.close(&closed);
                self.queue(events);
                done
            }
        };
        if done.send(()).is_err() {
            tracing::debug!("embedded xenstore: a caller has stopped waiting");
        }
        true
    }

    fn accept(&mut self, listener: &UnixListener) {
        loop {
            let accepted = listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) => {
                    self.peers.insert(self.store.connect(DomId::DOM0), Peer::new(stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!("embedded xenstore: accept: {error}");
                    return;
                }
            }
        }
    }

    fn read(&mut self, conn: ConnId) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        peer.flush();
        if peer.unread() >= PAUSE_BYTES || peer.paused || peer.broken {
            return;
        }
        // One gulp each, so that a busy connection does not starve the others.
        let mut buffer = [0u8; 16384];
        match peer.stream.read(&mut buffer) {
            Ok(0) => peer.broken = true,
            Ok(count) => peer.decoder.push(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => peer.broken = true,
        }
    }

    fn work(&mut self, conn: ConnId) {
        while let Some(peer) = self.peers.get_mut(&conn) {
            peer.paused = peer.unread() >= PAUSE_BYTES;
            if peer.broken || peer.paused {
                return;
            }
            match peer.decoder.next_packet() {
                Decoded::NeedMore(_) => return,
                Decoded::Failed(reason) => {
                    tracing::warn!("embedded xenstore: closing a connection: {reason}");
                    peer.broken = true;
                }
                Decoded::Packet(packet) => {
                    let (out, closed) = self.store.request(conn, &packet);
                    self.queue(out);
                    self.close(&closed);
                }
            }
        }
    }

    fn queue(&mut self, out: Outbox) {
        for (conn, packet) in out {
            let Some(peer) = self.peers.get_mut(&conn) else { continue };
            match packet.encode() {
                Some(bytes) if peer.unread() + bytes.len() <= MOST_BYTES => peer.out.extend_from_slice(&bytes),
                _ => {
                    tracing::warn!("embedded xenstore: closing a connection that does not read its events");
                    peer.broken = true;
                }
            }
        }
    }

    fn close(&mut self, conns: &[ConnId]) {
        for conn in conns {
            self.peers.remove(conn);
            self.store.disconnect(*conn);
        }
    }

    /// Sends what there is to send and drops what is broken.
    fn settle(&mut self) {
        for peer in self.peers.values_mut() {
            peer.flush();
        }
        let broken: Vec<ConnId> = self.peers.iter().filter(|(_, peer)| peer.broken).map(|(conn, _)| *conn).collect();
        self.close(&broken);
    }
}
