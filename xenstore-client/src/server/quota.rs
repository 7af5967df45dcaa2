//! What a guest may use up (defaults of C xenstored, `tools/xenstored/domain.c`). dom0 is exempt.

/// Nodes a domain may own.
pub(super) const NODES: usize = 1000;
/// Bytes of a node: value, names of children, permissions.
pub(super) const NODE_SIZE: usize = 2048;
/// Entries of a node's permissions.
pub(super) const PERMS: usize = 5;
/// Watches of a domain.
pub(super) const WATCHES: usize = 128;
/// Transactions a domain may have open.
pub(super) const TRANSACTIONS: usize = 10;
/// Nodes one transaction may touch.
pub(super) const TRANSACTION_NODES: usize = 1024;
/// Bytes of a path below a domain's home.
pub(super) const PATH: usize = 2048;
