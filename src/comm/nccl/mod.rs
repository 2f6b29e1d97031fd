//! NCCL: collectives of GPUs, loaded at run time.

mod library;

pub use library::Nccl;
