//! The operations that a connection and a transaction have in common.

use crate::wire::{MessageType, PAYLOAD_MAX, Perm, check_path, parse_perms, perms_to_bytes};
use crate::{Error, ErrorCode, Result};

/// The store, seen through a [`Client`](crate::Client) or through a [`Transaction`](crate::Transaction): a function
/// that takes `&impl Store` (or `&dyn Store`) works inside a transaction and outside of one.
///
/// Paths are absolute, or relative to the home of the connection's own domain. Every call is one round trip and waits
/// for the answer as long as it takes. Every error says which operation and which path.
pub trait Store {
    /// Sends one request and waits for its reply. `payload` is what `docs/misc/xenstore.txt` says for `kind`; `path`
    /// only serves error messages. The other methods are made from this one.
    ///
    /// # Errors
    /// The store's refusal, or a lost connection.
    fn request(&self, kind: MessageType, path: &str, payload: &[&[u8]]) -> Result<Vec<u8>>;

    /// Reads the value of a node.
    ///
    /// # Errors
    /// ENOENT if there is no such node, EACCES if it may not be read.
    fn read(&self, path: &str) -> Result<Vec<u8>> {
        checked(path)?;
        self.request(MessageType::Read, path, &[path.as_bytes(), b"\0"])
    }

    /// Reads a value that is text.
    ///
    /// # Errors
    /// As [`Store::read`], and if the value is not UTF-8.
    fn read_str(&self, path: &str) -> Result<String> {
        String::from_utf8(self.read(path)?).map_err(|_| malformed(MessageType::Read, path, "the value is not UTF-8"))
    }

    /// Reads a value that is text, if the node exists.
    ///
    /// # Errors
    /// As [`Store::read_str`], without ENOENT.
    fn read_opt(&self, path: &str) -> Result<Option<String>> {
        found(self.read_str(path))
    }

    /// Reads a value, if the node exists.
    ///
    /// # Errors
    /// As [`Store::read`], without ENOENT.
    fn read_bytes_opt(&self, path: &str) -> Result<Option<Vec<u8>>> {
        found(self.read(path))
    }

    /// Sets the value of a node, creating it and its parents.
    ///
    /// # Errors
    /// EACCES, or ENOSPC if a quota is exhausted.
    fn write(&self, path: &str, value: &str) -> Result<()> {
        self.write_bytes(path, value.as_bytes())
    }

    /// As [`Store::write`], with any bytes.
    ///
    /// # Errors
    /// As [`Store::write`].
    fn write_bytes(&self, path: &str, value: &[u8]) -> Result<()> {
        checked(path)?;
        self.request(MessageType::Write, path, &[path.as_bytes(), b"\0", value]).map(drop)
    }

    /// Creates an empty node and its parents; an existing node is left as it is.
    ///
    /// # Errors
    /// As [`Store::write`].
    fn mkdir(&self, path: &str) -> Result<()> {
        checked(path)?;
        self.request(MessageType::Mkdir, path, &[path.as_bytes(), b"\0"]).map(drop)
    }

    /// Removes a node and all below it. The store also agrees if there is no such node but its parent exists.
    ///
    /// # Errors
    /// ENOENT if not even the parent exists, EACCES.
    fn rm(&self, path: &str) -> Result<()> {
        checked(path)?;
        self.request(MessageType::Rm, path, &[path.as_bytes(), b"\0"]).map(drop)
    }

    /// As [`Store::rm`], and content if there is nothing to remove.
    ///
    /// # Errors
    /// As [`Store::rm`], without ENOENT.
    fn rm_if_exists(&self, path: &str) -> Result<()> {
        found(self.rm(path)).map(drop)
    }

