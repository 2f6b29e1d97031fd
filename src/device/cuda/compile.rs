//! Kernels from source to machine code: compiled by NVRTC once per process and architecture, and kept in a file for
//! later processes.
//!
//! The file's name is a checksum of all that the code depends on, and the file begins with a checksum of the rest; one
//! that is damaged counts as absent. It is written under another name and renamed, so that ranks that start together
//! see all of it or none. A cache that cannot be used costs time and nothing else. With a file there, the compiler is
//! not needed.

use super::driver::Compiler;
use crate::error::{err, Result};
use crate::log;
use std::collections::HashMap;
use std::ffi::{c_char, CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use xxhash_rust::xxh3::{xxh3_128, xxh3_64};

/// One program: the first file has what the others are made of.
pub const SOURCES: [&str; 5] = [
    include_str!("kernels/common.cu"),
    include_str!("kernels/cast.cu"),
    include_str!("kernels/gradients.cu"),
    include_str!("kernels/optimizer.cu"),
    include_str!("kernels/norm.cu"),
];

/// No contraction: results have the bits of the CPU's code.
const OPTIONS: [&CStr; 2] = [c"--fmad=false", c"--std=c++17"];
const MAGIC: &[u8; 8] = b"fsdpcu01";

/// The machine code of all kernels for a GPU of this compute capability, as `cuModuleLoadData` of a driver for this version
/// of CUDA takes it.
pub fn image(capability: (i32, i32), driver: (i32, i32)) -> Result<Arc<Vec<u8>>> {
    type Images = Mutex<Option<HashMap<(i32, i32), Arc<Vec<u8>>>>>;
    static IMAGES: Images = Mutex::new(None);
    // Held while it compiles: other threads want the same.
    let mut images = IMAGES.lock().unwrap_or_else(PoisonError::into_inner);
    let images = images.get_or_insert_default();
    if let Some(image) = images.get(&capability) {
        return Ok(image.clone());
    }
    let image = Arc::new(cached(cache_folder().as_deref(), capability, driver, || compile(capability))?);
    images.insert(capability, image.clone());
    Ok(image)
}

/// $XDG_CACHE_HOME/fsdp, else $HOME/.cache/fsdp.
fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("fsdp"))
}

/// The image in `folder`, or what `make` makes, which is then put there.
fn cached(
    folder: Option<&Path>,
    (major, minor): (i32, i32),
    driver: (i32, i32),
    make: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let mut all = SOURCES.concat();
    OPTIONS.iter().for_each(|option| all += &option.to_string_lossy());
    // Hosts that share the folder may have drivers that do not load what another's compiler made.
    all += &format!("driver {}.{}", driver.0, driver.1);
    let name = format!("kernels-sm{major}{minor}-{:032x}", xxh3_128(all.as_bytes()));
    let file = folder.map(|folder| folder.join(&name));
    if let Some(image) = file.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = make()?;
    if let Some(file) = file {
        if let Err(e) = write(&file, &image) {
            log::info(|| format!("the kernels are compiled again next time: {} was not written: {e}", file.display()));
        }
    }
    Ok(image)
}

fn read(file: &Path) -> Option<Vec<u8>> {
    let all = std::fs::read(file).ok()?;
    let (checksum, image) = all.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*checksum) == xxh3_64(image)).then(|| image.to_vec())
}

fn write(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = folder.join(format!(".{name}.{}", std::process::id()));
    let done = std::fs::write(&new, [&MAGIC[..], &xxh3_64(image).to_le_bytes(), image].concat());
    done.and_then(|()| std::fs::rename(&new, file)).inspect_err(|_| {
        let _ = std::fs::remove_file(&new);
    })
}

/// Machine code where the compiler knows the architecture; else code that the driver translates, for the newest one
/// that it knows and the GPU can run.
fn compile((major, minor): (i32, i32)) -> Result<Vec<u8>> {
    let compiler = Compiler::get().map_err(|e| e.context("the GPU's kernels cannot be compiled"))?;
    let wanted = major * 10 + minor;
    let known = compiler.architectures()?;
    match known.iter().rev().find(|arch| **arch <= wanted) {
        Some(arch) if *arch == wanted => Ok(compile_for(compiler, &format!("sm_{arch}"), &[])?.code),
        Some(arch) => Ok(compile_for(compiler, &format!("compute_{arch}"), &[])?.code),
        None => Err(err!(
            Unsupported,
            "the GPU's kernels cannot be compiled: {} knows no architecture that a GPU of compute capability \
             {major}.{minor} runs",
            compiler.path()
        )),
    }
}

