//! The requests about nodes: read, write, list, remove, and who may.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::quota;
use super::store::{Answer, OK};
use super::transaction::{Fire, View};
use super::tree::{Node, access_of, grants, join, name_of, parent_of, refusal};
use crate::DomId;
use crate::wire::{
    ABS_PATH_MAX, Access, ErrorCode, MessageType, PAYLOAD_MAX, Packet, check_path, check_watch_path, parse_perms,
    perms_to_bytes,
};

/// Exactly `N` texts, each ended by NUL.
pub(super) fn texts<const N: usize>(payload: &[u8]) -> Result<[&str; N], ErrorCode> {
    let text = std::str::from_utf8(payload).ok().and_then(|text| text.strip_suffix('\0')).ok_or(ErrorCode::Invalid)?;
    let all: Vec<&str> = text.split('\0').collect();
    all.try_into().map_err(|_| ErrorCode::Invalid)
}

/// The domain that a request about domains names first.
pub(super) fn dom_arg(payload: &[u8]) -> Result<DomId, ErrorCode> {
    let first = payload.split(|&b| b == 0).next().filter(|first| first.len() < payload.len());
    let text = first.and_then(|first| std::str::from_utf8(first).ok()).ok_or(ErrorCode::Invalid)?;
    text.parse().map_err(|_| ErrorCode::Invalid)
}

/// The absolute form of a node's path, if it keeps the rules.
fn node_path(dom: DomId, path: &str) -> Result<String, ErrorCode> {
    check_path(path).map_err(|_| ErrorCode::Invalid)?;
    let path = if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", dom.home()) };
    // What counts for a guest is the part below a home.
    let local =
        path.strip_prefix("/local/domain/").and_then(|rest| rest.split_once('/')).map_or(path.len(), |(_, l)| l.len());
    if path.len() > ABS_PATH_MAX || (dom != DomId::DOM0 && local > quota::PATH) {
        return Err(ErrorCode::Invalid);
    }
    Ok(path)
}

/// The absolute form of a watched path, and how much of it the watcher does not want to see.
pub(super) fn watch_path(dom: DomId, path: &str) -> Result<(String, usize), ErrorCode> {
    check_watch_path(path).map_err(|_| ErrorCode::Invalid)?;
    if path.starts_with('@') {
        return Ok((path.to_owned(), 0));
    }
    let cut = if path.starts_with('/') { 0 } else { dom.home().len() + 1 };
    Ok((node_path(dom, path)?, cut))
}

/// Answers one of them, in a transaction or outside.
pub(super) fn node_request(view: &mut View<'_>, dom: DomId, packet: &Packet) -> Answer {
    let payload = packet.payload.as_slice();
    match packet.kind {
        MessageType::Read => Ok(reach(view, dom, &one_path(dom, payload)?, Access::Read)?.value.clone()),
        MessageType::Directory => Ok(names(&*reach(view, dom, &one_path(dom, payload)?, Access::Read)?)),
        MessageType::DirectoryPart => directory_part(view, dom, payload),
        MessageType::GetPerms => {
            let path = special_or_path(dom, texts::<1>(payload)?[0])?;
            Ok(perms_to_bytes(&reach(view, dom, &path, Access::Read)?.perms))
        }
        MessageType::SetPerms => set_perms(view, dom, payload),
        MessageType::Mkdir => {
            let path = one_path(dom, payload)?;
            match reach(view, dom, &path, Access::Write) {
                Ok(_) => {}
                Err(ErrorCode::NotFound) => create(view, dom, &path, Vec::new())?,
                Err(code) => return Err(code),
            }
            Ok(OK.to_vec())
        }
        MessageType::Write => {
            let at = payload.iter().position(|&b| b == 0).ok_or(ErrorCode::Invalid)?;
            let path = std::str::from_utf8(&payload[..at]).map_err(|_| ErrorCode::Invalid)?;
            write(view, dom, &node_path(dom, path)?, &payload[at + 1..])
        }
        MessageType::Rm => rm(view, dom, &one_path(dom, payload)?),
        _ => Err(ErrorCode::NotImplemented),
    }
}

fn one_path(dom: DomId, payload: &[u8]) -> Result<String, ErrorCode> {
    node_path(dom, texts::<1>(payload)?[0])
}

fn special_or_path(dom: DomId, path: &str) -> Result<String, ErrorCode> {
    if path.starts_with('@') { Ok(path.to_owned()) } else { node_path(dom, path) }
}

/// A node that `dom` has `wanted` access to.
fn reach(view: &mut View<'_>, dom: DomId, path: &str, wanted: Access) -> Result<Arc<Node>, ErrorCode> {
    match view.get(path)? {
        Some(node) if grants(access_of(dom, &node.perms), wanted) => Ok(node),
        Some(_) => Err(ErrorCode::Access),
        None => {
            let mut at = path;
            let mut ancestor = None;
            while let Some(parent) = parent_of(at) {
                ancestor = view.get(parent)?;
                if ancestor.is_some() {
                    break;
                }
                at = parent;
            }
            Err(refusal(dom, ancestor.as_deref(), wanted))
        }
    }
}

fn names(node: &Node) -> Vec<u8> {
    node.children.iter().flat_map(|name| name.bytes().chain([0])).collect()
}

