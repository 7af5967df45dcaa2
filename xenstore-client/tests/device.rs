//! The client over something that behaves as the kernel's device /dev/xen/xenbus does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xenstore_client::wire::{Decoded, Decoder, MessageType, Packet};
use xenstore_client::{Client, Result, Store};

const THREADS: usize = 6;
const ROUNDS: usize = 40;

/// How the kernel's side of the device treats one open file. `xenbus_file_write` keeps a request's body in the one
/// buffer that the next write overwrites, and a WATCH waits for its reply under the mutex that the reply of the request
/// before needs: so a second request before the first was answered is the end.
struct Device {
    file: File,
    decoder: Decoder,
    /// A second request was seen while one was under way.
    violated: Arc<AtomicBool>,
}

impl Device {
    fn next(&mut self) -> Option<Packet> {
        loop {
            match self.decoder.next_packet() {
                Decoded::Packet(packet) => return Some(packet),
                Decoded::Failed(reason) => panic!("{reason}"),
                Decoded::NeedMore(_) => {}
            }
            let mut buffer = [0; 4096];
            match self.file.read(&mut buffer).expect("a read") {
                0 => return None,
                count => self.decoder.push(&buffer[..count]),
            }
        }
    }

    fn say(&mut self, kind: MessageType, req_id: u32, payload: &[u8]) {
        let packet = Packet { kind, req_id, tx_id: 0, payload: payload.to_vec() };
        self.file.write_all(&packet.encode().expect("short")).expect("a write");
    }

    /// Answers each request with its own path, or as its kind demands, and looks each time whether another one comes.
    fn serve(mut self) {
        while let Some(packet) = self.next() {
            let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
            let pause = Timespec { tv_sec: 0, tv_nsec: 300_000 };
            let more = poll(&mut fds, Some(&pause)).expect("poll") > 0 && fds[0].revents().contains(PollFlags::IN);
            if more || !matches!(self.decoder.next_packet(), Decoded::NeedMore(_)) {
                self.violated.store(true, Ordering::Release);
                // The kernel would be stuck now. Hanging up instead ends the test.
                return;
            }
            let words: Vec<&[u8]> = packet.payload.split(|&byte| byte == 0).collect();
            match packet.kind {
                MessageType::Watch => {
                    // Events come whenever they like, before the reply too; and old kernels answer with number 0.
                    let event = [words[0], b"\0", words[1], b"\0"].concat();
                    self.say(MessageType::WatchEvent, 0, &event);
                    self.say(MessageType::Watch, 0, b"OK\0");
                }
                MessageType::Unwatch => self.say(MessageType::Unwatch, packet.req_id, b"OK\0"),
                MessageType::TransactionStart => self.say(packet.kind, packet.req_id, b"7\0"),
                MessageType::Read => self.say(packet.kind, packet.req_id, words[0]),
                kind => self.say(kind, packet.req_id, b"OK\0"),
            }
        }
    }
}

fn pair() -> (File, File) {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    (File::from(OwnedFd::from(ours)), File::from(OwnedFd::from(theirs)))
}

/// Two requests at once on the device can stop XenStore for a whole domain.
#[test]
fn one_request_at_a_time_on_the_device() -> Result<()> {
    let (ours, theirs) = pair();
    let violated = Arc::new(AtomicBool::new(false));
    let device = Device { file: theirs, decoder: Decoder::new(), violated: violated.clone() };
    let device = std::thread::spawn(|| device.serve());
    let client = Client::from_device(ours)?;
    let together = Barrier::new(THREADS);
    let outcome: Result<()> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (client, together) = (client.clone(), &together);
                scope.spawn(move || -> Result<()> {
                    together.wait();
                    let watcher = client.watcher()?;
                    for round in 0..ROUNDS {
                        let path = format!("/{thread}/{round}");
                        assert_eq!(client.read_str(&path)?, path);
                        watcher.add(&path, "t")?;
                        let event = watcher.wait(Duration::from_secs(60))?.expect("an event");
                        assert_eq!(event.path, path);
                        assert_eq!(client.transaction(|tx| tx.read_str(&path))?, path);
                        watcher.remove(&path, "t")?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    });
    drop(client);
    device.join().expect("no panic");
    assert!(!violated.load(Ordering::Acquire), "a second request before the first was answered");
    outcome
}
