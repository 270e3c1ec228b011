//! Channels over a stream of bytes: frames, their two state machines, and the channel that joins them to a socket.

pub(crate) mod channel;
pub(crate) mod frame;
pub(crate) mod layer;
pub(crate) mod pipe;
pub(crate) mod plain;
pub(crate) mod receiver;
pub(crate) mod sender;
#[cfg(test)]
mod tests;
