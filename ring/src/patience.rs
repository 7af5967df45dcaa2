//! How long an idle queue looks at its ring before it sleeps; for both backends.
//!
//! Waking a sleeping thread on another core costs 7 to 20 µs, looking at memory 0.2 µs. So looking pays while the next
//! request is near; when the guest runs on this very core it never does, because the guest cannot run while we look.
//! Nobody tells us which it is, so we learn it: looks that find something earn trust, looks that find nothing cost
//! four times as much of it, and without trust there is no look; sleeps that turned out short make it worth trying
//! again. A look is always as long as a sleep would cost: shorter ones only fail more often, and teach the wrong thing.

use std::time::Duration;

/// How long a look lasts, in microseconds; and the sleep below which a look would have done.
const LOOK: u32 = 50;
/// Trust to begin with, and to try again with; what a look that found nothing costs; and the most there can be.
const FIRST: u32 = 16;
const AGAIN: u32 = 4;
const PRICE: u32 = 4;
const MOST: u32 = 64;
/// Least and most short sleeps in a row that are asked for before looking is tried again.
const LEAST_DOUBT: u32 = 8;
const MOST_DOUBT: u32 = 4096;
/// Events in a row that may mean nothing. An honest guest's sometimes come late, after its request was found.
const IDLE_EVENTS: u32 = 16;
/// The longest time, as a power of two of milliseconds, that an event channel stays masked for them.
const LONGEST_HOLD: u32 = 6;

/// What a queue has learnt about its guest.
#[derive(Debug)]
pub struct Patience {
    /// Looks that found something, less those that did not.
    trust: u32,
    /// Short sleeps in a row so far.
    short_sleeps: u32,
    /// Short sleeps in a row after which looking is tried again. Doubles each time the trial fails.
    doubt: u32,
    /// Events in a row for which there was nothing to do.
    idle_events: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { trust: FIRST, short_sleeps: 0, doubt: LEAST_DOUBT, idle_events: 0 }
    }
}

impl Patience {
    /// How long to leave the event channel masked before the next sleep: a guest that rings again and again for nothing
    /// (XSA-332) would otherwise keep a processor of ours busy. The kernel's backends do the same to such guests.
    pub fn hold(&self) -> Duration {
        match self.idle_events.checked_sub(IDLE_EVENTS) {
            None => Duration::ZERO,
            Some(more) => Duration::from_millis(1 << more.min(LONGEST_HOLD)),
        }
    }

    /// An event came.
    pub fn rang(&mut self) {
        self.idle_events = self.idle_events.saturating_add(1);
    }

    /// The guest made a request.
    #[inline]
    pub fn asked(&mut self) {
        self.idle_events = 0;
    }

    /// How long to look now; zero for not at all.
    pub fn look(&self) -> Duration {
        if self.trust > 0 { Duration::from_micros(LOOK.into()) } else { Duration::ZERO }
    }

    /// Looking found something.
    #[inline]
    pub fn found(&mut self) {
        self.trust = (self.trust + 1).min(MOST);
        if self.trust > FIRST {
            self.doubt = LEAST_DOUBT;
        }
    }

    /// Looking found nothing.
    pub fn found_nothing(&mut self) {
        self.trust = self.trust.saturating_sub(PRICE);
        if self.trust == 0 {
            self.short_sleeps = 0;
            self.doubt = (self.doubt * 2).min(MOST_DOUBT);
        }
    }

    /// The queue slept this long.
    pub fn slept(&mut self, time: Duration) {
        if time > Duration::from_micros(LOOK.into()) {
            // One long sleep among many short ones says nothing: the machine was busy with something else.
            self.short_sleeps = self.short_sleeps.saturating_sub(4);
            return;
        }
        self.short_sleeps += 1;
        if self.trust == 0 && self.short_sleeps >= self.doubt {
            self.trust = AGAIN;
            self.short_sleeps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(10);
    const LONG: Duration = Duration::from_millis(1);

    #[test]
    fn a_busy_guest_on_another_core_is_looked_for_through_a_disturbance() {
        let mut patience = Patience::default();
        (0..100).for_each(|_| patience.found());
        // Something else had the processor for a few milliseconds.
        for _ in 0..10 {
            patience.found_nothing();
            patience.slept(LONG);
        }
        assert_eq!(patience.look(), Duration::from_micros(50));
    }

    #[test]
    fn after_a_long_disturbance_looking_is_soon_tried_again() {
        let mut patience = Patience::default();
        (0..100).for_each(|_| patience.found_nothing());
        let mut sleeps = 0;
        while patience.look().is_zero() {
            patience.slept(SHORT);
            sleeps += 1;
        }
        assert!(sleeps <= 4096, "{sleeps}");
        (0..20).for_each(|_| patience.found());
        (0..5).for_each(|_| patience.found_nothing());
        (0..16).for_each(|_| patience.slept(SHORT));
        assert!(!patience.look().is_zero(), "what worked before is trusted sooner");
    }

    /// The share of looks among wake-ups goes towards nothing when no look ever finds anything.
    #[test]
    fn a_guest_on_the_same_core_is_left_alone() {
        let mut patience = Patience::default();
        let mut looks = 0;
        for _ in 0..100_000 {
            if !patience.look().is_zero() {
                looks += 1;
                patience.found_nothing();
            }
            patience.slept(SHORT);
        }
        assert!(looks < 200, "{looks} looks in 100000 rounds");
    }

    #[test]
    fn a_guest_that_rings_for_nothing_waits_longer_and_longer() {
        let mut patience = Patience::default();
        let mut holds = Vec::new();
        for _ in 0..40 {
            patience.rang();
            holds.push(patience.hold().as_millis());
        }
        assert_eq!(holds[..15], [0; 15]);
        assert_eq!(holds[15..22], [1, 2, 4, 8, 16, 32, 64]);
        assert!(holds[22..].iter().all(|&hold| hold == 64));
        patience.asked();
        assert_eq!(patience.hold(), Duration::ZERO);
    }

    #[test]
    fn an_idle_guest_costs_nothing_and_a_busy_one_is_noticed() {
        let mut patience = Patience::default();
        for _ in 0..4 {
            patience.found_nothing();
        }
        for _ in 0..1000 {
            patience.slept(LONG);
        }
        assert!(patience.look().is_zero());
        for _ in 0..64 {
            patience.slept(SHORT);
        }
        assert!(!patience.look().is_zero());
    }
}
