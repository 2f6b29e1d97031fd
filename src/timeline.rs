//! A timeline of what engines do, as Chrome-trace JSON: one file for all ranks of a host, which opens in Perfetto.
//!
//! FSDP_TIMELINE=FILE, the same on every rank, turns it on for the engines made from then on. Ranks are processes there;
//! an engine has a track of its own calls, and one for each unit:
//!
//!   unshard, reduce, wait   on the engine's track, "X" events with the unit (or what is waited for) in `args`. A wait
//!                           inside an unshard lies inside it, and a reduction inside a wait likewise. Only this rank's part of
//!                           a reduction is there.
//!   forward, backward       on the unit's track: from where the unit can be read to where it is left or resharded, the compute
//!                           between the hooks
//!   memory                  "C" events, bytes: units unsharded, gradient slots in use, shards of parameters and gradients,
//!                           and the most that giving values to parameters without storage took
//!
//! Timestamps are microseconds of CLOCK_MONOTONIC, so that ranks line up. The first engine that the process of rank 0
//! makes with the file starts it anew, before the other ranks open it. A rank collects events and appends them, under a
//! lock on the file, when there are many, at the end of an iteration if the last time was half a second ago, and when the
//! engine is destroyed; the file is whole JSON after each of these.

use crate::agree;
use crate::comm::Communicator;
use crate::error::{err, Error, Result};
use crate::plan::{Plan, UnitId};
use crate::unit::Unit;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

/// The environment variable.
pub const VARIABLE: &str = "FSDP_TIMELINE";
const START: &str = "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n";
const END: &str = "\n]}\n";
/// Bytes of events that a rank keeps before it writes.
const BUFFER: usize = 1 << 18;
const FLUSH_AFTER_NS: u64 = 500_000_000;

/// The file that the environment asks for.
pub fn wanted() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Nanoseconds of the clock that all processes of the host share.
pub fn now() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is writable; this clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// What memory counters show, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    pub units_unsharded: u64,
    pub gradient_slots: u64,
    pub param_shards: u64,
    pub grad_shards: u64,
    pub materialized_peak: u64,
}

/// See the module's text: one engine's part on this rank.
pub struct Timeline {
    rank: usize,
    /// The engine's track; the units' follow.
    track: u64,
    path: PathBuf,
    file: File,
    units: Vec<String>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Events separated by ",\n".
    text: String,
    flushed: u64,
    /// By unit: since when it computes, and whether in a forward.
    computing: Vec<Option<(u64, bool)>>,
    memory: Option<Memory>,
    failed: bool,
}

impl Timeline {
    /// None if the environment asks for none. Collective: an unusable file on one rank is an error on every rank.
    pub fn open(comm: &dyn Communicator, plan: &Plan, engine: u64) -> Result<Option<Timeline>> {
        let Some(path) = wanted() else { return Ok(None) };
        static STARTED: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);
        let fail = |e| Error::os(format!("the timeline \"{}\" ({VARIABLE}) cannot be written", path.display()), e);
        let start = || {
            let mut started = STARTED.lock().unwrap_or_else(|e| e.into_inner());
            if started.get_or_insert_default().insert(path.clone()) {
                std::fs::write(&path, format!("{START}{}{END}", process_name(0))).map_err(fail)?;
            }
            Ok(0)
        };
        // Nobody opens the file before rank 0 has started it.
        agree::on_result(if comm.rank() == 0 { start() } else { Ok(0) }, comm)?;
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(fail);
        agree::on_result(file.as_ref().map(|_| 0).map_err(Error::clone), comm)?;

