pub mod backend;
pub mod cpu;
pub mod error;
pub mod plan;
pub mod policy;
pub mod rng;
pub mod schedule;
