//! Launchers, one for each kernel: params struct, grid, launch.
#![forbid(unsafe_code)]

pub mod attention;
pub mod embed;
pub mod gather;
pub mod guidance;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod remask;
pub mod rope_append;
pub mod route;
pub mod sample;
pub mod select_masked;
pub mod shortlist;
pub mod unmask;
pub mod weight;
