//! What an engine has asked for and was not answered yet.

use arbitrary::{Result, Unstructured};

/// Orders under way, at most so many: an engine that asks for more at a time would fill the daemon.
const MOST: usize = 256;

/// Orders without an answer, in order.
#[derive(Debug)]
pub(crate) struct Orders<O>(Vec<O>);

impl<O> Orders<O> {
    pub(crate) fn new() -> Orders<O> {
        Orders(Vec::new())
    }

    pub(crate) fn add(&mut self, order: O) {
        assert!(self.0.len() < MOST, "too many orders at a time");
        self.0.push(order);
    }

    /// Takes one of them, the oldest most often.
    pub(crate) fn take(&mut self, input: &mut Unstructured<'_>) -> Result<Option<O>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let index = if input.ratio(3, 4)? {
            0
        } else {
            input.choose_index(self.0.len())?
        };
        Ok(Some(self.0.remove(index)))
    }

    /// Takes the oldest that `wanted` accepts.
    pub(crate) fn take_first(&mut self, wanted: impl Fn(&O) -> bool) -> Option<O> {
        let index = self.0.iter().position(wanted)?;
        Some(self.0.remove(index))
    }
}
