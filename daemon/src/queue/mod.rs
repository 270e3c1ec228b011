//! Many migrations of one host: what each may send, and when each begins.

mod buckets;
pub mod budget;
pub(crate) mod config;
