//! The backend's side of one device's life, as a pure function. No I/O, no clock, no device: facts go in, actions come
//! out, and the same machine serves every kind of device.
//!
//! The contract has three parties. libxl creates both directories at state 1, waits for our 2 (10 s), runs the hotplug
//! program, and on removal writes `online=0, state=5` into our directory and waits for our 6 (10 s). blkfront answers
//! 2 with 3, netfront with 4; both answer our 5 by closing. A frontend that closed may come back with 1.

use super::{Fault, State};

const EPROTO: i32 = 71;
const ESHUTDOWN: i32 = 108;

/// What the frontend's `state` node says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Front {
    /// There is no such node: the frontend's directory is gone.
    Gone,
    /// A state. Text that is none counts as [`State::Unknown`].
    At(State),
}

impl Front {
    /// It may be using its rings.
    pub(super) fn is_serving(self) -> bool {
        use State::{Connected, Initialised, Reconfigured, Reconfiguring};
        matches!(self, Self::At(Initialised | Connected | Reconfiguring | Reconfigured))
    }

    /// It has published its rings.
    pub(super) fn is_ready(self) -> bool {
        matches!(self, Self::At(State::Initialised | State::Connected))
    }
}

/// A fact.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// The device was found in the store, with this in our own `state` node. Nothing is done before this.
    Start(State),
    /// The frontend's `state` node was read.
    Frontend(Front),
    /// Our own `online` and `state` nodes were read.
    Toolstack {
        /// `online` is `1`: the device is to stay when its frontend closes.
        online: bool,
        /// Our `state` reads Closing: we wrote it, or we are asked to close.
        closing: bool,
    },
    /// `hotplug-status` was read: whether it is `connected`.
    Hotplug(bool),
    /// The answer to [`Action::Open`], perhaps long after it: the medium is open.
    Opened,
    /// The answer to [`Action::Open`]: it is not.
    OpenFailed(Fault),
    /// The answer to [`Action::Connect`] or [`Action::Reattach`]: the rings are mapped and state 4 is published.
    Connected,
    /// The answer to [`Action::Connect`] or [`Action::Reattach`]: nothing is mapped.
    ConnectFailed(Fault),
    /// The answer to [`Action::Connect`]: not now. The frontend waits, and [`Input::Retry`] follows.
    Postponed,
    /// What the device waited for has come: it may connect.
    Retry,
    /// The answer to [`Action::Open`], [`Action::Connect`] or [`Action::Reattach`]: not even tried, because an action
    /// before it failed. Comes after that failure.
    Skipped,
    /// The answer to [`Action::BeginDisconnect`]: nothing is in flight or mapped.
    Disconnected,
    /// The answer to [`Action::Release`], perhaps long after it: nothing is held any more.
    Released,
    /// The device cannot go on.
    Fault(Fault),
    /// Our directory was removed, or removed and made anew.
    Removed,
    /// This process wants to end.
    Stop,
}

/// What has to be done, in the order given. If one fails, that failure is the next input, and of the rest only what
/// lets go of something is still done (see [`Action::is_void_after_failure`]).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Publish what the frontend needs before it answers state 2.
    PublishFeatures,
    /// Write our state.
    SetState(State),
    /// Open the medium. Storage may take its time, so other facts can come before the answer.
    Open,
    /// Map the rings, and publish keys and state 4 in one transaction.
    Connect,
    /// Take over the rings of a process that died in state 4.
    Reattach,
    /// Read the frontend's keys anew; the rings stay.
    Reconfigure,
    /// Stop consuming; [`Input::Disconnected`] follows when what is in flight has ended.
    BeginDisconnect,
    /// Write the error node.
    ReportFault(Fault),
    /// Close the medium, or give up opening it; hold nothing any more.
    Release,
    /// Forget the device. Nothing of it is in the store any more.
    Forget,
}

impl Action {
    /// Whether the action makes no sense once an action before it in the same list has failed: to publish state 2
    /// without the features, say. `Open`, `Connect` and `Reattach` are then answered with [`Input::Skipped`].
    #[must_use]
    pub fn is_void_after_failure(&self) -> bool {
        matches!(self, Self::PublishFeatures | Self::SetState(_)) || self.is_question()
    }

