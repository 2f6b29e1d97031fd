//! Collectives that block, lent by a communicator of other ranks: as MPI's would be between hosts.

use crate::nccl;
use fsdp::comm::host::table::{Collectives, Lane, Request, Started};
use fsdp::comm::{host, Communicator, ReduceOp};
use fsdp::dtype::DType;
use fsdp::error::Error;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

struct Lent(Arc<dyn Communicator>);

impl Collectives for Lent {
    unsafe fn all_gather(&self, _: Lane, input: *const u8, output: *mut u8, bytes: usize) -> Started {
        // SAFETY: the caller's promise; its input may lie in its output, so it is copied.
        let (input, output) = unsafe {
            let input = std::slice::from_raw_parts(input, bytes).to_vec();
            (input, std::slice::from_raw_parts_mut(output, bytes * self.0.world_size()))
        };
        self.0.all_gather_host(&input, output, DType::U8).map(|()| None)
    }

    unsafe fn reduce_scatter(&self, _: Lane, _: *const u8, _: *mut u8, _: usize, _: DType, _: ReduceOp) -> Started {
        panic!("NCCL's")
    }

    unsafe fn all_reduce(&self, _: Lane, data: *mut u8, count: usize, of: DType, with: ReduceOp) -> Started {
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts_mut(data, count * of.size()) };
        self.0.all_reduce(data, of, with).map(|()| None)
    }

    unsafe fn broadcast(&self, _: Lane, data: *mut u8, bytes: usize, root: usize) -> Started {
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts_mut(data, bytes) };
        self.0.broadcast(data, DType::U8, root).map(|()| None)
    }

    fn barrier(&self, _: Lane) -> Started {
        self.0.barrier().map(|()| None)
    }

    fn test(&self, _: Request) -> Result<bool, Error> {
        Ok(true)
    }

    fn wait(&self, _: Request, _: Duration) -> Result<bool, Error> {
        Ok(true)
    }

    fn can_wait(&self) -> bool {
        false
    }

    fn can_split(&self) -> bool {
        true
    }

    fn split(&self, color: u32, key: i32, _: &[usize]) -> Result<Arc<dyn Collectives>, Error> {
        Ok(Arc::new(Lent(self.0.split(color, key)?)))
    }

    fn has_messages(&self) -> bool {
        false
    }

    fn post(&self, _: usize, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn poll(&self, _: &mut [u8]) -> Result<Option<usize>, Error> {
        Ok(None)
    }

    fn abort(&self, reason: &str) {
        self.0.abort(reason);
    }

    fn alloc(&self, _: usize) -> Result<Option<(*mut u8, Arc<dyn Any + Send + Sync>)>, Error> {
        Ok(None)
    }
}

/// A communicator on collectives of `comm`.
pub fn lent(comm: Arc<dyn Communicator>) -> Arc<dyn Communicator> {
    let config = host::Config { rank: comm.rank(), world_size: comm.world_size(), timeout: nccl::LONG };
    host::init(&config, Arc::new(Lent(comm))).unwrap()
}
