//! The policy under which this host starts QEMUs for guests that come: which programs, options, devices and paths, and as
//! which user. What it does not name is refused.
//!
//! The shipped file (`daemon/packaging/spawn.toml`) says what each key is for.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::options;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// Who QEMU runs as, with the groups of that user and nothing else.
    pub user: String,
    /// Whether QEMU runs in its own sandbox (`-sandbox`).
    #[serde(default = "yes")]
    pub sandbox: bool,
    /// Options of QEMU that a source's command line may have.
    #[serde(default = "options::usual")]
    pub options: Vec<String>,
    /// Devices (`-device`), as patterns with `*`.
    #[serde(default = "usual_devices")]
    pub devices: Vec<String>,
    /// Objects (`-object`), as patterns.
    #[serde(default = "usual_objects")]
    pub objects: Vec<String>,
    /// Kinds of network (`-netdev`).
    #[serde(default = "usual_netdevs")]
    pub netdevs: Vec<String>,
    /// Kinds of character device (`-chardev`).
    #[serde(default = "usual_chardevs")]
    pub chardevs: Vec<String>,
    /// Drivers and formats of disks (`-drive`, `-blockdev`).
    #[serde(default = "usual_block_drivers")]
    pub block_drivers: Vec<String>,
    /// Tap devices of this host that a guest may use, as patterns.
    #[serde(default)]
    pub taps: Vec<String>,
    /// What the source's program is called, and which of this host's is started in its place.
    pub binaries: BTreeMap<String, PathBuf>,
    /// Folders of the source, and the folder of this host that each stands for.
    #[serde(default)]
    pub paths: BTreeMap<String, PathBuf>,
    /// Folders of the source with RAM files, and the folder of this host, on tmpfs or hugetlbfs, where the files are made.
    pub memory_directories: BTreeMap<String, PathBuf>,
    /// Bridges of the source, and which of this host each stands for.
    #[serde(default)]
    pub bridges: BTreeMap<String, String>,
}

fn yes() -> bool {
    true
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

fn usual_devices() -> Vec<String> {
    texts(&[
        "virtio-*",
        "pcie-*",
        "pci-bridge",
        "ioh3420",
        "x3130-upstream",
        "xio3130-downstream",
        "scsi-hd",
        "scsi-cd",
        "ide-hd",
        "ide-cd",
        "ahci",
        "ich9-ahci",
        "nvme",
        "nvme-ns",
        "lsi*",
        "megasas*",
        "e1000",
        "e1000e",
        "igb",
        "rtl8139",
        "VGA",
        "cirrus-vga",
        "bochs-display",
        "qxl*",
        "ramfb",
        "qemu-xhci",
        "nec-usb-xhci",
        "ich9-usb-*",
        "piix3-usb-uhci",
        "usb-ehci",
        "usb-hub",
        "usb-tablet",
        "usb-kbd",
        "usb-mouse",
        "usb-storage",
        "isa-serial",
        "pci-serial",
        "isa-debugcon",
        "isa-debug-exit",
        "virtserialport",
        "virtconsole",
        "pvpanic*",
        "vmcoreinfo",
        "i6300esb",
        "ib700",
        "intel-hda",
        "ich9-intel-hda",
        "hda-*",
        "intel-iommu",
        "pc-dimm",
    ])
}

fn usual_objects() -> Vec<String> {
    texts(&[
        "memory-backend-file",
        "iothread",
        "main-loop",
        "thread-context",
        "rng-random",
        "rng-builtin",
        "throttle-group",
    ])
}

fn usual_netdevs() -> Vec<String> {
    texts(&["tap", "bridge", "hubport"])
}

fn usual_chardevs() -> Vec<String> {
    texts(&[
        "null", "ringbuf", "memory", "vc", "pty", "file", "socket", "stdio",
    ])
}

fn usual_block_drivers() -> Vec<String> {
    texts(&[
        "raw",
        "qcow2",
        "file",
        "host_device",
        "null-co",
        "null-aio",
        "throttle",
        "copy-on-read",
    ])
}

/// Files that every host has and that hold nothing: they need no mapping.
const HARMLESS: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/null"];

impl Policy {
    /// Reads and checks the text of a policy.
    ///
    /// # Errors
    /// What is wrong with it, in words, with the line where that is known.
    pub fn parse(text: &str) -> Result<Policy, String> {
        let policy: Policy = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start].matches('\n').count());
            let what = error.message().replace("unknown field", "unknown key");
            line.map_or_else(|| what.clone(), |line| format!("line {line}: {what}"))
        })?;
        policy.check()?;
        Ok(policy)
    }

    fn check(&self) -> Result<(), String> {
        if self.user.is_empty() {
            return Err("user is empty: name whom QEMU shall run as".to_owned());
        }
        if let Some(option) = self.options.iter().find(|it| !options::may_be_allowed(it)) {
            return Err(format!(
                "options: {option:?} is no option of QEMU that can be allowed (without dashes)"
            ));
        }
        for (name, path) in &self.binaries {
            if name.contains('/') || !is_plain_absolute(path) {
                return Err(format!(
                    "binaries: {name:?} = {path:?}: write a name, and an absolute path"
                ));
            }
        }
        let folders = self.paths.iter().chain(&self.memory_directories);
        for (from, to) in folders {
            if !is_plain_absolute(Path::new(from)) || !is_plain_absolute(to) {
                return Err(format!(
                    "{from:?} = {to:?}: both are absolute paths without \"..\""
                ));
            }
        }
        if self.binaries.is_empty() {
            return Err("binaries is empty: no guest could be started".to_owned());
        }
        if self.memory_directories.is_empty() {
            return Err("memory-directories is empty: no guest could be started".to_owned());
        }
        Ok(())
    }

    /// The program of this host that is started for one that the source's is called.
    pub(super) fn binary(&self, program: &str) -> Option<&Path> {
        let name = Path::new(program).file_name()?.to_str()?;
        self.binaries.get(name).map(PathBuf::as_path)
    }

    /// A path of the source as one of this host, and the folder of this host that it must be in.
    pub(super) fn path(&self, path: &str) -> Option<(PathBuf, PathBuf)> {
        if HARMLESS.contains(&path) {
            return Some((path.into(), "/dev".into()));
        }
        mapped(&self.paths, path)
    }

    /// The folder of this host for a RAM file of the source.
    pub(super) fn memory_directory(&self, path: &str) -> Option<PathBuf> {
        mapped(&self.memory_directories, path).map(|(_, folder)| folder)
    }
}