    /// Whether it has to be answered even if it is not done.
    #[must_use]
    pub fn is_question(&self) -> bool {
        matches!(self, Self::Open | Self::Connect | Self::Reattach)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Medium {
    Shut,
    Opening,
    Open,
    Closing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Rings {
    None,
    Connecting,
    Up,
    Draining,
}

/// All that has to be remembered of one device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Machine {
    started: bool,
    own: State,
    front: Front,
    /// The frontend's directory has existed: only then does its absence mean that it was deleted.
    front_seen: bool,
    /// The frontend has been seen without rings since we were last connected: rings it offers now are new ones.
    front_left: bool,
    online: bool,
    hotplug: bool,
    medium: Medium,
    rings: Rings,
    /// A fault was reported since the last announcement.
    faulty: bool,
    /// Where the frontend stood at that fault, until it moves. As long as it stands there, trying again would fail
    /// again, for ever and at full speed.
    stuck_at: Option<Front>,
    /// The device cannot connect yet, and will say when it can.
    postponed: bool,
    stopping: bool,
    removed: bool,
    released: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

/// Takes in one fact and says what to do about it.
#[must_use]
pub fn step(mut machine: Machine, input: Input) -> (Machine, Vec<Action>) {
    let mut actions = Vec::new();
    machine.learn(input, &mut actions);
    while machine.started && machine.turn(&mut actions) {}
    (machine, actions)
}

impl Machine {
    /// A device nothing is known of yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            started: false,
            own: State::Unknown,
            front: Front::Gone,
            front_seen: false,
            front_left: false,
            online: true,
            hotplug: false,
            medium: Medium::Shut,
            rings: Rings::None,
            faulty: false,
            stuck_at: None,
            postponed: false,
            stopping: false,
            removed: false,
            released: false,
        }
    }

    /// The state we have announced, or are about to.
    #[must_use]
    pub fn own(&self) -> State {
        self.own
    }

    /// What the frontend was last known to say.
    #[must_use]
    pub fn front(&self) -> Front {
        self.front
    }

    /// Nothing is mapped and nothing is open: the process may end.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.is_let_go() && self.medium == Medium::Shut
    }

    /// Nothing is mapped, and the medium is closed, or about to be.
    #[must_use]
    pub fn is_let_go(&self) -> bool {
        self.rings == Rings::None && self.released
    }

    fn learn(&mut self, input: Input, out: &mut Vec<Action>) {
        match input {
            Input::Start(found) => self.start(found),
            Input::Frontend(front) => {
                self.front = front;
                self.front_seen |= front != Front::Gone;
                self.front_left |= !front.is_serving();
                self.postponed &= front.is_ready();
                if self.stuck_at.is_some_and(|at| at != front) {
                    self.stuck_at = None;
                }
            }
            Input::Toolstack { online, closing } => {
                self.online = online;
                // Also when we are at 6 already: whoever wrote 5 over it waits for a 6.
                if closing && self.started {
                    self.own = State::Closing;
                }
            }
            Input::Hotplug(connected) => self.hotplug = connected,
            Input::Opened if self.medium == Medium::Opening => self.medium = Medium::Open,
            Input::OpenFailed(fault) if self.medium == Medium::Opening => {
                self.medium = Medium::Shut;
                self.fault(fault, out);
            }
            Input::Connected if self.rings == Rings::Connecting => {
                self.rings = Rings::Up;
                self.front_left = false;
                if self.own == State::InitWait {
                    self.own = State::Connected;
                }
            }
            Input::ConnectFailed(fault) if self.rings == Rings::Connecting => {
                self.rings = Rings::None;
                self.fault(fault, out);
            }
            Input::Postponed if self.rings == Rings::Connecting => {
                self.rings = Rings::None;
                self.postponed = true;
            }
            Input::Retry => self.postponed = false,
            Input::Skipped => {
                if self.medium == Medium::Opening {
                    self.medium = Medium::Shut;
                }
                if self.rings == Rings::Connecting {
                    self.rings = Rings::None;
                }
            }
            Input::Disconnected if self.rings == Rings::Draining => self.rings = Rings::None,
            Input::Released if self.medium == Medium::Closing => self.medium = Medium::Shut,
            // Answers to what was not asked: a device that says it twice.
            Input::Opened
            | Input::OpenFailed(_)
            | Input::Connected
            | Input::ConnectFailed(_)
            | Input::Postponed
            | Input::Disconnected
            | Input::Released => {}
            Input::Fault(fault) => self.fault(fault, out),
            Input::Removed => self.removed = true,
            Input::Stop => self.stopping = true,
        }
    }

    fn start(&mut self, found: State) {
        self.started = true;
        self.faulty = false;
        self.own = match found {
            State::Unknown | State::Initialising | State::InitWait => State::Unknown,
            // A predecessor died here, and its frontend still waits for answers.
            State::Initialised | State::Connected | State::Reconfiguring | State::Reconfigured => State::Connected,
            State::Closing | State::Closed => found,
        };
    }

    fn fault(&mut self, fault: Fault, out: &mut Vec<Action>) {
        if self.faulty || self.removed {
            return;
        }
        self.faulty = true;
        self.stuck_at = Some(self.front);
        out.push(Action::ReportFault(fault));
        if !matches!(self.own, State::Closing | State::Closed) {
            self.set(State::Closing, out);
        }
    }

    fn set(&mut self, state: State, out: &mut Vec<Action>) {
        self.own = state;
        out.push(Action::SetState(state));
    }