/// `<generation>\0` and as many whole names from `offset` on as fit; an empty name ends the last part.
fn directory_part(view: &mut View<'_>, dom: DomId, payload: &[u8]) -> Answer {
    let [path, offset] = texts(payload)?;
    let offset: usize = offset.parse().map_err(|_| ErrorCode::Invalid)?;
    let node = reach(view, dom, &node_path(dom, path)?, Access::Read)?;
    let mut reply = format!("{}\0", node.generation).into_bytes();
    let all = names(&node);
    let Some(rest) = all.get(offset..).filter(|rest| !rest.is_empty()) else {
        reply.push(0);
        return Ok(reply);
    };
    let room = PAYLOAD_MAX - reply.len();
    // The end mark has to fit as well, or the part is not the last.
    if rest.len() < room {
        reply.extend_from_slice(rest);
        reply.push(0);
        return Ok(reply);
    }
    let fits = rest[..room].iter().rposition(|&b| b == 0).map_or(0, |at| at + 1);
    reply.extend_from_slice(&rest[..fits]);
    Ok(reply)
}

fn write(view: &mut View<'_>, dom: DomId, path: &str, value: &[u8]) -> Answer {
    let node = match reach(view, dom, path, Access::Write) {
        Ok(node) => node,
        Err(ErrorCode::NotFound) => {
            create(view, dom, path, value.to_vec())?;
            return Ok(OK.to_vec());
        }
        Err(code) => return Err(code),
    };
    let node = Node { value: value.to_vec(), ..Node::clone(&node) };
    within_size(dom, &node)?;
    replace(view, path, node)?;
    Ok(OK.to_vec())
}

fn within_size(dom: DomId, node: &Node) -> Result<(), ErrorCode> {
    if dom != DomId::DOM0 && node.size() > quota::NODE_SIZE { Err(ErrorCode::NoSpace) } else { Ok(()) }
}

/// Puts a changed node and tells watchers at and above it.
fn replace(view: &mut View<'_>, path: &str, node: Node) -> Result<(), ErrorCode> {
    let before = view.get(path)?.map(|node| node.perms.clone());
    let after = Some(node.perms.clone());
    view.put(path, Some(node))?;
    view.fire(Fire { path: path.to_owned(), exact: false, before, after });
    Ok(())
}

/// Creates a node and the parents it lacks. Permissions are inherited, but what a guest creates it owns: dom0 leaves
/// its creations to the parent's owner (C xenstored's `construct_node`).
fn create(view: &mut View<'_>, dom: DomId, path: &str, value: Vec<u8>) -> Result<(), ErrorCode> {
    let mut missing = vec![path];
    let mut perms = loop {
        let parent = missing.last().and_then(|path| parent_of(path)).ok_or(ErrorCode::Invalid)?;
        match view.get(parent)? {
            Some(node) => break node.perms.clone(),
            None => missing.push(parent),
        }
    };
    if dom != DomId::DOM0 {
        if view.tree.owned(dom) + view.newly_owned(dom) + missing.len() > quota::NODES {
            return Err(ErrorCode::NoSpace);
        }
        if let Some(owner) = perms.first_mut() {
            owner.dom = dom;
        }
    }
    // All checks come before the first change: outside of a transaction nothing would undo it.
    let empty = Node { value: Vec::new(), perms: perms.clone(), children: BTreeSet::new(), generation: 0 };
    let leaf = Node { value, ..empty.clone() };
    within_size(dom, &leaf)?;
    let top = missing.last().copied().unwrap_or(path);
    if let Some(parent) = parent_of(top)
        && let Some(node) = view.get(parent)?
    {
        let mut node = Node::clone(&node);
        node.children.insert(name_of(top).to_owned());
        within_size(dom, &node)?;
    }
    for at in missing.iter().rev() {
        view.put(at, Some(if *at == path { leaf.clone() } else { empty.clone() }))?;
        view.link(at, true)?;
    }
    view.fire(Fire { path: path.to_owned(), exact: false, before: None, after: Some(perms) });
    Ok(())
}

fn rm(view: &mut View<'_>, dom: DomId, path: &str) -> Answer {
    if path == "/" {
        return Err(ErrorCode::Invalid);
    }
    match reach(view, dom, path, Access::Write) {
        Ok(_) => {}
        // Already gone is as good, if the place exists.
        Err(ErrorCode::NotFound) => {
            let parent = parent_of(path).ok_or(ErrorCode::NotFound)?;
            return view.get(parent)?.map(|_| OK.to_vec()).ok_or(ErrorCode::NotFound);
        }
        Err(code) => return Err(code),
    }
    view.link(path, false)?;
    let mut doomed = vec![path.to_owned()];
    while let Some(at) = doomed.pop() {
        let Some(node) = view.get(&at)? else { continue };
        doomed.extend(node.children.iter().map(|name| join(&at, name)));
        view.put(&at, None)?;
        view.fire(Fire { exact: at != path, path: at, before: None, after: Some(node.perms.clone()) });
    }
    Ok(OK.to_vec())
}

fn set_perms(view: &mut View<'_>, dom: DomId, payload: &[u8]) -> Answer {
    let at = payload.iter().position(|&b| b == 0).ok_or(ErrorCode::Invalid)?;
    let path = std::str::from_utf8(&payload[..at]).map_err(|_| ErrorCode::Invalid)?;
    let perms = parse_perms(&payload[at + 1..]).ok_or(ErrorCode::Invalid)?;
    if dom != DomId::DOM0 && perms.len() > quota::PERMS {
        return Err(ErrorCode::NoSpace);
    }
    let path = special_or_path(dom, path)?;
    let node = reach(view, dom, &path, Access::Write)?;
    if dom != DomId::DOM0 {
        // Being allowed to write is not enough: only the owner decides, and cannot give the node away.
        if node.owner() != dom {
            return Err(ErrorCode::Access);
        }
        if perms.first().map(|perm| perm.dom) != Some(dom) {
            return Err(ErrorCode::NotPermitted);
        }
    }
    let node = Node { perms, ..Node::clone(&node) };
    within_size(dom, &node)?;
    replace(view, &path, node)?;
    Ok(OK.to_vec())
}
