//! Many operations that happen as one.

use std::cell::Cell;
use std::time::Duration;

use super::connection::Connection;
use crate::wire::MessageType;
use crate::{Error, ErrorCode, Result, Store};

const MOST_ATTEMPTS: u32 = 64;

/// An open transaction; see [`Client::transaction`](crate::Client::transaction). It sees the store as it was when each
/// node was first looked at, and its own writes.
#[derive(Debug)]
pub struct Transaction<'a> {
    connection: &'a Connection,
    id: u32,
    ended: Cell<bool>,
}

impl Store for Transaction<'_> {
    fn request(&self, kind: MessageType, path: &str, payload: &[&[u8]]) -> Result<Vec<u8>> {
        self.connection.request(kind, self.id, path, payload)
    }
}

impl<'a> Transaction<'a> {
    fn start(connection: &'a Connection) -> Result<Self> {
        let op = MessageType::TransactionStart;
        let reply = connection.request(op, 0, "", &[b"\0"])?;
        let id = std::str::from_utf8(&reply).ok().and_then(|text| text.trim_end_matches('\0').parse().ok());
        match id {
            Some(id) if id != 0 => Ok(Self { connection, id, ended: Cell::new(false) }),
            _ => Err(Error::Reply { op, path: String::new(), reason: "not a transaction number" }),
        }
    }

    fn end(&self, commit: bool) -> Result<()> {
        self.ended.set(true);
        let word: &[u8] = if commit { b"T\0" } else { b"F\0" };
        self.connection.request(MessageType::TransactionEnd, self.id, "", &[word]).map(drop)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // Only when the body failed or panicked: an open transaction would count against the domain's quota for ever.
        if !self.ended.get()
            && let Err(error) = self.end(false)
        {
            tracing::debug!("dropping a transaction: {error}");
        }
    }
}

pub(super) fn run<T>(connection: &Connection, mut body: impl FnMut(&Transaction<'_>) -> Result<T>) -> Result<T> {
    let again = |error: &Error| error.code() == Some(&ErrorCode::Again);
    for attempt in 0..MOST_ATTEMPTS {
        // Two writers in step would conflict for ever; the pauses differ because the scheduler does.
        if attempt > 3 {
            std::thread::sleep(Duration::from_millis(u64::from(attempt.min(20))));
        }
        let transaction = Transaction::start(connection)?;
        let value = match body(&transaction) {
            Err(error) if again(&error) => continue,
            other => other?,
        };
        match transaction.end(true) {
            Ok(()) => return Ok(value),
            Err(error) if again(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::Conflict { attempts: MOST_ATTEMPTS })
}
