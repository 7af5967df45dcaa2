//! The store without its sockets: requests in, replies and events out.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::nodes::{dom_arg, node_request, texts, watch_path};
use super::quota;
use super::transaction::{Fire, Transaction, View};
use super::tree::{Tree, access_of, parent_of};
use crate::DomId;
use crate::wire::{ErrorCode, MessageType, PAYLOAD_MAX, Packet};

/// Numbers a connection; never used twice.
pub(super) type ConnId = u64;
/// Packets to send, in order.
pub(super) type Outbox = Vec<(ConnId, Packet)>;

/// The payload of a reply.
pub(super) type Answer = Result<Vec<u8>, ErrorCode>;

#[derive(Debug)]
struct Watch {
    /// Absolute.
    path: String,
    token: String,
    /// Bytes to cut off the front of paths in events: the home of a domain that watched a relative path.
    cut: usize,
}

#[derive(Debug)]
struct Connection {
    dom: DomId,
    watches: Vec<Watch>,
    transactions: HashMap<u32, Transaction>,
    next_transaction: u32,
}

/// Everything a xenstored knows.
#[derive(Debug)]
pub(super) struct Store {
    tree: Tree,
    connections: BTreeMap<ConnId, Connection>,
    domains: HashSet<DomId>,
    next: ConnId,
}

/// The reply to a request that only wants to be done.
pub(super) const OK: &[u8] = b"OK\0";

impl Store {
    pub(super) fn new() -> Self {
        let domains = HashSet::from([DomId::DOM0]);
        Self { tree: Tree::new(), connections: BTreeMap::new(), domains, next: 0 }
    }

    pub(super) fn connect(&mut self, dom: DomId) -> ConnId {
        self.next += 1;
        let connection = Connection { dom, watches: Vec::new(), transactions: HashMap::new(), next_transaction: 1 };
        self.connections.insert(self.next, connection);
        self.next
    }

    pub(super) fn disconnect(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
    }

    pub(super) fn introduce(&mut self, dom: DomId) -> Outbox {
        if self.domains.insert(dom) { self.fire(&[special("@introduceDomain")]) } else { Vec::new() }
    }

    /// Returns the connections that are to be closed.
    pub(super) fn release(&mut self, dom: DomId) -> (Vec<ConnId>, Outbox) {
        let gone: Vec<ConnId> = self.connections.iter().filter(|(_, c)| c.dom == dom).map(|(id, _)| *id).collect();
        self.connections.retain(|_, connection| connection.dom != dom);
        self.domains.remove(&dom);
        let removed = self.tree.forget_domain(dom).into_iter();
        let mut fires: Vec<Fire> = removed
            .map(|(path, node, top)| Fire { path, exact: !top, before: None, after: Some(node.perms.clone()) })
            .collect();
        fires.push(special("@releaseDomain"));
        (gone, self.fire(&fires))
    }

    /// Answers one request: the reply comes first, then the events it caused.
    pub(super) fn request(&mut self, conn: ConnId, packet: &Packet) -> (Outbox, Vec<ConnId>) {
        let Some(dom) = self.connections.get(&conn).map(|connection| connection.dom) else {
            return (Vec::new(), Vec::new());
        };
        let mut events = Outbox::new();
        let mut closed = Vec::new();
        let answer = match packet.kind {
            MessageType::Watch => self.watch(conn, dom, &packet.payload, &mut events),
            MessageType::Unwatch => self.unwatch(conn, dom, &packet.payload),
            MessageType::ResetWatches => self.reset(conn),
            MessageType::TransactionStart => self.transaction_start(conn, dom, packet.tx_id),
            MessageType::TransactionEnd => self.transaction_end(conn, packet).map(|fires| {
                events = self.fire(&fires);
                OK.to_vec()
            }),
            MessageType::GetDomainPath => dom_arg(&packet.payload).map(|dom| format!("{}\0", dom.home()).into_bytes()),
            MessageType::IsDomainIntroduced => dom_arg(&packet.payload)
                .map(|dom| if self.domains.contains(&dom) { b"T\0".to_vec() } else { b"F\0".to_vec() }),
            MessageType::Introduce | MessageType::Release if dom != DomId::DOM0 => Err(ErrorCode::Access),
            MessageType::Introduce => dom_arg(&packet.payload).map(|dom| {
                events = self.introduce(dom);
                OK.to_vec()
            }),
            MessageType::Release => match dom_arg(&packet.payload) {
                Ok(DomId::DOM0) => Err(ErrorCode::Invalid),
                Ok(dom) if !self.domains.contains(&dom) => Err(ErrorCode::NotFound),
                Ok(dom) => {
                    (closed, events) = self.release(dom);
                    Ok(OK.to_vec())
                }
                Err(code) => Err(code),
            },
            _ => self.node_request(conn, dom, packet, &mut events),
        };
        let answer =
            answer.and_then(|reply| if reply.len() > PAYLOAD_MAX { Err(ErrorCode::TooBig) } else { Ok(reply) });
        let (kind, payload) = match answer {
            Ok(payload) => (packet.kind, payload),
            Err(code) => (MessageType::Error, format!("{code}\0").into_bytes()),
        };
        let reply = Packet { kind, req_id: packet.req_id, tx_id: packet.tx_id, payload };
        let mut out = vec![(conn, reply)];
        out.append(&mut events);
        (out, closed)
    }

