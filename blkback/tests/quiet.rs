//! What a guest can fill the log with. Alone in its program, because the log is the whole process's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io;
use std::sync::{Arc, Mutex};

use blkback::front::{Frontend, Options};
use common::{Dom0, XVDA};
use hypervisor::Guest;
use xenstore_client::Store;

/// A log that is kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest that connects and disconnects without end is told of a few times, and then how often it was not.
#[test]
fn a_guest_that_reconnects_does_not_fill_the_log() {
    let log = Log::default();
    let kept = log.clone();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .with_writer(move || kept.clone())
        .init();
    let dom0 = Dom0::start();
    let image = dom0.image("disk.img", 1 << 20);
    let began = std::time::Instant::now();
    let guest = dom0.guest("guest");
    dom0.attach(&guest, &format!("{},raw,xvda,w", image.display())).unwrap();
    let state = format!("/local/domain/{}/device/vbd/{XVDA}/state", Guest::domid(&*guest));
    let store = Guest::store(&*guest).unwrap();
    let rounds = 100;
    for _ in 0..rounds {
        let mut front = Frontend::connect(guest.clone(), XVDA, &Options::default()).unwrap();
        let queues = front.take_queues();
        front.close(queues).unwrap();
        // The driver loads anew.
        store.write(&state, "1").unwrap();
    }
    dom0.detach(&guest, "xvda");
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines = text.lines().filter(|line| line.contains("/backend/vbd/")).count();
    // Two gates of ten lines in ten seconds, however slow this machine is, and what is said once.
    let windows = began.elapsed().as_secs() as usize / 10 + 1;
    assert!((5..=10 + 2 * 10 * (windows + 1)).contains(&lines), "{lines} lines in {windows} windows:\n{text}");
    assert!(lines < 7 * rounds, "{lines} lines");
}
