//! The folders under `state-dir`: files are opened by their name in an open folder, never through a symbolic link, and
//! only their owner may read them.
//!
//! What is decided from these files is where a guest runs, so a folder that others may write is refused. Names are made
//! by this daemon from its own constants and from migration ids, which are 16 bytes whatever a peer puts into them; no
//! text of a peer or of the API ever becomes part of one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest file that is read: a thousand times what the daemon writes.
const MAX_FILE: u64 = 64 << 20;
/// Files: for their owner only.
const FILE_MODE: RawMode = 0o600;
/// Folders: for their owner only.
const FOLDER_MODE: RawMode = 0o700;
/// Write permission for anybody but the owner.
const OTHERS_WRITE: u32 = 0o022;

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    /// For messages.
    path: PathBuf,
}

impl Folder {
    /// Opens the folder that the operator has named, and makes it if it is not there.
    ///
    /// # Errors
    /// It cannot be made or opened, belongs to somebody else, or may be written by others.
    pub(crate) fn open(path: &Path) -> io::Result<Folder> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(FOLDER_MODE).create(path)?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        Folder::checked(fd, path.to_owned())
    }

    /// Opens the folder `name` in this one, and makes it if it is not there.
    ///
    /// # Errors
    /// As [`open`](Self::open); or it is a symbolic link.
    pub(crate) fn folder(&self, name: &str) -> io::Result<Folder> {
        check_name(name)?;
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(FOLDER_MODE)) {
            Ok(()) => self.sync()?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY;
        Folder::checked(self.open_at(name, flags)?, self.path.join(name))
    }

    fn checked(fd: OwnedFd, path: PathBuf) -> io::Result<Folder> {
        let folder = File::from(fd);
        let data = folder.metadata()?;
        let own = rustix::process::geteuid().as_raw();
        let refuse = |what: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        if data.uid() != own {
            return refuse(format!(
                "{} belongs to user {}, and pagecopyd runs as user {own}: chown -R {own} {}",
                path.display(),
                data.uid(),
                path.display()
            ));
        }
        if data.mode() & OTHERS_WRITE != 0 {
            return refuse(format!(
                "others may write {}, and what is in it decides where a guest runs: chmod 700 {}, or choose another",
                path.display(),
                path.display()
            ));
        }
        Ok(Folder {
            fd: folder.into(),
            path,
        })
    }

    /// Makes a file to append to.
    ///
    /// # Errors
    /// There is one already (or a link), or the disk refused.
    pub(crate) fn create_new(&self, name: &str) -> io::Result<File> {
        self.file(
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::APPEND,
        )
    }

    /// Opens a file to append to, and makes it if it is not there.
    ///
    /// # Errors
    /// It is none, or a link; the disk refused.
    pub(crate) fn create(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::CREATE | OFlags::WRONLY | OFlags::APPEND)
    }

    /// Opens a file that is there, to append to it.
    ///
    /// # Errors
    /// There is none, or it is a link.
    pub(crate) fn append(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::WRONLY | OFlags::APPEND)
    }

    /// Makes a file to map, open to read and write.
    ///
    /// # Errors
    /// There is one already (or a link), or the disk refused.
    pub(crate) fn create_to_map(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR)
    }

    /// Opens a file to map that is there.
    ///
    /// # Errors
    /// There is none, or it is a link.
    pub(crate) fn open_to_map(&self, name: &str) -> io::Result<File> {
        self.file(name, OFlags::RDWR)
    }

    /// All of a file; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, is a link, or is absurdly large.
    pub(crate) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.file(name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if read as u64 > MAX_FILE {
            return Err(self.strange(name, "is too large to be this daemon's"));
        }
        Ok(Some(bytes))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// There is none, or the disk refused.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        Ok(rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?)
    }

    /// The names in this folder, with when each was last written.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn list(&self) -> io::Result<Vec<(String, SystemTime)>> {
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            let data = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let since = Duration::new(
                u64::try_from(data.st_mtime).unwrap_or(0),
                u32::try_from(data.st_mtime_nsec).unwrap_or(0),
            );
            found.push((name.to_owned(), SystemTime::UNIX_EPOCH + since));
        }
        Ok(found)
    }

    /// Makes created, renamed and removed names last.
    ///
    /// # Errors
    /// The disk refused.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// Replaces the file `name` by `value` as JSON, synced. A crash leaves the old one or the new one, never half of one.
    ///
    /// # Errors
    /// The disk refused.
    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        let new = format!("{name}.new");
        match self.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let bytes = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
        if let Err(error) = self.replace(name, &new, &bytes) {
            // A full disk has better uses for the half of it.
            let _ = self.remove(&new);
            return Err(error);
        }
        self.sync()
    }

    fn replace(&self, name: &str, new: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.create_new(new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(rustix::fs::renameat(&self.fd, new, &self.fd, name)?)
    }

    /// Reads JSON; an absent file is `None`.
    ///
    /// # Errors
    /// It cannot be read, or is none of ours.
    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(io::Error::other)
    }

    fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        // A pipe that somebody has put there would be waited for.
        let fd = self.open_at(name, flags | OFlags::NONBLOCK)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(self.strange(name, "is not a file"));
        }
        Ok(fd.into())
    }

    fn open_at(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        check_name(name)?;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let opened = rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(FILE_MODE));
        opened.map_err(|error| {
            let is_link = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|data| FileType::from_raw_mode(data.st_mode) == FileType::Symlink);
            match error {
                // O_DIRECTORY tells of a link in its own way.
                Errno::LOOP | Errno::NOTDIR if is_link => {
                    self.strange(name, "is a symbolic link, and none is followed here")
                }
                Errno::ACCESS => {
                    let own = rustix::process::geteuid().as_raw();
                    let path = self.path.join(name);
                    let what = format!(
                        "{} is not for user {own}, whom pagecopyd runs as",
                        path.display()
                    );
                    io::Error::new(io::ErrorKind::PermissionDenied, what)
                }
                error => error.into(),
            }
        })
    }

    fn strange(&self, name: &str, what: &str) -> io::Error {
        let path = self.path.join(name);
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} {what}", path.display()),
        )
    }
}

