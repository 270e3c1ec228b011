//! Makes a plan that fails smaller while it fails in the same way.
//!
//! A plan is data: faults, channels, blocks, pages and options are taken away or made plain one after the other. What is
//! left of chance goes another way then, so each candidate is tried with some seeds of chance, not only its own.

use std::time::{Duration, Instant};

use super::fault::{Fault, Moment, When};
use super::plan::{Host, Path, Plan, Wanted};
use super::rng::Rng;
use super::{Mistake, Outcome, run};

/// Seeds of chance that are tried for each candidate.
const CHANCES: u64 = 24;

/// The smallest plan found within `limit`. `fails` says whether a run fails in the way that is looked
/// into.
pub fn shrink(
    plan: &Plan,
    mistake: Option<Mistake>,
    limit: Duration,
    fails: impl Fn(&Outcome) -> bool,
) -> Plan {
    let end = Instant::now() + limit;
    let mut best = plan.clone();
    let mut progress = true;
    while progress {
        progress = false;
        let mut step = 0;
        while let Some(candidate) = smaller(&best).get(step).cloned() {
            if Instant::now() >= end {
                return best;
            }
            let found = Some(candidate).filter(|candidate| *candidate != best);
            match found.and_then(|candidate| failing(candidate, mistake, &fails)) {
                Some(found) => {
                    best = found;
                    progress = true;
                }
                None => step += 1,
            }
        }
    }
    best
}

/// The plan with a seed of chance with which it fails.
fn failing(
    mut plan: Plan,
    mistake: Option<Mistake>,
    fails: &impl Fn(&Outcome) -> bool,
) -> Option<Plan> {
    let own = plan.chance;
    (0..CHANCES).find_map(|chance| {
        plan.chance = match chance {
            0 => own,
            chance => Rng::new(chance).bits() >> 48,
        };
        fails(&run(&plan, mistake)).then(|| plan.clone())
    })
}

/// Plans that are a step simpler, the largest steps first.
fn smaller(plan: &Plan) -> Vec<Plan> {
    let plain = Plan::default();
    let mut found = Vec::new();
    let mut with = |change: &dyn Fn(&mut Plan)| {
        let mut candidate = plan.clone();
        change(&mut candidate);
        found.push(candidate);
    };
    for left_out in 0..plan.faults.len() {
        with(&|plan| {
            plan.faults.remove(left_out);
        });
    }
    with(&|plan| {
        plan.blocks.clone_from(&plain.blocks);
        plan.order.clone_from(&plain.order);
    });
    if plan.blocks.len() > 1 {
        with(&|plan| {
            plan.blocks.pop();
            plan.order = (0..plan.blocks.len()).collect();
        });
    }
    with(&|plan| plan.order = (0..plan.blocks.len()).collect());
    with(&|plan| plan.data_channels = 1);
    with(&|plan| plan.data_channels = plan.data_channels.min(2));
    with(&|plan| plan.source = Host::default());
    with(&|plan| plan.destination = Host::default());
    with(&|plan| plan.network = Path::default());
    with(&|plan| plan.wanted = Wanted::default());
    with(&|plan| plan.habits = plain.habits);
    with(&|plan| plan.direct_io = false);
    with(&|plan| plan.buffered = false);
    with(&|plan| plan.operator = true);
    with(&|plan| plan.device_state = plain.device_state);
    with(&|plan| plan.work_us = plain.work_us);
    with(&|plan| plan.fixed_downtime_us = plain.fixed_downtime_us);
    for index in 0..plan.blocks.len() {
        with(&|plan| {
            let block = &mut plan.blocks[index];
            let pages = (block.pages() / 2).max(1);
            block.size = pages * block.page_size;
        });
    }
    for index in 0..plan.faults.len() {
        with(&|plan| plan.faults[index] = simpler(&plan.faults[index]));
    }
    wanted(&mut with);
    hosts(&mut with, &plain);
    with(&|plan| plan.habits.reads = 0);
    with(&|plan| plan.habits.punches = 0);
    with(&|plan| plan.habits.writes /= 10);
    with(&|plan| plan.habits.pattern = plain.habits.pattern);
    with(&|plan| plan.habits.touched_percent = 100);
    with(&|plan| plan.network.bytes_per_second = None);
    with(&|plan| plan.network.piece = plain.network.piece);
    found
}

fn wanted(with: &mut impl FnMut(&dyn Fn(&mut Plan))) {
    let plain = Wanted::default();
    with(&|plan| plan.wanted.verify = false);
    with(&|plan| plan.wanted.encoded = false);
    with(&|plan| plan.wanted.versions = plain.versions);
    with(&|plan| plan.wanted.quit_source = false);
    with(&|plan| plan.wanted.timeout_us = None);
    with(&|plan| plan.wanted.bandwidth_limit = None);
    with(&|plan| plan.wanted.max_rounds = plain.max_rounds);
    with(&|plan| plan.wanted.downtime_limit_us = plain.downtime_limit_us);
}

fn hosts(with: &mut impl FnMut(&dyn Fn(&mut Plan)), plain: &Plan) {
    let host = |plan: &mut Plan, change: &dyn Fn(&mut Host)| {
        change(&mut plan.source);
        change(&mut plan.destination);
    };
    let plain = plain.source;
    with(&|plan| host(plan, &|host| host.clock = plain.clock));
    with(&|plan| host(plan, &|host| host.disk = plain.disk));
    with(&|plan| host(plan, &|host| host.operation_fails = 0));
    with(&|plan| host(plan, &|host| host.qemu_fails = 0));
    with(&|plan| host(plan, &|host| host.operation_us = plain.operation_us));
    with(&|plan| host(plan, &|host| host.qemu_us = plain.qemu_us));
}

/// A fault at a plainer moment, or a plainer one.
fn simpler((when, fault): &(When, Fault)) -> (When, Fault) {
    let moment = |moment: &Moment| match moment {
        Moment::Later(_) => Moment::After,
        other => *other,
    };
    let when = match when {
        When::Time(time) => When::Time(round(*time)),
        When::Output(side, nth, at) => When::Output(*side, *nth, moment(at)),
        When::Named(side, name, nth, at) => When::Named(*side, name.clone(), *nth, moment(at)),
    };
    let fault = match fault {
        Fault::DaemonDies(side, Some(time)) => Fault::DaemonDies(*side, Some(round(*time))),
        Fault::HostDies(side, restart) => Fault::DaemonDies(*side, *restart),
        Fault::Freeze(side, time) => Fault::Freeze(*side, round(*time)),
        Fault::Silence(Some(time)) => Fault::Silence(Some(round(*time))),
        Fault::OneWay(side, time) => Fault::OneWay(*side, round(*time)),
        Fault::Sleep { side, time, .. } => Fault::Freeze(*side, *time),
        Fault::CutSeenOnlyBy(_) | Fault::CutChannel(_) => Fault::Cut,
        other => *other,
    };
    (when, fault)
}

/// To its leading digit.
fn round(time: u64) -> u64 {
    let digit = 10u64.pow(time.max(1).ilog10());
    time / digit * digit
}
