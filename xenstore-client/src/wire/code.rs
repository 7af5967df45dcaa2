//! The names of errors on the wire.

use std::fmt;

macro_rules! codes {
    ($($name:ident $text:literal $errno:literal $doc:literal;)*) => {
        /// Why the store refused (`xsd_errors` in `xs_wire.h`: errors travel as their names, not as numbers).
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $(#[doc = $doc] $name,)*
            /// A name this crate does not know; to be treated like EIO. The text is kept for the log.
            Other(String),
        }

        impl ErrorCode {
            /// Every name of `xs_wire.h`.
            pub const ALL: &'static [ErrorCode] = &[$(Self::$name),*];

            /// Reads the payload of an ERROR message (without the trailing NUL).
            #[must_use]
            pub fn from_name(name: &str) -> Self {
                match name {
                    $($text => Self::$name,)*
                    other => Self::Other(other.to_owned()),
                }
            }

            /// The name as it travels.
            #[must_use]
            pub fn name(&self) -> &str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Other(text) => text,
                }
            }

            /// The Linux errno of the same meaning (x86 and Arm); [`ErrorCode::Other`] counts as EIO.
            #[must_use]
            pub fn errno(&self) -> i32 {
                match self {
                    $(Self::$name => $errno,)*
                    Self::Other(_) => 5,
                }
            }
        }
    };
}

codes! {
    Invalid "EINVAL" 22 "The request is malformed.";
    Access "EACCES" 13 "The node's permissions forbid it.";
    Exists "EEXIST" 17 "The watch is already set.";
    IsDirectory "EISDIR" 21 "Known name, unused by today's stores.";
    NotFound "ENOENT" 2 "No such node, watch or transaction.";
    NoMemory "ENOMEM" 12 "The store is out of memory, or over its memory quota.";
    NoSpace "ENOSPC" 28 "A quota is exhausted.";
    Io "EIO" 5 "The store failed.";
    NotEmpty "ENOTEMPTY" 39 "Known name, unused by today's stores.";
    NotImplemented "ENOSYS" 38 "The store does not know this operation.";
    ReadOnly "EROFS" 30 "The connection may only read.";
    Busy "EBUSY" 16 "A transaction inside a transaction.";
    Again "EAGAIN" 11 "The transaction met a conflict: do all of it again.";
    AlreadyConnected "EISCONN" 106 "The domain is already introduced.";
    TooBig "E2BIG" 7 "The reply or request does not fit one message.";
    NotPermitted "EPERM" 1 "Only the owner, or a privileged domain, may do this.";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_text_is_kept() {
        for code in ErrorCode::ALL {
            assert_eq!(&ErrorCode::from_name(code.name()), code);
        }
        let odd = ErrorCode::from_name("EODD");
        assert_eq!((odd.name(), odd.errno()), ("EODD", 5));
    }
}
