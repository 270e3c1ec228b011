//! The ways to move a guest that can be measured beside each other, and how each is set.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

/// Who moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// pagecopy.
    Ours,
    /// QEMU's own migration.
    Qemu,
    /// Nobody: what the link could carry, or the memory.
    Limit,
}

/// A way by its name, before anything is added to it.
#[derive(Debug, PartialEq, Eq)]
struct Base {
    id: &'static str,
    title: &'static str,
    mover: Mover,
    tls: bool,
    postcopy: bool,
    /// Ours: options of `pagecopy migrate`. QEMU's: capabilities.
    words: &'static [&'static str],
    /// QEMU's migration parameters.
    parameters: &'static [(&'static str, &'static str)],
}

const fn ours(
    id: &'static str,
    title: &'static str,
    [tls, postcopy]: [bool; 2],
    words: &'static [&'static str],
) -> Base {
    Base {
        id,
        title,
        mover: Mover::Ours,
        tls,
        postcopy,
        words,
        parameters: &[],
    }
}

const fn qemu(
    id: &'static str,
    title: &'static str,
    [tls, postcopy]: [bool; 2],
    words: &'static [&'static str],
    parameters: &'static [(&'static str, &'static str)],
) -> Base {
    Base {
        id,
        title,
        mover: Mover::Qemu,
        tls,
        postcopy,
        words,
        parameters,
    }
}

const fn limit(id: &'static str, title: &'static str) -> Base {
    Base {
        id,
        title,
        mover: Mover::Limit,
        tls: false,
        postcopy: false,
        words: &[],
        parameters: &[],
    }
}

const PLAIN: [bool; 2] = [false, false];
const TLS: [bool; 2] = [true, false];
const POSTCOPY: [bool; 2] = [false, true];
const TLS_POSTCOPY: [bool; 2] = [true, true];

const PRE: &[&str] = &["--mode", "precopy"];
const SLOWED: &[&str] = &["--mode", "precopy", "--throttle", "auto"];
const POST: &[&str] = &["--mode", "postcopy"];
const HYBRID: &[&str] = &["--mode", "hybrid", "--postcopy-after", "1"];

#[rustfmt::skip] // a table
const BASES: &[Base] = &[
    ours("tcp", "pagecopy, tcp", PLAIN, PRE),
    ours("throttle", "pagecopy, tcp, throttle", PLAIN, SLOWED),
    ours("tls", "pagecopy, tls", TLS, PRE),
    ours("postcopy", "pagecopy, postcopy", POSTCOPY, POST),
    ours("hybrid", "pagecopy, hybrid", POSTCOPY, HYBRID),
    ours("tls-postcopy", "pagecopy, tls, postcopy", TLS_POSTCOPY, POST),
    ours("tls-hybrid", "pagecopy, tls, hybrid", TLS_POSTCOPY, HYBRID),
    qemu("qemu-tcp", "QEMU, tcp", PLAIN, &[], &[]),
    qemu("qemu-multifd1", "QEMU, multifd ×1", PLAIN, &["multifd"], &[("multifd-channels", "1")]),
    qemu("qemu-multifd2", "QEMU, multifd ×2", PLAIN, &["multifd"], &[("multifd-channels", "2")]),
    qemu("qemu-multifd4", "QEMU, multifd ×4", PLAIN, &["multifd"], &[("multifd-channels", "4")]),
    qemu("qemu-zerocopy", "QEMU, multifd ×2, zero-copy", PLAIN, &["multifd", "zero-copy-send"],
        &[("multifd-channels", "2")]),
    qemu("qemu-zstd", "QEMU, multifd ×2, zstd", PLAIN, &["multifd"],
        &[("multifd-channels", "2"), ("multifd-compression", "zstd"), ("multifd-zstd-level", "1")]),
    qemu("qemu-xbzrle", "QEMU, xbzrle", PLAIN, &["xbzrle"], &[("xbzrle-cache-size", "536870912")]),
    qemu("qemu-converge", "QEMU, auto-converge", PLAIN, &["auto-converge"], &[]),
    qemu("qemu-tls", "QEMU, tls", TLS, &[], &[]),
    qemu("qemu-tls-multifd2", "QEMU, tls, multifd ×2", TLS, &["multifd"], &[("multifd-channels", "2")]),
    qemu("qemu-postcopy", "QEMU, postcopy", POSTCOPY, &["postcopy-ram"], &[]),
    qemu("qemu-preempt", "QEMU, postcopy-preempt", POSTCOPY, &["postcopy-ram", "postcopy-preempt"], &[]),
    qemu("qemu-tls-preempt", "QEMU, tls, postcopy-preempt", TLS_POSTCOPY,
        &["postcopy-ram", "postcopy-preempt"], &[]),
    limit("iperf3", "limit: iperf3, 2 streams"),
    limit("sockets", "limit: sockets, 2 streams"),
    limit("ktls", "limit: sockets, 2 streams, TLS by the kernel"),
    limit("memcpy", "limit: memcpy, 1 thread"),
];

