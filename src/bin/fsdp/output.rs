//! The ranks' output: whole lines, each with [rank] in front, never torn, however many ranks write at once.
//!
//! A line that a program draws over itself with carriage returns (a progress bar) is shown as it changes when it
//! ends on a terminal, and only in its last state when it ends in a file or a pipe.

use std::io::{self, IsTerminal, Read, Write};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A longer line is passed on in pieces, to bound memory.
const LONGEST_LINE: usize = 1 << 20;
/// Clears the terminal's current line.
const CLEAR: &[u8] = b"\r\x1b[K";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Where the lines go. One lock for both streams, so that lines on one terminal do not mix.
pub struct Screen {
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
    /// Whether an unfinished line stands on the terminal, to be cleared before the next one.
    unfinished: Mutex<bool>,
}

impl Screen {
    pub fn new() -> Screen {
        Screen {
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
            unfinished: Mutex::new(false),
        }
    }

    /// A line of the launcher's own, on standard error.
    pub fn note(&self, line: &str) {
        // With standard error closed there is nobody left to tell.
        let _ = self.finished(Stream::Stderr, format!("{line}\n").as_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_terminal(&self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout_is_terminal,
            Stream::Stderr => self.stderr_is_terminal,
        }
    }

    /// Writes whole lines.
    fn finished(&self, stream: Stream, lines: &[u8]) -> io::Result<()> {
        let mut unfinished = self.lock();
        if *unfinished && self.is_terminal(stream) {
            write(stream, CLEAR)?;
            *unfinished = false;
        }
        write(stream, lines)
    }

    /// Shows a line that is still being written, on a terminal only.
    fn unfinished(&self, stream: Stream, line: &[u8]) -> io::Result<()> {
        if !self.is_terminal(stream) {
            return Ok(());
        }
        let mut unfinished = self.lock();
        *unfinished = true;
        let mut text = CLEAR.to_vec();
        text.extend_from_slice(&fit(line, columns(stream)));
        write(stream, &text)
    }
}

fn write(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(bytes)?;
            out.flush()
        }
        Stream::Stderr => io::stderr().lock().write_all(bytes),
    }
}

/// A line cut to the terminal's width: one that wraps could not be cleared. One with escape sequences is left as it is.
fn fit(line: &[u8], columns: usize) -> Vec<u8> {
    if line.len() < columns || line.contains(&0x1b) {
        return line.to_vec();
    }
    String::from_utf8_lossy(line).chars().take(columns.saturating_sub(1)).collect::<String>().into_bytes()
}

fn columns(stream: Stream) -> usize {
    let fd = if stream == Stream::Stdout { libc::STDOUT_FILENO } else { libc::STDERR_FILENO };
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills the winsize that the pointer refers to.
    let known = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) } == 0 && size.ws_col > 0;
    if known {
        usize::from(size.ws_col)
    } else {
        80
    }
}

/// Copies one rank's stream until its end. When the screen cannot be written any more (a closed pipe), it stops
/// reading, so that the rank meets a closed pipe too.
pub fn copy_lines(mut pipe: impl Read, rank: u32, stream: Stream, screen: &Screen) {
    let mut lines = Lines::new(rank);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let finished = lines.push(&buffer[..count]);
        if !finished.is_empty() && screen.finished(stream, &finished).is_err() {
            return;
        }
        if let Some(line) = lines.unfinished() {
            if screen.unfinished(stream, &line).is_err() {
                return;
            }
        }
    }
    let rest = lines.finish();
    if !rest.is_empty() {
        let _ = screen.finished(stream, &rest);
    }
}

/// Cuts a stream of bytes into prefixed lines.
struct Lines {
    prefix: Vec<u8>,
    pending: Vec<u8>,
}

impl Lines {
    fn new(rank: u32) -> Lines {
        Lines { prefix: format!("[{rank}] ").into_bytes(), pending: Vec::new() }
    }

    /// Takes bytes in; returns the lines that are finished by them.
    fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut finished = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.pending.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.pending.len() >= LONGEST_LINE {
                finished.extend(self.finish());
            }
        }
        // States that were drawn over are not needed any more.
        let shown = visible(&self.pending);
        if !shown.is_empty() {
            self.pending.drain(..shown.start);
        }
        finished
    }

    /// What is still unfinished, as a line, or the empty vector.
    fn finish(&mut self) -> Vec<u8> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return pending;
        }
        self.prefixed(&pending[visible(&pending)], b"\n")
    }

    /// The unfinished line as a terminal would show it now.
    fn unfinished(&self) -> Option<Vec<u8>> {
        let shown = visible(&self.pending);
        (!shown.is_empty()).then(|| self.prefixed(&self.pending[shown], b""))
    }

    fn prefixed(&self, text: &[u8], end: &[u8]) -> Vec<u8> {
        [&self.prefix, text, end].concat()
    }
}

/// What stands on the line at the end: the text after the last carriage return that has text behind it.
fn visible(line: &[u8]) -> Range<usize> {
    let mut end = line.len() - usize::from(line.ends_with(b"\n"));
    while end > 0 && line[end - 1] == b'\r' {
        end -= 1;
    }
    let start = line[..end].iter().rposition(|&byte| byte == b'\r').map_or(0, |at| at + 1);
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prefixed_whole_whatever_the_pieces() {
        let mut lines = Lines::new(3);
        assert_eq!(lines.push(b"he"), b"");
        assert_eq!(lines.push(b"llo\n\nwor"), b"[3] hello\n[3] \n");
        assert_eq!(lines.unfinished().unwrap(), b"[3] wor");
        assert_eq!(lines.push(b"ld"), b"");
        assert_eq!(lines.finish(), b"[3] world\n");
        assert_eq!(lines.finish(), b"");
    }

    #[test]
    fn carriage_returns_leave_the_last_state() {
        let mut lines = Lines::new(0);
        assert_eq!(lines.push(b"\r10%\r20%"), b"");
        assert_eq!(lines.unfinished().unwrap(), b"[0] 20%");
        assert_eq!(lines.push(b"\r30%\r"), b"");
        assert_eq!(lines.unfinished().unwrap(), b"[0] 30%");
        assert_eq!(lines.push(b"\n"), b"[0] 30%\n");
        assert_eq!(lines.push(b"dos\r\n"), b"[0] dos\n");
    }

    #[test]
    fn a_line_without_end_is_passed_on_in_pieces() {
        let mut lines = Lines::new(0);
        let piece = vec![b'x'; LONGEST_LINE];
        assert_eq!(lines.push(&piece).len(), LONGEST_LINE + "[0] \n".len());
        assert!(lines.unfinished().is_none());
    }

    #[test]
    fn unfinished_lines_fit_the_terminal() {
        assert_eq!(fit("ab\u{e9}d".as_bytes(), 4), "ab\u{e9}".as_bytes());
        assert_eq!(fit(b"abc", 4), b"abc");
    }
}
