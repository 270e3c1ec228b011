//! Figures of a post-copy in bytes: for people only, so that nothing is decided by them; bounded all the same, so that they
//! can be added and shown.

use super::codec::{Reader, WireError, Writer};
use super::fields::{Codec, Flag};
use crate::engine::event::{FaultFigures, PostcopyCost, Quantiles};
use crate::limits::MAX_TIME_US;

/// Page faults: how many, how many wait, and four quantiles in order.
pub(super) struct Faults;

impl Codec for Faults {
    type Value = FaultFigures;

    /// Figures of ours that break the rules are cut to them: they must not keep the source from hearing the message.
    fn put(value: &FaultFigures, out: &mut Writer) {
        let most = if value.faults == 0 { 0 } else { MAX_TIME_US };
        let Quantiles {
            p50,
            p99,
            p999,
            max,
        } = value.fault_us;
        let max = max.min(most);
        let p999 = p999.min(max);
        let p99 = p99.min(p999);
        for figure in [
            value.faults,
            value.faults_waiting,
            p50.min(p99),
            p99,
            p999,
            max,
        ] {
            u64::put(&figure, out);
        }
    }

    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<FaultFigures, WireError> {
        let [faults, faults_waiting] = [u64::get(field, input)?, u64::get(field, input)?];
        let fault_us = Quantiles {
            p50: time(field, input)?,
            p99: time(field, input)?,
            p999: time(field, input)?,
            max: time(field, input)?,
        };
        let Quantiles {
            p50,
            p99,
            p999,
            max,
        } = fault_us;
        if ![p50, p99, p999, max].is_sorted() || (faults == 0 && max > 0) {
            return Err(WireError::Invalid {
                field,
                why: "quantiles are in order, and zero when there were no faults",
            });
        }
        Ok(FaultFigures {
            faults,
            faults_waiting,
            fault_us,
        })
    }
}

/// What a post-copy cost, if it is known.
pub(super) struct Cost;

impl Codec for Cost {
    type Value = Option<PostcopyCost>;

    /// As for [`Faults`].
    fn put(value: &Option<PostcopyCost>, out: &mut Writer) {
        Flag::put(&value.is_some(), out);
        if let Some(cost) = value {
            Faults::put(&cost.faults, out);
            let postcopy_us = cost.postcopy_us.min(MAX_TIME_US);
            u64::put(&postcopy_us, out);
            u64::put(&cost.paused_us.min(postcopy_us), out);
        }
    }

    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Option<PostcopyCost>, WireError> {
        if !Flag::get(field, input)? {
            return Ok(None);
        }
        let faults = Faults::get(field, input)?;
        let [postcopy_us, paused_us] = [time(field, input)?, time(field, input)?];
        if paused_us > postcopy_us {
            return Err(WireError::Invalid {
                field,
                why: "the pauses of a post-copy are no longer than it is",
            });
        }
        Ok(Some(PostcopyCost {
            faults,
            postcopy_us,
            paused_us,
        }))
    }
}

/// A time, in microseconds.
fn time(field: &'static str, input: &mut Reader<'_>) -> Result<u64, WireError> {
    let value = u64::get(field, input)?;
    if value > MAX_TIME_US {
        return Err(WireError::AboveLimit {
            field,
            value,
            limit: MAX_TIME_US,
        });
    }
    Ok(value)
}
