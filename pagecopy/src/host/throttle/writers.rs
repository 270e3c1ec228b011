//! Which threads write: by the page faults that the kernel counts for each.

use std::fs;
use std::time::Instant;

#[cfg(target_arch = "x86_64")]
use super::{FIRST_LOOK, LOOK_EVERY};

/// Threads among which some write.
#[derive(Debug)]
pub(super) struct Writers {
    pid: i32,
    threads: Vec<Thread>,
    looked: Instant,
    /// Percent of the time that the chosen have lost since then.
    percent: u32,
    chosen: Vec<i32>,
}

#[derive(Clone, Copy, Debug)]
struct Thread {
    id: i32,
    /// At the last look.
    faults: u64,
}

/// What a thread writes, in faults a second, if nobody keeps it from that.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Wish {
    id: i32,
    rate: f64,
}

impl Writers {
    pub(super) fn new(pid: i32, threads: Vec<i32>) -> Writers {
        let count = |id| {
            Some(Thread {
                id,
                faults: faults(pid, id)?,
            })
        };
        Writers {
            pid,
            threads: threads.into_iter().filter_map(count).collect(),
            looked: Instant::now(),
            percent: 0,
            chosen: Vec::new(),
        }
    }

    /// Those that are to lose `percent` of their time.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn look(&mut self, percent: u32, now: Instant) -> &[i32] {
        let since = now.saturating_duration_since(self.looked);
        let due = self.chosen.is_empty() || percent != self.percent || since >= LOOK_EVERY;
        if due && since >= FIRST_LOOK {
            let wishes = self.wishes(since.as_secs_f64());
            let chosen = choose(wishes, percent);
            // Who wrote goes on to, as far as is known.
            if !chosen.is_empty() || self.chosen.is_empty() {
                self.chosen = chosen;
            }
            if self.chosen.is_empty() {
                self.chosen = self.threads.iter().map(|thread| thread.id).collect();
            }
            (self.looked, self.percent) = (now, percent);
        }
        &self.chosen
    }

    #[cfg(target_arch = "x86_64")]
    fn wishes(&mut self, seconds: f64) -> Vec<Wish> {
        let kept = f64::from(100 - self.percent.min(99)) / 100.0;
        let mut wishes = Vec::new();
        self.threads.retain_mut(|thread| {
            let Some(now) = faults(self.pid, thread.id) else {
                return false;
            };
            #[allow(clippy::cast_precision_loss, reason = "a rate")]
            let rate = now.saturating_sub(thread.faults) as f64 / seconds;
            thread.faults = now;
            let slowed = self.chosen.contains(&thread.id);
            wishes.push(Wish {
                id: thread.id,
                rate: if slowed { rate / kept } else { rate },
            });
            true
        });
        wishes
    }
}

/// As many of those that write most that the others write no more than half of what is to be left of it all, and all that write half
/// as much as the first: a thread that writes little is not stopped, unless that little would be too much.
fn choose(mut wishes: Vec<Wish>, percent: u32) -> Vec<i32> {
    wishes.sort_by(|one, other| other.rate.total_cmp(&one.rate));
    let all: f64 = wishes.iter().map(|wish| wish.rate).sum();
    let others = all * f64::from(100 - percent.min(100)) / 100.0 / 2.0;
    let alike = wishes.first().map_or(0.0, |first| first.rate / 2.0);
    let mut rest = all;
    let mut chosen = Vec::new();
    for wish in wishes {
        if wish.rate <= 0.0 || (rest <= others && wish.rate < alike) {
            break;
        }
        rest -= wish.rate;
        chosen.push(wish.id);
    }
    chosen
}

/// Page faults of a thread so far; `None` when it has ended.
fn faults(pid: i32, thread: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
    // The name, in parentheses, may have anything in it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let minor: u64 = fields.nth(7)?.parse().ok()?;
    let major: u64 = fields.nth(1)?.parse().ok()?;
    Some(minor + major)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn chosen(rates: &[f64], percent: u32) -> Vec<i32> {
        let wishes = (0..).zip(rates).map(|(id, rate)| Wish { id, rate: *rate });
        choose(wishes.collect(), percent)
    }

    #[test]
    fn who_writes_is_chosen_and_who_does_not_is_spared() {
        assert_eq!(chosen(&[0.0, 100.0, 0.0], 99), [1]);
        assert_eq!(chosen(&[10.0, 10.0, 0.0, 10.0], 20), [0, 1, 3]);
        assert_eq!(chosen(&[0.0, 0.0], 50), [0; 0]);
        assert_eq!(chosen(&[], 50), [0; 0]);
    }

    #[test]
    fn who_writes_little_is_chosen_when_that_would_be_too_much() {
        let rates = [1000.0, 40.0, 1.0];
        assert_eq!(chosen(&rates, 50), [0]);
        assert_eq!(chosen(&rates, 90), [0]);
        assert_eq!(chosen(&rates, 95), [0, 1]);
        assert_eq!(chosen(&rates, 99), [0, 1]);
    }

    #[test]
    fn the_kernel_counts_for_each_thread() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let before = faults(pid, own).unwrap();
        let touched = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = faults(pid, own).unwrap();
        assert!(after > before + 16, "{before} {after}");
        drop(touched);
        assert_eq!(faults(pid, i32::MAX), None);
        let all = super::super::ours(pid, &[own.unsigned_abs()]).unwrap();
        assert_eq!(all, [own]);
    }
}
