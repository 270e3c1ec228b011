//! Rounds that end before all of them is sent.
//!
//! Where a short total time is preferred, the guest is stopped as soon as what is left fits into the downtime limit: the rest goes
//! while it stands still and takes no processor. Whether it fits is only known by a scan, for which the round has to end: if the
//! guest has dirtied more than was thought, that was in vain, and another round follows.

/// So often at most.
const MOST: u32 = 8;

/// How often that was tried.
#[derive(Debug, Default)]
pub(super) struct Early {
    tried: u32,
}

impl Early {
    /// What is left fits into the limit, by what is known. True: end the round.
    pub(super) fn once_more(&mut self) -> bool {
        let may = self.tried < MOST;
        self.tried += u32::from(may);
        may
    }
}
