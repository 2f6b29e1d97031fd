//! Ranks as threads of the test process.

use fsdp::comm::{shm, Communicator};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Runs `f` on every rank of a job of `world` ranks; returns the ranks' results in order.
pub fn ranks<T: Send>(world: usize, f: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    static JOBS: AtomicUsize = AtomicUsize::new(0);
    let job = format!("fsdp-test-{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed));
    std::thread::scope(|scope| {
        let rank = |rank| {
            let (job, f) = (job.clone(), &f);
            scope.spawn(move || {
                let mut config = shm::Config::new(job, rank, world);
                config.rendezvous_timeout = Duration::from_secs(30);
                config.timeout = Duration::from_secs(30);
                f(shm::init(&config).expect("every rank joins"))
            })
        };
        let threads: Vec<_> = (0..world).map(rank).collect();
        threads.into_iter().map(|t| t.join().expect("no rank panics")).collect()
    })
}
