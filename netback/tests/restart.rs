//! netback is killed, stopped and started again: what becomes of the interfaces of guests that go on.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod processes;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypervisor::Guest;
use hypervisor::emu::GuestSeat;
use netback::front::{Frontend, Options, Queue, TapGuest, features};
use netback::tap::Tap;
use nix::sched::{CloneFlags, setns, unshare};
use processes::{Dom0, PATIENCE, assert_nothing_left, ip, namespace, script, until};
use xenstore_client::Store as _;
use xenstore_client::xenbus::{State, toolstack};

/// A guest whose eth0 is in a namespace of its own.
struct Host {
    seat: Arc<GuestSeat>,
    namespace: std::fs::File,
    stop: Arc<AtomicBool>,
    card: Option<JoinHandle<()>>,
}

impl Host {
    /// Attaches an interface to a new guest, whose driver connects it.
    fn start(dom0: &Dom0, name: &str, address: &str, options: Options) -> Self {
        let seat = dom0.guest(name);
        dom0.ok(&["attach", name, "--wait", "0"]);
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, up) = mpsc::channel();
        let card = {
            let (seat, stop, address) = (Arc::clone(&seat), Arc::clone(&stop), address.to_owned());
            std::thread::spawn(move || {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                let mut front = Frontend::connect(seat as Arc<dyn Guest>, 0, &options).unwrap();
                let tap = Tap::create("eth0").unwrap();
                tap.set_features(features(&front.offered())).unwrap();
                tap.set_carrier(true).unwrap();
                let mac = front.mac().unwrap().map(|byte| format!("{byte:02x}")).join(":");
                ip(&format!("link set eth0 address {mac} up"));
                ip(&format!("address add {address}/24 dev eth0"));
                ready.send(std::fs::File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
                let mut taps = vec![tap];
                let queues = front.take_queues();
                taps.extend((1..queues.len()).map(|_| Tap::attach_queue("eth0").unwrap()));
                let queues = std::thread::scope(|scope| {
                    let pairs = queues.into_iter().zip(taps);
                    let threads: Vec<_> = pairs.map(|(queue, tap)| scope.spawn(|| pump(queue, tap, &stop))).collect();
                    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
                });
                front.close(queues, None).unwrap();
            })
        };
        let namespace = up.recv_timeout(PATIENCE).unwrap();
        Self { seat, namespace, stop, card: Some(card) }
    }

    /// Runs something on a thread of the guest's.
    fn run<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = self.namespace.try_clone().unwrap();
        std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            what()
        })
    }

    /// The driver goes; the guest stays as long as what is returned.
    fn close(mut self) -> Arc<GuestSeat> {
        self.stop.store(true, Ordering::Release);
        self.card.take().unwrap().join().unwrap();
        Arc::clone(&self.seat)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Only a test that fails gets here with a thread that runs.
        self.stop.store(true, Ordering::Release);
    }
}

/// Drives one queue of a guest's card.
fn pump(queue: Queue, tap: Tap, stop: &AtomicBool) -> Queue {
    let mut guest = TapGuest::new(queue, tap).unwrap();
    while !stop.load(Ordering::Acquire) {
        let moved = guest.turn().unwrap();
        if moved.sent + moved.received == 0 {
            guest.wait(Duration::from_millis(50)).unwrap();
        }
    }
    guest.into_parts().0
}

/// The bytes of a stream from `at` on, no two blocks alike: whoever knows the place can tell them.
fn pattern(at: u64, bytes: &mut [u8]) {
    for (place, byte) in (at..).zip(bytes) {
        let word = (place / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        *byte = word.to_le_bytes()[(place % 8) as usize];
    }
}

/// Sends until it is to end, and returns how much; and checks everything that comes, until the other side ends.
fn exchange(mut stream: TcpStream, end: &AtomicBool, received: &AtomicU64) -> (u64, u64) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut back = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let (mut sent, mut block) = (0, vec![0; 1 << 16]);
            while !end.load(Ordering::Acquire) {
                pattern(sent, &mut block);
                stream.write_all(&block).unwrap();
                sent += block.len() as u64;
            }
            stream.shutdown(Shutdown::Write).unwrap();
            sent
        });
        let (mut got, mut buffer, mut expected) = (0, vec![0; 1 << 16], vec![0; 1 << 16]);
        loop {
            let len = back.read(&mut buffer).unwrap();
            if len == 0 {
                break (sender.join().unwrap(), got);
            }
            pattern(got, &mut expected[..len]);
            assert!(buffer[..len] == expected[..len], "other bytes than were sent, after {got}");
            got += len as u64;
            received.store(got, Ordering::Release);
        }
    })
}

