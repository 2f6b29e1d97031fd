//! `fsdp run`: starts the ranks, watches over them, and turns their ends into one exit status.
//!
//! Invariant: a rank is reaped only after its whole process group was killed for the last time, so a signal never
//! reaches a stranger that got the same number.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::launch::{start_failure, Job, RunArgs};
use crate::output::{copy_lines, Screen, Stream};
use crate::signals::{self, Waiter};

/// From SIGTERM to SIGKILL.
const TERMINATE_WAIT: Duration = Duration::from_secs(2);
/// How long after the first failure another one may still be taken for its cause (see [`Run::first_failure`]).
const SETTLE: Duration = Duration::from_millis(100);
/// How long output may still arrive when every rank has ended: only a process that left its group writes then.
const DRAIN_WAIT: Duration = Duration::from_secs(1);

enum Event {
    Ended(usize),
    OutputClosed,
    Signal(i32),
}

/// One rank's process and what became of it.
struct Rank {
    child: Child,
    ended: bool,
    /// Whether this launcher sent it SIGTERM or SIGKILL of its own accord.
    stopped_by_us: bool,
}

/// Runs the program; returns the exit status of `fsdp run`.
pub fn run(args: &RunArgs) -> i32 {
    let waiter = Waiter::block();
    let job = match Job::new(args) {
        Ok(job) => job,
        Err(message) => return refuse(&message, 2),
    };
    let screen = Arc::new(Screen::new());
    let (sender, events) = channel();
    let mut ranks = Vec::new();
    let mut open_outputs = 0;
    for number in 0..args.ranks {
        match job.spawn(args, number) {
            Ok(mut child) => {
                open_outputs += read_output(&mut child, number, &screen, &sender);
                ranks.push(Rank { child, ended: false, stopped_by_us: false });
            }
            Err(error) => {
                end_all(&mut ranks);
                let (message, code) = start_failure(&args.program[0], &error);
                return refuse(&message, code);
            }
        }
    }
    for (index, rank) in ranks.iter().enumerate() {
        let (pid, sender) = (rank.child.id(), sender.clone());
        thread::spawn(move || {
            signals::wait_for_end(pid);
            let _ = sender.send(Event::Ended(index));
        });
    }
    thread::spawn(move || while sender.send(Event::Signal(waiter.wait())).is_ok() {});
    let mut run = Run { ranks, failed: Vec::new(), open_outputs, grace: args.grace, screen };
    run.watch(&events);
    run.close(&events)
}

fn refuse(message: &str, code: i32) -> i32 {
    eprintln!("fsdp run: error: {message}");
    code
}

/// Starts the threads that copy a rank's output; returns how many.
fn read_output(child: &mut Child, rank: u32, screen: &Arc<Screen>, sender: &Sender<Event>) -> usize {
    let mut count = 0;
    let mut start = |pipe: Option<Box<dyn std::io::Read + Send>>, stream| {
        if let Some(pipe) = pipe {
            let (screen, sender) = (Arc::clone(screen), sender.clone());
            count += 1;
            thread::spawn(move || {
                copy_lines(pipe, rank, stream, &screen);
                let _ = sender.send(Event::OutputClosed);
            });
        }
    };
    start(child.stdout.take().map(|pipe| Box::new(pipe) as _), Stream::Stdout);
    start(child.stderr.take().map(|pipe| Box::new(pipe) as _), Stream::Stderr);
    count
}

/// Kills every rank's process group for good, then reaps the ranks.
fn end_all(ranks: &mut [Rank]) -> Vec<Option<ExitStatus>> {
    for rank in ranks.iter() {
        signals::send_to_group(rank.child.id(), libc::SIGKILL);
    }
    ranks.iter_mut().map(|rank| rank.child.wait().ok()).collect()
}

struct Run {
    ranks: Vec<Rank>,
    /// Ranks that failed by themselves, in the order in which they ended.
    failed: Vec<(usize, ExitStatus)>,
    open_outputs: usize,
    grace: Duration,
    screen: Arc<Screen>,
}

/// What happens next to ranks that outlive a failed one.
#[derive(Clone, Copy)]
enum Deadline {
    None,
    Name(Instant),
    Terminate(Instant),
    Kill(Instant),
}

