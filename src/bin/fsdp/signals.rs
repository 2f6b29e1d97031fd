//! Signals: which ones are passed on, how they are received, and sending to a rank's whole process group.

use std::mem::MaybeUninit;

/// The signals that `fsdp run` passes on to its ranks.
const PASSED_ON: [i32; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2];

/// The passed-on signals, blocked in this thread and in every thread it starts, to be taken by [`Waiter::wait`].
pub struct Waiter {
    set: libc::sigset_t,
}

impl Waiter {
    /// Call before any other thread exists. A signal that this process was started to ignore (nohup) stays ignored.
    pub fn block() -> Waiter {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initializes the set; the later calls get that valid set and valid signal numbers, and
        // sigaction with a null new action only reads the old one into `old`.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            for signal in PASSED_ON {
                let mut old = MaybeUninit::<libc::sigaction>::zeroed();
                let known = libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) == 0;
                if !(known && old.assume_init().sa_sigaction == libc::SIG_IGN) {
                    libc::sigaddset(&mut set, signal);
                }
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            Waiter { set }
        }
    }

    /// Waits for the next of them.
    pub fn wait(&self) -> i32 {
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to live values of the right type.
            if unsafe { libc::sigwait(&self.set, &mut signal) } == 0 {
                return signal;
            }
        }
    }
}

/// Sends `signal` to the process group of a rank. The rank must not have been reaped, or the group's number may
/// belong to someone else by now. A group that is gone is no error.
pub fn send_to_group(pid: u32, signal: i32) {
    // SAFETY: killpg takes plain numbers.
    unsafe { libc::killpg(pid as libc::pid_t, signal) };
}

/// Waits until a child has ended and leaves it unreaped, so that its process group's number stays taken.
pub fn wait_for_end(pid: u32) {
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: `info` is writable memory of the right type.
        let rc = unsafe { libc::waitid(libc::P_PID, pid, info.as_mut_ptr(), libc::WEXITED | libc::WNOWAIT) };
        if rc == 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// `SIGKILL` for 9, and so on.
pub fn name(signal: i32) -> String {
    let known = match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGALRM => "SIGALRM",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGSYS => "SIGSYS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGXCPU => "SIGXCPU",
        other => return format!("signal {other}"),
    };
    known.to_string()
}