    /// Does the next thing that the facts call for; `false` if there is none.
    fn turn(&mut self, out: &mut Vec<Action>) -> bool {
        if self.rings == Rings::Connecting {
            return false;
        }
        if self.removed {
            // Nothing is written any more: whatever is at our path now belongs to somebody else.
            return self.drain(out) || self.release(out);
        }
        if self.medium == Medium::Closing {
            return false;
        }
        match self.own {
            State::Unknown => self.announce_or_end(out),
            State::InitWait => self.wait(out),
            State::Connected | State::Reconfigured => self.serve(out),
            State::Closing => self.close(out),
            _ => self.rest(out),
        }
    }

    fn announce_or_end(&mut self, out: &mut Vec<Action>) -> bool {
        if self.stopping {
            return self.release(out);
        }
        self.faulty = false;
        self.stuck_at = None;
        self.released = false;
        out.push(Action::PublishFeatures);
        self.set(State::InitWait, out);
        true
    }

    fn wait(&mut self, out: &mut Vec<Action>) -> bool {
        if self.stopping {
            // State 2 stays: the next process announces again and nobody notices.
            return self.release(out);
        }
        let left = match self.front {
            Front::Gone => self.front_seen,
            Front::At(state) => matches!(state, State::Closing | State::Closed),
        };
        if left {
            self.set(State::Closing, out);
            return true;
        }
        // Before the hotplug program is done there may be nothing to open; and a 4 before that would make libxl, which
        // waits for exactly 2, give up.
        if self.hotplug && self.medium == Medium::Shut {
            self.medium = Medium::Opening;
            self.released = false;
            out.push(Action::Open);
        } else if self.hotplug && self.medium == Medium::Open && self.front.is_ready() && !self.postponed {
            self.rings = Rings::Connecting;
            out.push(Action::Connect);
        }
        false
    }

    fn serve(&mut self, out: &mut Vec<Action>) -> bool {
        if self.stopping {
            self.fault(Fault::host(ESHUTDOWN, "the backend process was told to stop"), out);
        } else if self.front == Front::At(State::Unknown) {
            self.fault(Fault::guest(EPROTO, "the frontend wrote a state that does not exist"), out);
        } else if !self.front.is_serving() {
            // 5 and 6 are a goodbye; 1 is a kernel that was started over the old one without one.
            self.set(State::Closing, out);
        } else if self.rings == Rings::None {
            // State 4 without rings: it was a process before us that connected.
            match self.medium {
                Medium::Shut => {
                    self.medium = Medium::Opening;
                    self.released = false;
                    out.push(Action::Open);
                }
                Medium::Open => {
                    self.rings = Rings::Connecting;
                    out.push(Action::Reattach);
                }
                Medium::Opening | Medium::Closing => {}
            }
            return false;
        } else if self.own == State::Connected && self.front == Front::At(State::Reconfiguring) {
            out.push(Action::Reconfigure);
            self.set(State::Reconfigured, out);
        } else if self.own == State::Reconfigured && self.front == Front::At(State::Connected) {
            self.set(State::Connected, out);
        } else {
            return false;
        }
        true
    }

    fn close(&mut self, out: &mut Vec<Action>) -> bool {
        // Asked by the toolstack alone, we go on serving until the guest lets go: it may have the disk mounted, and
        // has yet to write back.
        if (self.faulty || self.stopping || !self.front.is_serving()) && self.drain(out) {
            return true;
        }
        let let_go = matches!(
            self.front,
            Front::Gone | Front::At(State::Unknown | State::Initialising | State::InitWait | State::Closed)
        );
        if self.rings == Rings::None && (let_go || !self.online || self.stopping) {
            // Whoever sees our 6 may hand the medium to the next guest at once, so it is let go of before.
            let keeps = self.online && !self.stopping;
            if keeps || !self.release(out) {
                self.set(State::Closed, out);
            }
            return true;
        }
        false
    }

    fn rest(&mut self, out: &mut Vec<Action>) -> bool {
        if self.stopping || !self.online {
            return self.release(out);
        }
        // A frontend in a hurry may have gone from 6 over 1 to 3 before we looked.
        let back = self.front == Front::At(State::Initialising) || (self.front_left && self.front.is_ready());
        if back && self.stuck_at.is_none() {
            self.own = State::Unknown;
            return true;
        }
        false
    }

    fn drain(&mut self, out: &mut Vec<Action>) -> bool {
        let up = self.rings == Rings::Up;
        if up {
            self.rings = Rings::Draining;
            out.push(Action::BeginDisconnect);
        }
        up
    }

    fn release(&mut self, out: &mut Vec<Action>) -> bool {
        if self.rings == Rings::None && !self.released {
            self.released = true;
            self.medium = Medium::Closing;
            out.push(Action::Release);
            if self.removed {
                out.push(Action::Forget);
                self.started = false;
            }
            return true;
        }
        if self.removed && self.is_let_go() {
            out.push(Action::Forget);
            self.started = false;
            return true;
        }
        false
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
