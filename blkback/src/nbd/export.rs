//! Which NBD server, and which of its exports.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port of NBD (IANA).
const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host name or address, and a port.
    Tcp(String, u16),
}

/// An export of a server, as `nbd:unix:PATH[:EXPORT]` or `nbd://HOST[:PORT]/EXPORT` name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The server.
    pub place: Place,
    /// The export; empty for the server's default one.
    pub name: String,
}

impl Export {
    /// Whether a disk's target is meant to be one.
    pub fn is_one(target: &str) -> bool {
        target.starts_with("nbd:unix:") || target.starts_with("nbd://")
    }
}

impl FromStr for Export {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("nbd:unix:") {
            // QEMU's spelling has exportname= before the name.
            let (path, name) = rest.split_once(':').unwrap_or((rest, ""));
            let name = name.strip_prefix("exportname=").unwrap_or(name);
            if !path.starts_with('/') {
                return Err(format!(
                    "{path:?} is no absolute path of a socket; write nbd:unix:/run/server.sock[:EXPORT]"
                ));
            }
            return Ok(Self { place: Place::Unix(path.into()), name: name.to_owned() });
        }
        let Some(rest) = text.strip_prefix("nbd://") else {
            return Err("write nbd:unix:PATH[:EXPORT] or nbd://HOST[:PORT]/EXPORT".to_owned());
        };
        let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, rest)) => (host, rest.strip_prefix(':')),
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let port = match port {
            None => PORT,
            Some(port) => port.parse().map_err(|_| format!("{port:?} is no port; write nbd://HOST[:PORT]/EXPORT"))?,
        };
        if host.is_empty() {
            return Err("the host is missing; write nbd://HOST[:PORT]/EXPORT".to_owned());
        }
        Ok(Self { place: Place::Tcp(host.to_owned(), port), name: name.to_owned() })
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Unix(path) if self.name.is_empty() => write!(f, "nbd:unix:{}", path.display()),
            Place::Unix(path) => write!(f, "nbd:unix:{}:{}", path.display(), self.name),
            Place::Tcp(host, port) if host.contains(':') => write!(f, "nbd://[{host}]:{port}/{}", self.name),
            Place::Tcp(host, port) => write!(f, "nbd://{host}:{port}/{}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        let unix = |path: &str, name: &str| Export { place: Place::Unix(path.into()), name: name.into() };
        let tcp = |host: &str, port, name: &str| Export { place: Place::Tcp(host.into(), port), name: name.into() };
        let cases = [
            ("nbd:unix:/run/x", unix("/run/x", ""), "nbd:unix:/run/x"),
            ("nbd:unix:/run/x:disk", unix("/run/x", "disk"), "nbd:unix:/run/x:disk"),
            ("nbd:unix:/run/x:exportname=disk", unix("/run/x", "disk"), "nbd:unix:/run/x:disk"),
            ("nbd://host/disk", tcp("host", 10809, "disk"), "nbd://host:10809/disk"),
            ("nbd://host:1/a/b", tcp("host", 1, "a/b"), "nbd://host:1/a/b"),
            ("nbd://[::1]:7/", tcp("::1", 7, ""), "nbd://[::1]:7/"),
            ("nbd://[::1]", tcp("::1", 10809, ""), "nbd://[::1]:10809/"),
        ];
        for (text, expected, shown) in cases {
            let export: Export = text.parse().unwrap();
            assert_eq!((&export, export.to_string().as_str()), (&expected, shown), "{text}");
            assert_eq!(shown.parse::<Export>().unwrap(), expected);
        }
        for bad in ["nbd:unix:x", "nbd://", "nbd://:1/x", "nbd://h:x/e", "nbd://h:99999/e", "/x"] {
            assert!(bad.parse::<Export>().is_err(), "{bad}");
        }
    }
}
