//! Lines of the log that a stranger can cause: so many a second, and how many were left out.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Counts lines.
#[derive(Debug)]
pub struct Seldom {
    a_second: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Instant,
    told: u32,
    left_out: u64,
}

impl Seldom {
    /// So many lines a second.
    pub fn new(a_second: u32) -> Seldom {
        Seldom {
            a_second,
            state: Mutex::new(State {
                since: Instant::now(),
                told: 0,
                left_out: 0,
            }),
        }
    }

    /// Whether a line may be written now, and how many were left out since the last one that was.
    pub fn may_tell(&self) -> Option<u64> {
        self.may_tell_at(Instant::now())
    }

    fn may_tell_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.since) >= Duration::from_secs(1) {
            (state.since, state.told) = (now, 0);
        }
        if state.told == self.a_second {
            state.left_out += 1;
            return None;
        }
        state.told += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_counted() {
        let seldom = Seldom::new(2);
        let now = Instant::now();
        let told: Vec<_> = (0..5).map(|_| seldom.may_tell_at(now)).collect();
        assert_eq!(told, [Some(0), Some(0), None, None, None]);
        let later = now + Duration::from_secs(2);
        assert_eq!(seldom.may_tell_at(later), Some(3));
        assert_eq!(seldom.may_tell_at(later), Some(0));
    }
}
