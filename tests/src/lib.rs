//! Tests of the whole: real guests moved between real daemons, and simulations of both engines.

pub mod real;
