//! The other ends of interfaces: packet sockets in a second namespace, where no kernel answers anything.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket};

use super::{sh, try_sh};

/// A packet socket on one device.
pub(crate) struct Cable(OwnedFd);

impl Cable {
    /// On a device of this thread's namespace.
    pub(crate) fn new(device: &str) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        let all = nix::ifaddrs::getifaddrs().unwrap();
        let own =
            all.filter(|entry| entry.interface_name == device).find_map(|entry| entry.address?.as_link_addr().copied());
        bind(fd.as_raw_fd(), &own.unwrap()).unwrap();
        Self(fd)
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(send(self.0.as_raw_fd(), frame, MsgFlags::empty()), Ok(frame.len()));
    }

    /// Everything that came until now.
    pub(crate) fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(len) = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            frames.push(buffer[..len].to_vec());
        }
        frames
    }

    /// Waits for such a frame.
    pub(crate) fn gets(&self, such: impl Fn(&[u8]) -> bool) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < super::PATIENCE {
            if self.received().iter().any(|frame| such(frame)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

pub(crate) fn has(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

/// What is to be done in a namespace beside.
enum Order {
    /// Switch this device on, and listen at it.
    Cable(String),
    /// Run this command line.
    Run(String, Sender<String>),
}

/// A namespace beside this thread's one.
pub(crate) struct Beside {
    orders: Option<Sender<Order>>,
    cables: Receiver<Cable>,
    path: String,
    thread: Option<JoinHandle<()>>,
}

impl Beside {
    pub(crate) fn new() -> Self {
        let (orders, of_thread) = channel::<Order>();
        let (answers, cables) = channel();
        let (ready, started) = channel();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())).unwrap();
            for order in of_thread {
                let device = match order {
                    Order::Cable(device) => device,
                    Order::Run(line, answer) => {
                        answer.send(sh(&line)).unwrap();
                        continue;
                    }
                };
                // Whether the kernel has IPv6 or not, this end is to be silent.
                let _ = try_sh(&format!("sysctl -qw net/ipv6/conf/{device}/disable_ipv6=1"));
                sh(&format!("ip link set {device} arp off promisc on up"));
                answers.send(Cable::new(&device)).unwrap();
            }
        });
        Self { orders: Some(orders), cables, path: started.recv().unwrap(), thread: Some(thread) }
    }

    /// Makes `near` here with its other end there, and returns that.
    pub(crate) fn pair(&self, near: &str, far: &str) -> Cable {
        sh(&format!("ip link add {near} type veth peer name {far}"));
        sh(&format!("ip link set {far} netns {}", self.path));
        self.orders.as_ref().unwrap().send(Order::Cable(far.to_owned())).unwrap();
        self.cables.recv_timeout(super::PATIENCE).unwrap()
    }

    /// Runs a command line there.
    pub(crate) fn run(&self, line: &str) -> String {
        let (answer, answered) = channel();
        self.orders.as_ref().unwrap().send(Order::Run(line.to_owned(), answer)).unwrap();
        answered.recv_timeout(super::PATIENCE).unwrap()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
