//! A list of steps with a name: what a program is about to do.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::state::State;
use crate::step::Step;

/// What a program is about to do, in order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What it is for, in a few words: `network-bridge start xenbr0`. It stands in messages about an unfinished run.
    pub title: String,
    /// The steps.
    pub steps: Vec<Step>,
    /// What the administrator should know, a line each.
    pub notes: Vec<String>,
}

impl Plan {
    /// A plan without steps.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), ..Self::default() }
    }

    /// Adds a step.
    pub fn push(&mut self, step: Step) -> &mut Self {
        self.steps.push(step);
        self
    }

    /// Adds a line for the administrator.
    pub fn note(&mut self, line: impl Into<String>) -> &mut Self {
        self.notes.push(line.into());
        self
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// What takes back each step, given the network before the first one. It is carried out from the last to the first.
    pub fn undo(&self, before: &State) -> Vec<Vec<Step>> {
        let mut state = before.clone();
        let mut undo = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            undo.push(step.undo(&state));
            state.take(step);
        }
        undo
    }

    /// What the network is meant to be afterwards. What the kernel does by itself (routes to an address's network,
    /// link-local addresses) is not in it.
    pub fn outcome(&self, before: &State) -> State {
        let mut state = before.clone();
        self.steps.iter().for_each(|step| state.take(step));
        state
    }
}

impl fmt::Display for Plan {
    /// The steps with their numbers, a line each, and then the notes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "{:>3}. {step}", index + 1)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}
