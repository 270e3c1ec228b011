//! How an agent is started on a host: over ssh, or what stands in for it, or here.
//!
//! A host that is another gets the programs of this build first, through the same connection: a tar file ahead of the first
//! line, unpacked into a folder of its own that is removed at the end. Or it has them already, in a folder that is named.
//! Either way they must be those of this host, byte for byte.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::ask::{Ask, Digests};
use super::facts;
use super::host::Host;

/// What this host is called.
pub const LOCAL: &str = "local";
/// The command that leads to another host: it must ask nobody for anything, and not wait for ever.
pub const SSH: &str = "ssh -o BatchMode=yes -o ConnectTimeout=15";

/// Starts the agent of the host `name`. `ssh` gets the host's name and a line for its shell; `programs` is a folder there
/// with the programs of this build.
///
/// # Errors
/// It does not start, or the programs there are others.
pub(super) fn reach(name: &str, ssh: &[String], programs: Option<&Path>) -> Result<Host, String> {
    if name == LOCAL {
        let mut command = Command::new("sh");
        command.args(["-c", &from_folders()?]);
        return Host::start(name, command, b"");
    }
    let (program, words) = ssh.split_first().ok_or("--ssh: no command")?;
    let mut command = Command::new(program);
    command.args(words).arg(name);
    let mut host = match programs {
        Some(folder) => {
            command.arg(from_folder(&quoted(&folder.to_string_lossy())));
            Host::start(name, command, b"")?
        }
        None => {
            let archive = archive()?;
            command.arg(unpacked(archive.len()));
            Host::start(name, command, &archive)?
        }
    };
    let theirs: Digests = host.ask(&Ask::Programs)?;
    match differing(&facts::digests()?, &theirs) {
        None => Ok(host),
        Some(name) => Err(format!(
            "{}: {name} there is of another build than here: put the programs of one build on both hosts, or leave out \
             --programs, so that they are copied",
            host.name()
        )),
    }
}

/// The first program that is not the same.
fn differing(ours: &Digests, theirs: &Digests) -> Option<String> {
    let mut names = ours.keys().chain(theirs.keys());
    let differs = |name: &&String| ours.get(*name) != theirs.get(*name);
    names.find(differs).cloned()
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A line for a shell that becomes the agent, as root. It finds its programs in `folder`, a word of the shell's. The daemon's
/// own user gets to folders that it makes.
fn agent(folder: &str, bench: &str) -> String {
    format!(
        "umask 022; if [ \"$(id -u)\" = 0 ]; then sudo=; else sudo='sudo -n'; fi; \
         $sudo env PATH=\"$PATH:/usr/sbin:/sbin\" PAGECOPY_BIN_DIR={folder} {bench} agent --ssh-connection \"${{SSH_CONNECTION:-}}\""
    )
}

/// With the programs where they are here.
fn from_folders() -> Result<String, String> {
    let [bench, pagecopy, _, _] = facts::programs()?;
    let folder = pagecopy.parent().unwrap_or(Path::new("."));
    let word = |path: &Path| quoted(&path.to_string_lossy());
    Ok(agent(&word(folder), &word(&bench)))
}

/// With all of them in one folder.
fn from_folder(folder: &str) -> String {
    agent(folder, &format!("{folder}/bench"))
}

/// With what comes on the input first: so many bytes.
fn unpacked(bytes: usize) -> String {
    format!(
        "d=$(mktemp -d --suffix=-pagecopy-bench) || exit; trap 'rm -rf \"$d\"' EXIT; trap 'exit 1' HUP INT TERM; \
         head -c {bytes} | tar -xf - -C \"$d\" || exit; {}",
        from_folder("\"$d\"")
    )
}

/// All programs, as a tar file.
fn archive() -> Result<Vec<u8>, String> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file", "-"]).stdin(Stdio::null());
    for path in facts::programs()? {
        // A path is absolute, or tar would take it from the folder before.
        let path =
            fs::canonicalize(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(format!("{} is no program", path.display()));
        };
        tar.arg("-C").arg(folder).arg(name);
    }
    let output = tar
        .output()
        .map_err(|error| format!("tar does not start: {error}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!(
            "tar: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one() {
        let word = "/a b/it's$(x)";
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s {}", quoted(word))])
            .output()
            .expect("a shell");
        assert_eq!(String::from_utf8_lossy(&output.stdout), word);
    }

    #[test]
    fn a_program_that_is_missing_is_another() {
        let digests = |pairs: &[(&str, &str)]| -> Digests {
            let pairs = pairs.iter();
            pairs
                .map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned()))
                .collect()
        };
        let ours = digests(&[("bench", "1"), ("pagecopy", "2")]);
        assert_eq!(differing(&ours, &ours.clone()), None);
        let other = digests(&[("bench", "1"), ("pagecopy", "3")]);
        assert_eq!(differing(&ours, &other).as_deref(), Some("pagecopy"));
        assert_eq!(
            differing(&ours, &digests(&[("bench", "1")])).as_deref(),
            Some("pagecopy")
        );
        assert_eq!(
            differing(&digests(&[("bench", "1")]), &ours).as_deref(),
            Some("pagecopy")
        );
    }
}
