//! Placeholder until the golden samples are written below.
