//! What a guest can make dom0 keep by not reading.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::rc::Rc;
use std::time::{Duration, Instant};

use common::frames::{GUEST_MAC, PEER_MAC, TCP, ethernet, ipv4, pattern, pseudo4, tcp};
use common::taps::{PairTaps, ip, own_network};
use common::{Dom0, PATIENCE, Vif, until};
use hypervisor::memory::{IoList, Mapping};
use netback::abi::GsoType;
use netback::device::Config;
use netback::front::Options;
use netback::rx::{BACKLOG, DRAIN};
use netback::tap::Tap;
use netback::vnet::{Offload, Partial};

const QUEUES: u32 = 8;
/// More than all the taps' queues can take.
const FRAMES: u32 = 2 * 1000 * QUEUES;
const PAYLOAD: usize = 65_000;

/// Frames that the kernel keeps for netback: it has not read them yet.
fn kept(vif: &Vif, sent: u32) -> i64 {
    let said = ip(&format!("-s link show {}", vif.name)).unwrap();
    let mut lines = said.lines().skip_while(|line| !line.trim_start().starts_with("TX:"));
    let numbers: Vec<i64> = lines.nth(1).unwrap().split_whitespace().map(|word| word.parse().unwrap()).collect();
    // Bytes, packets (that were read), errors, dropped (because the queue was full).
    i64::from(sent) - numbers[1] - numbers[3]
}

/// A guest posts pages for one frame now and then, so that none waits for too long, and its network sends it the largest
/// frames there are to all of its queues. The taps' queues would hold half a gigabyte.
#[test]
fn a_guest_that_hardly_reads_keeps_half_a_mebibyte_a_queue() {
    std::thread::spawn(|| {
        if !own_network("what a guest keeps in its tap's queues") {
            return;
        }
        let dom0 = Dom0::with(Config { queues: QUEUES, ..Config::default() }, PairTaps::default(), |serve| serve());
        let mut vif = dom0.connected("hostile", &Options { queues: QUEUES, ..Options::default() });
        assert_eq!(vif.queues.len(), QUEUES as usize);
        let source = Tap::create("source").unwrap();
        source.set_carrier(true).unwrap();
        ip("link add br0 type bridge").expect("there is ip");
        for name in ["br0", "source", &vif.name] {
            if name != "br0" {
                ip(&format!("link set {name} master br0"));
            }
            ip(&format!("link set {name} up"));
        }
        let segment = tcp(pseudo4(TCP, 20 + PAYLOAD), &pattern(PAYLOAD, 4));
        let frame = ethernet(GUEST_MAC, PEER_MAC, 0x0800, &ipv4(TCP, &segment));
        let offload = Offload {
            partial: Some(Partial { start: 34, offset: 16 }),
            validated: false,
            gso: Some((GsoType::TcpV4, 1448)),
            headers: 54,
        };
        let bytes = [&offload.encode()[..], &frame].concat();
        let memory = Rc::new(Mapping::anonymous(bytes.len().next_multiple_of(4096)).unwrap());
        memory.copy_in(0, &bytes);
        let mut list = IoList::with_capacity(1);
        list.push(&memory, 0, bytes.len());
        until("the bridge forwards", || {
            source.write(&list).unwrap();
            kept(&vif, 0) < 0
        });
        let before = u32::try_from(-kept(&vif, 0)).unwrap();
        for number in 0..FRAMES {
            // The source's port is what makes the kernel choose another queue.
            memory.copy_in(Offload::SIZE + 34, &((number % 509) as u16).to_be_bytes());
            source.write(&list).unwrap();
        }
        let (mut received, mut looked) = (0, Instant::now());
        let mut buffer = Vec::new();
        let mut read = |vif: &mut Vif, most: usize| {
            for queue in &mut vif.queues {
                for _ in 0..most {
                    match queue.rx.receive_bytes(&mut buffer).unwrap() {
                        Some(_) => received += buffer.len(),
                        None => break,
                    }
                }
                queue.pump().unwrap();
            }
            received
        };
        until("netback to have read what the taps' queues hold", || {
            if looked.elapsed() > DRAIN / 10 {
                looked = Instant::now();
                read(&mut vif, 1);
            }
            kept(&vif, before + FRAMES) < i64::from(QUEUES)
        });
        // All that was kept comes now.
        let mut last = Instant::now();
        let mut total = 0;
        let least = QUEUES as usize * BACKLOG;
        while last.elapsed() < if total < least { PATIENCE } else { Duration::from_millis(500) } {
            let now = read(&mut vif, usize::MAX);
            if now > total {
                (total, last) = (now, Instant::now());
            }
        }
        // Besides, those that its pages were posted for, and one that waited for pages.
        let pages = 256 * 4096 + 2 * frame.len();
        let most = QUEUES as usize * (BACKLOG + frame.len() + pages);
        assert!(total <= most, "{total} bytes were kept, {most} may be");
        assert!(total >= least, "{total} bytes are less than a guest should get");
        vif.close();
    })
    .join()
    .unwrap();
}
