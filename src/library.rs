//! Shared libraries that are looked for when they are first needed: CUDA's driver, its compiler, NCCL.
//!
//! Building needs none of them, and a machine without them gets an error that says what was looked for and where. A
//! copy that the process has already (LibTorch's, say) is shared: two copies of NCCL in one process would not know each
//! other's communicators. What was loaded stays loaded until the process ends, so its functions may be called at any
//! time.

use crate::error::{err, Result};
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{c_void, CStr, OsString};
use std::mem::ManuallyDrop;

/// What to look for.
pub struct Search<'a> {
    /// How messages call it.
    pub what: &'a str,
    /// An environment variable that names the file: if set, nothing else is tried.
    pub variable: &'a str,
    /// Names that the system's loader may know it by, best first.
    pub names: &'a [&'a str],
    /// One of its functions.
    pub symbol: &'a str,
}

/// A loaded library.
#[derive(Debug)]
pub struct Library {
    what: String,
    /// Never closed.
    handle: ManuallyDrop<Handle>,
    /// The file that its functions are in.
    path: String,
}

impl Search<'_> {
    /// The library that the variable names; else the copy that this process has; else what the system finds by name.
    /// Runs the library's initializers. An error is `Unsupported`.
    pub fn load(&self) -> Result<Library> {
        self.load_from(std::env::var_os(self.variable).filter(|path| !path.is_empty()))
    }

    /// [`Search::load`] where the variable has this value.
    pub fn load_from(&self, file: Option<OsString>) -> Result<Library> {
        if let Some(file) = file {
            // SAFETY: the host asks for this library, and so for its initializers.
            let handle = unsafe { Handle::open(Some(&file), RTLD_NOW | RTLD_LOCAL) };
            return match handle {
                Ok(handle) => self.opened(handle),
                Err(e) => {
                    Err(err!(Unsupported, "{} was not found where {} says: {}", self.what, self.variable, why(&e)))
                }
            };
        }
        let in_process = |name: &&str| {
            // SAFETY: RTLD_NOLOAD loads nothing, so nothing is initialized.
            unsafe { Handle::open(Some(*name), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NOLOAD) }.ok()
        };
        if let Some(handle) = self.names.iter().find_map(in_process) {
            return self.opened(handle);
        }
        // A library that has it linked in, if its names are visible to all.
        if let Ok(found) = self.opened(Handle::this()) {
            return Ok(found);
        }
        let mut failures = Vec::new();
        for name in self.names {
            // SAFETY: these are the vendor's libraries, made to be loaded so.
            match unsafe { Handle::open(Some(*name), RTLD_NOW | RTLD_LOCAL) } {
                Ok(handle) => return self.opened(handle),
                Err(e) => failures.push(why(&e)),
            }
        }
        Err(err!(
            Unsupported,
            "{} was not found, neither in this process nor where the system looks (LD_LIBRARY_PATH, /etc/ld.so.cache): \
             {}. {} may name the file",
            self.what,
            failures.join("; "),
            self.variable
        ))
    }

    fn opened(&self, handle: Handle) -> Result<Library> {
        let mut library =
            Library { what: self.what.to_string(), handle: ManuallyDrop::new(handle), path: String::new() };
        // SAFETY: only the address is used.
        let symbol: *const c_void = unsafe { library.function(self.symbol) }?;
        library.path = file_of(symbol).unwrap_or_else(|| self.names[0].to_string());
        Ok(library)
    }
}

impl Library {
    /// The file that it was loaded from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A function, as a function pointer; a missing one is `Unsupported`.
    ///
    /// # Safety
    /// `F` is a pointer's size and fits the function of this name.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> Result<F> {
        // SAFETY: the caller's promise.
        match unsafe { self.handle.get::<F>(name) } {
            Ok(symbol) => Ok(*symbol),
            Err(_) if self.path.is_empty() => Err(err!(Unsupported, "{} has no function {name}", self.what)),
            Err(_) => Err(err!(
                Unsupported,
                "{} has no function {name}: {} is too old or another library",
                self.what,
                self.path
            )),
        }
    }
}

/// What the system's loader said; it names the file.
fn why(e: &libloading::Error) -> String {
    use std::error::Error;
    e.source().map_or_else(|| e.to_string(), |source| source.to_string())
}

