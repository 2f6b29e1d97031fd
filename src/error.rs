//! The one error type: a status code (shared with the C ABI) and a message that names what went wrong.

use std::fmt;

/// Status codes of the C ABI. Append-only: a number is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    Ok = 0,
    InvalidArgument = 1,
    InvalidHandle = 2,
    InvalidState = 3,
    Unsupported = 4,
    OutOfMemory = 5,
    Io = 6,
    Rendezvous = 7,
    PeerDied = 8,
    Timeout = 9,
    Mismatch = 10,
    Aborted = 11,
    Checkpoint = 12,
    Callback = 13,
    Panic = 14,
    Nonfinite = 15,
    Device = 16,
}

impl Status {
    pub const ALL: [Status; 17] = [
        Status::Ok,
        Status::InvalidArgument,
        Status::InvalidHandle,
        Status::InvalidState,
        Status::Unsupported,
        Status::OutOfMemory,
        Status::Io,
        Status::Rendezvous,
        Status::PeerDied,
        Status::Timeout,
        Status::Mismatch,
        Status::Aborted,
        Status::Checkpoint,
        Status::Callback,
        Status::Panic,
        Status::Nonfinite,
        Status::Device,
    ];

    /// The status with this number, if there is one.
    pub fn from_code(code: i32) -> Option<Status> {
        Status::ALL.iter().copied().find(|s| *s as i32 == code)
    }

    /// The name a person reads, e.g. `peer died`.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::InvalidArgument => "invalid argument",
            Status::InvalidHandle => "invalid handle",
            Status::InvalidState => "invalid state",
            Status::Unsupported => "unsupported",
            Status::OutOfMemory => "out of memory",
            Status::Io => "input/output error",
            Status::Rendezvous => "rendezvous failed",
            Status::PeerDied => "peer died",
            Status::Timeout => "timeout",
            Status::Mismatch => "ranks disagree",
            Status::Aborted => "aborted",
            Status::Checkpoint => "bad checkpoint",
            Status::Callback => "callback failed",
            Status::Panic => "internal error (panic)",
            Status::Nonfinite => "not finite",
            Status::Device => "device error",
        }
    }
}

/// What every fallible function of the crate returns on failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub status: Status,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// An operating-system error: `what` says what was tried, and on what.
    pub fn os(what: impl fmt::Display, error: std::io::Error) -> Error {
        let status = match error.raw_os_error() {
            Some(libc::ENOMEM) | Some(libc::ENOSPC) => Status::OutOfMemory,
            _ => Status::Io,
        };
        Error::new(status, format!("{what}: {error}"))
    }

    /// The same failure with what was being done put in front of it.
    pub fn context(self, what: impl fmt::Display) -> Error {
        Error { status: self.status, message: format!("{what}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.name(), self.message)
    }
}

impl std::error::Error for Error {}

/// `err!(Status, "format {}", args)`: an [`Error`] with a formatted message.
macro_rules! err {
    ($status:ident, $($arg:tt)*) => {
        $crate::error::Error::new($crate::error::Status::$status, format!($($arg)*))
    };
}
pub(crate) use err;
