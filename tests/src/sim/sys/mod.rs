//! The only unsafe code of the simulation: heap memory that stands in for a guest's mapped RAM.

mod heap;

pub(super) use heap::Heap;
