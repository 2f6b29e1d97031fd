//! The `fsdp` command as a user meets it: `fsdp run` with small shell programs as ranks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No run of this file may take longer; a test that waits for something gives up then.
const DEADLINE: Duration = Duration::from_secs(60);

fn fsdp(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsdp"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: alarm takes a number. It ends this process if a test hangs in a read, in whatever order tests run.
    unsafe { libc::alarm(2 * DEADLINE.as_secs() as u32) };
    // SAFETY: the closure runs between fork and exec and only makes async-signal-safe system calls.
    unsafe {
        command.pre_exec(|| {
            // Tests may be started by something that ignores them, such as a background job of a shell; `fsdp run`
            // would, rightly, go on ignoring them.
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"] {
        command.env_remove(name);
    }
    command
}

/// `fsdp run OPTIONS -- sh -c SCRIPT`.
fn run_sh(options: &[&str], script: &str) -> Command {
    let mut args = vec!["run"];
    args.extend(options);
    args.extend(["--", "sh", "-c", script]);
    fsdp(&args)
}

/// Waits for the command with a deadline, so that a hang fails instead of hanging the test run.
fn finish(command: &mut Command) -> (i32, String, String) {
    let child = command.spawn().expect("fsdp starts");
    let pid = child.id() as libc::pid_t;
    let (sender, done) = std::sync::mpsc::channel();
    let watcher = std::thread::spawn(move || {
        if done.recv_timeout(DEADLINE).is_err() {
            // SAFETY: kill takes plain numbers; the child is not reaped while this thread is not told so.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    });
    let output: Output = child.wait_with_output().expect("fsdp can be waited for");
    let _ = sender.send(());
    watcher.join().expect("the watcher does not panic");
    let code = output.status.code().unwrap_or_else(|| panic!("fsdp itself was killed: {output:?}"));
    (code, String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Sorted lines: ranks write in any order.
fn lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Waits until `done` holds; fails with `what` past the deadline.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the process runs (a zombie does not).
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

fn signal(child: &Child, number: i32) {
    // SAFETY: kill takes plain numbers; the child is not reaped yet, so its number is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, number) }, 0);
}

/// Reads the next line with `text` in it.
fn line_with(reader: &mut impl BufRead, text: &str) -> String {
    let mut line = String::new();
    while reader.read_line(&mut line).expect("readable output") > 0 {
        if line.contains(text) {
            return line.trim_end().to_string();
        }
        line.clear();
    }
    panic!("the output ended without '{text}'");
}

#[test]
fn ranks_get_torchruns_variables() {
    let script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR $OMP_NUM_THREADS; \
                  echo same $MASTER_PORT $TORCHELASTIC_RUN_ID >&2";
    let (code, out, err) = finish(run_sh(&["-n", "3"], script).env("OMP_NUM_THREADS", "7"));
    assert_eq!(code, 0, "{err}");
    let expected: Vec<String> = (0..3).map(|r| format!("[{r}] {r} {r} 3 3 0 127.0.0.1 7")).collect();
    assert_eq!(lines(&out), expected);
    let shared: Vec<&str> = lines(&err).into_iter().map(|line| line.split_once("] ").unwrap().1).collect();
    assert_eq!(shared.len(), 3);
    assert!(shared.iter().all(|line| *line == shared[0]), "{err}");
    let words: Vec<&str> = shared[0].split(' ').collect();
    assert!(words[1].parse::<u16>().unwrap() > 0 && words[2].len() > 16, "{err}");
    let (_, _, again) = finish(&mut run_sh(&["-n", "1"], "echo $TORCHELASTIC_RUN_ID >&2"));
    assert_ne!(again.trim(), format!("[0] {}", words[2]));
}

#[test]
fn ranks_start_with_no_signal_blocked() {
    let (code, out, _) =
        finish(&mut fsdp(&["run", "-n", "1", "--no-prefix", "--", "grep", "SigBlk", "/proc/self/status"]));
    assert_eq!((code, out.trim_start_matches("SigBlk:").trim()), (0, "0000000000000000"));
}

#[test]
fn threads_are_shared_out() {
    let (code, out, _) = finish(&mut run_sh(&["-n", "2"], "echo $OMP_NUM_THREADS"));
    assert_eq!(code, 0);
    let cores = std::thread::available_parallelism().unwrap().get();
    let expected = (cores / 2).max(1).to_string();
    assert_eq!(lines(&out), [format!("[0] {expected}"), format!("[1] {expected}")]);
}

#[test]
fn arguments_reach_the_program_untouched() {
    let (code, out, _) = finish(&mut fsdp(&["run", "-n1", "printf", "%s|", "-n", "a b", "--grace", "", "--", "é"]));
    assert_eq!((code, out.as_str()), (0, "[0] -n|a b|--grace||--|é|\n"));
}

#[test]
fn lines_are_not_torn() {
    let script = "i=0; while [ $i -lt 300 ]; do printf 'aaaaaaaaaaaaaaaaaaaa'; printf 'bbbbbbbbbbbbbbbbbbbb\\n'; i=$((i+1)); done";
    let (code, out, _) = finish(&mut run_sh(&["-n", "4"], script));
    assert_eq!(code, 0);
    assert_eq!(out.lines().count(), 1200);
    for line in out.lines() {
        assert!(line.starts_with('[') && line.ends_with("] aaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbb"), "{line}");
    }
}

#[test]
fn a_progress_bar_in_a_pipe_shows_its_last_state() {
    let (_, out, _) =
        finish(&mut run_sh(&["-n", "1"], "printf '\\r10%%\\r20%%'; sleep 0.1; printf '\\r100%%\\n'; printf end"));
    assert_eq!(out, "[0] 100%\n[0] end\n");
}

#[test]
fn without_prefix_output_is_untouched() {
    let (code, out, _) = finish(&mut run_sh(&["-n", "1", "--no-prefix"], "printf '\\ra\\rb'"));
    assert_eq!((code, out.as_str()), (0, "\ra\rb"));
}

#[test]
fn only_rank_0_reads_standard_input() {
    let mut child = run_sh(&["-n", "2"], "cat").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "[0] hello\n");
}

#[test]
fn the_first_failing_rank_gives_the_status() {
    let script = "[ $RANK = 2 ] && exit 41; sleep 1; echo peer 2 died; exit 1";
    let (code, out, err) = finish(&mut run_sh(&["-n", "3"], script));
    assert_eq!(code, 41, "{err}");
    assert_eq!(lines(&out), ["[0] peer 2 died", "[1] peer 2 died"], "the others may report their own error");
    assert!(err.contains("rank 2 (pid ") && err.contains("exited with status 41; exit status 41"), "{err}");
    assert!(err.contains("rank 0 (pid ") && err.contains("exited with status 1\n"), "{err}");
}

#[test]
fn a_rank_ended_by_a_signal_is_named() {
    let (code, _, err) = finish(&mut run_sh(&["-n", "2"], "[ $RANK = 1 ] && kill -9 $$; sleep 0.3"));
    assert_eq!(code, 128 + 9);
    assert!(err.contains("rank 1 (pid ") && err.contains("was killed by SIGKILL"), "{err}");
}

#[test]
fn ranks_that_outlive_a_failure_are_ended_with_their_children() {
    // Rank 0 ignores SIGTERM and leaves a grandchild that does too.
    let script =
        "[ $RANK = 1 ] && { sleep 0.3; exit 5; }; trap '' TERM; sleep 1000 & echo pids $$ $!; wait; sleep 1000";
    let (code, out, err) = finish(&mut run_sh(&["-n", "2", "--grace", "0.2"], script));
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("rank 0 still running 200ms after the failure"), "{err}");
    assert!(err.contains("after SIGTERM: killing them"), "{err}");
    for pid in out.strip_prefix("[0] pids ").expect(&out).split_whitespace() {
        wait_until("the rank's processes are gone", || !runs(pid));
    }
}

#[test]
fn what_a_finished_rank_leaves_running_is_ended() {
    let (code, out, _) = finish(&mut run_sh(&["-n", "1"], "sleep 1000 & echo $!"));
    assert_eq!(code, 0);
    let pid = out.trim().strip_prefix("[0] ").unwrap().to_string();
    wait_until("the grandchild is gone", || !runs(&pid));
}

#[test]
fn signals_are_passed_on() {
    for (number, name) in
        [(libc::SIGINT, "INT"), (libc::SIGTERM, "TERM"), (libc::SIGHUP, "HUP"), (libc::SIGUSR1, "USR1")]
    {
        let script = format!("trap 'echo got {name}; exit 0' {name}; echo ready; while :; do sleep 0.02; done");
        let mut child = run_sh(&["-n", "2"], &script).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        line_with(&mut out, "ready");
        line_with(&mut out, "ready");
        signal(&child, number);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!(lines(&rest), [format!("[0] got {name}"), format!("[1] got {name}")]);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn a_third_interrupt_ends_ranks_that_ignore_it() {
    let mut child =
        run_sh(&["-n", "1"], "trap 'echo again' INT; echo ready; while :; do sleep 0.02; done").spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    line_with(&mut out, "ready");
    for _ in 0..2 {
        signal(&child, libc::SIGINT);
        line_with(&mut out, "again");
    }
    signal(&child, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
}

#[test]
fn ranks_die_with_a_killed_launcher() {
    let mut child = run_sh(&["-n", "2"], "echo pid $$; while :; do sleep 0.05; done").spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let pids: Vec<String> =
        (0..2).map(|_| line_with(&mut out, "pid").rsplit(' ').next().unwrap().to_string()).collect();
    signal(&child, libc::SIGKILL);
    child.wait().unwrap();
    for pid in pids {
        wait_until("the ranks are gone", || !runs(&pid));
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_ranks() {
    let mut child = run_sh(&["-n", "1"], "while :; do echo x || exit 3; done").spawn().unwrap();
    let mut first = [0; 4];
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut first).unwrap();
    drop(out);
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
            panic!("the rank wrote on into a closed pipe");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn bad_arguments_are_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let cases: [(&[&str], i32, &str); 9] = [
        (&["run", "-n", "2", "--", "no-such-program-anywhere"], 127, "'no-such-program-anywhere' was not found"),
        (&["run", "-n", "1", "./no/such/file"], 127, "'./no/such/file' was not found"),
        (&["run", "-n", "1", "Cargo.toml"], 127, "for the one in this folder write ./Cargo.toml"),
        (&["run", "-n", "1", "./Cargo.toml"], 126, "'./Cargo.toml' cannot be executed"),
        (&["run", "-n", "0", "true"], 2, "invalid value '0'"),
        (&["run", "-n", "two", "true"], 2, "invalid value 'two'"),
        (&["run", "-n", "2"], 2, "PROGRAM"),
        (&["run", "-n", "2", "--grace", "soon", "true"], 2, "not a number of seconds"),
        (&["run", "-n", "2", "--master-port", &port, "true"], 2, "is in use by another process"),
    ];
    for (args, expected, text) in cases {
        let (code, out, err) = finish(fsdp(args).current_dir(env!("CARGO_MANIFEST_DIR")));
        assert_eq!(code, expected, "{args:?}: {err}");
        assert!(err.contains(text) && out.is_empty(), "{args:?}: {err}");
    }
    drop(taken);
    let (code, out, _) = finish(&mut run_sh(&["-n", "1", "--master-port", &port], "echo $MASTER_PORT"));
    assert_eq!((code, out.trim()), (0, format!("[0] {port}").as_str()));
}
