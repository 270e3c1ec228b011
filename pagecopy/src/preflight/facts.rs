//! What a side has found out about itself, as it crosses the wire: JSON, bounded, without control characters.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Cpu, Disk, Line};
use crate::limits::{MAX_BLOCKS, MAX_FACT, MAX_FACTS, MAX_FACTS_EACH};
use crate::memory::BlockSpec;

/// What a side has found out about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The daemon's name.
    pub host: String,
    /// Which boot of which kernel this is: two daemons with the same are on one host.
    pub boot: String,
    /// What it has found by itself.
    pub lines: Vec<Line>,
    /// Its QEMU, if there is one that answers.
    pub qemu: Option<QemuFacts>,
}

/// A QEMU and its guest, as far as both sides are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QemuFacts {
    /// Its version: major, minor, micro.
    pub version: [u32; 3],
    /// The type of its machine, such as `pc-q35-10.0`.
    pub machine: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The first of them, where QEMU tells.
    pub cpu: Option<Cpu>,
    /// RAMBlocks that pagecopy moves; none if they could not be looked at.
    pub blocks: Vec<BlockSpec>,
    /// Disks that the guest may write.
    pub disks: Vec<Disk>,
    /// Whether a job copies a disk elsewhere just now.
    pub mirrors: bool,
}

impl Facts {
    /// The facts as text for the peer. What is too long or too much is cut: it must not keep the rest from being told.
    pub fn to_text(&self) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        cut(&mut value);
        let text = value.to_string();
        if text.len() <= MAX_FACTS {
            return text;
        }
        let remedy = "see that host's pagecopyd by itself; report this";
        let line = Line::fail(
            "facts",
            super::Whose::Destination,
            format!(
                "what was found takes {} bytes, too much to be told",
                text.len()
            ),
            remedy,
        );
        let short = Facts {
            host: clean(&self.host),
            boot: clean(&self.boot),
            lines: vec![line],
            qemu: None,
        };
        serde_json::to_string(&short).unwrap_or_default()
    }

    /// A peer's facts.
    ///
    /// # Errors
    /// In which way they break the rules: no JSON, another shape, too long, too many, control characters.
    pub fn from_text(text: &str) -> Result<Facts, String> {
        if text.len() > MAX_FACTS {
            return Err(format!("facts of {} bytes", text.len()));
        }
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        check(&value)?;
        let facts: Facts = serde_json::from_value(value).map_err(|error| error.to_string())?;
        if let Some(qemu) = &facts.qemu
            && qemu.blocks.len() > MAX_BLOCKS
        {
            return Err(format!("{} RAMBlocks", qemu.blocks.len()));
        }
        Ok(facts)
    }
}

/// `text` without control characters, and no longer than a fact may be.
pub fn clean(text: &str) -> String {
    let mut text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    text.truncate(text.floor_char_boundary(MAX_FACT));
    text
}

/// Cuts our own to what [`check`] takes.
fn cut(value: &mut Value) {
    match value {
        Value::String(text) => *text = clean(text),
        Value::Array(all) => {
            all.truncate(MAX_FACTS_EACH);
            all.iter_mut().for_each(cut);
        }
        Value::Object(all) => all.values_mut().for_each(cut),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn check(value: &Value) -> Result<(), String> {
    match value {
        Value::String(text) if text.len() > MAX_FACT => {
            Err(format!("a fact of {} bytes", text.len()))
        }
        Value::String(text) if text.chars().any(char::is_control) => {
            Err("a fact with control characters".to_owned())
        }
        Value::Array(all) if all.len() > MAX_FACTS_EACH => {
            Err(format!("{} facts of a kind", all.len()))
        }
        Value::Array(all) => all.iter().try_for_each(check),
        Value::Object(all) => all.values().try_for_each(check),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::preflight::{Storage, Whose, Word};

    fn facts() -> Facts {
        let word = Word {
            leaf: 7,
            subleaf: Some(0),
            register: "EBX".into(),
            features: 5,
        };
        let disk = Disk {
            id: "d0".into(),
            driver: "qcow2".into(),
            name: "/srv/d.qcow2".into(),
            bytes: 1 << 30,
            storage: Storage::Path {
                system: "nfs".into(),
                device: 3,
                inode: 4,
            },
        };
        Facts {
            host: "b".into(),
            boot: "x".into(),
            lines: vec![Line::fail("memory", Whose::Destination, "none", "add some")],
            qemu: Some(QemuFacts {
                version: [10, 0, 2],
                machine: "pc-q35-10.0".into(),
                cpus: 2,
                cpu: Some(Cpu {
                    model: "qemu64".into(),
                    words: vec![word],
                }),
                blocks: Vec::new(),
                disks: vec![disk],
                mirrors: false,
            }),
        }
    }

    #[test]
    fn what_was_told_is_understood() {
        assert_eq!(Facts::from_text(&facts().to_text()), Ok(facts()));
        // A daemon of another version tells more, or less.
        let other = Facts::from_text(r#"{"host":"b","moon":"full"}"#).unwrap();
        assert_eq!(other.host, "b");
    }

    #[test]
    fn hostile_facts_are_refused() {
        let many = format!(r#"{{"lines":[{}]}}"#, vec!["{}"; 300].join(","));
        let long = format!(r#"{{"host":"{}"}}"#, "a".repeat(3000));
        let deep = "[".repeat(5000);
        let huge = " ".repeat(MAX_FACTS + 1);
        let cases = [
            ("{\"host\":\"\\u001b[2J\"}", "control characters"),
            ("{\"lines\":[{\"found\":\"a\\nb\"}]}", "control characters"),
            ("{\"qemu\":{\"cpus\":-1}}", "invalid value"),
            (
                "{\"qemu\":{\"disks\":[{\"storage\":{\"kind\":\"tape\"}}]}}",
                "unknown variant",
            ),
            ("{", "EOF"),
            ("7", "invalid type"),
            (&many, "300 facts"),
            (&long, "3000 bytes"),
            (&deep, "recursion"),
            (&huge, "bytes"),
        ];
        for (text, word) in cases {
            let error = Facts::from_text(text).unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn facts_of_ours_are_cut_rather_than_refused() {
        let mut wild = facts();
        wild.host = "x\n\u{1b}[2J".repeat(1000);
        wild.lines = vec![Line::pass("ram", Whose::Source, "ü".repeat(5000)); 1000];
        let told = Facts::from_text(&wild.to_text()).unwrap();
        assert!(told.host.starts_with("x  [2J"), "{}", told.host);
        // Even cut it is too much: that is told instead.
        assert_eq!(told.lines[0].check, "facts");
    }
}
