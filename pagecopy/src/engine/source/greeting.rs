//! First phases: the destination is told what wants to come, and accepts; then QEMU is attached to.

use super::core::Core;
use super::interface::{Input, Mode, Output, Setup};
use super::reasons::{outside, stalled};
use super::round::Round;
use super::{Phase, Step};
use crate::engine::encoding::Encodings;
use crate::engine::encoding::policy::Compress;
use crate::engine::end::End;
use crate::engine::event::{Report, State};
use crate::engine::{Failure, Fault, Time};
use crate::wire::{self, AbortCode, Message, VERSION_MAX, VERSION_MIN};

/// `Hello` was sent. The destination clears its RAM, which may take long; it answers pings meanwhile.
#[derive(Debug)]
pub(super) struct Greeting {
    deadline: Time,
}

impl Greeting {
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.out.enter(State::Preparing);
        let offered = offered(core);
        let setup = &core.setup;
        let hello = Message::Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            capabilities: offered,
            id: setup.id,
            vm: setup.vm.clone(),
            host: setup.host.clone(),
            verify: setup.options.verify,
            blocks: setup.blocks.clone(),
        };
        core.send(hello);
        Phase::Greeting(Greeting {
            deadline: core.now.after(core.setup.timeouts.prepare),
        })
    }

    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Message(Message::Accept {
                version,
                capabilities,
                host: _,
                reason,
            }) => {
                check_accept(core, version, capabilities, &reason)?;
                agree_on_encodings(core, Encodings::of_bits(capabilities));
                if capabilities & wire::capability::CHANNELS == 0 {
                    core.growth.stop();
                }
                let can = capabilities & wire::capability::POSTCOPY != 0;
                if !can && offered(core) & wire::capability::POSTCOPY != 0 {
                    core.out.notice(format!(
                        "the guest will not go first, whatever it writes: {}",
                        cannot(&reason)
                    ));
                }
                core.agree_on_postcopy(can);
                core.out.push(Output::Attach);
                let deadline = core.now.after(core.setup.timeouts.stall);
                Ok(Phase::Attaching(Attaching { deadline }))
            }
            Input::Message(message) => {
                Err(core.out_of_place(&message, "it was asked to accept the guest"))
            }
            _ => Ok(Phase::Greeting(self)),
        }
    }

    pub(super) fn next(&self) -> Time {
        self.deadline
    }

    pub(super) fn on_time(self, core: &mut Core) -> Step {
        if core.now < self.deadline {
            return Ok(Phase::Greeting(self));
        }
        let limit = core.setup.timeouts.prepare.as_secs_f64();
        Err(End::new(
            AbortCode::TimedOut,
            Failure::new(
                Fault::PeerHost,
                format!("the destination was not ready within {limit:.0} s"),
                "see what keeps the destination host busy, then migrate again",
            ),
        ))
    }
}

/// Capability bits: encodings and post-copy only where the operator wants it in some case.
fn offered(core: &Core) -> u64 {
    let Setup {
        options,
        data_channels,
        ..
    } = &core.setup;
    let postcopy = !matches!(options.mode, Mode::Precopy | Mode::Auto { postcopy: false });
    let mut offered = wire::capability::VERIFY | options.compress.encodings().bits();
    if postcopy && !options.verify && *data_channels >= 2 {
        offered |= wire::capability::POSTCOPY;
    }
    if options.channels.is_some() {
        offered |= wire::capability::CHANNELS;
    }
    offered
}

/// What the destination cannot take is not sent; an operator who has asked for it is told.
fn agree_on_encodings(core: &mut Core, encodings: Encodings) {
    let compress = core.setup.options.compress;
    if compress != Compress::Auto && encodings != compress.encodings() {
        core.out.push(Output::Report(Report::Notice {
            text: "the destination cannot take pages encoded as was asked for: they go as they are"
                .to_owned(),
        }));
    }
    core.sender.encode(encodings);
}

fn check_accept(core: &Core, version: u16, capabilities: u64, reason: &str) -> Result<(), End> {
    if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
        return Err(End::protocol(format!(
            "the destination chose version {version}, which was not offered"
        )));
    }
    if capabilities & !offered(core) != 0 {
        return Err(End::protocol(
            "the destination chose capabilities that were not offered".to_owned(),
        ));
    }
    if core.setup.options.verify && capabilities & wire::capability::VERIFY == 0 {
        return Err(End::new(
            AbortCode::Incompatible,
            Failure::new(
                Fault::Operator,
                "the destination cannot verify",
                "migrate without --verify, or run a newer pagecopyd at the destination",
            ),
        ));
    }
    let without = capabilities & wire::capability::POSTCOPY == 0;
    if without && matches!(core.setup.options.mode, Mode::Hybrid(_) | Mode::Postcopy) {
        return Err(End::new(
            AbortCode::Incompatible,
            Failure::new(
                Fault::PeerHost,
                cannot(reason),
                "see to that at the destination, or migrate with --mode precopy",
            ),
        ));
    }
    Ok(())
}

/// The destination has said that it cannot do post-copy, and perhaps why.
fn cannot(reason: &str) -> String {
    if reason.is_empty() {
        return "the destination cannot do post-copy for this guest, and does not say why"
            .to_owned();
    }
    format!("the destination cannot do post-copy for this guest: {reason}")
}

/// QEMU is being attached to.
#[derive(Debug)]
pub(super) struct Attaching {
    deadline: Time,
}

impl Attaching {
    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Attached { stopped, populated } => {
                core.figures.attach_stop_us = u64::try_from(stopped.as_micros()).ok();
                core.pages.populated(&populated).map_err(outside)?;
                for runs in populated.chunks(crate::limits::MAX_RUNS) {
                    core.send(Message::Populate(runs.to_vec()));
                }
                core.out.enter(State::Migrating);
                Round::first(core)
            }
            Input::Message(message) => Err(core.out_of_place(&message, "nothing was sent yet")),
            _ => Ok(Phase::Attaching(self)),
        }
    }

    pub(super) fn next(&self) -> Time {
        self.deadline
    }

    pub(super) fn on_time(self, core: &mut Core) -> Step {
        if core.now < self.deadline {
            return Ok(Phase::Attaching(self));
        }
        Err(stalled("attaching to QEMU did not end"))
    }
}
