//! What the RAM files hold, for the moment at which the guest stands still.
//!
//! To list it takes as long as to walk through all pages, so it is listed while the guest runs, and at the stop only if something
//! was taken out of the files after that. What came into them is found by the scans.

use std::io;
use std::sync::Arc;

use pagecopy::engine::source::Populated;
use pagecopy::host::Ram;
use pagecopy::host::ram::{MappedRam, Taken};
use pagecopy::memory::Run;

/// The list, and who would notice that it does not hold any more.
pub(super) struct Holes {
    ram: Arc<dyn Ram>,
    mapped: MappedRam,
    /// None where nobody would: then all is listed at the stop.
    watch: Option<Taken>,
    /// A list that was made after the one for `Attached`.
    later: Option<Vec<Run>>,
}

impl Holes {
    pub(super) fn new(ram: Arc<dyn Ram>, mapped: MappedRam) -> Holes {
        Holes {
            ram,
            mapped,
            watch: None,
            later: None,
        }
    }

    /// Begins to watch. To be called before the list for `Attached` is made.
    pub(super) fn watch(&mut self) {
        self.later = None;
        self.watch = match self.mapped.watch() {
            Ok(watch) => Some(watch),
            Err(error) => {
                tracing::info!(%error, "the RAM files cannot be watched: what they hold is listed when the guest stands still");
                None
            }
        };
    }

    /// Lists anew what the files hold.
    ///
    /// # Errors
    /// A file cannot be asked.
    pub(super) fn list(&self) -> io::Result<Vec<Run>> {
        let mut runs = Vec::new();
        self.ram.populated(&mut runs)?;
        Ok(runs)
    }

    /// With the guest still running, not long before it is stopped: lists again if the list does not hold any more.
    pub(super) fn list_again(&mut self) {
        // Asked first: what is taken out while the list is made is noticed at the stop.
        if self.watch.as_ref().is_some_and(Taken::anything) {
            self.later = self.list().ok();
            if self.later.is_none() {
                // What the kernel has told it does not tell again: at the stop the files are asked in any case.
                self.watch = None;
            }
        }
    }

    /// With the guest standing still, after the last scan.
    ///
    /// # Errors
    /// A file cannot be asked.
    pub(super) fn at_the_stop(&mut self) -> io::Result<Populated> {
        if self.watch.as_ref().is_none_or(Taken::anything) {
            return Ok(Populated::Runs(self.list()?));
        }
        Ok(match self.later.take() {
            Some(runs) => Populated::Runs(runs),
            None => Populated::NothingTaken,
        })
    }
}
