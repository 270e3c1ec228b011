//! `--verify`: both sides' digests are collected and compared, and the first page that differs is found.

use super::core::Core;
use super::interface::Output;
use crate::engine::end::End;
use crate::engine::{Failure, Fault};
use crate::limits::DIGEST_CHUNK;
use crate::memory::BlockSpec;
use crate::wire::{AbortCode, Message};

type Digest = [u8; 16];

/// Digests of all chunks, by block.
#[derive(Debug)]
pub(super) struct Verify {
    theirs: Vec<Vec<Digest>>,
    ours: Option<Vec<Vec<Digest>>>,
    search: Option<Search>,
    agreed: bool,
}

/// A chunk that differs; which page of it?
#[derive(Debug)]
struct Search {
    block: u16,
    chunk: u64,
    theirs: Option<Vec<Digest>>,
    ours: Option<Vec<Digest>>,
}

impl Verify {
    pub(super) fn new(blocks: &[BlockSpec]) -> Verify {
        Verify {
            theirs: vec![Vec::new(); blocks.len()],
            ours: None,
            search: None,
            agreed: false,
        }
    }

    /// Whether both RAMs are the same.
    pub(super) fn agreed(&self) -> bool {
        self.agreed
    }

    /// The source's digests, in order; as many as the blocks have chunks and not one more.
    pub(super) fn theirs(
        &mut self,
        core: &mut Core,
        block: u16,
        first: u64,
        digests: &[Digest],
    ) -> Result<(), End> {
        let index = usize::from(block);
        let (Some(spec), Some(have)) = (core.blocks.get(index), self.theirs.get_mut(index)) else {
            return Err(End::protocol(format!(
                "digests came for RAMBlock {block}, which does not exist"
            )));
        };
        let end = first.saturating_add(digests.len() as u64);
        if first != have.len() as u64 || end > chunks(spec) {
            return Err(End::protocol(format!(
                "digests {first} to {end} came for RAMBlock {block}, which has {}, of which {} are known",
                chunks(spec),
                have.len()
            )));
        }
        have.extend_from_slice(digests);
        self.compare(core)
    }

    /// Our digests.
    pub(super) fn ours(&mut self, core: &mut Core, digests: Vec<Vec<Digest>>) -> Result<(), End> {
        self.ours = Some(digests);
        self.compare(core)
    }

    fn compare(&mut self, core: &mut Core) -> Result<(), End> {
        let complete = self
            .theirs
            .iter()
            .zip(&core.blocks)
            .all(|(have, spec)| have.len() as u64 == chunks(spec));
        let Some(ours) = self
            .ours
            .as_ref()
            .filter(|_| complete && self.search.is_none())
        else {
            return Ok(());
        };
        let Some((block, chunk)) = first_difference(&self.theirs, ours) else {
            self.agreed = true;
            return Ok(());
        };
        let block = u16::try_from(block).unwrap_or(u16::MAX);
        core.send(Message::ChunkDiffers { block, chunk });
        core.out.push(Output::PageDigests { block, chunk });
        self.search = Some(Search {
            block,
            chunk,
            theirs: None,
            ours: None,
        });
        Ok(())
    }

    /// Digests of the pages of the chunk that differs, from the source or from here.
    pub(super) fn pages(
        &mut self,
        core: &Core,
        from_source: bool,
        (block, chunk): (u16, u64),
        digests: Vec<Digest>,
    ) -> Result<(), End> {
        let Some(search) = self
            .search
            .as_mut()
            .filter(|s| (s.block, s.chunk) == (block, chunk))
        else {
            return Err(End::protocol(format!(
                "page digests of chunk {chunk} of RAMBlock {block} were not asked for"
            )));
        };
        if from_source {
            search.theirs = Some(digests);
        } else {
            search.ours = Some(digests);
        }
        match (&search.theirs, &search.ours) {
            (Some(theirs), Some(ours)) => Err(differs(core, search, theirs, ours)),
            _ => Ok(()),
        }
    }
}

fn chunks(spec: &BlockSpec) -> u64 {
    spec.size.div_ceil(DIGEST_CHUNK)
}

/// Block and chunk of the first difference. A side with fewer digests differs where they end.
fn first_difference(theirs: &[Vec<Digest>], ours: &[Vec<Digest>]) -> Option<(usize, u64)> {
    let none = Vec::new();
    theirs.iter().enumerate().find_map(|(block, theirs)| {
        let ours = ours.get(block).unwrap_or(&none);
        first_unequal(theirs, ours).map(|chunk| (block, chunk))
    })
}

fn first_unequal(theirs: &[Digest], ours: &[Digest]) -> Option<u64> {
    let most = theirs.len().max(ours.len());
    (0..most)
        .find(|index| theirs.get(*index) != ours.get(*index))
        .map(|index| index as u64)
}

fn differs(core: &Core, search: &Search, theirs: &[Digest], ours: &[Digest]) -> End {
    let spec = &core.blocks[usize::from(search.block)];
    let start = search.chunk * DIGEST_CHUNK;
    let place = match first_unequal(theirs, ours) {
        Some(index) => {
            let address = start + index * spec.page_size;
            format!(
                "page {} (at byte {address:#x}) of RAMBlock {:?}",
                address / spec.page_size,
                spec.name
            )
        }
        None => format!(
            "the {DIGEST_CHUNK} bytes at {start:#x} of RAMBlock {:?}",
            spec.name
        ),
    };
    End::new(
        AbortCode::VerifyFailed,
        Failure::new(
            Fault::PeerHost,
            format!("the guest's memory arrived changed: {place} differs first"),
            "keep the guest at the source and report this",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        let same = vec![vec![[1; 16], [2; 16]], vec![[3; 16]]];
        let mut other = same.clone();
        assert_eq!(first_difference(&same, &other), None);
        other[1][0] = [9; 16];
        assert_eq!(first_difference(&same, &other), Some((1, 0)));
        other[0].pop();
        assert_eq!(first_difference(&same, &other), Some((0, 1)));
    }
}
