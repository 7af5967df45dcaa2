//! The nodes, and who may do what with them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::wire::{Access, Perm};
use crate::{DomId, wire::ErrorCode};

/// A node as it is; never changed in place, so that a transaction can keep what it saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) value: Vec<u8>,
    pub(super) perms: Vec<Perm>,
    pub(super) children: BTreeSet<String>,
    /// Unique over all writes: what conflicts are told by.
    pub(super) generation: u64,
}

impl Node {
    pub(super) fn owner(&self) -> DomId {
        self.perms.first().map_or(DomId::DOM0, |perm| perm.dom)
    }

    /// Bytes that count against the node-size quota.
    pub(super) fn size(&self) -> usize {
        self.value.len() + 8 * self.perms.len() + self.children.iter().map(|name| name.len() + 1).sum::<usize>()
    }
}

/// What `dom` may do with a node of these permissions: dom0 and the owner everything, a domain that is named what its
/// entry says, everybody else what the first entry says.
pub(super) fn access_of(dom: DomId, perms: &[Perm]) -> Access {
    let Some((first, named)) = perms.split_first() else {
        return if dom == DomId::DOM0 { Access::Both } else { Access::None };
    };
    if dom == DomId::DOM0 || first.dom == dom {
        return Access::Both;
    }
    named.iter().find(|perm| perm.dom == dom).unwrap_or(first).access
}

/// The parent of an absolute path; `None` for `/` and for special paths.
pub(super) fn parent_of(path: &str) -> Option<&str> {
    match path.rfind('/') {
        Some(0) if path.len() > 1 => Some("/"),
        Some(at) if at > 0 && path.starts_with('/') => Some(&path[..at]),
        _ => None,
    }
}

/// The last component of a path.
pub(super) fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Path of a child.
pub(super) fn join(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

/// All committed nodes.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: HashMap<String, Arc<Node>>,
    owned: HashMap<DomId, usize>,
    generation: u64,
}

impl Tree {
    /// What C xenstored starts with: the root, its own directory, and the two special nodes that say who may watch
    /// domains come and go.
    pub(super) fn new() -> Self {
        let mut tree = Self { nodes: HashMap::new(), owned: HashMap::new(), generation: 0 };
        for (path, child) in [
            ("/", Some("tool")),
            ("/tool", Some("xenstored")),
            ("/tool/xenstored", None),
            ("@introduceDomain", None),
            ("@releaseDomain", None),
        ] {
            let children = child.map(str::to_owned).into_iter().collect();
            let perms = vec![Perm::new(Access::None, DomId::DOM0)];
            tree.put(path, Some(Node { value: Vec::new(), perms, children, generation: 0 }));
        }
        tree
    }

    pub(super) fn get(&self, path: &str) -> Option<&Arc<Node>> {
        self.nodes.get(path)
    }

    /// How many nodes a domain owns.
    pub(super) fn owned(&self, dom: DomId) -> usize {
        self.owned.get(&dom).copied().unwrap_or(0)
    }

    /// The generation the next write would have.
    pub(super) fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// Sets or removes one node (not its place among its parent's children) under a new generation.
    pub(super) fn put(&mut self, path: &str, node: Option<Node>) {
        if let Some(old) = self.nodes.get(path)
            && let Some(count) = self.owned.get_mut(&old.owner())
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.owned.remove(&old.owner());
            }
        }
        match node {
            Some(mut node) => {
                node.generation = self.next_generation();
                *self.owned.entry(node.owner()).or_default() += 1;
                self.nodes.insert(path.to_owned(), Arc::new(node));
            }
            None => {
                self.nodes.remove(path);
            }
        }
    }

    /// Removes every node `dom` owns, with all below, and its entries in other nodes' permissions. Returns what was
    /// removed, and whether it was the top of a removed subtree.
    pub(super) fn forget_domain(&mut self, dom: DomId) -> Vec<(String, Arc<Node>, bool)> {
        let mut owned: Vec<String> = Vec::new();
        let mut named: Vec<String> = Vec::new();
        for (path, node) in &self.nodes {
            if node.owner() == dom {
                owned.push(path.clone());
            } else if node.perms.iter().any(|perm| perm.dom == dom) {
                named.push(path.clone());
            }
        }
        for path in named {
            if let Some(node) = self.nodes.get(&path) {
                let mut node = Node::clone(node);
                node.perms.retain(|perm| perm.dom != dom);
                self.put(&path, Some(node));
            }
        }
        // Shortest first, so that a subtree goes with its top.
        owned.sort_by_key(String::len);
        let mut removed = Vec::new();
        for path in owned {
            if self.nodes.contains_key(&path) {
                self.remove_below(&path, true, &mut removed);
                if let Some(parent) = parent_of(&path)
                    && let Some(node) = self.nodes.get(parent)
                {
                    let mut node = Node::clone(node);
                    node.children.remove(name_of(&path));
                    self.put(parent, Some(node));
                }
            }
        }
        removed
    }

    fn remove_below(&mut self, path: &str, top: bool, removed: &mut Vec<(String, Arc<Node>, bool)>) {
        if let Some(node) = self.nodes.get(path).cloned() {
            for name in &node.children {
                self.remove_below(&join(path, name), false, removed);
            }
            self.put(path, None);
            removed.push((path.to_owned(), node, top));
        }
    }
}

/// The reason to give when a node is missing: whoever may not even reach the place gets EACCES and learns nothing about
/// what exists. `ancestor` is the nearest one that exists.
pub(super) fn refusal(dom: DomId, ancestor: Option<&Node>, wanted: Access) -> ErrorCode {
    match ancestor {
        Some(node) if !grants(access_of(dom, &node.perms), wanted) => ErrorCode::Access,
        _ => ErrorCode::NotFound,
    }
}

/// Whether `have` includes all of `wanted`.
pub(super) fn grants(have: Access, wanted: Access) -> bool {
    (!wanted.may_read() || have.may_read()) && (!wanted.may_write() || have.may_write())
}
