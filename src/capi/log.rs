//! Where messages for a person go.

use super::model::UserData;
use super::status::{boundary, boundary_void, fsdp_status_t};
use crate::error::err;
use crate::log::{self, set_callback, Level, LogCallback};
use std::ffi::{c_char, c_void, CString};
use std::sync::Arc;

/// Level of a message: the steps of an iteration, many.
pub const FSDP_LOG_DEBUG: i32 = 0;
/// What happens seldom, e.g. that an engine was made.
pub const FSDP_LOG_INFO: i32 = 1;
/// Nothing failed, but what happens may not be what was meant.
pub const FSDP_LOG_WARNING: i32 = 2;
/// For fsdp_set_log_level: no messages.
pub const FSDP_LOG_OFF: i32 = 3;

// Numbers as literals are what cbindgen understands.
const _: () = assert!(
    FSDP_LOG_DEBUG == Level::Debug as i32
        && FSDP_LOG_INFO == Level::Info as i32
        && FSDP_LOG_WARNING == Level::Warning as i32
        && FSDP_LOG_OFF == log::OFF
);

/// Messages below this level, FSDP_LOG_*, are not made from now on, in the whole process; FSDP_LOG_OFF: none are. At first
/// the environment variable FSDP_LOG says it: debug, info, warning or off; FSDP_LOG_WARNING without it. Local.
/// Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_set_log_level(level: i32) -> fsdp_status_t {
    boundary(|| match (FSDP_LOG_DEBUG..=FSDP_LOG_OFF).contains(&level) {
        true => {
            log::set_threshold(level);
            Ok(())
        }
        false => Err(err!(InvalidArgument, "the log level cannot be {level}")),
    })
}

/// Receives a message (one line without its end, borrowed for the call) and its level, FSDP_LOG_*. Called in any thread
/// that calls fsdp, from within that call, by several at once; may call fsdp; must not throw or unwind.
pub type fsdp_log_fn = Option<unsafe extern "C" fn(level: i32, message: *const c_char, user_data: *mut c_void)>;

/// Sends the messages of this process to `fn` from now on, with `user_data` untouched; NULL: back to the default, a
/// line "fsdp: warning: ..." each on standard error. The function before it may still be running in another thread when
/// this returns. Local. Since 0.1.
///
/// # Safety
/// `fn_` is NULL or a function that may be called with `user_data` from any thread until it is replaced.
#[no_mangle]
pub unsafe extern "C" fn fsdp_set_log_callback(fn_: fsdp_log_fn, user_data: *mut c_void) {
    boundary_void(|| {
        let user_data = UserData(user_data);
        set_callback(fn_.map(|function| {
            let callback: LogCallback = Arc::new(move |level, message| {
                let message = CString::new(message.replace('\0', "?")).unwrap_or_default();
                // SAFETY: the caller's promise; the message lives until the call returns.
                unsafe { function(level as i32, message.as_ptr(), user_data.get()) }
            });
            callback
        }));
    });
}
