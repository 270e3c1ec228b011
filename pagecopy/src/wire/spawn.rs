//! The fields of `Spawn` and `Spawned`: a command line, what a QEMU is made of, and whose fault it is that there is none.

use super::codec::{Reader, WireError, Writer};
use super::fields::{Codec, Name, get_text, put_text};
use crate::limits;

/// Whose fault it is, as the destination sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Blame {
    /// Nobody's: the QEMU waits.
    Nobody = 0,
    /// What was asked for, or what the policy says to it.
    Request = 1,
    /// The destination's host.
    Destination = 2,
    /// The destination's QEMU.
    Qemu = 3,
}

impl Blame {
    /// Every one.
    pub const ALL: [Blame; 4] = [
        Blame::Nobody,
        Blame::Request,
        Blame::Destination,
        Blame::Qemu,
    ];
}

/// What kind of part of a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PartKind {
    /// The machine; its name is its type.
    Machine = 1,
    /// A device.
    Device = 2,
    /// An object.
    Object = 3,
    /// The image in a drive; empty for an empty drive.
    Image = 4,
}

impl PartKind {
    /// Every kind.
    pub const ALL: [PartKind; 4] = [
        PartKind::Machine,
        PartKind::Device,
        PartKind::Object,
        PartKind::Image,
    ];
}

/// A part of a QEMU as its monitor tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its kind.
    pub kind: PartKind,
    /// Its name.
    pub name: String,
    /// Its type, or the name of the image.
    pub what: String,
}

/// A command line: 1 to `MAX_ARGUMENTS` words, `MAX_ARGUMENT_BYTES` in all.
pub(super) struct Arguments;

impl Codec for Arguments {
    type Value = Vec<String>;
    fn put(value: &Vec<String>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_ARGUMENTS);
        for word in value {
            put_text(word, limits::MAX_ARGUMENT_BYTES, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<String>, WireError> {
        let count = input.count(field, limits::MAX_ARGUMENTS, 4)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a command line has at least its program",
            });
        }
        let mut room = limits::MAX_ARGUMENT_BYTES;
        let mut words = Vec::with_capacity(count);
        for _ in 0..count {
            let word = get_text(field, room, input)?;
            room -= word.len();
            words.push(word);
        }
        Ok(words)
    }
}

/// Parts: up to `MAX_PARTS`, `MAX_PARTS_BYTES` in all.
pub(super) struct Parts;

impl Codec for Parts {
    type Value = Vec<Part>;
    fn put(value: &Vec<Part>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_PARTS);
        for part in value {
            out.put(&[part.kind as u8]);
            Name::put(&part.name, out);
            put_text(&part.what, limits::MAX_PART, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<Part>, WireError> {
        let count = input.count(field, limits::MAX_PARTS, 1 + 4 + 1 + 4)?;
        let mut room = limits::MAX_PARTS_BYTES;
        let mut parts = Vec::with_capacity(count);
        for _ in 0..count {
            let part = get_part(room, input)?;
            room -= part.name.len() + part.what.len();
            parts.push(part);
        }
        Ok(parts)
    }
}

/// A part of at most `room` bytes.
fn get_part(room: usize, input: &mut Reader<'_>) -> Result<Part, WireError> {
    let [value] = input.array::<1>("part kind")?;
    let kind = PartKind::ALL
        .into_iter()
        .find(|kind| *kind as u8 == value)
        .ok_or(WireError::Invalid {
            field: "part kind",
            why: "no such kind of part",
        })?;
    let name = Name::get("part name", input)?;
    let what = get_text("part", limits::MAX_PART, input)?;
    let len = name.len() + what.len();
    if len > room {
        return Err(WireError::AboveLimit {
            field: "parts",
            value: (limits::MAX_PARTS_BYTES - room + len) as u64,
            limit: limits::MAX_PARTS_BYTES as u64,
        });
    }
    Ok(Part { kind, name, what })
}

/// Whose fault.
pub(super) struct Blamed;

impl Codec for Blamed {
    type Value = Blame;
    fn put(value: &Blame, out: &mut Writer) {
        out.put(&[*value as u8]);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Blame, WireError> {
        let [value] = input.array::<1>(field)?;
        Blame::ALL
            .into_iter()
            .find(|blame| *blame as u8 == value)
            .ok_or(WireError::Invalid {
                field,
                why: "nobody of that number can be blamed",
            })
    }
}