/// Waits until both directions have moved on.
fn moves_on(dom0: &Dom0, received: &[Arc<AtomicU64>; 2]) {
    let before = received.each_ref().map(|count| count.load(Ordering::Acquire));
    let began = Instant::now();
    while received.iter().zip(before).any(|(count, before)| count.load(Ordering::Acquire) < before + (256 << 10)) {
        assert!(began.elapsed() < PATIENCE, "the connection stands still\n{}", dom0.said());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How often to kill: 20 times, or as often as `KILLS` says.
fn kills() -> u64 {
    std::env::var("KILLS").map_or(20, |text| text.parse().unwrap())
}

/// A TCP connection between two guests goes on, every byte of it right, however often the backend is killed.
fn a_connection_outlives_its_backend(options: Options) {
    let mut dom0 = Dom0::start();
    let first = Host::start(&dom0, "first", "10.0.0.1", options);
    let second = Host::start(&dom0, "second", "10.0.0.2", options);
    let end = Arc::new(AtomicBool::new(false));
    let received: [Arc<AtomicU64>; 2] = Default::default();
    let (listening, listens) = mpsc::channel();
    let server = {
        let (end, received) = (Arc::clone(&end), Arc::clone(&received[0]));
        second.run(move || {
            let listener = TcpListener::bind("10.0.0.2:9").unwrap();
            listening.send(()).unwrap();
            let (stream, _) = listener.accept().unwrap();
            exchange(stream, &end, &received)
        })
    };
    listens.recv_timeout(PATIENCE).unwrap();
    let client = {
        let (end, received) = (Arc::clone(&end), Arc::clone(&received[1]));
        first.run(move || {
            let address = "10.0.0.2:9".parse().unwrap();
            exchange(TcpStream::connect_timeout(&address, PATIENCE).unwrap(), &end, &received)
        })
    };
    let mut seed = u64::from(std::process::id()) << 20 | 1;
    for _ in 0..kills() {
        moves_on(&dom0, &received);
        // Anywhere in a turn.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        std::thread::sleep(Duration::from_micros(seed % 20_000));
        dom0.kill();
        dom0.serve();
    }
    moves_on(&dom0, &received);
    end.store(true, Ordering::Release);
    let (sent, got) = server.join().unwrap();
    let (sent_back, got_back) = client.join().unwrap();
    assert_eq!((sent, sent_back), (got_back, got));
    for host in [&first, &second] {
        assert_eq!(dom0.key(&host.seat, 0, "state").as_deref(), Some("4"), "{}", dom0.said());
        assert_eq!(dom0.key(&host.seat, 0, "error"), None, "{}", dom0.said());
    }
    // What a guest would have noticed, if only for a moment.
    let steps = dom0.said();
    assert_eq!((steps.matches(": state 2").count(), steps.matches(": state 5").count()), (2, 0), "{steps}");
    assert!(steps.contains("resumed=true"), "{steps}");
    println!("{} kills, {} MiB one way, {} MiB the other", kills(), sent >> 20, sent_back >> 20);
    let guests = [first.close(), second.close()];
    // What the last of them made is taken down as if it had been the first.
    dom0.ok(&["detach", "first", "0"]);
    dom0.ok(&["detach", "second", "0"]);
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
    drop(guests);
}

#[test]
fn a_connection_outlives_twenty_kills() {
    if namespace("a connection whose backend is killed") {
        a_connection_outlives_its_backend(Options { queues: 2, multicast: true, ..Options::default() });
    }
}

#[test]
fn a_connection_without_offloads_outlives_twenty_kills() {
    if namespace("a connection without offloads whose backend is killed") {
        let options = Options {
            split_channels: false,
            rx_notify: false,
            gso_v4: false,
            gso_v6: false,
            csum_v4: false,
            csum_v6: false,
            ..Options::default()
        };
        a_connection_outlives_its_backend(options);
    }
}

/// Between attaching and the guest's driver: nobody connected yet, and the tap is new.
#[test]
fn an_interface_that_waits_for_its_guest_is_wired_again() {
    if !namespace("wiring interfaces anew") {
        return;
    }
    let mut dom0 = Dom0::start();
    let guest = dom0.guest("web");
    dom0.ok(&["attach", "web", "--wait", "0", "vifname=web0"]);
    dom0.kill();
    dom0.serve();
    until("the bridge has its port again", || {
        let links = ip("-o link show master xenbr0");
        links.contains("web0") && links.contains(",UP")
    });
    let front = Frontend::connect(Arc::clone(&guest) as Arc<dyn Guest>, 0, &Options::default()).unwrap();
    dom0.stop();
    // Stopped in order, it closes: the guest has to come back by itself.
    let store = guest.store().unwrap();
    let state = format!("{}/state", front.backend_path());
    let mut front = front;
    let queues = front.take_queues();
    assert_ne!(store.read_opt(&state).unwrap().as_deref(), Some("4"));
    dom0.serve();
    front.close(queues, None).unwrap();
    let front = Frontend::connect(Arc::clone(&guest) as Arc<dyn Guest>, 0, &Options::default()).unwrap();
    assert!(ip("-o link show master xenbr0").contains("web0"), "{}", dom0.said());
    drop(front);
}

/// A filter that somebody deletes comes back while netback serves, and one that has gone with the tap is there again before
/// the interface is on.
#[test]
fn the_filter_of_an_interface_stays() {
    if !namespace("filters that are deleted") {
        return;
    }
    let tc = |words: &str| std::process::Command::new("tc").args(words.split(' ')).output();
    if tc("-V").is_err() {
        println!("NOT TESTED: filters that are deleted: tc is not installed");
        return;
    }
    let mut dom0 = Dom0::start();
    let guest = dom0.guest("web");
    dom0.ok(&["attach", "web", "--wait", "0", "ip=10.0.0.5"]);
    let vif = format!("vif{}.0", Guest::domid(&*guest));
    let listed = || String::from_utf8(tc(&format!("filter show dev {vif} ingress")).unwrap().stdout).unwrap();
    let wanted = listed();
    assert!(wanted.contains("direct-action"), "{wanted}");
    for _ in 0..3 {
        tc(&format!("qdisc del dev {vif} clsact")).unwrap();
        until("the filter comes back", || listed() == wanted);
    }
    until("it is said", || dom0.said().contains("put back"));
    // It goes with the tap.
    dom0.kill();
    dom0.serve();
    until("the bridge has its port again", || {
        let links = ip("-o link show master xenbr0");
        let up = links.contains(",UP");
        assert!(!up || listed() == wanted, "on, and without its filter: {}", listed());
        up
    });
    assert_eq!(listed(), wanted);
    dom0.ok(&["detach", "web", "0"]);
    assert_nothing_left(&dom0, &["lo".to_owned(), "xenbr0".to_owned()]);
}

/// What a driver has asked for on the control ring was known to the dead process alone: the driver has to say it again.
#[test]
fn a_guest_that_has_asked_for_hashing_connects_again() {
    if !namespace("a guest with a control ring whose backend is killed") {
        return;
    }
    let mut dom0 = Dom0::start();
    let guest = dom0.guest("web");
    dom0.ok(&["attach", "web", "--wait", "0"]);
    let options = Options { control: true, ..Options::default() };
    for asks in [false, true] {
        let mut front = Frontend::connect(Arc::clone(&guest) as Arc<dyn Guest>, 0, &options).unwrap();
        let (queues, mut control) = (front.take_queues(), front.take_control());
        if asks {
            let number = netback::abi::ctrl_type::SET_HASH_ALGORITHM;
            let answer = control.as_mut().unwrap().ask(number, [1, 0, 0]).unwrap();
            assert_eq!(answer.status, netback::abi::ctrl_status::SUCCESS);
        }
        dom0.kill();
        dom0.serve();
        if asks {
            let state = format!("{}/state", front.backend_path());
            toolstack::wait_state(&dom0.store, &state, &[State::Closing], PATIENCE).unwrap();
            let error = dom0.key(&guest, 0, "error").unwrap();
            assert!(error.contains("hashing") && error.contains("reconnect"), "{error}");
        } else {
            until("another backend", || dom0.said().contains("resumed=true"));
            assert_eq!(dom0.key(&guest, 0, "state").as_deref(), Some("4"));
        }
        front.close(queues, control).unwrap();
    }
    let front = Frontend::connect(Arc::clone(&guest) as Arc<dyn Guest>, 0, &options).unwrap();
    let links = ip("-o link show master xenbr0");
    assert!(links.contains(&format!("vif{}.0", Guest::domid(&*guest))), "{links}");
    drop(front);
}

/// A script of the administrator's is not run for an interface that was there before; it is said, and served.
#[test]
fn a_foreign_script_is_left_to_the_administrator() {
    if !namespace("a killed backend and a script of the administrator's") {
        return;
    }
    let mut dom0 = Dom0::start();
    let guest = dom0.guest("web");
    let said = dom0.folder.path().join("said");
    // The status is written while it runs; this test does it for the script.
    let go = dom0.folder.path().join("go");
    let text = format!("echo $1 >> {}; while ! test -e {}; do sleep 0.01; done", said.display(), go.display());
    let path = script(dom0.folder.path(), "vif-mine", &text);
    let helper = {
        let (store, guest) = (dom0.store.clone(), Guest::domid(&*guest));
        std::thread::spawn(move || {
            let back = format!("/local/domain/0/backend/vif/{guest}/0");
            toolstack::wait_state(&store, &format!("{back}/state"), &[State::InitWait], PATIENCE).unwrap();
            store.write(&format!("{back}/hotplug-status"), "connected").unwrap();
            std::fs::write(go, "").unwrap();
        })
    };
    dom0.ok(&["attach", "web", &format!("script={path}"), "--wait", "0"]);
    helper.join().unwrap();
    let front = Frontend::connect(Arc::clone(&guest) as Arc<dyn Guest>, 0, &Options::default()).unwrap();
    dom0.kill();
    dom0.serve();
    until("it is said", || {
        dom0.key(&guest, 0, "error").is_some_and(|error| error.contains("vif-mine") && error.contains("detach"))
    });
    until("another backend", || dom0.said().contains("resumed=true"));
    assert_eq!(std::fs::read_to_string(&said).unwrap(), "online\n");
    drop(front);
}
