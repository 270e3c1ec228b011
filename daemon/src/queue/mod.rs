//! Many migrations of one host: what each may send, and when each begins.

mod buckets;
pub mod budget;
pub(crate) mod config;
mod order;
pub(crate) mod turns;

pub(crate) use order::Full;
