//! Messages for a person: one callback of the host for the whole process, or a line on standard error.
//!
//! A callback may call anything, so it must not run under a lock: C functions run inside [`deferred`], which hands
//! messages on when the function's work is done and its locks are released.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Receives each message.
pub type LogCallback = Arc<dyn Fn(Level, &str) + Send + Sync>;

/// How important a message is. Numbers are those of the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Level {
    /// Every step of an iteration: many.
    Debug = 0,
    /// What happens seldom, e.g. that an engine was made.
    Info = 1,
    /// Nothing failed, but what happens may not be what was meant.
    Warning = 2,
}

/// A threshold above all levels: nothing is said.
pub const OFF: i32 = 3;
/// The environment variable that sets the threshold at first: debug, info, warning or off.
pub const VARIABLE: &str = "FSDP_LOG";

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warning => "warning",
        }
    }
}

/// The lowest level that is said; UNKNOWN: the environment has not been asked yet.
static THRESHOLD: AtomicI32 = AtomicI32::new(UNKNOWN);
const UNKNOWN: i32 = -1;

/// Only messages of at least this level are said from now on; [`OFF`]: none.
pub fn set_threshold(threshold: i32) {
    THRESHOLD.store(threshold, Ordering::Relaxed);
}

fn threshold() -> i32 {
    match THRESHOLD.load(Ordering::Relaxed) {
        UNKNOWN => {
            let wanted = std::env::var(VARIABLE).unwrap_or_default();
            let known = [Level::Debug, Level::Info, Level::Warning].into_iter().find(|l| l.name() == wanted);
            let threshold = match known {
                Some(level) => level as i32,
                None if wanted == "off" => OFF,
                None => Level::Warning as i32,
            };
            // Not over what set_threshold has said meanwhile.
            let _ = THRESHOLD.compare_exchange(UNKNOWN, threshold, Ordering::Relaxed, Ordering::Relaxed);
            if known.is_none() && !wanted.is_empty() && wanted != "off" {
                warn(&format!("{VARIABLE} cannot be \"{wanted}\": debug, info, warning and off are known"));
            }
            THRESHOLD.load(Ordering::Relaxed)
        }
        threshold => threshold,
    }
}

static CALLBACK: RwLock<Option<LogCallback>> = RwLock::new(None);

/// Where messages go from now on; None: one line each on standard error.
pub fn set_callback(callback: Option<LogCallback>) {
    let old = std::mem::replace(&mut *CALLBACK.write().unwrap_or_else(PoisonError::into_inner), callback);
    // Dropped here, after the lock: dropping may run code of the host.
    drop(old);
}

thread_local! {
    /// How many `deferred` this thread is inside of, one in the other, and whether it has something to say.
    static INSIDE: (Cell<u32>, Cell<bool>) = const { (Cell::new(0), Cell::new(false)) };
    /// What it has to say when the outermost ends.
    static PENDING: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

/// Says that something may not be what was meant.
pub fn warn(message: &str) {
    say(Level::Warning, || message.to_string());
}

/// Says something that happens seldom.
pub fn info(message: impl FnOnce() -> String) {
    say(Level::Info, message);
}

/// Says something that happens often.
pub fn debug(message: impl FnOnce() -> String) {
    say(Level::Debug, message);
}

/// At once, or when the `deferred` that this thread is in has ended. What is below the threshold costs one load.
#[inline]
fn say(level: Level, message: impl FnOnce() -> String) {
    /// Apart from the callers' paths, which seldom say anything.
    #[cold]
    #[inline(never)]
    fn say_now(level: Level, message: impl FnOnce() -> String) {
        let message = message();
        if INSIDE.with(|(depth, _)| depth.get() == 0) {
            return deliver(level, &message);
        }
        INSIDE.with(|(_, pending)| pending.set(true));
        PENDING.with_borrow_mut(|pending| pending.push((level, message)));
    }
    if level as i32 >= threshold() {
        say_now(level, message);
    }
}

/// Runs `f`, then hands on the messages it had; inside another `deferred` of this thread, that one does so.
pub(crate) fn deferred<T>(f: impl FnOnce() -> T) -> T {
    /// Hands on when it is dropped, so that a panic loses no message.
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            let ends = INSIDE.with(|(depth, pending)| {
                depth.set(depth.get() - 1);
                depth.get() == 0 && pending.get()
            });
            if ends {
                hand_on();
            }
        }
    }
    INSIDE.with(|(depth, _)| depth.set(depth.get() + 1));
    let _leave = Leave;
    f()
}

#[cold]
fn hand_on() {
    INSIDE.with(|(_, pending)| pending.set(false));
    for (level, message) in PENDING.take() {
        deliver(level, &message);
    }
}

/// Without a lock of this file: the callback may set another one.
fn deliver(level: Level, message: &str) {
    let callback = CALLBACK.read().unwrap_or_else(PoisonError::into_inner).clone();
    match callback {
        Some(callback) => callback(level, message),
        None => {
            let line = format!("fsdp: {}: {message}\n", level.name());
            // In one write, so that lines of several ranks do not mix. If nobody can hear it, there is nobody to tell.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// One test, because the callback is the process's.
    #[test]
    fn the_callback_hears_everything_and_may_call_back() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (first, second) = (heard.clone(), heard.clone());
        set_callback(Some(Arc::new(move |level, message| {
            first.lock().unwrap().push(format!("first {level:?} {message}"));
            let second = second.clone();
            set_callback(Some(Arc::new(move |_, message| second.lock().unwrap().push(format!("second {message}")))));
            warn("from inside");
        })));
        warn("one");
        std::thread::spawn(|| warn("two")).join().unwrap();
        let count = || heard.lock().unwrap().len();
        let before = deferred(|| {
            warn("three");
            deferred(|| warn("four"));
            count()
        });
        assert_eq!((before, count()), (3, 5));
        let _ = std::panic::catch_unwind(|| {
            deferred(|| {
                warn("five");
                panic!("in the middle")
            })
        });
        warn("six");
        set_callback(None);
        warn("this line belongs to a test");
        assert_eq!(
            *heard.lock().unwrap(),
            [
                "first Warning one",
                "second from inside",
                "second two",
                "second three",
                "second four",
                "second five",
                "second six"
            ]
        );
        assert_eq!(Arc::strong_count(&heard), 1, "the callbacks are gone");
    }
}