/// A way to move a guest: one of the table, and settings that were added to it with `+KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    base: &'static Base,
    added: Vec<(String, String)>,
}

impl Way {
    /// All ways of the table.
    pub fn all() -> Vec<Way> {
        BASES.iter().map(Way::plain).collect()
    }

    fn plain(base: &'static Base) -> Way {
        Way {
            base,
            added: Vec::new(),
        }
    }

    /// The name in the table.
    pub fn id(&self) -> &'static str {
        self.base.id
    }

    /// As a person would say it.
    pub fn title(&self) -> String {
        let added = self.added.iter();
        let added = added.map(|(key, value)| format!(", {key} {value}"));
        self.base.title.to_owned() + &added.collect::<String>()
    }

    /// Who moves the guest.
    pub fn mover(&self) -> Mover {
        self.base.mover
    }

    /// Whether the link is encrypted.
    pub fn has_tls(&self) -> bool {
        self.base.tls
    }

    /// Whether the guest runs at the destination before its memory is there.
    pub fn is_postcopy(&self) -> bool {
        self.base.postcopy
    }

    /// The same way in the clear, of one that is encrypted.
    pub fn in_the_clear(&self) -> Option<Way> {
        let base = match self.base.id {
            "tls" => "tcp",
            "tls-postcopy" => "postcopy",
            "tls-hybrid" => "hybrid",
            "qemu-tls" => "qemu-tcp",
            "qemu-tls-multifd2" => "qemu-multifd2",
            "qemu-tls-preempt" => "qemu-preempt",
            "ktls" => "sockets",
            _ => return None,
        };
        let clear: Way = base.parse().ok()?;
        Some(Way {
            added: self.added.clone(),
            ..clear
        })
    }

    /// Why it cannot be measured between two hosts, if so.
    pub fn only_here(&self) -> Option<&'static str> {
        (self.base.id == "memcpy")
            .then_some("it copies memory of one host, and nothing of it crosses the link")
    }

    /// What it may be held against: whether they do the same for the guest's owner.
    pub fn is_like(&self, other: &Way) -> bool {
        let kind = |way: &Way| (way.base.tls, way.base.postcopy);
        self.mover() != Mover::Limit && other.mover() != Mover::Limit && kind(self) == kind(other)
    }

    /// Options of `pagecopy migrate`; empty for QEMU's.
    pub fn options(&self) -> Vec<String> {
        if self.mover() != Mover::Ours {
            return Vec::new();
        }
        let mut words: Vec<String> = self
            .base
            .words
            .iter()
            .map(|word| (*word).to_owned())
            .collect();
        for (key, value) in &self.added {
            words.extend([format!("--{key}"), value.clone()]);
        }
        words
    }

    /// QEMU's migration capabilities.
    pub fn capabilities(&self) -> Vec<&'static str> {
        let mut names = vec!["events"];
        if self.mover() == Mover::Qemu {
            names.extend(self.base.words);
        }
        names
    }

    /// QEMU's migration parameters, with its default limit of 128 MiB/s lifted.
    pub fn parameters(&self, downtime_limit_ms: u32) -> Map<String, Value> {
        let mut all = Map::new();
        all.insert("max-bandwidth".to_owned(), json!(1_u64 << 40));
        all.insert("downtime-limit".to_owned(), json!(downtime_limit_ms));
        if self.base.tls {
            all.insert("tls-creds".to_owned(), json!("tls0"));
            all.insert("tls-hostname".to_owned(), json!("b"));
        }
        let table = self.base.parameters.iter();
        let table = table.map(|(key, value)| (*key, *value));
        let added = self.added.iter();
        for (key, value) in table.chain(added.map(|(key, value)| (key.as_str(), value.as_str()))) {
            let value = value
                .parse::<u64>()
                .map_or_else(|_| json!(value), |number| json!(number));
            all.insert(key.to_owned(), value);
        }
        all
    }

    /// Everything that is set, for the record; whether the destination's memory is allocated before.
    pub fn settings(&self, downtime_limit_ms: u32, allocated: bool) -> Value {
        let mut all = match self.mover() {
            Mover::Ours => {
                json!({"options": self.options(), "downtime-limit": format!("{downtime_limit_ms}ms")})
            }
            Mover::Qemu => json!({
                "capabilities": self.capabilities(),
                "parameters": self.parameters(downtime_limit_ms),
            }),
            Mover::Limit => return json!({}),
        };
        if allocated {
            all["destination"] = json!({"memory": "prealloc=on"});
        }
        all
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base.id)?;
        for (key, value) in &self.added {
            write!(f, "+{key}={value}")?;
        }
        Ok(())
    }
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Way, String> {
        let mut parts = text.split('+');
        let id = parts.next().unwrap_or_default();
        let base = BASES
            .iter()
            .find(|base| base.id == id)
            .ok_or_else(|| format!("{id:?} is no way to move a guest; --list shows them"))?;
        let mut way = Way::plain(base);
        for part in parts {
            let pair = part
                .split_once('=')
                .filter(|(key, value)| !key.is_empty() && !value.is_empty());
            let (key, value) =
                pair.ok_or_else(|| format!("{text:?}: after + stands KEY=VALUE, not {part:?}"))?;
            if base.mover == Mover::Limit {
                return Err(format!("{text:?}: nothing can be set there"));
            }
            way.added.push((key.to_owned(), value.to_owned()));
        }
        Ok(way)
    }
}

