//! What is compared on a GPU and on what stands in for one.

pub mod elements;
pub mod gpu;
pub mod reductions;
