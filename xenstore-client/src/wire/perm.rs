//! Permissions of a node.

use crate::DomId;

/// What a domain may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `n`: nothing.
    None,
    /// `r`: read value, children and permissions.
    Read,
    /// `w`: write the value, create children, remove.
    Write,
    /// `b`: both.
    Both,
}

impl Access {
    /// Whether reading is allowed.
    #[must_use]
    pub fn may_read(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Whether writing is allowed.
    #[must_use]
    pub fn may_write(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }
}

/// One entry of a node's permissions. The first entry of a list is special: its domain **owns** the node (may do
/// everything), and its access is what every domain *not* named in the list may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Perm {
    /// What is allowed.
    pub access: Access,
    /// To whom.
    pub dom: DomId,
}

impl Perm {
    /// An entry `access` for `dom`.
    #[must_use]
    pub const fn new(access: Access, dom: DomId) -> Self {
        Self { access, dom }
    }

    /// Reads one entry, such as `b5` or `n0`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut chars = text.chars();
        let access = match chars.next()? {
            'n' => Access::None,
            'r' => Access::Read,
            'w' => Access::Write,
            'b' => Access::Both,
            _ => return None,
        };
        Some(Self { access, dom: chars.as_str().parse().ok()? })
    }
}

impl std::fmt::Display for Perm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.dom)
    }
}

/// Reads a list of entries, each ended by NUL. `None` if the list is empty or an entry is malformed.
#[must_use]
pub fn parse_perms(bytes: &[u8]) -> Option<Vec<Perm>> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\0')?;
    text.split('\0').map(Perm::parse).collect()
}

/// The list as it travels: each entry ended by NUL.
#[must_use]
pub fn perms_to_bytes(perms: &[Perm]) -> Vec<u8> {
    perms.iter().flat_map(|perm| format!("{perm}\0").into_bytes()).collect()
}
