//! A source's command line under a policy: whatever it says, what comes out opens nothing that the policy does not name.

use std::path::{Component, Path};
use std::sync::OnceLock;

use daemon::spawn::{Ask, Plan, Policy, plan};

/// Without the options whose words are only text, in which anything may be written.
const POLICY: &str = "user = 'qemu'\ntaps = ['vnet*']\n\
    options = ['object', 'device', 'drive', 'blockdev', 'netdev', 'chardev', 'machine', 'global', 'numa', 'kernel', 'bios', \
        'serial', 'boot', 'display', 'm', 'cpu', 'nographic', 'nodefaults', 'cdrom']\n\
    [binaries]\nq = '/usr/bin/q'\n\
    [paths]\n'/i' = '/mnt/i'\n\
    [memory-directories]\n'/r' = '/mnt/r'\n\
    [bridges]\nb = 'br-b'\n";

/// A command line, one word a line.
///
/// # Panics
/// A rule is broken.
pub fn spawn(data: &[u8]) {
    static PARSED: OnceLock<Option<Policy>> = OnceLock::new();
    let policy = PARSED.get_or_init(|| Policy::parse(POLICY).ok());
    let policy = policy.as_ref().expect("the policy is one");
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let words = text.split('\n').map(str::to_owned);
    let ask = Ask {
        id: uuid::Uuid::nil(),
        arguments: std::iter::once("q".to_owned()).chain(words).collect(),
        machine: None,
    };
    match plan(policy, &ask, 9) {
        Ok(plan) => check(&plan),
        Err(failure) => assert!(!failure.what.is_empty()),
    }
}

fn check(plan: &Plan) {
    assert_eq!(plan.binary, Path::new("/usr/bin/q"));
    assert!(!plan.ram.is_empty());
    for (path, folder) in &plan.opened {
        assert!(path.starts_with(folder), "{path:?} is not in {folder:?}");
        assert!(
            path.components().all(|part| part != Component::ParentDir),
            "{path:?}"
        );
    }
    let ours = plan
        .arguments
        .iter()
        .rposition(|word| word == "-no-user-config");
    for word in &plan.arguments[..ours.expect("our own words follow")] {
        assert!(!word.chars().any(char::is_control), "{word:?}");
        for part in without_opened(word, plan).split(['=', ',', '"', ':', '{', '}', '[', ']']) {
            let known = [
                "/mnt/i",
                "/mnt/r/pagecopy-",
                "/dev/urandom",
                "/dev/random",
                "/dev/null",
            ];
            let is_known = known.iter().any(|folder| part.starts_with(folder));
            assert!(!part.contains('/') || is_known, "{part:?} of {word:?}");
        }
    }
}

/// A word without the paths in it that were looked at above: what parts a word may be part of a path.
fn without_opened(word: &str, plan: &Plan) -> String {
    let opened = plan.opened.iter().map(|(path, _)| path.to_string_lossy());
    // In a list of options a comma is written twice.
    let written = opened.flat_map(|path| [path.replace(',', ",,"), path.into_owned()]);
    let mut written: Vec<String> = written.collect();
    written.sort_by_key(|path| std::cmp::Reverse(path.len()));
    written
        .iter()
        .fold(word.to_owned(), |word, path| word.replace(path, ""))
}
