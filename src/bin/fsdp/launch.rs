//! What a rank is started with: the options of `fsdp run`, the launcher's variables, and the process itself.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

#[derive(clap::Args)]
pub struct RunArgs {
    /// How many ranks to start.
    #[arg(short = 'n', long = "ranks", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub ranks: u32,

    /// MASTER_PORT for the ranks, which must be free; default: a free one.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: Option<u16>,

    /// Seconds that the other ranks have to end by themselves once one has failed; then they get SIGTERM, and
    /// 2 seconds later SIGKILL.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub grace: std::time::Duration,

    /// Pass the ranks' output through untouched instead of putting [rank] in front of each line.
    #[arg(long)]
    pub no_prefix: bool,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    std::time::Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

/// The variables that are the same for every rank of one run.
pub struct Job {
    world_size: u32,
    master_port: u16,
    run_id: String,
    omp_threads: Option<usize>,
}

impl Job {
    /// Chooses the port and the run's name; the error is a line for the user.
    pub fn new(args: &RunArgs) -> Result<Job, String> {
        let omp_threads = match std::env::var_os("OMP_NUM_THREADS") {
            Some(value) if !value.is_empty() => None,
            _ => {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                Some((cores / args.ranks as usize).max(1))
            }
        };
        Ok(Job {
            world_size: args.ranks,
            master_port: choose_port(args.master_port)?,
            run_id: run_id().map_err(|error| format!("/dev/urandom: {error}"))?,
            omp_threads,
        })
    }

    /// Starts one rank, in a process group of its own, to die with this process.
    ///
    /// Must be called from the main thread: the kernel's parent-death signal watches the calling thread.
    pub fn spawn(&self, args: &RunArgs, rank: u32) -> io::Result<Child> {
        let mut command = Command::new(&args.program[0]);
        command.args(&args.program[1..]);
        let world_size = self.world_size.to_string();
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", &world_size);
        command.env("LOCAL_RANK", rank.to_string()).env("LOCAL_WORLD_SIZE", &world_size).env("GROUP_RANK", "0");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", self.master_port.to_string());
        command.env("TORCHELASTIC_RUN_ID", &self.run_id);
        if let Some(threads) = self.omp_threads {
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        // A rank is no foreground process group: reading from the terminal would stop it.
        let give_stdin = rank == 0 && !io::stdin().is_terminal();
        command.stdin(if give_stdin { Stdio::inherit() } else { Stdio::null() });
        if !args.no_prefix {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        command.process_group(0);
        // SAFETY: getpid is always safe to call.
        let parent = unsafe { libc::getpid() };
        // SAFETY: the closure runs between fork and exec and only makes async-signal-safe system calls.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // This process blocks the signals that it passes on; a rank must get them.
                let mut none = std::mem::zeroed();
                libc::sigemptyset(&mut none);
                if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died before the line above took effect.
                if libc::getppid() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
        command.spawn()
    }
}

/// The line and exit status for a program that could not be started.
pub fn start_failure(program: &OsString, error: &io::Error) -> (String, i32) {
    let shown = program.to_string_lossy();
    match error.kind() {
        io::ErrorKind::NotFound => {
            let here = !shown.contains('/') && Path::new(program).is_file();
            let hint = if here { format!("; for the one in this folder write ./{shown}") } else { String::new() };
            (format!("program '{shown}' was not found{hint}"), 127)
        }
        io::ErrorKind::PermissionDenied => (format!("program '{shown}' cannot be executed: {error}"), 126),
        _ => (format!("program '{shown}' could not be started: {error}"), 126),
    }
}

fn choose_port(wanted: Option<u16>) -> Result<u16, String> {
    match wanted {
        Some(port) => match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Ok(_) => Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(format!("--master-port {port} is in use by another process; leave it out for a free one"))
            }
            Err(error) => Err(format!("--master-port {port} cannot be used: {error}")),
        },
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map(|address| address.port())
            .map_err(|error| format!("no free port for MASTER_PORT: {error}")),
    }
}

/// A name that no other run has, so that two runs at the same port never meet.
fn run_id() -> io::Result<String> {
    let mut bytes = [0u8; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("fsdp-{}-{:016x}", std::process::id(), u64::from_ne_bytes(bytes)))
}
