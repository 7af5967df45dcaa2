//! The emulated guest with a network stack of its own: its driver sits between a tap in the guest's namespace and the
//! rings; the backend's tap is in another namespace. TCP and UDP go through all of it, with all offloads and without.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use common::taps::{PairTaps, ip, own_network};
use common::{Dom0, Vif};
use netback::device::Config;
use netback::front::{Frontend, Options, TapGuest, features};
use netback::tap::Tap;

/// Bytes each way.
const TRANSFER: usize = 8 << 20;

/// What a guest's thread does: its driver, until told to stop.
fn drive(guest: &mut TapGuest, stop: &AtomicBool) -> (usize, usize) {
    let (mut sent, mut received) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let progress = guest.turn().unwrap();
        sent += progress.sent;
        received += progress.received;
        if progress.sent + progress.received == 0 {
            guest.wait(Duration::from_millis(50)).unwrap();
        }
    }
    (sent, received)
}

/// Bytes of one connection, which the other side can check.
fn byte(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn send_all(mut stream: TcpStream) {
    let mut at = 0;
    while at < TRANSFER {
        let block: Vec<u8> = (at..(at + 65_536).min(TRANSFER)).map(byte).collect();
        stream.write_all(&block).unwrap();
        at += block.len();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

fn receive_all(mut stream: TcpStream) {
    let (mut at, mut block) = (0, vec![0; 65_536]);
    loop {
        let len = stream.read(&mut block).unwrap();
        if len == 0 {
            break;
        }
        for (index, &got) in block[..len].iter().enumerate() {
            assert!(got == byte(at + index), "byte {}", at + index);
        }
        at += len;
    }
    assert_eq!(at, TRANSFER, "bytes received");
}

/// One connection out of the guest and one into it, at once, and datagrams in between.
fn transfer(v6: bool, options: &Options, mtu: u32) -> Option<(usize, usize)> {
    if !own_network("a guest with a network stack") {
        return None;
    }
    let dom0 = Dom0::with(Config { queues: 1, ..Config::default() }, PairTaps::default(), |serve| serve());
    let Vif { guest: seat, front, mut queues, control, name, .. } = dom0.connected("guest", options);
    if ip(&format!("link set {name} mtu {mtu} up")).is_none() {
        println!("NOT TESTED: a guest with a network stack: there is no program ip");
        return None;
    }
    let (ours, theirs) = if v6 { ("[fd00::1]", "[fd00::2]") } else { ("10.0.0.1", "10.0.0.2") };
    // IPv6 addresses stand in brackets where a port follows.
    let assign = move |address: &str, device: &str| {
        let address = address.trim_matches(['[', ']']);
        let width = if v6 { "64 nodad" } else { "24" };
        ip(&format!("addr add {address}/{width} dev {device}"));
    };
    assign(ours, &name);
    let listener = TcpListener::bind(format!("{ours}:7000")).unwrap();
    let echo = UdpSocket::bind(format!("{ours}:7001")).unwrap();
    let offered = front.offered();
    let stop = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = mpsc::channel();
    let queue = queues.pop().unwrap();
    let guest = {
        let (stop, theirs, ours) = (Arc::clone(&stop), theirs.to_owned(), ours.to_owned());
        std::thread::spawn(move || {
            assert!(own_network("the guest's namespace"));
            let tap = Tap::create("eth0").unwrap();
            tap.set_features(features(&offered)).unwrap();
            tap.set_carrier(true).unwrap();
            ip("link set eth0 address 00:16:3e:5f:77:fd");
            ip(&format!("link set eth0 mtu {mtu} up"));
            assign(&theirs, "eth0");
            let programs = std::thread::spawn({
                move || {
                    let listener = TcpListener::bind(format!("{theirs}:7000")).unwrap();
                    let socket = UdpSocket::bind(format!("{theirs}:0")).unwrap();
                    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                    // Until the network is up datagrams are lost, which is theirs to be; then each comes back.
                    let mut back = [0; 4096];
                    for len in [1usize, 100, 1400, 3000] {
                        let data: Vec<u8> = (0..len).map(byte).collect();
                        let came_back = (0..100).any(|_| {
                            socket.send_to(&data, format!("{ours}:7001")).unwrap();
                            socket.recv(&mut back).is_ok_and(|got| back[..got] == data)
                        });
                        assert!(came_back, "a datagram of {len} bytes");
                    }
                    let out = TcpStream::connect(format!("{ours}:7000")).unwrap();
                    ready.send(()).unwrap();
                    let (into, _) = listener.accept().unwrap();
                    let receiver = std::thread::spawn(move || receive_all(into));
                    send_all(out);
                    receiver.join().unwrap();
                    ready.send(()).unwrap();
                }
            });
            let mut guest = TapGuest::new(queue, tap).unwrap();
            let moved = drive(&mut guest, &stop);
            programs.join().unwrap();
            (guest.into_parts().0, moved)
        })
    };
    let replies = {
        let stop = Arc::clone(&stop);
        echo.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        std::thread::spawn(move || {
            let mut data = [0; 4096];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((len, from)) = echo.recv_from(&mut data) {
                    echo.send_to(&data[..len], from).unwrap();
                }
            }
        })
    };
    let (from_guest, _) = listener.accept().unwrap();
    is_ready.recv().unwrap();
    let to_guest = TcpStream::connect(format!("{theirs}:7000")).unwrap();
    let sender = std::thread::spawn(move || send_all(to_guest));
    receive_all(from_guest);
    sender.join().unwrap();
    // Only when both sides have all of it may the driver go.
    is_ready.recv().unwrap();
    stop.store(true, Ordering::Relaxed);
    replies.join().unwrap();
    let (queue, moved) = guest.join().unwrap();
    close(front, queue, control);
    assert_eq!(dom0.mapped(hypervisor::Guest::domid(&*seat)), 0);
    Some(moved)
}

fn close(front: Frontend, queue: netback::front::Queue, control: Option<netback::front::ControlRing>) {
    front.close(vec![queue], control).unwrap();
}

/// In a thread, and so in a network, of its own.
fn alone(v6: bool, options: Options, mtu: u32) -> Option<(usize, usize)> {
    std::thread::spawn(move || transfer(v6, &options, mtu)).join().unwrap()
}

#[test]
fn tcp_with_all_offloads() {
    for v6 in [false, true] {
        if let Some((sent, received)) = alone(v6, Options::default(), 1500) {
            // Cut into 1448 bytes each it would be 5800 frames each way.
            assert!(sent < 4000 && received < 4000, "{sent} sent, {received} received: nothing was left to be cut");
        }
    }
}

#[test]
fn tcp_without_offloads() {
    let plain = Options {
        gso_v4: false,
        gso_v6: false,
        csum_v4: false,
        csum_v6: false,
        sg: false,
        split_channels: false,
        ..Options::default()
    };
    alone(false, plain, 1500);
    alone(true, plain, 1500);
}

#[test]
fn tcp_over_large_frames_with_headroom_and_hash() {
    alone(false, Options { headroom: Some(256), control: true, ..Options::default() }, 9000);
    alone(true, Options { rx_notify: false, ..Options::default() }, 9000);
}
