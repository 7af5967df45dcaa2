use std::collections::{HashMap, HashSet, VecDeque};

use super::*;
use State::{Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured, Reconfiguring, Unknown};

fn fault() -> Fault {
    Fault::guest(EPROTO, "test")
}

/// All facts a driver can come up with.
fn inputs() -> Vec<Input> {
    let mut all: Vec<Input> = State::ALL.iter().map(|&state| Input::Frontend(Front::At(state))).collect();
    all.extend([
        Input::Frontend(Front::Gone),
        Input::Toolstack { online: true, closing: false },
        Input::Toolstack { online: false, closing: true },
        Input::Toolstack { online: true, closing: true },
        Input::Toolstack { online: false, closing: false },
        Input::Hotplug(true),
        Input::Hotplug(false),
        Input::Opened,
        Input::OpenFailed(fault()),
        Input::Connected,
        Input::ConnectFailed(fault()),
        Input::Postponed,
        Input::Retry,
        Input::Disconnected,
        Input::Released,
        Input::Fault(fault()),
        Input::Removed,
        Input::Stop,
    ]);
    all
}

/// What the world looks like after the actions were done; checks that each of them was allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    state: State,
    features: bool,
    opening: bool,
    open: bool,
    connecting: bool,
    mapped: bool,
    draining: bool,
    closing: bool,
    removed: bool,
    forgotten: bool,
}

impl World {
    const NEW: Self = Self {
        state: Initialising,
        features: false,
        opening: false,
        open: false,
        connecting: false,
        mapped: false,
        draining: false,
        closing: false,
        removed: false,
        forgotten: false,
    };

    /// `false`: this input cannot come now (an answer to a question that was not asked).
    fn takes(&mut self, input: &Input) -> bool {
        match input {
            // Only a fresh connection can be put off.
            Input::Postponed if self.state == Connected => return false,
            // The driver answers at once: nothing else can come first.
            _ if self.connecting && !matches!(input, Input::Connected | Input::ConnectFailed(_) | Input::Postponed) => {
                return false;
            }
            Input::Opened => (self.opening, self.open) = (false, self.open || self.opening),
            Input::OpenFailed(_) => self.opening = false,
            Input::Connected => {
                self.mapped |= self.connecting;
                if self.connecting {
                    self.state = Connected;
                }
                self.connecting = false;
            }
            Input::ConnectFailed(_) | Input::Postponed => self.connecting = false,
            Input::Disconnected if self.draining => (self.draining, self.mapped) = (false, false),
            Input::Released => self.closing = false,
            Input::Removed => self.removed = true,
            // The toolstack's 5 is in the store before it is heard of.
            Input::Toolstack { closing, .. } => {
                if *closing {
                    self.state = Closing;
                } else if self.state == Closing {
                    return false;
                }
            }
            _ => {}
        }
        true
    }

    fn does(&mut self, actions: &[Action], trace: &str) {
        for action in actions {
            assert!(!self.forgotten, "{action:?} after the end: {trace}");
            match action {
                Action::PublishFeatures => {
                    assert!(!self.removed, "{trace}");
                    self.features = true;
                }
                Action::SetState(state) => {
                    assert!(!self.removed, "writes into a directory that is not ours: {trace}");
                    let legal = match state {
                        InitWait => {
                            assert!(self.features, "2 before the features: {trace}");
                            matches!(self.state, Initialising | InitWait | Closed)
                        }
                        Closing => true,
                        Reconfigured => self.state == Connected && self.mapped && !self.draining,
                        Connected => self.state == Reconfigured && self.mapped && !self.draining,
                        Closed => {
                            assert!(!self.mapped && !self.draining, "6 with rings mapped: {trace}");
                            assert!(!self.closing, "6 before the medium is closed: {trace}");
                            self.state == Closing
                        }
                        _ => false,
                    };
                    assert!(legal, "{} -> {state}: {trace}", self.state);
                    self.state = *state;
                }
                Action::Open => {
                    assert!(!self.open && !self.opening && !self.closing && !self.removed, "{trace}");
                    self.opening = true;
                }
                Action::Connect => {
                    assert!(self.open && !self.mapped && !self.connecting && self.state == InitWait, "{trace}");
                    self.connecting = true;
                }
                Action::Reattach => {
                    assert!(self.open && !self.mapped && !self.connecting && self.state == Connected, "{trace}");
                    self.connecting = true;
                }
                Action::Reconfigure => assert!(self.mapped && !self.draining && !self.removed, "{trace}"),
                Action::BeginDisconnect => {
                    assert!(self.mapped && !self.draining, "{trace}");
                    self.draining = true;
                }
                Action::ReportFault(_) => assert!(!self.removed, "{trace}"),
                Action::Release => {
                    assert!(!self.mapped && !self.connecting && !self.closing, "{trace}");
                    (self.open, self.opening, self.closing) = (false, false, true);
                }
                Action::Forget => {
                    assert!(self.removed && !self.open && !self.opening, "{trace}");
                    self.forgotten = true;
                }
            }
        }
    }
}