/// What the compiler made of the kernels.
pub struct Compiled {
    pub code: Vec<u8>,
    /// Its messages.
    pub log: String,
}

/// Compiles for `sm_*` (machine code) or `compute_*` (PTX), with `more` options than the engine's. An error has the
/// compiler's messages.
pub fn compile_for(compiler: &Compiler, arch: &str, more: &[&CStr]) -> Result<Compiled> {
    let fns = &compiler.fns;
    let source = CString::new(SOURCES.concat()).expect("no NUL in the sources");
    let architecture = CString::new(format!("--gpu-architecture={arch}")).expect("no NUL in a number");
    let options: Vec<*const c_char> =
        OPTIONS.iter().chain(more).copied().chain([architecture.as_c_str()]).map(CStr::as_ptr).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: texts end with NUL; there are no headers.
    let made = unsafe {
        let no_headers = std::ptr::null();
        (fns.nvrtcCreateProgram)(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, no_headers, no_headers)
    };
    compiler.check("compiling the GPU's kernels", made)?;
    // SAFETY: the program lives until it is destroyed below; the options until the call returns.
    let compiled = unsafe { (fns.nvrtcCompileProgram)(program, options.len() as i32, options.as_ptr()) };
    let log = output(compiler, program, fns.nvrtcGetProgramLogSize, fns.nvrtcGetProgramLog).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string();
    let result = match compiler.check(format_args!("compiling the GPU's kernels for {arch}"), compiled) {
        Ok(()) if arch.starts_with("sm_") => output(compiler, program, fns.nvrtcGetCUBINSize, fns.nvrtcGetCUBIN),
        Ok(()) => output(compiler, program, fns.nvrtcGetPTXSize, fns.nvrtcGetPTX),
        Err(mut e) => {
            e.message += &format!("\n{log}");
            Err(e)
        }
    };
    // SAFETY: made above, destroyed once.
    unsafe { (fns.nvrtcDestroyProgram)(&mut program) };
    Ok(Compiled { code: result?, log })
}

type Program = cudarc::nvrtc::sys::nvrtcProgram;

/// What the program has become.
fn output(
    compiler: &Compiler,
    program: Program,
    size: unsafe extern "C" fn(Program, *mut usize) -> i32,
    get: unsafe extern "C" fn(Program, *mut c_char) -> i32,
) -> Result<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the program lives and the pointer is valid.
    compiler.check("asking for compiled kernels", unsafe { size(program, &mut bytes) })?;
    let mut out = vec![0u8; bytes];
    // SAFETY: there is room for as many bytes as it has just said.
    compiler.check("asking for compiled kernels", unsafe { get(program, out.as_mut_ptr().cast()) })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn images_are_kept_and_damaged_files_count_as_absent() {
        let folder = Folder(std::env::temp_dir().join(format!("fsdp-kernels-{}", std::process::id())));
        let made = Cell::new(0);
        let get_with = |capability: (i32, i32), driver| {
            cached(Some(&folder.0.join("cache")), capability, driver, || {
                made.set(made.get() + 1);
                Ok(vec![capability.0 as u8; 1000])
            })
            .unwrap()
        };
        let get = |capability| get_with(capability, (13, 0));
        for (capability, times) in [((8, 0), 1), ((8, 0), 1), ((9, 0), 2), ((8, 0), 2)] {
            assert_eq!(get(capability), vec![capability.0 as u8; 1000]);
            assert_eq!(made.get(), times);
        }
        let files: Vec<PathBuf> =
            std::fs::read_dir(folder.0.join("cache")).unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files.len(), 2, "nothing but the files: {files:?}");
        for (i, damage) in
            [|all: &mut Vec<u8>| all[500] ^= 1, |all: &mut Vec<u8>| all.truncate(12)].into_iter().enumerate()
        {
            let mut all = std::fs::read(&files[0]).unwrap();
            damage(&mut all);
            std::fs::write(&files[0], all).unwrap();
            get((8, 0));
            get((9, 0));
            assert_eq!(made.get(), 3 + i, "one of the two is made again, and kept");
        }
        get_with((8, 0), (12, 8));
        assert_eq!(made.get(), 5, "another driver may not load what is there");
    }

    #[test]
    fn a_cache_that_cannot_be_used_is_no_failure() {
        for folder in [None, Some(Path::new("/proc/fsdp"))] {
            assert_eq!(cached(folder, (8, 0), (13, 0), || Ok(vec![1, 2])).unwrap(), [1, 2]);
            let e = cached(folder, (8, 0), (13, 0), || Err(err!(Device, "no"))).unwrap_err();
            assert_eq!(e.message, "no");
        }
    }
}
