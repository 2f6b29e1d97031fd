//! For tests: compares what is declared here of a library with its header, by a C++ compiler, where that header is found.
//!
//! In the environment, FSDP_TEST_INCLUDE has folders to look in before the compiler's own, separated by colons.

use std::io::Write;
use std::process::Command;

/// How an argument or a result is passed: p (a pointer), the bytes of a number, or s and the bytes of a struct.
fn passed(rust: &str) -> &'static str {
    match rust {
        _ if rust.starts_with('*') => "p",
        "CUcontext" | "CUevent" | "CUfunction" | "CUmemoryPool" | "CUmodule" | "CUstream" => "p",
        "ncclComm_t" | "nvrtcProgram" => "p",
        "Code" | "CUdevice" | "c_int" | "c_uint" => "4",
        "CUdeviceptr" | "usize" => "8",
        "u8" => "1",
        "ncclUniqueId" => "s128",
        _ => panic!("how is {rust} passed?"),
    }
}

/// A library's header, and what is expected of it.
pub struct Header<'a> {
    pub name: &'a str,
    /// Of the preprocessor: of which versions of it.
    pub versions: &'a str,
    /// Names and texts of headers that it includes and needs little of.
    pub shims: &'a [(&'a str, &'a str)],
    /// A table's `DECLARED`.
    pub functions: &'a [(&'a str, &'a [&'a str], &'a str)],
    /// Constant expressions of C++ that are true with it.
    pub facts: Vec<String>,
}

impl Header<'_> {
    /// Fails, saying what differs. Says that it was skipped where no compiler finds the header.
    pub fn agrees(&self) {
        let folder = std::env::temp_dir().join(format!("fsdp-headers-{}-{}", std::process::id(), self.name));
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in self.shims.iter().copied().chain([("check.cpp", &*self.source())]) {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let listed = std::env::var_os("FSDP_TEST_INCLUDE").unwrap_or_default();
        let folders = [folder.clone()].into_iter().chain(std::env::split_paths(&listed));
        let options: Vec<_> = folders.filter(|f| !f.as_os_str().is_empty()).flat_map(|f| ["-I".into(), f]).collect();
        let compile = |more: &[&str]| {
            let compiler = std::env::var("CXX").unwrap_or("c++".to_string());
            Command::new(compiler).current_dir(&folder).arg("-std=c++17").args(&options).args(more).output()
        };
        if compile(&["-E", "-include", self.name, "-x", "c++", "/dev/null"]).is_ok_and(|made| made.status.success()) {
            let made = compile(&["check.cpp", "-o", "check"]).unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let checked = Command::new(folder.join("check")).output().unwrap();
            assert!(checked.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&checked.stdout));
        } else {
            let why = format!("\nskipped: no compiler finds {} (FSDP_TEST_INCLUDE may have its folder)\n", self.name);
            // Past the test runner, which keeps what passing tests print.
            let _ = std::io::stderr().write_all(why.as_bytes());
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    fn source(&self) -> String {
        let mut source = format!("#include <{}>\n{HELPERS}#if {}\n", self.name, self.versions);
        for (name, takes, returns) in self.functions {
            let takes: String = takes.iter().map(|t| passed(t).to_string() + " ").collect();
            source +=
                &format!("  compare(\"{name}\", kinds(decltype(&{name}){{}}), \"{takes}-> {}\");\n", passed(returns));
        }
        for fact in &self.facts {
            source += &format!("  fact(R\"({fact})\", {fact});\n");
        }
        source + "#endif\n  return wrong;\n}\n"
    }
}

/// Only the functions' types are asked for, so nothing is linked.
const HELPERS: &str = r#"
#include <cstddef>
#include <cstdio>
#include <string>
#include <type_traits>
template <class T> std::string kind() {
  if (std::is_pointer_v<T>) return "p";
  return (std::is_class_v<T> ? "s" : "") + std::to_string(sizeof(T));
}
template <class R, class... A> std::string kinds(R (*)(A...)) {
  return ((kind<A>() + " ") + ... + ("-> " + kind<R>()));
}
static int wrong = 0;
[[maybe_unused]] static void compare(const char* name, const std::string& is, const char* should) {
  if (is != should) wrong = 1, std::printf("%s is %s, not %s\n", name, is.c_str(), should);
}
[[maybe_unused]] static void fact(const char* text, bool is_true) {
  if (!is_true) wrong = 1, std::printf("not so: %s\n", text);
}
int main() {
"#;