/// Every reachable (machine, world) and every fact in it: no order of events leads to a forbidden action, and from
/// everywhere there is a way out.
#[test]
fn every_reachable_state_with_every_input() {
    let mut seen = HashSet::new();
    let mut queue = VecDeque::new();
    for found in State::ALL {
        let (machine, actions) = step(Machine::new(), Input::Start(found));
        let mut world = World { state: found, ..World::NEW };
        if matches!(found, Unknown | InitWait) {
            world.state = Initialising;
        }
        if matches!(found, Initialised | Reconfiguring | Reconfigured) {
            world.state = Connected;
        }
        world.does(&actions, &format!("start {found}"));
        if seen.insert((machine.clone(), world)) {
            queue.push_back((machine, world));
        }
    }
    while let Some((machine, world)) = queue.pop_front() {
        finishes(&machine, world);
        for input in inputs() {
            let mut world = world;
            if !world.takes(&input) {
                continue;
            }
            let (next, actions) = step(machine.clone(), input.clone());
            for (machine, world) in failures(&next, world, &actions) {
                if !world.forgotten && seen.insert((machine.clone(), world)) {
                    queue.push_back((machine, world));
                }
            }
            world.does(&actions, &format!("{machine:?} + {input:?} -> {actions:?}"));
            if world.forgotten {
                continue;
            }
            assert!(world.state == next.own() || next.own() == Unknown || world.removed, "{machine:?} + {input:?}");
            if seen.insert((next.clone(), world)) {
                queue.push_back((next, world));
            }
        }
    }
    assert!(seen.len() > 500, "only {} states reached: the inputs lost their reach", seen.len());
}

/// Where it leads when one of the actions fails, done as the driver does it.
fn failures(machine: &Machine, world: World, actions: &[Action]) -> Vec<(Machine, World)> {
    let mut all = Vec::new();
    for (at, action) in actions.iter().enumerate() {
        let reasons: &[Input] = match action {
            Action::PublishFeatures | Action::Reconfigure => &[Input::Removed, Input::Fault(fault())],
            Action::SetState(InitWait) => &[Input::Removed, Input::Toolstack { online: false, closing: true }],
            Action::SetState(_) => &[Input::Removed],
            Action::Open => &[Input::Removed, Input::Hotplug(false)],
            Action::Connect | Action::Reattach => &[
                Input::Frontend(Front::Gone),
                Input::Frontend(Front::At(Connected)),
                Input::Frontend(Front::At(Closed)),
            ],
            _ => continue,
        };
        for reason in reasons {
            let (mut machine, mut world) = (machine.clone(), world);
            world.does(&actions[..at], "before a failure");
            let (void, rest): (Vec<_>, Vec<_>) =
                actions[at + 1..].iter().cloned().partition(Action::is_void_after_failure);
            if *reason == Input::Removed {
                world.removed = true;
            }
            if matches!(reason, Input::Toolstack { .. }) {
                world.state = Closing;
            }
            let trace = format!("{action:?} failed by {reason:?}, then {rest:?}: {machine:?}");
            let rest: Vec<Action> = rest.into_iter().filter(|a| !matches!(a, Action::ReportFault(_))).collect();
            world.does(&rest, &trace);
            let skipped = (action.is_question() || void.iter().any(Action::is_question)).then_some(Input::Skipped);
            for input in std::iter::once(reason.clone()).chain(skipped) {
                let (next, actions) = step(machine, input);
                machine = next;
                world.does(&actions, &trace);
            }
            all.push((machine, world));
        }
    }
    all
}

/// From anywhere: with the frontend gone the toolstack gets its 6 and everything is released; with the directory gone
/// the device is forgotten.
fn finishes(machine: &Machine, world: World) {
    for removed in [false, true] {
        let end = if removed { Input::Removed } else { Input::Toolstack { online: false, closing: true } };
        let mut machine = machine.clone();
        let mut world = world;
        if world.removed && !removed {
            continue;
        }
        let mut last = Vec::new();
        let facts = [
            Input::Opened,
            Input::Connected,
            Input::Frontend(Front::Gone),
            Input::Toolstack { online: true, closing: false },
            end,
            Input::Opened,
            Input::Connected,
            Input::Disconnected,
            Input::Released,
        ];
        for input in facts {
            if !world.takes(&input) {
                continue;
            }
            let (next, actions) = step(machine.clone(), input);
            machine = next;
            world.does(&actions, &format!("finishing {machine:?}"));
            last.extend(actions);
        }
        assert!((machine.is_idle() || removed) && !world.mapped && !world.open, "{machine:?} {last:?}");
        assert!(if removed { world.forgotten } else { world.state == Closed }, "{machine:?} {last:?}");
    }
}