impl Run {
    /// Until every rank has ended.
    fn watch(&mut self, events: &Receiver<Event>) {
        let mut deadline = Deadline::None;
        let mut interrupts = 0;
        while self.ranks.iter().any(|rank| !rank.ended) {
            let event = match deadline {
                Deadline::None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Deadline::Name(at) | Deadline::Terminate(at) | Deadline::Kill(at) => {
                    events.recv_timeout(at.saturating_duration_since(Instant::now()))
                }
            };
            match event {
                Ok(Event::Ended(index)) => {
                    self.note_end(index);
                    if !self.failed.is_empty() && matches!(deadline, Deadline::None) {
                        deadline = Deadline::Name(Instant::now() + SETTLE.min(self.grace));
                    }
                }
                Ok(Event::OutputClosed) => self.open_outputs -= 1,
                Ok(Event::Signal(signal)) => {
                    interrupts += u32::from(matches!(signal, libc::SIGINT | libc::SIGTERM));
                    self.pass_on(if interrupts >= 3 { libc::SIGKILL } else { signal });
                }
                Err(RecvTimeoutError::Timeout) => deadline = self.next_step(deadline),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn note_end(&mut self, index: usize) {
        let rank = &mut self.ranks[index];
        rank.ended = true;
        if let Some(status) = peek_status(rank.child.id()) {
            if !status.success() && !rank.stopped_by_us {
                self.failed.push((index, status));
            }
        }
    }

    fn pass_on(&self, signal: i32) {
        for rank in self.ranks.iter().filter(|rank| !rank.ended) {
            signals::send_to_group(rank.child.id(), signal);
        }
    }

    fn running(&self) -> Vec<usize> {
        (0..self.ranks.len()).filter(|&index| !self.ranks[index].ended).collect()
    }

    fn stop(&mut self, signal: i32, reason: &str) {
        let running = self.running();
        let numbers: Vec<String> = running.iter().map(|index| index.to_string()).collect();
        let plural = if running.len() == 1 { "rank" } else { "ranks" };
        self.screen.note(&format!("fsdp run: {plural} {} still running {reason}", numbers.join(", ")));
        for index in running {
            self.ranks[index].stopped_by_us = true;
            signals::send_to_group(self.ranks[index].child.id(), signal);
        }
    }

    fn next_step(&mut self, deadline: Deadline) -> Deadline {
        let now = Instant::now();
        match deadline {
            Deadline::None => Deadline::None,
            Deadline::Name(at) => {
                let line = format!("{}; waiting {:?} for the other ranks", self.describe_first(), self.grace);
                self.screen.note(&line);
                Deadline::Terminate(at + self.grace.saturating_sub(SETTLE))
            }
            Deadline::Terminate(_) => {
                self.stop(libc::SIGTERM, &format!("{:?} after the failure: ending them", self.grace));
                Deadline::Kill(now + TERMINATE_WAIT)
            }
            Deadline::Kill(_) => {
                self.stop(libc::SIGKILL, &format!("{TERMINATE_WAIT:?} after SIGTERM: killing them"));
                Deadline::Kill(now + TERMINATE_WAIT)
            }
        }
    }

    /// The rank that failed first. A rank that a signal ended goes before one that exited in the same instant: the
    /// kernel closes a dying process's sockets before it reports the death, so a peer that only noticed that may
    /// be reported a moment earlier.
    fn first_failure(&self) -> Option<(usize, ExitStatus)> {
        let by_signal = self.failed.iter().find(|(_, status)| status.signal().is_some());
        by_signal.or(self.failed.first()).copied()
    }

    fn describe_first(&self) -> String {
        self.first_failure().map_or(String::new(), |(index, status)| self.describe(index, status))
    }

    fn describe(&self, index: usize, status: ExitStatus) -> String {
        let cause = match status.signal() {
            Some(signal) if status.core_dumped() => format!("was killed by {} (core dumped)", signals::name(signal)),
            Some(signal) => format!("was killed by {}", signals::name(signal)),
            None => format!("exited with status {}", status.code().unwrap_or(-1)),
        };
        format!("fsdp run: rank {index} (pid {}) {cause}", self.ranks[index].child.id())
    }

    /// Cleans up what the ranks left, waits for the rest of the output, and says how it ended.
    fn close(mut self, events: &Receiver<Event>) -> i32 {
        end_all(&mut self.ranks);
        let until = Instant::now() + DRAIN_WAIT;
        while self.open_outputs > 0 {
            match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Event::OutputClosed) => self.open_outputs -= 1,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        let Some((first, status)) = self.first_failure() else { return 0 };
        let others = self.failed.iter().filter(|(index, _)| *index != first);
        for (index, status) in others {
            self.screen.note(&self.describe(*index, *status));
        }
        let code = status.signal().map_or(status.code().unwrap_or(1), |signal| 128 + signal);
        self.screen.note(&format!("{}; exit status {code}", self.describe(first, status)));
        code
    }
}

/// The status of a child that has ended and is not reaped yet.
fn peek_status(pid: u32) -> Option<ExitStatus> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOWAIT | libc::WNOHANG;
    // SAFETY: `info` is writable memory of the right type; si_status is valid once waitid filled it for a child.
    let (code, status) = unsafe {
        if libc::waitid(libc::P_PID, pid, info.as_mut_ptr(), flags) != 0 {
            return None;
        }
        let info = info.assume_init();
        (info.si_code, info.si_status())
    };
    match code {
        libc::CLD_EXITED => Some(ExitStatus::from_raw((status & 0xff) << 8)),
        libc::CLD_KILLED => Some(ExitStatus::from_raw(status)),
        libc::CLD_DUMPED => Some(ExitStatus::from_raw(status | 0x80)),
        _ => None,
    }
}
