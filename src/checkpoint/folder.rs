//! Complete or absent: a folder is written aside, flushed to disk, and gets its name when everything is in it.

use super::damaged;
use crate::error::{err, Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder being written, `.NAME.incomplete` beside its target; removed on drop unless it was published.
pub struct Incomplete {
    target: PathBuf,
    aside: PathBuf,
}

impl Incomplete {
    /// Makes an empty folder for `target`, which must not exist. What an interrupted write left is removed.
    pub fn create(target: &Path) -> Result<Incomplete> {
        let aside = aside(target)?;
        require_absent(target)?;
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(|e| Error::os(format!("removing \"{}\"", aside.display()), e))?;
        }
        fs::create_dir_all(&aside).map_err(|e| Error::os(format!("creating \"{}\"", aside.display()), e))?;
        Ok(Incomplete { target: target.to_path_buf(), aside })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.aside
    }

    /// Gives the folder its name. Its files are on disk already; afterwards the names are, too.
    pub fn publish(self) -> Result<()> {
        let rename = || -> std::io::Result<()> {
            fs::File::open(&self.aside)?.sync_all()?;
            fs::rename(&self.aside, &self.target)?;
            let parent = self.target.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
            fs::File::open(parent)?.sync_all()
        };
        rename().map_err(|e| Error::os(format!("completing \"{}\"", self.target.display()), e))
    }
}

impl Drop for Incomplete {
    fn drop(&mut self) {
        // Nothing is there after publish. A failure would hide the error that stopped the write; the next one removes it.
        let _ = fs::remove_dir_all(&self.aside);
    }
}

/// An error if something has the name already.
pub fn require_absent(target: &Path) -> Result<()> {
    match target.exists() {
        true => Err(damaged(target, "exists already: a checkpoint is never overwritten")),
        false => Ok(()),
    }
}

/// Where `target` is written before it is complete.
pub fn aside(target: &Path) -> Result<PathBuf> {
    let name = target.file_name().ok_or_else(|| err!(InvalidArgument, "\"{}\" names no folder", target.display()))?;
    Ok(target.with_file_name(format!(".{}.incomplete", name.to_string_lossy())))
}
