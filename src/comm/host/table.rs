//! What a host lends: collectives on plain memory, and small messages.

use crate::comm::ReduceOp;
use crate::dtype::DType;
use crate::error::Result;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// Collectives on one lane are started in the same order on every rank; lanes are independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Lane {
    /// Announcements, and collectives on the caller's memory.
    Control = 0,
    /// All-gathers of units.
    Gather = 1,
    /// Reduce-scatters of units.
    Reduce = 2,
}

/// Number of lanes.
pub const LANES: usize = 3;

/// The host's name for a collective that was started and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub usize);

/// None: the collective is done already.
pub type Started = Result<Option<Request>>;

/// The callbacks. Collectives are called by one thread at a time; `post`, `poll` and `abort` by any, at any time. An error is
/// that of the callback; where it happened is added by the caller.
pub trait Collectives: Send + Sync {
    /// `output` = the ranks' `input`s of `bytes` each, in rank order; `input` may be this rank's place in `output`.
    ///
    /// # Safety
    /// The memory is readable and writable until the request has ended; so for all of these.
    unsafe fn all_gather(&self, lane: Lane, input: *const u8, output: *mut u8, bytes: usize) -> Started;
    /// `output` = range `rank`, of `count` elements, of the ranks' `input`s combined.
    ///
    /// # Safety
    /// As of `all_gather`.
    unsafe fn reduce_scatter(
        &self,
        lane: Lane,
        input: *const u8,
        output: *mut u8,
        count: usize,
        dtype: DType,
        op: ReduceOp,
    ) -> Started;
    /// In place.
    ///
    /// # Safety
    /// As of `all_gather`.
    unsafe fn all_reduce(&self, lane: Lane, data: *mut u8, count: usize, dtype: DType, op: ReduceOp) -> Started;
    /// # Safety
    /// As of `all_gather`.
    unsafe fn broadcast(&self, lane: Lane, data: *mut u8, bytes: usize, root: usize) -> Started;
    fn barrier(&self, lane: Lane) -> Started;
    /// Whether it has ended; the request is gone then.
    fn test(&self, request: Request) -> Result<bool>;
    /// The same, after sleeping at most `limit` until it has. False: the host cannot sleep, or it has not ended.
    fn wait(&self, request: Request, limit: Duration) -> Result<bool>;
    /// Whether `wait` sleeps.
    fn can_wait(&self) -> bool;

    fn can_split(&self) -> bool;
    /// Collective: the same for `members` of the ranks, this one among them, in the order of their new ranks.
    fn split(&self, color: u32, key: i32, members: &[usize]) -> Result<Arc<dyn Collectives>>;

    /// Whether `post` and `poll` do anything.
    fn has_messages(&self) -> bool;
    /// Sends a message without waiting for its receiver.
    fn post(&self, rank: usize, message: &[u8]) -> Result<()>;
    /// A message that has come, if there is one: `message` is filled, and its sender returned.
    fn poll(&self, message: &mut [u8]) -> Result<Option<usize>>;
    /// The communicator has failed on this rank.
    fn abort(&self, reason: &str);
    /// Memory that collectives run best on, 64-byte aligned, and its owner; None: any will do.
    fn alloc(&self, bytes: usize) -> Result<Option<(*mut u8, Arc<dyn Any + Send + Sync>)>>;
}
