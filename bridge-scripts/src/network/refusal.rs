//! Why a network program does nothing.

use super::words::Unclear;
use crate::apply;

/// Why a network program does nothing. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// What was typed makes no sense.
    #[error(transparent)]
    Unclear(#[from] Unclear),
    /// The machine is not as it has to be.
    #[error("{0}")]
    Machine(String),
    /// The plan could not be applied.
    #[error(transparent)]
    Apply(#[from] apply::Error),
}

/// An error about the machine.
pub(super) fn refuse<T>(message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Machine(message.into()))
}
