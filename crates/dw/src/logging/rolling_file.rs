//! A log file that never grows without end: at 50 MiB it becomes `NAME.1`, what was `NAME.1` becomes
//! `NAME.2`, and so on up to seven old files.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;

/// Bytes a log file may hold.
const LIMIT: u64 = 50 * 1024 * 1024;
/// Old files that are kept.
const KEPT: u32 = 7;

/// An append-only file that rotates by size. Two processes may share it: each line is one write, and the worst
/// that rotating at the same moment does is to keep one old file less.
#[derive(Debug)]
pub(super) struct RollingFile {
    path: PathBuf,
    file: fs::File,
    written: u64,
    limit: u64,
}

impl RollingFile {
    /// Opens the file for appending, and makes its folder when missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder)?;
        }
        let file = append(path)?;
        let written = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, written, limit })
    }

    fn rotate(&mut self) -> io::Result<()> {
        for age in (1..KEPT).rev() {
            let from = self.aged(age);
            if from.exists() {
                fs::rename(from, self.aged(age + 1))?;
            }
        }
        fs::rename(&self.path, self.aged(1))?;
        self.file = append(&self.path)?;
        self.written = 0;
        Ok(())
    }

    fn aged(&self, age: u32) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(format!(".{age}"));
        name.into()
    }
}

impl Write for RollingFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.written > 0 && self.written + line.len() as u64 > self.limit {
            self.rotate()?;
        }
        let count = self.file.write(line)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_becomes_an_old_one_and_the_oldest_goes() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("log/dw.log");
        let mut log = RollingFile::with_limit(&path, 10).expect("a log");
        for line in 0..9 {
            writeln!(log, "line {line:3}").expect("a line");
        }
        let text = |name: &str| fs::read_to_string(path.with_file_name(name)).expect(name);
        assert_eq!(text("dw.log"), "line   8\n");
        assert_eq!(text("dw.log.1"), "line   7\n");
        assert_eq!(text("dw.log.7"), "line   1\n");
        assert!(!path.with_file_name("dw.log.8").exists());
    }

    #[test]
    fn a_log_is_continued_where_it_ended() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("dw.log");
        for line in ["one", "two"] {
            writeln!(RollingFile::open(&path).expect("a log"), "{line}").expect("a line");
        }
        assert_eq!(fs::read_to_string(&path).expect("the log"), "one\ntwo\n");
    }
}