    /// The requests about nodes, which work the same inside a transaction.
    fn node_request(&mut self, conn: ConnId, dom: DomId, packet: &Packet, events: &mut Outbox) -> Answer {
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        let transaction = match packet.tx_id {
            0 => None,
            id => Some(connection.transactions.get_mut(&id).ok_or(ErrorCode::NotFound)?),
        };
        let limited = dom != DomId::DOM0;
        let mut view = View { tree: &mut self.tree, transaction, limited, fires: Vec::new() };
        let answer = node_request(&mut view, dom, packet);
        let fires = view.fires;
        *events = self.fire(&fires);
        answer
    }

    fn watch(&mut self, conn: ConnId, dom: DomId, payload: &[u8], events: &mut Outbox) -> Answer {
        let [path, token] = texts(payload)?;
        let (path, cut) = watch_path(dom, path)?;
        let all: usize = self.connections.values().filter(|c| c.dom == dom).map(|c| c.watches.len()).sum();
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        if connection.watches.iter().any(|watch| watch.path == path && watch.token == token) {
            return Err(ErrorCode::Exists);
        }
        if dom != DomId::DOM0 && all >= quota::WATCHES {
            return Err(ErrorCode::TooBig);
        }
        events.push((conn, event(&path[cut..], token)));
        connection.watches.push(Watch { path, token: token.to_owned(), cut });
        Ok(OK.to_vec())
    }

    fn unwatch(&mut self, conn: ConnId, dom: DomId, payload: &[u8]) -> Answer {
        let [path, token] = texts(payload)?;
        let (path, _) = watch_path(dom, path)?;
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        let at = connection.watches.iter().position(|watch| watch.path == path && watch.token == token);
        connection.watches.remove(at.ok_or(ErrorCode::NotFound)?);
        Ok(OK.to_vec())
    }

    fn reset(&mut self, conn: ConnId) -> Answer {
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        connection.watches.clear();
        connection.transactions.clear();
        Ok(OK.to_vec())
    }

    fn transaction_start(&mut self, conn: ConnId, dom: DomId, inside: u32) -> Answer {
        let open: usize = self.connections.values().filter(|c| c.dom == dom).map(|c| c.transactions.len()).sum();
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        if inside != 0 {
            return Err(ErrorCode::Busy);
        }
        if dom != DomId::DOM0 && open >= quota::TRANSACTIONS {
            return Err(ErrorCode::NoSpace);
        }
        let mut id = connection.next_transaction;
        while id == 0 || connection.transactions.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        connection.next_transaction = id.wrapping_add(1);
        connection.transactions.insert(id, Transaction::default());
        Ok(format!("{id}\0").into_bytes())
    }

    fn transaction_end(&mut self, conn: ConnId, packet: &Packet) -> Result<Vec<Fire>, ErrorCode> {
        let commit = match packet.payload.as_slice() {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err(ErrorCode::Invalid),
        };
        let connection = self.connections.get_mut(&conn).ok_or(ErrorCode::Io)?;
        let transaction = connection.transactions.remove(&packet.tx_id).ok_or(ErrorCode::NotFound)?;
        if commit { transaction.commit(&mut self.tree) } else { Ok(Vec::new()) }
    }

    /// Events for all watches that the changes concern and whose connections may know.
    fn fire(&self, fires: &[Fire]) -> Outbox {
        let mut out = Outbox::new();
        for fire in fires {
            for (id, connection) in &self.connections {
                let mut concerned = connection.watches.iter().filter(|watch| concerns(fire, &watch.path)).peekable();
                if concerned.peek().is_some() && self.may_know(connection.dom, fire) {
                    out.extend(
                        concerned.map(|watch| (*id, event(fire.path.get(watch.cut..).unwrap_or(""), &watch.token))),
                    );
                }
            }
        }
        out
    }

    /// Who may read a node, or could before, or may list its parent, learns of its changes (`watch_permitted`).
    fn may_know(&self, dom: DomId, fire: &Fire) -> bool {
        let reads = |perms: &[_]| access_of(dom, perms).may_read();
        fire.before.as_deref().is_some_and(reads)
            || fire.after.as_deref().is_some_and(reads)
            || self.tree.get(&fire.path).is_some_and(|node| reads(&node.perms))
            || parent_of(&fire.path).and_then(|parent| self.tree.get(parent)).is_some_and(|node| reads(&node.perms))
    }
}

fn special(path: &str) -> Fire {
    Fire { path: path.to_owned(), exact: true, before: None, after: None }
}

fn concerns(fire: &Fire, watched: &str) -> bool {
    if fire.exact || watched.starts_with('@') {
        return fire.path == watched;
    }
    watched == "/" || fire.path.strip_prefix(watched).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn event(path: &str, token: &str) -> Packet {
    let payload = format!("{path}\0{token}\0").into_bytes();
    Packet { kind: MessageType::WatchEvent, req_id: 0, tx_id: 0, payload }
}