/// Names are one component of a path.
fn check_name(name: &str) -> io::Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no name of a file"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::super::test_dir;
    use super::*;

    #[test]
    fn files_and_folders_are_for_their_owner_only() {
        let dir = test_dir("modes").join("made");
        let folder = Folder::open(&dir).unwrap();
        folder.write_json("a.json", &1).unwrap();
        folder.create_new("b").unwrap();
        let inner = folder.folder("inner").unwrap();
        inner.create("c").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        for path in ["", "inner"] {
            assert_eq!(mode(&dir.join(path)), 0o700, "{path}");
        }
        for path in ["a.json", "b", "inner/c"] {
            assert_eq!(mode(&dir.join(path)), 0o600, "{path}");
        }
        assert_eq!(folder.read_json::<i32>("a.json").unwrap(), Some(1));
        assert_eq!(folder.read("absent").unwrap(), None);
        fs::remove_dir_all(dir.parent().unwrap()).unwrap();
    }

    #[test]
    fn no_symbolic_link_is_followed_and_nothing_outside_is_reached() {
        let dir = test_dir("links");
        let (inside, victim) = (dir.join("state"), dir.join("victim"));
        let folder = Folder::open(&inside).unwrap();
        fs::write(&victim, "7").unwrap();
        symlink(&victim, inside.join("file")).unwrap();
        symlink(&dir, inside.join("folder")).unwrap();
        let told = |result: io::Result<()>| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
        };
        told(folder.read("file").map(drop));
        told(folder.append("file").map(drop));
        told(folder.create("file").map(drop));
        told(folder.folder("folder").map(drop));
        assert!(folder.create_new("file").is_err());
        // Replacing a file replaces the link, not what it leads to; so does the name that is written first.
        symlink(&victim, inside.join("json")).unwrap();
        symlink(&victim, inside.join("json.new")).unwrap();
        folder.write_json("json", &"new").unwrap();
        assert_eq!(folder.read_json::<String>("json").unwrap().unwrap(), "new");
        assert_eq!(fs::read(&victim).unwrap(), b"7");
        for name in ["../victim", "a/b", "..", ".", "", "a\0b"] {
            assert!(folder.read(name).is_err(), "{name:?}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let dir = test_dir("pipes");
        let folder = Folder::open(&dir).unwrap();
        let mode = Mode::from_raw_mode(FILE_MODE);
        rustix::fs::mknodat(CWD, dir.join("pipe"), FileType::Fifo, mode, 0).unwrap();
        let error = folder.read("pipe").unwrap_err().to_string();
        assert!(error.contains("not a file"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let dir = test_dir("writable");
        for mode in [0o770, 0o707, 0o1777] {
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
            let error = Folder::open(&dir).unwrap_err().to_string();
            assert!(error.contains("chmod 700"), "{error}");
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        Folder::open(&dir).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }
}
