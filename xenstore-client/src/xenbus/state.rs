//! The states of a device's two ends.

use std::fmt;

/// What one end of a device says about itself in its `state` node (`enum xenbus_state`, `xenbus.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// 0: nobody is there, or it cannot say.
    Unknown = 0,
    /// 1: created by the toolstack; the driver has not spoken yet.
    Initialising = 1,
    /// 2: the backend's early features are published; it waits for the frontend (and for the hotplug program).
    InitWait = 2,
    /// 3: blkfront has published its rings. netfront skips this state.
    Initialised = 3,
    /// 4: in use.
    Connected = 4,
    /// 5: going away.
    Closing = 5,
    /// 6: gone.
    Closed = 6,
    /// 7: renegotiating.
    Reconfiguring = 7,
    /// 8: renegotiated.
    Reconfigured = 8,
}

impl State {
    /// All states in order.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Reads the value of a `state` node: one decimal digit and nothing else. `None` for all other text: a guest that
    /// writes ` 4` or `04` gets what it would get for `abc`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.as_bytes() {
            [digit @ b'0'..=b'8'] => Some(Self::ALL[usize::from(digit - b'0')]),
            _ => None,
        }
    }

    /// The number of the state.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for State {
    /// The number, as it is written into the store.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_strictly() {
        for state in State::ALL {
            assert_eq!(State::parse(&state.to_string()), Some(state));
        }
        for wrong in ["", "9", "04", " 4", "4 ", "4\n", "-1", "abc", "4294967300", "0x4", "٤"] {
            assert_eq!(State::parse(wrong), None, "{wrong:?}");
        }
    }
}