/// Runs facts one after the other and collects what was done, as short words. A medium closes at once, unless the story
/// says when it does.
fn run(inputs: &[Input]) -> Vec<String> {
    let mut machine = Machine::new();
    let mut said = Vec::new();
    let slow = inputs.contains(&Input::Released);
    let mut inputs: VecDeque<Input> = inputs.iter().cloned().collect();
    while let Some(input) = inputs.pop_front() {
        let (next, actions) = step(machine, input);
        machine = next;
        if actions.contains(&Action::Release) && !slow {
            inputs.push_front(Input::Released);
        }
        said.extend(actions.iter().map(|action| match action {
            Action::SetState(state) => state.to_string(),
            Action::PublishFeatures => "features".into(),
            Action::ReportFault(_) => "error".into(),
            Action::BeginDisconnect => "drain".into(),
            other => format!("{other:?}").to_lowercase(),
        }));
    }
    said
}

#[test]
fn stories() {
    let front = |state| Input::Frontend(Front::At(state));
    let start = || vec![front(Initialising), Input::Start(Initialising)];
    let attached = || {
        let mut all = start();
        all.extend([Input::Hotplug(true), Input::Opened, front(Initialised), Input::Connected]);
        all
    };
    let with = |mut all: Vec<Input>, more: &[Input]| {
        all.extend_from_slice(more);
        all
    };
    let remove = Input::Toolstack { online: false, closing: true };
    let stories: HashMap<&str, (Vec<Input>, &str)> = HashMap::from([
        ("attach", (attached(), "features 2 open connect")),
        (
            "frontend first",
            (
                with(start(), &[front(Connected), Input::Hotplug(true), Input::Opened, Input::Connected]),
                "features 2 open connect",
            ),
        ),
        ("no hotplug, no disk", (with(start(), &[front(Initialised), front(Connected)]), "features 2")),
        (
            "repeats",
            (with(attached(), &[front(Initialised), front(Connected), front(Connected)]), "features 2 open connect"),
        ),
        (
            "guest closes",
            (
                with(attached(), &[front(Closing), Input::Disconnected, front(Closed)]),
                "features 2 open connect 5 drain 6",
            ),
        ),
        (
            "reconnect",
            (
                with(
                    attached(),
                    &[front(Closed), Input::Disconnected, front(Initialising), front(Connected), Input::Connected],
                ),
                "features 2 open connect 5 drain 6 features 2 connect",
            ),
        ),
        (
            "reconnect in a hurry",
            (
                with(attached(), &[front(Closed), Input::Disconnected, front(Initialised), Input::Connected]),
                "features 2 open connect 5 drain 6 features 2 connect",
            ),
        ),
        (
            "rings of a process before us",
            (
                vec![front(Connected), Input::Start(Closed), front(Connected), front(Closed), front(Connected)],
                "features 2",
            ),
        ),
        (
            "reconfiguring",
            (
                with(attached(), &[front(Reconfiguring), front(Reconfiguring), front(Connected), front(Connected)]),
                "features 2 open connect reconfigure 8 4",
            ),
        ),
        (
            "reconfiguring, and gone",
            (
                with(attached(), &[front(Reconfiguring), front(Closed), Input::Disconnected]),
                "features 2 open connect reconfigure 8 5 drain 6",
            ),
        ),
        (
            "kexec",
            (
                with(attached(), &[front(Initialising), Input::Disconnected, front(Initialised)]),
                "features 2 open connect 5 drain 6 features 2 connect",
            ),
        ),
        (
            "detach",
            (
                with(attached(), &[front(Connected), remove.clone(), front(Closed), Input::Disconnected]),
                "features 2 open connect drain release 6",
            ),
        ),
        (
            "detach while busy",
            (with(attached(), &[front(Connected), remove.clone(), front(Connected)]), "features 2 open connect"),
        ),
        (
            "detach before connect",
            (with(start(), &[Input::Hotplug(true), Input::Opened, remove.clone()]), "features 2 open release 6"),
        ),
        (
            "detach while it is opened",
            (with(start(), &[Input::Hotplug(true), remove.clone(), Input::Opened]), "features 2 open release 6"),
        ),
        (
            "removed while it is opened",
            (with(start(), &[Input::Hotplug(true), Input::Removed, Input::Opened]), "features 2 open release forget"),
        ),
        (
            "opened late, the guest waits",
            (
                with(start(), &[Input::Hotplug(true), front(Initialised), Input::Opened, Input::Connected]),
                "features 2 open connect",
            ),
        ),
        (
            "opened late, the guest went and came back",
            (
                with(
                    start(),
                    &[Input::Hotplug(true), front(Closed), front(Initialising), Input::Opened, front(Initialised)],
                ),
                "features 2 open 5 6 features 2 connect",
            ),
        ),
        (
            "opening fails when the guest is gone",
            (
                with(start(), &[Input::Hotplug(true), front(Closed), Input::OpenFailed(fault()), front(Initialising)]),
                "features 2 open 5 6 error features 2 open",
            ),
        ),
        ("stop while it is opened", (with(start(), &[Input::Hotplug(true), Input::Stop]), "features 2 open release")),
        (
            "detach, and the storage is long in closing",
            (
                with(
                    start(),
                    &[
                        Input::Hotplug(true),
                        Input::Opened,
                        remove.clone(),
                        front(Closed),
                        remove.clone(),
                        Input::Released,
                    ],
                ),
                "features 2 open release 6",
            ),
        ),
        (
            "removed, and the storage is long in closing",
            (
                with(start(), &[Input::Hotplug(true), Input::Opened, remove.clone(), Input::Removed, Input::Released]),
                "features 2 open release forget",
            ),
        ),
        (
            "detach when closed",
            (
                with(attached(), &[front(Closed), Input::Disconnected, remove]),
                "features 2 open connect 5 drain 6 release 6",
            ),
        ),
        (
            "open fails",
            (
                with(start(), &[Input::Hotplug(true), Input::OpenFailed(fault()), front(Initialising)]),
                "features 2 open error 5 6",
            ),
        ),
        (
            "open fails, tried again",
            (
                with(start(), &[Input::Hotplug(true), Input::OpenFailed(fault()), front(Closed), front(Initialising)]),
                "features 2 open error 5 6 features 2 open",
            ),
        ),
        (
            "guest breaks the rules",
            (
                with(attached(), &[Input::Fault(fault()), Input::Fault(fault()), Input::Disconnected, front(Closed)]),
                "features 2 open connect error 5 drain 6",
            ),
        ),
        (
            "garbage",
            (with(attached(), &[front(Unknown), Input::Disconnected]), "features 2 open connect error 5 drain 6"),
        ),
        (
            "frontend deleted",
            (
                with(attached(), &[Input::Frontend(Front::Gone), Input::Disconnected]),
                "features 2 open connect 5 drain 6",
            ),
        ),
        (
            "backend deleted",
            (
                with(attached(), &[Input::Removed, front(Closed), Input::Disconnected]),
                "features 2 open connect drain release forget",
            ),
        ),
        (
            "stop",
            (with(attached(), &[Input::Stop, Input::Disconnected]), "features 2 open connect error 5 drain release 6"),
        ),
        (
            "stop while waiting",
            (with(start(), &[Input::Hotplug(true), Input::Opened, Input::Stop]), "features 2 open release"),
        ),
        (
            "put off until the device says so",
            (
                with(
                    start(),
                    &[
                        Input::Hotplug(true),
                        Input::Opened,
                        front(Initialised),
                        Input::Postponed,
                        Input::Hotplug(true),
                        front(Initialised),
                        Input::Retry,
                        Input::Connected,
                    ],
                ),
                "features 2 open connect connect",
            ),
        ),
        (
            "put off, and the frontend starts over",
            (
                with(
                    start(),
                    &[
                        Input::Hotplug(true),
                        Input::Opened,
                        front(Initialised),
                        Input::Postponed,
                        front(Initialising),
                        front(Initialised),
                        Input::Connected,
                    ],
                ),
                "features 2 open connect connect",
            ),
        ),
        (
            "adopted",
            (vec![front(Connected), Input::Start(Connected), Input::Opened, Input::Connected], "open reattach"),
        ),
        (
            "not adopted",
            (
                vec![
                    front(Connected),
                    Input::Start(Connected),
                    Input::Opened,
                    Input::ConnectFailed(fault()),
                    front(Closed),
                ],
                "open reattach error 5 6",
            ),
        ),
    ]);
    for (name, (inputs, expected)) in stories {
        assert_eq!(run(&inputs).join(" "), expected, "{name}");
    }
}
