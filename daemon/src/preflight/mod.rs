//! What is looked at before a guest moves, without moving it.

pub mod dirty_rate;
