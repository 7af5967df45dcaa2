//! Stores that hang. Alone in its process: `abandon_silent` is about all connections of one.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use xenstore_client::{Client, Error, Result, Store, abandon_silent};

/// Whoever waits for a store that never answers is let go, on a socket and on the device, and so are those who wait for
/// their turn; a connection that is answered stays.
#[test]
fn a_silent_store_is_abandoned() -> Result<()> {
    let server = xenstore_client::server::Server::new()?;
    let good = server.connect(xenstore_client::DomId::DOM0)?;
    let (ours, mut device) = UnixStream::pair().expect("socketpair");
    let ours = File::from(OwnedFd::from(ours));
    let (socket, mut store) = UnixStream::pair().expect("socketpair");
    let clients = [Client::from_device(ours)?, Client::from_stream(socket)?];
    let stuck: Vec<_> = clients
        .iter()
        .flat_map(|client| [client.clone(), client.clone()])
        .map(|client| std::thread::spawn(move || client.read("/never")))
        .collect();
    device.read_exact(&mut [0; 16]).expect("a request");
    store.read_exact(&mut [0; 16]).expect("a request");
    assert_eq!(abandon_silent(Duration::from_secs(3600)), Vec::<String>::new());
    let mut abandoned = Vec::new();
    while abandoned.len() < 2 {
        abandoned.extend(abandon_silent(Duration::ZERO));
    }
    assert_eq!(abandoned, ["read \"/never\"", "read \"/never\""]);
    for thread in stuck {
        assert!(matches!(thread.join().expect("no panic"), Err(Error::Disconnected)));
    }
    for client in clients {
        assert!(matches!(client.read("/a"), Err(Error::Disconnected)));
    }
    good.write("/a", "1")
}