/// Reads a list of ways, in which a group's name stands for its members: `default`, `all`, `ours`, `qemu`, `limits`,
/// `postcopies`.
///
/// # Errors
/// What is wrong with it.
pub fn read_list(words: &[String]) -> Result<Vec<Way>, String> {
    let mut ways: Vec<Way> = Vec::new();
    for word in words {
        let all = || BASES.iter().map(Way::plain);
        let mut more: Vec<Way> = match word.as_str() {
            "all" => all().collect(),
            "ours" => all().filter(|way| way.mover() == Mover::Ours).collect(),
            "qemu" => all().filter(|way| way.mover() == Mover::Qemu).collect(),
            "limits" => all().filter(|way| way.mover() == Mover::Limit).collect(),
            "postcopies" => all()
                .filter(|way| way.is_postcopy() && !way.has_tls())
                .collect(),
            "default" => [
                "tcp",
                "qemu-tcp",
                "qemu-multifd2",
                "tls",
                "qemu-tls",
                "qemu-tls-multifd2",
            ]
            .iter()
            .map(|id| id.parse())
            .collect::<Result<_, _>>()?,
            one => vec![one.parse()?],
        };
        more.retain(|way| !ways.contains(way));
        ways.extend(more);
    }
    Ok(ways)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(text: &str) -> Way {
        text.parse().expect("a way")
    }

    #[test]
    fn a_way_is_read_as_it_is_written() {
        for base in BASES {
            assert_eq!(way(base.id).to_string(), base.id);
        }
        let text = "qemu-multifd2+multifd-channels=8+multifd-compression=zlib";
        assert_eq!(way(text).to_string(), text);
        for text in [
            "",
            "tcp+",
            "tcp+channels",
            "tcp+=4",
            "smoke",
            "iperf3+streams=4",
        ] {
            assert!(text.parse::<Way>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn what_is_added_is_set() {
        let ours = way("tls+channels=4+compress=auto").options().join(" ");
        assert_eq!(ours, "--mode precopy --channels 4 --compress auto");
        assert_eq!(way("tcp").options().join(" "), "--mode precopy");
        let theirs = way("qemu-multifd2+multifd-channels=8").parameters(300);
        assert_eq!(theirs["multifd-channels"], 8);
        assert_eq!(theirs["max-bandwidth"], 1_u64 << 40);
        assert_eq!(theirs["downtime-limit"], 300);
        for (name, moves) in [("tcp", true), ("qemu-tcp", true), ("iperf3", false)] {
            let memory = |allocated| {
                let settings = way(name).settings(300, allocated);
                settings["destination"]["memory"] == "prealloc=on"
            };
            assert_eq!([memory(false), memory(true)], [false, moves], "{name}");
        }
    }

    #[test]
    fn like_is_held_against_like() {
        assert!(way("tcp").is_like(&way("qemu-zstd")));
        assert!(!way("tcp").is_like(&way("qemu-tls")));
        assert!(!way("postcopy").is_like(&way("qemu-tcp")));
        assert!(!way("iperf3").is_like(&way("memcpy")));
    }

    #[test]
    fn what_needs_one_host_says_why() {
        for way in Way::all() {
            assert_eq!(way.only_here().is_some(), way.id() == "memcpy");
        }
    }

    #[test]
    fn each_encrypted_way_has_one_in_the_clear() {
        for way in Way::all() {
            assert_eq!(
                way.in_the_clear().is_some(),
                way.has_tls() || way.id() == "ktls"
            );
        }
        let clear = way("tls+channels=4").in_the_clear().expect("tcp");
        assert_eq!(clear.to_string(), "tcp+channels=4");
    }

    #[test]
    fn a_group_stands_for_its_members_once() {
        let words = ["tcp", "default", "limits"].map(str::to_owned);
        let ways = read_list(&words).expect("a list");
        let names: Vec<String> = ways.iter().map(Way::to_string).collect();
        assert_eq!(
            names,
            [
                "tcp",
                "qemu-tcp",
                "qemu-multifd2",
                "tls",
                "qemu-tls",
                "qemu-tls-multifd2",
                "iperf3",
                "sockets",
                "ktls",
                "memcpy"
            ]
        );
        assert!(read_list(&["smoke".to_owned()]).is_err());
    }
}
