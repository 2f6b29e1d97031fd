//! Starting ranks as processes, with a deadline, and collecting what they report.

use fsdp::comm::shm::{self, Config};
use fsdp::comm::{Communicator, Kind, ReduceTarget, Segment, Tag, UnitName, NO_UNIT};
use fsdp::dtype::DType;
use fsdp::error::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROLE: &str = "FSDP_TEST_ROLE";

/// What a rank process knows of itself.
pub struct Rank {
    pub role: String,
    pub case: String,
    pub config: Config,
}

impl Rank {
    pub fn rank(&self) -> usize {
        self.config.rank
    }

    pub fn world(&self) -> usize {
        self.config.world_size
    }

    pub fn init(&self) -> Arc<dyn Communicator> {
        shm::init(&self.config).unwrap()
    }
}

/// In a rank process: runs the role and reports what it returns. Elsewhere: nothing.
pub fn run_role(roles: &dyn Fn(&Rank) -> String) {
    let Ok(role) = std::env::var(ROLE) else { return };
    let var = |name: &str| std::env::var(format!("FSDP_TEST_{name}")).unwrap();
    let number = |name: &str| var(name).parse::<usize>().unwrap();
    let config = Config {
        timeout: Duration::from_millis(number("TIMEOUT") as u64),
        rendezvous_timeout: Duration::from_secs(40),
        ..Config::new(var("JOB"), number("RANK"), number("WORLD"))
    };
    let report = roles(&Rank { role, case: var("CASE"), config });
    println!("\nREPORT {}", report.replace('\n', " "));
    std::process::exit(0);
}

/// A job to start: all its ranks run `role`.
pub struct Job {
    pub role: &'static str,
    pub case: String,
    pub world: usize,
    pub timeout: Duration,
    name: String,
}

/// How a rank process ended.
#[derive(Debug)]
pub struct Outcome {
    pub report: Option<String>,
    pub signal: Option<i32>,
    pub all: String,
}

pub struct Running {
    children: Vec<Child>,
    outputs: Vec<BufReader<ChildStdout>>,
}

impl Job {
    pub fn new(role: &'static str, case: &str, world: usize) -> Job {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        Job { role, case: case.to_string(), world, timeout: Duration::from_secs(60), name }
    }

    pub fn timeout_ms(self, ms: u64) -> Job {
        Job { timeout: Duration::from_millis(ms), ..self }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn command(&self, rank: usize) -> Command {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["--exact", "rank_process", "--nocapture", "--test-threads=1"]);
        c.env(ROLE, self.role).env("FSDP_TEST_CASE", &self.case).env("FSDP_TEST_JOB", &self.name);
        c.env("FSDP_TEST_RANK", rank.to_string()).env("FSDP_TEST_WORLD", self.world.to_string());
        c.env("FSDP_TEST_TIMEOUT", self.timeout.as_millis().to_string());
        c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        c
    }

    pub fn start(&self) -> Running {
        Running::of((0..self.world).map(|r| self.command(r).spawn().unwrap()).collect())
    }

    /// Starts the job and returns how each rank ended.
    pub fn run(&self) -> Vec<Outcome> {
        self.start().finish()
    }

    /// The ranks' reports; fails the test when a rank did not make one.
    pub fn reports(&self) -> Vec<String> {
        let what = format!("{} {} world {}", self.role, self.case, self.world);
        let report = |(r, o): (usize, Outcome)| o.report.unwrap_or_else(|| panic!("{what}: rank {r}: {}", o.all));
        self.run().into_iter().enumerate().map(report).collect()
    }

    /// The one report that all ranks make.
    pub fn same_report(&self) -> String {
        let all = self.reports();
        assert!(all.iter().all(|r| *r == all[0]), "{} {}: {all:#?}", self.role, self.case);
        all[0].clone()
    }
}

impl Running {
    pub fn of(mut children: Vec<Child>) -> Running {
        let outputs = children.iter_mut().map(|c| BufReader::new(c.stdout.take().unwrap())).collect();
        Running { children, outputs }
    }

    /// Returns when every rank has written this line, or ended.
    pub fn wait_for(&mut self, line: &str) {
        for output in &mut self.outputs {
            let mut got = String::new();
            while got.trim_end() != line {
                got.clear();
                if output.read_line(&mut got).unwrap() == 0 {
                    break;
                }
            }
        }
    }

    pub fn pid(&self, rank: usize) -> u32 {
        self.children[rank].id()
    }

    /// kill -9.
    pub fn kill(&mut self, rank: usize) {
        self.children[rank].kill().unwrap();
    }

    /// Waits for every rank, at most two minutes, then collects what they wrote.
    pub fn finish(mut self) -> Vec<Outcome> {
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut outcomes = Vec::new();
        for (child, output) in self.children.iter_mut().zip(&mut self.outputs) {
            let mut hung = false;
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status,
                    None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                    None => {
                        hung = true;
                        child.kill().unwrap();
                        break child.wait().unwrap();
                    }
                }
            };
            let (mut out, mut err) = (String::new(), String::new());
            output.read_to_string(&mut out).unwrap();
            child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
            let report = out.lines().find_map(|l| l.strip_prefix("REPORT ")).map(str::to_string);
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            let report = report.filter(|_| status.success() && !hung);
            outcomes.push(Outcome { report, signal, all: format!("hung: {hung}, {status}\n{out}\n{err}") });
        }
        outcomes
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `status | message` of an error, for reports.
pub fn text(e: &Error) -> String {
    format!("{:?} | {}", e.status, e.message)
}

/// The same of a result that must be an error.
pub fn error_text<T>(r: Result<T>) -> String {
    text(&r.err().expect("an error"))
}

/// A clock that all processes share, in milliseconds.
pub fn clock_ms() -> u64 {
    // SAFETY: `t` is plain data that the call fills.
    let t = unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t
    };
    t.tv_sec as u64 * 1000 + t.tv_nsec as u64 / 1_000_000
}

pub fn die() -> ! {
    // SAFETY: ends this process.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

pub fn sleep_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

pub fn tag(kind: Kind, unit: u32, bytes: usize) -> Tag {
    Tag { kind, unit, dtype: DType::F32, bytes: bytes as u64 }
}

/// Names for `name_units`.
pub fn names(labels: &[&str]) -> Vec<UnitName> {
    labels.iter().map(|l| UnitName { label: l.to_string(), params: format!("{l}.weight") }).collect()
}

/// Takes part in reductions that write nothing on this rank; counts them.
#[derive(Default)]
pub struct Nothing(pub usize);

impl ReduceTarget for Nothing {
    fn segments(&mut self, _: usize) -> &[Segment] {
        &[]
    }
    fn reduced(&mut self, _: usize, _: &[bool]) {
        self.0 += 1;
    }
}

pub fn no_unit(kind: Kind, bytes: usize) -> Tag {
    tag(kind, NO_UNIT, bytes)
}

/// The same numbers for the same seed, on every rank: of many magnitudes, so that the order of a sum shows.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    (0..n).map(|_| ((next() >> 40) as f32 / 8388608.0 - 1.0) * 10f32.powi((next() % 7) as i32 - 3)).collect()
}

pub fn bytes_of(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_ne_bytes()).collect()
}
