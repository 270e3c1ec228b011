//! First phases: the source's `Hello` is compared with the QEMU that waits here, and the RAM is made ready.

use super::core::Core;
use super::interface::{Input, Output};
use super::receive::Receive;
use super::{Phase, Step};
use crate::engine::encoding::Encodings;
use crate::engine::end::End;
use crate::engine::event::State;
use crate::engine::{Failure, Fault};
use crate::memory::BlockSpec;
use crate::wire::{self, AbortCode, Message, VERSION_MAX, VERSION_MIN};

/// Nothing was said yet.
#[derive(Debug)]
pub(super) struct Greeting;

impl Greeting {
    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Message(Message::Hello {
                version_min,
                version_max,
                capabilities,
                vm,
                verify,
                blocks,
                ..
            }) => {
                core.greeted = true;
                core.out.enter(State::Preparing);
                let version = common_version(version_min, version_max)?;
                let (capabilities, reason) = common_capabilities(core, capabilities, verify)?;
                core.postcopy = capabilities & wire::capability::POSTCOPY != 0;
                core.channels = capabilities & wire::capability::CHANNELS != 0;
                if vm != core.setup.vm {
                    return Err(unknown_vm(core, &vm));
                }
                let order = match_blocks(&blocks, &core.setup.blocks)?;
                core.blocks = blocks;
                core.verify = verify;
                let encodings = Encodings::of_bits(capabilities);
                core.out.push(Output::Prepare { order, encodings });
                Ok(Phase::Preparing(Preparing {
                    version,
                    capabilities,
                    reason,
                }))
            }
            Input::Message(message) => Err(core.out_of_place(&message, "nobody had said Hello")),
            _ => Ok(Phase::Greeting(self)),
        }
    }
}

fn common_version(min: u16, max: u16) -> Result<u16, End> {
    let version = max.min(VERSION_MAX);
    if min > max {
        return Err(End::protocol(format!(
            "the source speaks versions {min} to {max}"
        )));
    }
    if version < min || version < VERSION_MIN {
        let what = format!(
            "the source speaks versions {min} to {max} of the protocol, this host {VERSION_MIN} to {VERSION_MAX}"
        );
        return Err(incompatible(what));
    }
    Ok(version)
}

/// What both sides can do, and why post-copy is not among it although the source would.
fn common_capabilities(core: &mut Core, theirs: u64, verify: bool) -> Result<(u64, String), End> {
    let mut ours = wire::capability::VERIFY | Encodings::ALL.bits() | wire::capability::CHANNELS;
    let mut reason = String::new();
    match &core.setup.postcopy {
        Ok(()) if core.setup.data_channels >= 2 && !verify => ours |= wire::capability::POSTCOPY,
        Ok(()) => {}
        Err(failure) if theirs & wire::capability::POSTCOPY != 0 => {
            reason = format!("{}; what to do: {}", failure.what, failure.remedy);
            core.out
                .notice(format!("post-copy is not possible here: {reason}"));
        }
        Err(_) => {}
    }
    let common = theirs & ours;
    if verify && common & wire::capability::VERIFY == 0 {
        return Err(End::protocol(
            "the source wants to verify and says that it cannot",
        ));
    }
    Ok((common, reason))
}

fn incompatible(what: String) -> End {
    let remedy = "run versions of pagecopyd that fit on both hosts";
    End::new(
        AbortCode::Incompatible,
        Failure::new(Fault::Operator, what, remedy),
    )
}

fn unknown_vm(core: &Core, vm: &str) -> End {
    let what = format!(
        "no QEMU waits here for a guest {vm:?}, but one for {:?}",
        core.setup.vm
    );
    let remedy = "run `pagecopy receive` with the name that the source migrates";
    End::new(
        AbortCode::UnknownVm,
        Failure::new(Fault::Operator, what, remedy),
    )
}

/// For each of the source's blocks, the index of ours; or what differs, with both figures.
fn match_blocks(theirs: &[BlockSpec], ours: &[BlockSpec]) -> Result<Vec<usize>, End> {
    let order = theirs
        .iter()
        .map(|spec| match_block(spec, ours))
        .collect::<Result<Vec<usize>, End>>()?;
    match ours
        .iter()
        .find(|own| theirs.iter().all(|spec| spec.name != own.name))
    {
        Some(own) => Err(mismatch(format!(
            "the destination has a RAMBlock {:?}, the source has none of that name",
            own.name
        ))),
        None => Ok(order),
    }
}

fn match_block(spec: &BlockSpec, ours: &[BlockSpec]) -> Result<usize, End> {
    let Some(index) = ours.iter().position(|own| own.name == spec.name) else {
        let names: Vec<&str> = ours.iter().map(|own| own.name.as_str()).collect();
        return Err(mismatch(format!(
            "the source has a RAMBlock {:?}, the destination has {}",
            spec.name,
            if names.is_empty() {
                "none".to_owned()
            } else {
                format!("only {names:?}")
            }
        )));
    };
    let own = &ours[index];
    for (what, theirs, ours) in [
        ("size", spec.size, own.size),
        ("page size", spec.page_size, own.page_size),
    ] {
        if theirs != ours {
            return Err(mismatch(format!(
                "RAMBlock {:?} has a {what} of {theirs} bytes at the source and of {ours} bytes at the destination",
                spec.name
            )));
        }
    }
    Ok(index)
}

fn mismatch(what: String) -> End {
    let remedy = "start the destination's QEMU with the same memory back ends as the source's: ids, sizes and page sizes";
    End::new(
        AbortCode::MemoryMismatch,
        Failure::new(Fault::Operator, what, remedy),
    )
}

/// The RAM is being cleared and registered. Pings are answered meanwhile.
#[derive(Debug)]
pub(super) struct Preparing {
    version: u16,
    capabilities: u64,
    reason: String,
}

impl Preparing {
    pub(super) fn handle(self, core: &mut Core, input: Input) -> Step {
        match input {
            Input::Prepared => {
                let host = core.setup.host.clone();
                core.send(Message::Accept {
                    version: self.version,
                    capabilities: self.capabilities,
                    host,
                    reason: self.reason,
                });
                core.out.enter(State::Migrating);
                Ok(Phase::Receive(Receive::new(core)))
            }
            Input::Message(message) => Err(core.out_of_place(&message, "it was not accepted yet")),
            Input::Barrier { .. } | Input::Left { .. } => Err(End::protocol(
                "the source sent a barrier before it was accepted",
            )),
            _ => Ok(Phase::Preparing(self)),
        }
    }
}
