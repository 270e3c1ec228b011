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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::engine::MigrationId;
    use crate::wire::Message;
    use crate::wire::tests::from_hex;

    const ID: MigrationId = MigrationId([0xab; 16]);

    #[test]
    fn figures_outside_their_rules_are_refused() {
        let id = "ab".repeat(16);
        let quantiles = |faults: u64, p99: u64, max: u64| {
            let hex = |figure: u64| {
                figure
                    .to_le_bytes()
                    .map(|byte| format!("{byte:02x}"))
                    .concat()
            };
            let [faults, p99, max] = [faults, p99, max].map(hex);
            format!("{faults} 0000000000000000 0000000000000000 {p99} {p99} {max}")
        };
        let times = "0100000000000000 0200000000000000";
        let figures = [
            (
                format!("1b00 0000000000000000 {}", quantiles(1, 0, (1 << 50) + 1)),
                "faults is 1125899906842625, above its limit of 1125899906842624",
            ),
            (
                format!("1b00 0000000000000000 {}", quantiles(1, 9, 8)),
                "quantiles are in order",
            ),
            (
                format!("1b00 0000000000000000 {}", quantiles(0, 0, 1)),
                "zero when there were no faults",
            ),
            (
                format!("1c00 {id} 01 {} {times}", quantiles(0, 0, 0)),
                "no longer than it is",
            ),
            (format!("1c00 {id} 02"), "a flag is 0 or 1"),
        ];
        for (hex, expected) in figures {
            let error = Message::decode(&from_hex(&hex)).unwrap_err().to_string();
            assert!(error.contains(expected), "{hex}: {error}");
        }
    }

    /// A figure beyond its rules would keep the source from hearing that it is not needed any more.
    #[test]
    fn figures_of_ours_are_cut_rather_than_refused() {
        let wild = FaultFigures {
            faults: 0,
            faults_waiting: u64::MAX,
            fault_us: Quantiles {
                p50: u64::MAX,
                p99: 3,
                p999: 2,
                max: 1 << 60,
            },
        };
        let cost = PostcopyCost {
            faults: FaultFigures { faults: 5, ..wild },
            postcopy_us: u64::MAX,
            paused_us: u64::MAX,
        };
        let lacks = Message::Lacks {
            bytes: 1,
            faults: wild,
        };
        let Ok(Message::Lacks { faults, .. }) = Message::decode(&lacks.encode()) else {
            panic!()
        };
        assert_eq!(faults.fault_us, Quantiles::default());
        let whole = Message::Whole {
            id: ID,
            cost: Some(cost),
        };
        let Ok(Message::Whole {
            cost: Some(cost), ..
        }) = Message::decode(&whole.encode())
        else {
            panic!()
        };
        let Quantiles { p50, p99, max, .. } = cost.faults.fault_us;
        assert_eq!((p50, p99, max), (2, 2, MAX_TIME_US));
        assert_eq!(cost.paused_us, MAX_TIME_US);
    }
}
