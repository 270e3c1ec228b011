//! Fuzz targets: functions that take any bytes, and panic when a rule is broken.
//!
//! `tests/fuzz` feeds them to libFuzzer (`scripts/fuzz`), built with other flags; `tests/corpus.rs` of this crate runs
//! every file of the corpus again as an ordinary test. They are here, in the workspace, so that both run the same code.

mod decoders;
mod destination;
mod encoded;
mod facts;
mod orders;
mod source;
mod spawn;
mod words;

pub use decoders::{journal, message};
pub use destination::destination;
pub use encoded::encoded;
pub use facts::facts;
pub use source::source;
pub use spawn::spawn;

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also that of its folder in `tests/fuzz/corpus`.
pub const TARGETS: [(&str, Target); 10] = [
    ("destination", destination),
    ("encoded", encoded),
    ("facts", facts),
    ("greeting", transport::fuzzing::greeting),
    ("journal", journal),
    ("message", message),
    ("records", transport::fuzzing::records),
    ("source", source),
    ("spawn", spawn),
    ("stream", transport::fuzzing::stream),
];