        let units: Vec<String> = plan.units.iter().map(|u| u.label().to_string()).collect();
        // Engines of a process side by side, whatever their numbers of units.
        let timeline = Timeline {
            rank: comm.rank(),
            track: engine << 20,
            path: path.clone(),
            file: file?,
            units,
            inner: Mutex::default(),
        };
        let mut inner = timeline.lock();
        inner.computing = vec![None; timeline.units.len()];
        inner.flushed = now();
        inner.add(process_name(timeline.rank));
        inner.add(timeline.track_name(0, "engine"));
        for (u, name) in timeline.units.iter().enumerate() {
            inner.add(timeline.track_name(1 + u as u64, &format!("unit {name}")));
        }
        drop(inner);
        Ok(Some(timeline))
    }

    fn track_name(&self, lane: u64, name: &str) -> String {
        format!(
            "{{\"ph\": \"M\", \"name\": \"thread_name\", \"pid\": {}, \"tid\": {}, \"args\": {{\"name\": {}}}}},\n\
             {{\"ph\": \"M\", \"name\": \"thread_sort_index\", \"pid\": {}, \"tid\": {}, \"args\": {{\"sort_index\": {}}}}}",
            self.rank,
            self.track + lane,
            quoted(name),
            self.rank,
            self.track + lane,
            self.track + lane
        )
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the engine did from `start` ([`now`]) to now for a unit: "unshard", "reduce" or "wait".
    pub fn unit_span(&self, name: &str, unit: UnitId, start: u64) {
        self.lock().span(self.rank, self.track, name, "unit", &self.units[unit as usize], start);
        self.flush_if_full();
    }

    /// The same for something that is not a unit's: a wait for `what`.
    pub fn wait_span(&self, what: &str, start: u64) {
        self.lock().span(self.rank, self.track, "wait", "for", what, start);
        self.flush_if_full();
    }

    /// Compares with what was last seen: units that began or ended to compute, and memory.
    pub fn observe(&self, units: &[Unit], in_forward: bool, memory: Memory) {
        let time = now();
        let mut inner = self.lock();
        for (u, unit) in units.iter().enumerate() {
            match (inner.computing[u], unit.is_computing()) {
                (None, true) => inner.computing[u] = Some((time, in_forward)),
                (Some((start, forward)), false) => {
                    let name = if forward { "forward" } else { "backward" };
                    inner.span(self.rank, self.track + 1 + u as u64, name, "unit", &self.units[u], start);
                    inner.computing[u] = None;
                }
                _ => {}
            }
        }
        if inner.memory != Some(memory) {
            inner.memory = Some(memory);
            let m = memory;
            inner.add(format!(
                "{{\"ph\": \"C\", \"name\": \"memory\", \"id\": {}, \"pid\": {}, \"ts\": {}, \"args\": {{\"units unsharded\": {}, \
                 \"gradient slots\": {}, \"parameter shards\": {}, \"gradient shards\": {}, \"materialized peak\": {}}}}}",
                self.track >> 20,
                self.rank,
                micros(time),
                m.units_unsharded,
                m.gradient_slots,
                m.param_shards,
                m.grad_shards,
                m.materialized_peak
            ));
        }
        drop(inner);
        self.flush_if_full();
    }

    /// The end of an iteration.
    pub fn end_iteration(&self) {
        if now() - self.lock().flushed > FLUSH_AFTER_NS {
            self.flush();
        }
    }

    fn flush_if_full(&self) {
        if self.lock().text.len() > BUFFER {
            self.flush();
        }
    }

    /// Appends what was collected. A failure is logged once, and ends the timeline.
    pub fn flush(&self) {
        let mut inner = self.lock();
        inner.flushed = now();
        let text = std::mem::take(&mut inner.text);
        if text.is_empty() || inner.failed {
            return;
        }
        if let Err(e) = self.append(&text) {
            inner.failed = true;
            crate::log::warn(&format!("the timeline \"{}\" of rank {} ends here: {e}", self.path.display(), self.rank));
        }
    }

    /// In place of the file's end, which comes after it again.
    fn append(&self, text: &str) -> Result<()> {
        let _locked = FileLock::new(&self.file)?;
        let fail = |e| Error::os("cannot append", e);
        let length = self.file.metadata().map_err(fail)?.len();
        let at = length.saturating_sub(END.len() as u64);
        let mut end = [0; END.len()];
        self.file.read_exact_at(&mut end, at).map_err(fail)?;
        if end != END.as_bytes() {
            return Err(err!(Io, "the file was changed by something else"));
        }
        self.file.write_all_at(format!(",\n{text}{END}").as_bytes(), at).map_err(fail)
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Inner {
    fn add(&mut self, event: String) {
        if !self.text.is_empty() {
            self.text.push_str(",\n");
        }
        self.text.push_str(&event);
    }

    fn span(&mut self, rank: usize, track: u64, name: &str, key: &str, value: &str, start: u64) {
        let end = now();
        if self.failed {
            return;
        }
        self.add(format!(
            "{{\"ph\": \"X\", \"name\": \"{name}\", \"cat\": \"fsdp\", \"pid\": {rank}, \"tid\": {track}, \"ts\": {}, \"dur\": {}, \
             \"args\": {{\"{key}\": {}}}}}",
            micros(start),
            micros(end - start),
            quoted(value)
        ));
    }
}

/// With all the digits that there are: nested events must stay nested.
fn micros(ns: u64) -> String {
    let mut text = String::new();
    let _ = write!(text, "{}.{:03}", ns / 1000, ns % 1000);
    text
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn process_name(rank: usize) -> String {
    format!(
        "{{\"ph\": \"M\", \"name\": \"process_name\", \"pid\": {rank}, \"args\": {{\"name\": \"rank {rank}\"}}}},\n\
         {{\"ph\": \"M\", \"name\": \"process_sort_index\", \"pid\": {rank}, \"args\": {{\"sort_index\": {rank}}}}}"
    )
}

/// An exclusive lock on a file, among processes and among openings of one process.
struct FileLock<'a>(&'a File);

impl FileLock<'_> {
    fn new(file: &File) -> Result<FileLock<'_>> {
        loop {
            // SAFETY: the descriptor is open.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } == 0 {
                return Ok(FileLock(file));
            }
            let e = std::io::Error::last_os_error();
            if e.kind() != std::io::ErrorKind::Interrupted {
                return Err(Error::os("cannot lock the file", e));
            }
        }
    }
}

impl Drop for FileLock<'_> {
    fn drop(&mut self) {
        // SAFETY: the descriptor is open.
        unsafe { libc::flock(self.0.as_raw_fd(), libc::LOCK_UN) };
    }
}
