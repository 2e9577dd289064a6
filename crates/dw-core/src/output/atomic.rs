//! Writing a file so that it is there whole or not at all.

use std::{
    io::{self, BufWriter, Write},
    path::Path,
    process,
};

use tempfile::{Builder, NamedTempFile};

/// Writes `path` by way of a temporary file beside it, which is renamed at the end and removed when
/// anything fails. An existing file is replaced. The temporary name ends in `.tmp`.
pub(super) fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "a folder of that name exists"));
    }
    let mut file = BufWriter::new(temporary(path.parent().unwrap_or(Path::new("")))?);
    fill(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Removes the temporary files that the process with this number left in `folder` when it died; gives how many
/// there were.
pub(super) fn sweep(folder: &Path, process_id: u32) -> io::Result<usize> {
    let prefix = prefix(process_id);
    let mut removed = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(&prefix) && name.ends_with(SUFFIX));
        if is_ours && entry.file_type()?.is_file() {
            std::fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// How the names of a process's temporary files begin.
fn prefix(process_id: u32) -> String {
    format!(".dw-{process_id}-")
}

const SUFFIX: &str = ".tmp";

/// Finds out whether files can be created in `folder`.
pub(super) fn probe(folder: &Path) -> io::Result<()> {
    temporary(folder)?.close()
}

/// A file that removes itself, with the permissions that a new file of the user has.
fn temporary(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    let prefix = prefix(process::id());
    builder.prefix(&prefix).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    builder.tempfile_in(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs_err::read_dir(folder).expect("it can be listed");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_appears_whole_and_replaces_the_one_before() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.txt");
        for text in ["first, and longer", "second"] {
            write(&path, |file| file.write_all(text.as_bytes())).expect("written");
            assert_eq!(fs_err::read_to_string(&path).expect("readable"), text);
        }
        assert_eq!(names(folder.path()), ["a.txt"]);
    }

    #[test]
    fn a_failure_half_way_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.txt");
        fs_err::write(&path, "old").expect("written");
        let failed = write(&path, |file| {
            file.write_all(&vec![0; 100_000])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert_eq!(failed.expect_err("it failed").kind(), io::ErrorKind::StorageFull);
        assert_eq!(names(folder.path()), ["a.txt"]);
        assert_eq!(fs_err::read_to_string(&path).expect("readable"), "old");
    }

    #[test]
    fn only_the_temporary_files_of_a_dead_process_are_swept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in [".dw-12-abc.tmp", ".dw-123-abc.tmp", ".dw-12-abc.png", "dw-12-.tmp"] {
            fs_err::write(folder.path().join(name), "half").expect("written");
        }
        assert_eq!(sweep(folder.path(), 12).expect("swept"), 1);
        let mut left = names(folder.path());
        left.sort();
        assert_eq!(left, [".dw-12-abc.png", ".dw-123-abc.tmp", "dw-12-.tmp"]);
    }

    #[test]
    fn a_folder_in_the_way_is_an_error_and_stays() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.txt");
        fs_err::create_dir(&path).expect("created");
        let failed = write(&path, |file| file.write_all(b"x")).expect_err("it failed");
        assert_eq!(failed.kind(), io::ErrorKind::IsADirectory);
        assert_eq!(names(folder.path()), ["a.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_replaced_and_what_it_points_to_is_not_touched() {
        let (folder, elsewhere) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let target = elsewhere.path().join("precious");
        fs_err::write(&target, "precious").expect("written");
        let path = folder.path().join("a.txt");
        std::os::unix::fs::symlink(&target, &path).expect("linked");
        write(&path, |file| file.write_all(b"new")).expect("written");
        assert_eq!(fs_err::read_to_string(&target).expect("readable"), "precious");
        assert_eq!(fs_err::read_to_string(&path).expect("readable"), "new");
    }

    #[cfg(unix)]
    #[test]
    fn files_have_the_permissions_of_ordinary_new_files() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mode = |name: &str| fs_err::metadata(folder.path().join(name)).expect("there").permissions().mode();
        fs_err::write(folder.path().join("ordinary"), "x").expect("written");
        write(&folder.path().join("ours"), |file| file.write_all(b"x")).expect("written");
        assert_eq!(mode("ours"), mode("ordinary"));
    }
}
