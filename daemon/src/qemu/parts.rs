//! What a QEMU is made of at this moment, as its monitor tells it: its devices, objects and the images in its drives. Compared with the
//! same of a QEMU that was started from the first one's command line, it shows what was plugged, unplugged or exchanged since.

use std::collections::BTreeMap;

use pagecopy::wire::{Part, PartKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::drives::drives;
use crate::failure::{Failure, operator};
use crate::qmp::{Qmp, QmpError};

#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// Asks a QEMU what it is made of.
///
/// # Errors
/// It does not answer.
pub(crate) async fn parts(qmp: &Qmp) -> Result<Vec<Part>, QmpError> {
    let machine: String = qmp
        .query("qom-get", json!({ "path": "/machine", "property": "type" }))
        .await?;
    let mut found = vec![Part {
        kind: PartKind::Machine,
        name: machine.trim_end_matches("-machine").to_owned(),
        what: String::new(),
    }];
    for (kind, path) in [
        (PartKind::Device, "/machine/peripheral"),
        (PartKind::Device, "/machine/peripheral-anon"),
        (PartKind::Object, "/objects"),
    ] {
        let listed: Vec<Listed> = qmp.query("qom-list", json!({ "path": path })).await?;
        let children = listed.into_iter().filter_map(|listed| {
            let what = listed.kind.strip_prefix("child<")?.strip_suffix('>')?;
            Some(Part {
                kind,
                name: listed.name,
                what: what.to_owned(),
            })
        });
        found.extend(children);
    }
    let drives = drives(qmp).await?;
    found.extend(drives.into_iter().map(|drive| Part {
        kind: PartKind::Image,
        name: match drive.device.is_empty() {
            true => drive.qdev.unwrap_or_default(),
            false => drive.device,
        },
        what: drive.inserted.map(|it| it.file).unwrap_or_default(),
    }));
    Ok(found)
}

/// The type of the machine, in full.
pub(crate) fn machine(parts: &[Part]) -> Option<&str> {
    let found = parts.iter().find(|part| part.kind == PartKind::Machine)?;
    Some(&found.name)
}

/// Compares a source's `parts` with those of the QEMU that was started from its command line, where the paths of the source
/// are what `mapped` says.
///
/// # Errors
/// What was changed since the source's QEMU was started, and what to do.
pub(crate) fn same(
    theirs: &[Part],
    ours: &[Part],
    mapped: &BTreeMap<String, String>,
) -> Result<(), Failure> {
    let expected: Vec<Part> = theirs
        .iter()
        .map(|part| Part {
            what: match part.kind {
                PartKind::Image => image(&part.what, mapped),
                _ => part.what.clone(),
            },
            ..part.clone()
        })
        .collect();
    let differ = |what: String, remedy: &str| Err(operator(what, remedy));
    const HAND: &str = "or start the destination's QEMU by hand, and use `pagecopy receive`";
    for (part, original) in expected.iter().zip(theirs) {
        let here = ours
            .iter()
            .find(|other| (other.kind, &other.name) == (part.kind, &part.name));
        match here {
            Some(other) if other.what == part.what => {}
            Some(other) => {
                return differ(
                    format!(
                        "the source's {} {:?} is {:?} now, and by its command line it would be {:?}",
                        word(part.kind),
                        part.name,
                        original.what,
                        other.what
                    ),
                    &format!("put it back as it was (a medium, a snapshot), {HAND}"),
                );
            }
            None => {
                return differ(
                    format!(
                        "the source has a {} {:?} ({}) that is not on its command line",
                        word(part.kind),
                        part.name,
                        part.what
                    ),
                    &format!("unplug it, {HAND}"),
                );
            }
        }
    }
    let gone = ours.iter().find(|part| {
        !theirs
            .iter()
            .any(|other| (other.kind, &other.name) == (part.kind, &part.name))
    });
    match gone {
        Some(part) => differ(
            format!(
                "the source does not have the {} {:?} ({}) any more that is on its command line",
                word(part.kind),
                part.name,
                part.what
            ),
            &format!("plug it again, {HAND}"),
        ),
        None => Ok(()),
    }
}

fn word(kind: PartKind) -> &'static str {
    match kind {
        PartKind::Machine => "machine",
        PartKind::Device => "device",
        PartKind::Object => "object",
        PartKind::Image => "drive",
    }
}

/// The name of an image as it would be here: a path, or the JSON of a node with paths in it.
fn image(what: &str, mapped: &BTreeMap<String, String>) -> String {
    if let Some(json) = what.strip_prefix("json:")
        && let Ok(mut value) = serde_json::from_str::<Value>(json)
    {
        map_names(&mut value, mapped);
        return format!("json:{value}");
    }
    mapped.get(what).cloned().unwrap_or_else(|| what.to_owned())
}

fn map_names(value: &mut Value, mapped: &BTreeMap<String, String>) {
    match value {
        Value::Object(map) => map.values_mut().for_each(|it| map_names(it, mapped)),
        Value::Array(list) => list.iter_mut().for_each(|it| map_names(it, mapped)),
        Value::String(text) => {
            if let Some(here) = mapped.get(text) {
                *text = here.clone();
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn part(kind: PartKind, name: &str, what: &str) -> Part {
        Part {
            kind,
            name: name.to_owned(),
            what: what.to_owned(),
        }
    }

    fn source() -> Vec<Part> {
        vec![
            part(PartKind::Machine, "pc-q35-7.2", ""),
            part(PartKind::Device, "disk0", "virtio-blk-pci"),
            part(PartKind::Image, "d0", "/images/a.img"),
            part(PartKind::Image, "cd", ""),
        ]
    }

    fn here() -> Vec<Part> {
        let mut parts = source();
        parts[2].what = "/mnt/a.img".to_owned();
        parts
    }

    fn mapped() -> BTreeMap<String, String> {
        [("/images/a.img".to_owned(), "/mnt/a.img".to_owned())].into()
    }

    #[test]
    fn the_same_machine_is_the_same() {
        same(&source(), &here(), &mapped()).unwrap();
    }

    #[test]
    fn what_was_plugged_or_unplugged_is_named() {
        let mut more = source();
        more.push(part(PartKind::Device, "net7", "virtio-net-pci"));
        let failure = same(&more, &here(), &mapped()).unwrap_err();
        assert!(failure.what.contains("net7") && failure.remedy.contains("unplug"));
        let failure = same(&source()[..1], &here(), &mapped()).unwrap_err();
        assert!(failure.what.contains("disk0") && failure.what.contains("any more"));
    }

    #[test]
    fn an_image_that_the_command_line_does_not_name_is_seen() {
        for (at, now) in [
            (2, "/images/snapshot.qcow2"),
            (3, "/images/cd.iso"),
            (2, ""),
        ] {
            let mut changed = source();
            changed[at].what = now.to_owned();
            let failure = same(&changed, &here(), &mapped()).unwrap_err();
            assert!(failure.what.contains(&format!("{now:?}")), "{failure:?}");
        }
        let json =
            |path: &str| format!(r#"json:{{"driver":"raw","file":{{"filename":"{path}"}}}}"#);
        assert_eq!(image(&json("/images/a.img"), &mapped()), json("/mnt/a.img"));
    }
}
