//! The guest is whole: QEMU loads its devices, and then nothing happens without `Commit`.

use super::commit::Committing;
use super::core::Core;
use super::interface::{Input, Output};
use super::{Phase, Step};
use crate::engine::end::End;
use crate::wire::Message;

/// QEMU loads the device state.
#[derive(Debug)]
pub(super) struct Loading;

impl Loading {
    pub(super) fn begin(core: &mut Core) -> Phase {
        core.qemu_used = true;
        core.out.push(Output::LoadDeviceState);
        Phase::Loading(Loading)
    }

    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::DeviceStateLoaded => {
                core.send(Message::Loaded);
                Ok(Phase::Loaded(Loaded))
            }
            Input::Message(message) => {
                Err(core.out_of_place(&message, "the device state was being loaded"))
            }
            Input::Barrier { .. } => Err(End::protocol("a barrier came after the last round")),
            _ => Ok(Phase::Loading(self)),
        }
    }
}

/// The guest could run; only `Commit` is missing.
#[derive(Debug)]
pub(super) struct Loaded;

impl Loaded {
    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Message(Message::Commit) => Ok(Committing::begin(core)),
            Input::Message(message) => Err(core.out_of_place(&message, "only Commit was missing")),
            Input::Barrier { .. } => Err(End::protocol("a barrier came after the last round")),
            _ => Ok(Phase::Loaded(self)),
        }
    }
}
