//! Saving in the background: the calling thread stops for the copy, a thread of its own does the rest.
//!
//! The copy has all of this rank's part, and the thread has a communicator of its own, split off the engine's at the first
//! such save and kept. So the engine may train on, load, or be destroyed meanwhile. One save of an engine at a time: while
//! one runs on any rank, every further save of that engine is refused on every rank, by an error that names the folder.

use super::contents::{Contents, Listing};
use super::folder::require_absent;
use super::gather;
use super::manifest::Metadata;
use super::save::write;
use crate::comm::Communicator;
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What an engine knows of its saves in the background.
#[derive(Default)]
pub struct Saves(Mutex<State>);

#[derive(Default)]
struct State {
    comm: Option<Arc<dyn Communicator>>,
    latest: Option<Arc<Progress>>,
}

struct Progress {
    dir: PathBuf,
    outcome: Mutex<Option<Result<()>>>,
    ended: Condvar,
}

impl Saves {
    /// An error that names the folder while a save of this rank runs.
    pub fn require_idle(&self) -> Result<()> {
        match &lock(&self.0).latest {
            Some(p) if lock(&p.outcome).is_none() => Err(err!(
                InvalidState,
                "the checkpoint \"{}\" is still being saved in the background: wait for it first",
                p.dir.display()
            )),
            _ => Ok(()),
        }
    }

    /// The communicator of this engine's background saves. Collective the first time.
    fn comm(&self, engine: &Engine) -> Result<Arc<dyn Communicator>> {
        let mut state = lock(&self.0);
        if let Some(comm) = &state.comm {
            return Ok(comm.clone());
        }
        let comm = engine.world().split(0, engine.world().rank() as i32)?;
        state.comm = Some(comm.clone());
        Ok(comm)
    }
}

/// A save in the background. Dropped: waits until it has ended.
pub struct Job {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    /// As [`super::save`], but returns when this rank's part is copied. Collective, and so are the saves that follow.
    /// What can be seen at once is an error here: wrong contents, a folder that exists, a save that runs, no memory for
    /// the copy. The rest is the outcome of [`Job::wait`].
    ///
    /// # Safety
    /// The data of states and extra tensors must be readable.
    pub unsafe fn start(engine: &Engine, dir: &Path, contents: &Contents) -> Result<Job> {
        let rank = engine.world().rank();
        let listing = engine.saves().require_idle().and_then(|()| {
            if rank == 0 {
                require_absent(dir)?;
            }
            let mut listing = Listing::to_save(engine, contents)?;
            // SAFETY: the caller's promise; the shards are the engine's, which is borrowed.
            unsafe { listing.copy(engine) }?;
            Ok(listing)
        });
        gather(engine.world().as_ref(), listing.as_ref().map(|_| String::new()).map_err(Error::clone))?;
        let listing = listing?;
        let comm = engine.saves().comm(engine)?;
        let progress = Arc::new(Progress { dir: dir.to_path_buf(), outcome: Mutex::new(None), ended: Condvar::new() });
        let (description, metadata) = (listing.description(contents), contents.metadata.clone());
        let shared = progress.clone();
        let run = move || {
            let body = || run(comm.as_ref(), &shared.dir, listing, &description, &metadata);
            let outcome = catch_unwind(AssertUnwindSafe(body))
                .unwrap_or_else(|_| Err(err!(Panic, "internal error in a background save, please report it")));
            *lock(&shared.outcome) = Some(outcome);
            shared.ended.notify_all();
        };
        let thread = std::thread::Builder::new().name("fsdp-save".into()).spawn(run);
        match thread {
            Ok(thread) => {
                lock(&engine.saves().0).latest = Some(progress.clone());
                Ok(Job { progress, thread: Some(thread) })
            }
            Err(e) => {
                let e = Error::os("starting the thread of a background save", e);
                // The other ranks' threads wait for this one.
                engine.saves().comm(engine)?.abort(&e.message);
                Err(e)
            }
        }
    }

    /// Waits until the save has ended on this rank, and returns how: every rank gets the same. May be asked again.
    pub fn wait(&self) -> Result<()> {
        let mut outcome = lock(&self.progress.outcome);
        loop {
            match outcome.as_ref() {
                Some(outcome) => return outcome.clone(),
                None => outcome = self.progress.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Whether the save has ended on this rank, well or not.
    pub fn done(&self) -> bool {
        lock(&self.progress.outcome).is_some()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panics were caught.
            let _ = thread.join();
        }
    }
}

fn run(comm: &dyn Communicator, dir: &Path, listing: Listing, description: &str, metadata: &Metadata) -> Result<()> {
    // SAFETY: the listing's memory is its own copy.
    unsafe { write(comm, dir, Ok(listing), description, metadata) }
        .map_err(|e| e.context(format_args!("saving \"{}\" in the background", dir.display())))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::shm;
    use crate::config::EngineConfig;
    use crate::dtype::DType;
    use crate::error::Status;
    use crate::module::{ModuleTree, ROOT};

    /// Rank 1 alone has a save that has not ended: further ones are refused on both ranks, and go on when it has.
    #[test]
    fn a_second_save_is_refused_on_every_rank_while_one_runs_on_any() {
        let folder = std::env::temp_dir().join(format!("fsdp-second-save-{}", std::process::id()));
        let job_name = format!("fsdp-second-save-{}", std::process::id());
        let running = || Progress { dir: "/there/step-7".into(), outcome: Mutex::new(None), ended: Condvar::new() };
        let body = |rank: usize| {
            let comm = shm::init(&shm::Config::new(job_name.clone(), rank, 2)).unwrap();
            let data = [1f32; 10];
            let mut tree = ModuleTree::new("Net");
            tree.add_param(ROOT, "w", &[10], DType::F32, true, data.as_ptr().cast()).unwrap();
            // SAFETY: the data outlives the call.
            let engine = unsafe { Engine::new(&tree, comm.clone(), &EngineConfig::default()) }.unwrap();
            let (contents, progress) = (Contents::default(), Arc::new(running()));
            if rank == 1 {
                lock(&engine.saves().0).latest = Some(progress.clone());
            }
            // SAFETY: there is nothing beside the shards.
            let attempts = unsafe {
                [
                    Job::start(&engine, &folder.join("a"), &contents).err(),
                    crate::checkpoint::save(&engine, &folder.join("a"), &contents).err(),
                ]
            };
            for e in attempts {
                let e = e.expect("refused");
                assert_eq!(e.status, Status::InvalidState);
                assert!(e.message.contains("rank 1: the checkpoint \"/there/step-7\" is still being saved"), "{e}");
            }
            *lock(&progress.outcome) = Some(Ok(()));
            // SAFETY: as above.
            unsafe {
                crate::checkpoint::save(&engine, &folder.join("a"), &contents).unwrap();
                Job::start(&engine, &folder.join("b"), &contents).unwrap().wait().unwrap();
            }
            comm.barrier().unwrap();
        };
        std::thread::scope(|scope| {
            let body = &body;
            let ranks = [0, 1].map(|rank| scope.spawn(move || body(rank)));
            ranks.into_iter().for_each(|r| r.join().unwrap());
        });
        assert!(folder.join("a/manifest.json").exists() && folder.join("b/manifest.json").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
