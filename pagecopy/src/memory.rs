//! The words for guest memory that the engine, the wire and the host share: RAMBlock, page, run.

use serde::{Deserialize, Serialize};

/// Index of a RAMBlock in the list that both sides agreed on. It is also the number of its transport region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId(pub u16);

/// A RAMBlock as both sides must have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// QEMU's name of the memory back end (the `id` of `-object memory-backend-file`).
    pub name: String,
    /// Bytes; a multiple of `page_size`.
    pub size: u64,
    /// Bytes of a page as tracked and sent: 4 KiB, or 2 MiB on hugetlbfs.
    pub page_size: u64,
}

impl BlockSpec {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.size / self.page_size
    }

    /// All of it, as the RAMBlock of that number, in runs of about `bytes` bytes at most, but at least a page each.
    pub fn pieces(&self, block: BlockId, bytes: u64) -> impl Iterator<Item = Run> + use<> {
        let all = Run {
            block,
            first: 0,
            pages: self.pages(),
        };
        all.pieces(bytes, self.page_size)
    }
}

/// Contiguous bytes of one RAMBlock, in units of 4 KiB whatever the block's page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096, never zero.
    pub len: u64,
}

/// Contiguous pages of one RAMBlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Run {
    /// The RAMBlock.
    pub block: BlockId,
    /// Index of the first page.
    pub first: u64,
    /// Number of pages; never zero.
    pub pages: u64,
}

impl Run {
    /// Index of the page after the last. Saturates: of a run that a message names and that no RAMBlock has, too, people are
    /// told.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// The same in runs of about `bytes` bytes at most, but at least a page each, where a page has `page_size`.
    pub fn pieces(self, bytes: u64, page_size: u64) -> impl Iterator<Item = Run> + use<> {
        let most = (bytes / page_size.max(1)).max(1);
        (self.first..self.end())
            .step_by(usize::try_from(most).unwrap_or(usize::MAX))
            .map(move |first| Run {
                first,
                pages: most.min(self.end() - first),
                ..self
            })
    }
}