/// The longest folder of `map` that `path` is in decides.
fn mapped(map: &BTreeMap<String, PathBuf>, path: &str) -> Option<(PathBuf, PathBuf)> {
    let path = Path::new(path);
    if !is_plain_absolute(path) {
        return None;
    }
    let found = map
        .iter()
        .filter_map(|(from, to)| Some((path.strip_prefix(from).ok()?, to)));
    let (rest, to) = found.min_by_key(|(rest, _)| rest.components().count())?;
    Some((to.join(rest), to.clone()))
}

/// Whether a path is absolute and goes nowhere but down, without a character that a log or a terminal would take for more.
fn is_plain_absolute(path: &Path) -> bool {
    let text = path.to_string_lossy();
    path.is_absolute()
        && !text.chars().any(char::is_control)
        && !text.split('/').any(|part| part == "." || part == "..")
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// Whether one of `patterns` takes `name`. A `*` stands for any characters, and there may be several.
pub(super) fn is_one_of(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(rest) = name.strip_prefix(head) else {
        return false;
    };
    (0..=rest.len())
        .filter(|&at| rest.is_char_boundary(at))
        .any(|at| matches(tail, &rest[at..]))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LEAST: &str = "user = 'qemu'\n[binaries]\nqemu-system-x86_64 = '/usr/bin/qemu-system-x86_64'\n\
                         [memory-directories]\n'/dev/shm' = '/dev/shm'\n";

    fn with(more: &str) -> Result<Policy, String> {
        Policy::parse(&format!("{more}\n{LEAST}"))
    }

    #[test]
    fn what_is_left_out_is_the_usual_and_what_is_unknown_is_an_error() {
        let policy = with("").unwrap();
        assert!(policy.sandbox && policy.taps.is_empty() && policy.paths.is_empty());
        assert!(policy.options.contains(&"device".to_owned()));
        let error = with("optoins = []").unwrap_err();
        assert!(
            error.contains("line 1") && error.contains("optoins"),
            "{error}"
        );
        for wrong in ["user = 5", "options = ['plugin']", "options = ['-device']"] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
        for missing in ["[binaries]\n", "[memory-directories]\n"] {
            assert!(Policy::parse(missing).is_err());
        }
    }

    #[test]
    fn relative_and_climbing_paths_are_no_policy() {
        for wrong in [
            "[paths]\n'images' = '/b'",
            "[paths]\n'/a' = 'b'",
            "[paths]\n'/a/../b' = '/b'",
            "[paths]\n'/a' = '/b/..'",
        ] {
            assert!(
                Policy::parse(&format!("{LEAST}{wrong}")).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn the_longest_folder_decides_and_nothing_leads_out_of_it() {
        let policy =
            Policy::parse(&format!("{LEAST}[paths]\n'/a' = '/x'\n'/a/b' = '/y'\n")).unwrap();
        let to = |path: &str| policy.path(path).map(|(to, _)| to);
        assert_eq!(to("/a/c.img"), Some("/x/c.img".into()));
        assert_eq!(to("/a/b/c.img"), Some("/y/c.img".into()));
        assert_eq!(to("/a"), Some("/x".into()));
        assert_eq!(to("/dev/urandom"), Some("/dev/urandom".into()));
        for out in [
            "/etc/passwd",
            "/ab/c",
            "a/c",
            "/a/../etc/passwd",
            "/a/./c",
            "/a/b/..",
            "",
            "/",
            "/a/\n",
            "//etc",
            "/dev/sda",
            "/a/\0",
        ] {
            assert_eq!(to(out), None, "{out:?}");
        }
    }

    #[test]
    fn programs_are_found_by_their_name_alone() {
        let policy = with("").unwrap();
        let usual = Some(Path::new("/usr/bin/qemu-system-x86_64"));
        assert_eq!(policy.binary("qemu-system-x86_64"), usual);
        assert_eq!(policy.binary("/tmp/evil/qemu-system-x86_64"), usual);
        assert_eq!(policy.binary("/bin/sh"), None);
        assert_eq!(policy.binary(".."), None);
    }

    #[test]
    fn patterns() {
        for (pattern, name, is) in [
            ("virtio-*", "virtio-blk-pci", true),
            ("virtio-*", "vhost-virtio-", false),
            ("*-pci", "virtio-blk-pci", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("VGA", "VGAx", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }
}
