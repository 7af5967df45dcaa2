//! What a transaction saw and did, and the view that hides whether there is one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::quota;
use super::tree::{Node, Tree, name_of, parent_of};
use crate::wire::{ErrorCode, Perm};

/// A change that watchers will hear of.
#[derive(Debug, Clone)]
pub(super) struct Fire {
    pub(super) path: String,
    /// Only watches on this very path fire: its removal is reported to those above as that of the removed subtree.
    pub(super) exact: bool,
    /// The permissions before the change: who loses sight of a node still learns of that.
    pub(super) before: Option<Vec<Perm>>,
    /// The permissions after the change, or of the node removed.
    pub(super) after: Option<Vec<Perm>>,
}

#[derive(Debug)]
struct Touched {
    /// The generation at first sight; `None`: there was no such node.
    seen: Option<u64>,
    now: Option<Arc<Node>>,
    modified: bool,
}

/// An open transaction: private versions of all nodes it touched.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    touched: BTreeMap<String, Touched>,
    fires: Vec<Fire>,
    failed: bool,
}

impl Transaction {
    /// Commits everything, or nothing if any touched node has changed since it was first seen.
    pub(super) fn commit(self, tree: &mut Tree) -> Result<Vec<Fire>, ErrorCode> {
        if self.failed {
            return Err(ErrorCode::NoMemory);
        }
        let conflict =
            |(path, touched): (&String, &Touched)| tree.get(path).map(|node| node.generation) != touched.seen;
        if self.touched.iter().any(conflict) {
            return Err(ErrorCode::Again);
        }
        for (path, touched) in self.touched {
            if touched.modified {
                tree.put(&path, touched.now.map(|node| Node::clone(&node)));
            }
        }
        Ok(self.fires)
    }
}

/// The nodes as one request sees them: the tree, or the tree under a transaction's own versions.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) transaction: Option<&'a mut Transaction>,
    /// Guests only.
    pub(super) limited: bool,
    /// What to tell watchers at once.
    pub(super) fires: Vec<Fire>,
}

impl View<'_> {
    pub(super) fn get(&mut self, path: &str) -> Result<Option<Arc<Node>>, ErrorCode> {
        let Some(transaction) = &mut self.transaction else { return Ok(self.tree.get(path).cloned()) };
        if let Some(touched) = transaction.touched.get(path) {
            return Ok(touched.now.clone());
        }
        if self.limited && transaction.touched.len() >= quota::TRANSACTION_NODES {
            transaction.failed = true;
            return Err(ErrorCode::NoSpace);
        }
        let now = self.tree.get(path).cloned();
        let seen = now.as_ref().map(|node| node.generation);
        transaction.touched.insert(path.to_owned(), Touched { seen, now: now.clone(), modified: false });
        Ok(now)
    }

    /// Replaces one node. Everything is read before it is written, so a transaction has touched it already.
    pub(super) fn put(&mut self, path: &str, node: Option<Node>) -> Result<(), ErrorCode> {
        if self.transaction.is_none() {
            self.tree.put(path, node);
            return Ok(());
        }
        self.get(path)?;
        let generation = self.tree.next_generation();
        let node = node.map(|node| Arc::new(Node { generation, ..node }));
        if let Some(touched) = self.transaction.as_mut().and_then(|t| t.touched.get_mut(path)) {
            touched.now = node;
            touched.modified = true;
        }
        Ok(())
    }

    /// Adds `path` to its parent's children, or takes it out.
    pub(super) fn link(&mut self, path: &str, present: bool) -> Result<(), ErrorCode> {
        let Some(parent) = parent_of(path) else { return Ok(()) };
        let Some(node) = self.get(parent)? else { return Ok(()) };
        let mut node = Node::clone(&node);
        let changed = match present {
            true => node.children.insert(name_of(path).to_owned()),
            false => node.children.remove(name_of(path)),
        };
        if changed { self.put(parent, Some(node)) } else { Ok(()) }
    }

    pub(super) fn fire(&mut self, fire: Fire) {
        match &mut self.transaction {
            None => self.fires.push(fire),
            Some(transaction) => {
                // A path fires once per commit; the less exact report includes the other.
                match transaction.fires.iter_mut().find(|old| old.path == fire.path) {
                    None => transaction.fires.push(fire),
                    Some(old) => {
                        old.exact &= fire.exact;
                        old.after = fire.after;
                    }
                }
            }
        }
    }

    /// Nodes the transaction would add to what `dom` owns.
    pub(super) fn newly_owned(&self, dom: crate::DomId) -> usize {
        let Some(transaction) = &self.transaction else { return 0 };
        let new = |t: &&Touched| t.seen.is_none() && t.now.as_ref().is_some_and(|node| node.owner() == dom);
        transaction.touched.values().filter(new).count()
    }
}
