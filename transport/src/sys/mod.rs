//! The only place of this crate with `unsafe` code, apart from `region`: vectors of memory for the kernel, and io_uring.
//!
//! What this module offers is safe: a [`Gather`](iovecs::Gather) or [`Scatter`](iovecs::Scatter) owns, or shares in,
//! all memory that it points to, and the driver keeps it until the kernel has said that it is done.

pub(crate) mod iovecs;
#[cfg(test)]
mod tests;
pub(crate) mod uring;