/// The file that an address was loaded from.
fn file_of(symbol: *const c_void) -> Option<String> {
    // SAFETY: an all-zero Dl_info is a valid one.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr takes any address and fills the struct.
    if unsafe { libc::dladdr(symbol, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own string, which lives as long as the library.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned())
}

/// `functions! { /// Doc. pub struct Name { fn cName(Type, ...) -> Type; ... } optional { fn cName(...) -> Type; ... }
/// }`: a table of a library's functions by their C names; `Name::load(&Library)` fails for a missing one unless it is
/// optional.
macro_rules! functions {
    ($(#[$doc:meta])* pub struct $table:ident { $(fn $name:ident($($arg:ty),* $(,)?) -> $ret:ty;)* }
     optional { $(fn $maybe:ident($($marg:ty),* $(,)?) -> $mret:ty;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub struct $table {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            $(pub $maybe: Option<unsafe extern "C" fn($($marg),*) -> $mret>,)*
        }

        impl $table {
            /// Each function's name, what it takes and what it returns, as they are written here.
            #[cfg(test)]
            pub const DECLARED: &'static [(&'static str, &'static [&'static str], &'static str)] = &[
                $((stringify!($name), &[$(stringify!($arg)),*], stringify!($ret)),)*
                $((stringify!($maybe), &[$(stringify!($marg)),*], stringify!($mret)),)*
            ];

            /// Looks all of them up.
            pub fn load(library: &$crate::library::Library) -> $crate::error::Result<$table> {
                Ok($table {
                    // SAFETY: the types are those of the library's header.
                    $($name: unsafe { library.function(stringify!($name)) }?,)*
                    // SAFETY: as above.
                    $($maybe: unsafe { library.function(stringify!($maybe)) }.ok(),)*
                })
            }
        }
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    const ABSENT: Search = Search {
        what: "the library of nothing",
        variable: "FSDP_TEST_LIBRARY_OF_NOTHING",
        names: &["libfsdp-absent.so.7", "libfsdp-absent.so"],
        symbol: "fsdp_absent",
    };

    #[test]
    fn a_missing_library_says_what_was_looked_for_and_where() {
        let e = ABSENT.load().unwrap_err();
        assert_eq!(e.status, Status::Unsupported);
        for words in
            ["the library of nothing", "libfsdp-absent.so.7", "libfsdp-absent.so:", "LD_LIBRARY_PATH", ABSENT.variable]
        {
            assert!(e.message.contains(words), "{words} is not in: {e}");
        }
    }

    #[test]
    fn a_named_file_is_the_only_one_tried() {
        let e =
            Search { names: &["libc.so.6"], symbol: "getpid", ..ABSENT }.load_from(Some("/nonexistent/lib.so".into()));
        let e = e.unwrap_err();
        assert_eq!(e.status, Status::Unsupported);
        assert!(e.message.contains("/nonexistent/lib.so") && e.message.contains(ABSENT.variable), "{e}");
    }

    #[test]
    fn a_copy_in_the_process_is_shared_and_missing_functions_are_named() {
        let library = Search { names: &["libc.so.6"], symbol: "getpid", ..ABSENT }.load().unwrap();
        assert!(library.path().contains("libc"), "{}", library.path());
        // SAFETY: the type of getpid.
        let getpid: extern "C" fn() -> i32 = unsafe { library.function("getpid") }.unwrap();
        assert_eq!(getpid(), std::process::id() as i32);
        // SAFETY: never called.
        let e = unsafe { library.function::<extern "C" fn()>("fsdp_no_such_function") }.unwrap_err();
        assert_eq!(e.status, Status::Unsupported);
        assert!(e.message.contains("fsdp_no_such_function") && e.message.contains(library.path()), "{e}");
        // Visible to all, though no name fits.
        let library = Search { symbol: "getpid", ..ABSENT }.load().unwrap();
        assert!(library.path().contains("libc"), "{}", library.path());
        // The right name, another library.
        let e = Search { names: &["libc.so.6"], ..ABSENT }.load().unwrap_err();
        assert!(e.message.contains("no function fsdp_absent"), "{e}");
    }

    functions! {
        /// A few functions of the C library.
        pub struct Some_ {
            fn getpid() -> i32;
            fn abs(i32) -> i32;
        }
        optional {
            fn labs(i64) -> i64;
            fn fsdp_no_such_function(i32) -> i32;
        }
    }

    #[test]
    fn tables_know_what_is_optional() {
        let table = Some_::load(&Search { names: &["libc.so.6"], symbol: "getpid", ..ABSENT }.load().unwrap()).unwrap();
        // SAFETY: the C library's functions, with their types.
        unsafe {
            assert_eq!(((table.getpid)(), (table.abs)(-3)), (std::process::id() as i32, 3));
            assert_eq!(table.labs.map(|f| f(-4)), Some(4));
        }
        assert!(table.fsdp_no_such_function.is_none());
        assert_eq!(Some_::DECLARED[1], ("abs", &["i32"][..], "i32"));
    }
}
