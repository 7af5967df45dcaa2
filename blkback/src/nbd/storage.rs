//! An NBD server as a queue's disk.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::memory::IoList;

use super::client::{Ask, Client, Mailbox};
use crate::storage::{Done, Sleep, Storage, UringStorage};

/// One queue's way to the server.
#[derive(Debug)]
pub struct NbdStorage {
    client: Arc<Client>,
    mailbox: Arc<Mailbox>,
    /// Does no I/O; it is where the queue's thread sleeps.
    bells: UringStorage,
    /// The waker that rings for the mailbox.
    own_bell: u32,
    /// Memory of what is under way.
    memory: HashMap<u32, IoList>,
    /// Since when the queue is being closed.
    giving_up: Option<Instant>,
    /// What was asked for that no server can do.
    refused: VecDeque<Done>,
}

impl NbdStorage {
    /// Storage on `client`. `wakers` are watched for becoming readable; `idle` is any file, of which nothing is read.
    ///
    /// # Errors
    /// When the kernel gives no io_uring or eventfd.
    pub fn new(client: Arc<Client>, idle: BorrowedFd<'_>, wakers: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let all: Vec<_> = wakers.iter().copied().chain([mailbox.bell().as_fd()]).collect();
        let bells = UringStorage::new(idle, &all, 1)?;
        Ok(Self {
            client,
            mailbox,
            bells,
            own_bell: wakers.len() as u32,
            memory: HashMap::new(),
            giving_up: None,
            refused: VecDeque::new(),
        })
    }

    fn ask(&mut self, ask: Ask, memory: IoList, token: u32) {
        self.memory.insert(token, memory);
        self.client.ask(ask, &self.mailbox, token);
    }
}

impl Storage for NbdStorage {
    fn read(&mut self, offset: u64, memory: IoList, token: u32) {
        let len = memory.len() as u32;
        self.ask(Ask::Read { offset, len }, memory, token);
    }

    fn write(&mut self, offset: u64, memory: IoList, token: u32) {
        // A copy, because it may have to be sent again when the guest's pages hold something else already.
        let data = Arc::new(memory.to_vec());
        self.ask(Ask::Write { offset, data }, memory, token);
    }

    fn flush(&mut self, token: u32) {
        self.ask(Ask::Flush, IoList::default(), token);
    }

    fn discard(&mut self, offset: u64, len: u64, token: u32) {
        // The protocol's length has 32 bits. What is more is not given up: a discard is a hint.
        let len = u32::try_from(len).unwrap_or(u32::MAX / 4096 * 4096);
        self.ask(Ask::Trim { offset, len }, IoList::default(), token);
    }

    fn erase(&mut self, _: u64, _: u64, token: u32) {
        // The protocol has no such command, and so it is not offered; an answer all the same.
        let unsupported = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        self.refused.push_back(Done { token, memory: IoList::default(), result: Err(unsupported) });
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn next(&mut self) -> Option<Done> {
        if let Some(refused) = self.refused.pop_front() {
            return Some(refused);
        }
        let (token, answer) = self.mailbox.take()?;
        let mut memory = self.memory.remove(&token).unwrap_or_default();
        let result = answer.map(|bytes| {
            if !bytes.is_empty() {
                memory.fill(&bytes);
            }
        });
        Some(Done { token, memory, result })
    }

    fn has_completions(&mut self) -> bool {
        !self.refused.is_empty() || !self.mailbox.is_empty()
    }

    fn give_up(&mut self) {
        let since = *self.giving_up.get_or_insert_with(Instant::now);
        self.client.give_up(&self.mailbox, since.elapsed());
    }
}

impl Sleep for NbdStorage {
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.mailbox.is_empty() {
            return Ok(());
        }
        self.bells.wait(timeout)?;
        // Of its own it has nothing but wake-ups.
        while self.bells.next().is_some() {}
        if self.bells.take_rung(self.own_bell) {
            // Empty is as good.
            let _ = rustix::io::read(self.mailbox.bell(), &mut [0; 8]);
        }
        Ok(())
    }

    fn ignore(&mut self, waker: u32) {
        self.bells.ignore(waker);
    }

    fn take_rung(&mut self, waker: u32) -> bool {
        self.bells.take_rung(waker)
    }
}
