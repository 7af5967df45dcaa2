//! Reading what a guest wrote: only known keys, only small values, all in one transaction.

use std::collections::BTreeMap;

use super::machine::Front;
use super::{Blame, Fault, Keys, State};
use crate::{Client, DomId, Error, Result, Store};

/// Longest value that is looked at. The longest honest one is a MAC address or a protocol name.
pub(super) const VALUE_MAX: usize = 256;
/// Most keys of one snapshot: 64 queues of 16 pages need some 1100.
const KEYS_MAX: usize = 2048;

const E2BIG: i32 = 7;
const EILSEQ: i32 = 84;
const EAGAIN: i32 = 11;

/// What the frontend's `state` node says now.
pub(super) fn read_state(client: &Client, frontend_path: &str) -> Result<Front> {
    let bytes = client.read_bytes_opt(&format!("{frontend_path}/state"))?;
    Ok(bytes.map_or(Front::Gone, |bytes| Front::At(parse_state(&bytes))))
}

/// Garbage is state 0: it is the machine's to judge.
pub(super) fn parse_state(bytes: &[u8]) -> State {
    std::str::from_utf8(bytes).ok().and_then(State::parse).unwrap_or(State::Unknown)
}

/// Checks that `frontend_path` lies in the home of `frontend_id`: a path that pointed elsewhere would make us read, and
/// wait for, what another domain wrote.
pub(super) fn check_path(frontend_path: &str, frontend_id: DomId) -> Result<(), Fault> {
    let home = format!("{}/", frontend_id.home());
    let good = frontend_path.len() > home.len()
        && frontend_path.starts_with(&home)
        && crate::wire::check_path(frontend_path).is_ok();
    if good {
        return Ok(());
    }
    Err(Fault::host(22, format!("frontend {frontend_path:?} does not lie below {home}; correct the toolstack")))
}

/// Takes a snapshot of the keys that match `patterns`, and of the state they were published under: what made us look
/// may be the state of a directory that has been replaced since. The inner error is the guest's, the outer one the
/// store's.
pub(super) fn snapshot(client: &Client, dir: &str, patterns: &[&str]) -> Result<Result<(Front, Keys), Fault>> {
    let taken = client.transaction(|tx| {
        let mut values = BTreeMap::new();
        let state = tx.read_bytes_opt(&format!("{dir}/state"))?;
        let front = state.map_or(Front::Gone, |bytes| Front::At(parse_state(&bytes)));
        for name in tx.directory_opt(dir)?.unwrap_or_default() {
            if patterns.iter().any(|pattern| matches(pattern, &name)) {
                // A key that was listed and is gone will be a conflict at the end of the transaction; not an error here.
                values.extend(tx.read_bytes_opt(&format!("{dir}/{name}"))?.map(|value| (name.clone(), value)));
            }
            let inner: Vec<&str> = patterns
                .iter()
                .filter_map(|pattern| pattern.split_once('/').filter(|(head, _)| matches(head, &name)))
                .map(|(_, rest)| rest)
                .collect();
            if !inner.is_empty() {
                for leaf in tx.directory_opt(&format!("{dir}/{name}"))?.unwrap_or_default() {
                    if inner.iter().any(|pattern| matches(pattern, &leaf)) {
                        let key = format!("{name}/{leaf}");
                        values.extend(tx.read_bytes_opt(&format!("{dir}/{key}"))?.map(|value| (key, value)));
                    }
                }
            }
            if values.len() > KEYS_MAX {
                break;
            }
        }
        Ok((front, values))
    });
    match taken {
        Ok((front, values)) => Ok(check(dir, values, Blame::Guest).map(|keys| (front, keys))),
        Err(Error::Conflict { .. }) => {
            Ok(Err(Fault::guest(EAGAIN, format!("{dir}: the frontend keeps rewriting its keys"))))
        }
        Err(error) => Err(error),
    }
}

/// All small values directly in our own directory. The toolstack wrote it, so its keys need no list; what is too long
/// or not text is left out, because toolstacks put things there that are not for us.
pub(super) fn read_backend(client: &Client, dir: &str) -> Result<Keys> {
    client.transaction(|tx| {
        let mut keys = Keys::new(dir, Blame::Host);
        for name in tx.directory_opt(dir)?.unwrap_or_default().into_iter().take(KEYS_MAX) {
            let Some(value) = tx.read_bytes_opt(&format!("{dir}/{name}"))? else { continue };
            match String::from_utf8(value) {
                // A disk specification may be a long path.
                Ok(text) if text.len() <= 4096 => keys.insert(name, text),
                _ => tracing::debug!("{dir}/{name} is not text"),
            }
        }
        Ok(keys)
    })
}

fn check(dir: &str, values: BTreeMap<String, Vec<u8>>, blame: Blame) -> Result<Keys, Fault> {
    let mut keys = Keys::new(dir, blame);
    if values.len() > KEYS_MAX {
        return Err(keys.fault(E2BIG, "more keys than any device needs"));
    }
    for (key, value) in values {
        if value.len() > VALUE_MAX {
            return Err(keys.fault(E2BIG, &format!("{key} is longer than {VALUE_MAX} bytes")));
        }
        let Ok(text) = String::from_utf8(value) else {
            return Err(keys.fault(EILSEQ, &format!("{key} is not text")));
        };
        keys.insert(key, text);
    }
    Ok(keys)
}

/// Whether `name` is what `pattern` stands for: `#` is a decimal number of one to four digits, at the end of the name.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('#') {
        None => pattern == name,
        Some(head) => name
            .strip_prefix(head)
            .is_some_and(|digits| (1..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(matches("ring-ref", "ring-ref") && !matches("ring-ref", "ring-ref0"));
        assert!(matches("ring-ref#", "ring-ref15") && matches("queue-#", "queue-0"));
        for wrong in ["ring-ref", "ring-refx", "ring-ref12345", "ring-ref-1"] {
            assert!(!matches("ring-ref#", wrong), "{wrong}");
        }
    }

    #[test]
    fn paths_stay_at_home() {
        assert_eq!(check_path("/local/domain/5/device/vbd/1", DomId(5)), Ok(()));
        for wrong in
            ["/local/domain/51/device", "/local/domain/5", "/local/domain/5/", "/local/domain/5/../0", "device/vbd"]
        {
            assert!(check_path(wrong, DomId(5)).is_err(), "{wrong}");
        }
    }
}