    /// The names of a node's children, in the store's order.
    ///
    /// A list too long for one message is fetched in parts. Stores without that operation (oxenstored) cannot give
    /// such a list at all: then the first refusal, E2BIG, is the error.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    fn directory(&self, path: &str) -> Result<Vec<String>> {
        checked(path)?;
        let too_big = match self.request(MessageType::Directory, path, &[path.as_bytes(), b"\0"]) {
            Ok(names) => return split_names(MessageType::Directory, path, &names),
            Err(error) if error.code() == Some(&ErrorCode::TooBig) => error,
            Err(error) => return Err(error),
        };
        match directory_in_parts(self, path) {
            Err(error) if error.code() == Some(&ErrorCode::NotImplemented) => Err(too_big),
            other => other,
        }
    }

    /// As [`Store::directory`]; `None` if there is no such node.
    ///
    /// # Errors
    /// As [`Store::directory`], without ENOENT.
    fn directory_opt(&self, path: &str) -> Result<Option<Vec<String>>> {
        found(self.directory(path))
    }

    /// The permissions of a node: owner first.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    fn get_perms(&self, path: &str) -> Result<Vec<Perm>> {
        checked(path)?;
        let reply = self.request(MessageType::GetPerms, path, &[path.as_bytes(), b"\0"])?;
        parse_perms(&reply).ok_or_else(|| malformed(MessageType::GetPerms, path, "not a list of permissions"))
    }

    /// Replaces the permissions of a node. The first entry is the owner and the default for everybody not named.
    ///
    /// # Errors
    /// ENOENT, EACCES; EPERM if an unprivileged domain gives a node away.
    fn set_perms(&self, path: &str, perms: &[Perm]) -> Result<()> {
        // The special nodes have permissions as well: they say who may watch domains come and go.
        if !path.starts_with('@') {
            checked(path)?;
        }
        self.request(MessageType::SetPerms, path, &[path.as_bytes(), b"\0", &perms_to_bytes(perms)]).map(drop)
    }
}

impl<S: Store + ?Sized> Store for &S {
    fn request(&self, kind: MessageType, path: &str, payload: &[&[u8]]) -> Result<Vec<u8>> {
        (**self).request(kind, path, payload)
    }
}

fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn checked(path: &str) -> Result<()> {
    check_path(path).map_err(|reason| Error::Invalid { path: path.to_owned(), reason })
}

fn malformed(op: MessageType, path: &str, reason: &'static str) -> Error {
    Error::Reply { op, path: path.to_owned(), reason }
}

fn split_names(op: MessageType, path: &str, bytes: &[u8]) -> Result<Vec<String>> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let text = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_suffix('\0'));
    let text = text.ok_or_else(|| malformed(op, path, "not a list of names"))?;
    Ok(text.split('\0').map(str::to_owned).collect())
}

/// Fetches a child list slice by slice (`DIRECTORY_PART`). Every slice starts with the node's generation: if that
/// changes on the way, the slices do not belong together and all starts anew.
fn directory_in_parts<S: Store + ?Sized>(store: &S, path: &str) -> Result<Vec<String>> {
    const OP: MessageType = MessageType::DirectoryPart;
    // A list this long has no honest origin: dom0 itself would have had to create millions of nodes.
    const MOST_BYTES: usize = 64 << 20;
    const RESTARTS: u32 = 100;
    for _ in 0..RESTARTS {
        let mut names = Vec::new();
        let mut generation: Option<Vec<u8>> = None;
        loop {
            let offset = names.len().to_string();
            let reply = store.request(OP, path, &[path.as_bytes(), b"\0", offset.as_bytes(), b"\0"])?;
            let Some(at) = reply.iter().position(|&b| b == 0) else {
                return Err(malformed(OP, path, "no generation count"));
            };
            if generation.get_or_insert_with(|| reply[..at].to_vec()) != &reply[..at] {
                break;
            }
            let slice = &reply[at + 1..];
            // The last slice ends with an empty name.
            match slice {
                [0] => return split_names(OP, path, &names),
                [head @ .., 0, 0] => {
                    names.extend_from_slice(head);
                    names.push(0);
                    return split_names(OP, path, &names);
                }
                [] => return Err(malformed(OP, path, "an empty slice that is not the last")),
                _ => names.extend_from_slice(slice),
            }
            if names.len() > MOST_BYTES || reply.len() > PAYLOAD_MAX {
                return Err(malformed(OP, path, "the list has no end"));
            }
        }
    }
    Err(Error::Conflict { attempts: RESTARTS })
}
