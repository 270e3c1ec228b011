//! How each kind of field looks in bytes, and its limits. One codec a kind; `table.rs` puts them together to messages.

use bytes::Bytes;

use super::codec::{Reader, WireError, Writer};
use super::{AbortCode, Secret, Standing};
use crate::engine::MigrationId;
use crate::limits;
use crate::memory::{BlockId, BlockSpec, Piece, Run};

/// The bytes of one kind of field.
pub(super) trait Codec {
    /// What the field holds.
    type Value;
    /// Appends `value`.
    fn put(value: &Self::Value, out: &mut Writer);
    /// Takes a value, or says what is wrong with `field`.
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Self::Value, WireError>;
}

macro_rules! integer {
    ($($int:ty),*) => {$(
        impl Codec for $int {
            type Value = $int;
            fn put(value: &$int, out: &mut Writer) {
                out.put(&value.to_le_bytes());
            }
            fn get(field: &'static str, input: &mut Reader<'_>) -> Result<$int, WireError> {
                Ok(<$int>::from_le_bytes(input.array(field)?))
            }
        }
    )*};
}
integer!(u16, u32, u64);

/// One byte, 0 or 1.
pub(super) struct Flag;

impl Codec for Flag {
    type Value = bool;
    fn put(value: &bool, out: &mut Writer) {
        out.put(&[u8::from(*value)]);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<bool, WireError> {
        match input.array::<1>(field)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(WireError::Invalid {
                field,
                why: "a flag is 0 or 1",
            }),
        }
    }
}

/// Sixteen bytes that name a migration.
pub(super) struct Id;

impl Codec for Id {
    type Value = MigrationId;
    fn put(value: &MigrationId, out: &mut Writer) {
        out.put(&value.0);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<MigrationId, WireError> {
        Ok(MigrationId(input.array(field)?))
    }
}

/// Thirty-two bytes that nobody else is to know.
pub(super) struct Key;

impl Codec for Key {
    type Value = Secret;
    fn put(value: &Secret, out: &mut Writer) {
        out.put(&value.0);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Secret, WireError> {
        Ok(Secret(input.array(field)?))
    }
}

/// A name: 1 to `MAX_NAME` bytes of UTF-8 without control characters, so that it can stand in a log line.
pub(super) struct Name;

impl Codec for Name {
    type Value = String;
    fn put(value: &String, out: &mut Writer) {
        put_text(value, limits::MAX_NAME, out);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<String, WireError> {
        let text = get_text(field, limits::MAX_NAME, input)?;
        if text.is_empty() {
            return Err(WireError::Invalid {
                field,
                why: "a name is not empty",
            });
        }
        Ok(text)
    }
}

/// A reason for people: 0 to `MAX_REASON` bytes of UTF-8 without control characters. A longer one of ours is cut.
pub(super) struct Reason;

impl Codec for Reason {
    type Value = String;
    fn put(value: &String, out: &mut Writer) {
        let mut text: String = value
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        text.truncate(text.floor_char_boundary(limits::MAX_REASON));
        put_text(&text, limits::MAX_REASON, out);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<String, WireError> {
        get_text(field, limits::MAX_REASON, input)
    }
}

/// What a side tells of itself in preflight: 2 to `MAX_FACTS` bytes of JSON. What is in it is checked by who reads it
/// (`preflight::Facts`).
pub(super) struct Facts;

impl Codec for Facts {
    type Value = String;
    fn put(value: &String, out: &mut Writer) {
        put_text(value, limits::MAX_FACTS, out);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<String, WireError> {
        let text = get_text(field, limits::MAX_FACTS, input)?;
        if text.len() < 2 {
            return Err(WireError::Invalid {
                field,
                why: "JSON with facts has two bytes at least",
            });
        }
        Ok(text)
    }
}

pub(super) fn put_text(text: &str, limit: usize, out: &mut Writer) {
    out.count(text.len(), limit);
    out.put(text.as_bytes());
}

pub(super) fn get_text(
    field: &'static str,
    limit: usize,
    input: &mut Reader<'_>,
) -> Result<String, WireError> {
    let len = input.count(field, limit, 1)?;
    let text = str::from_utf8(input.take(field, len)?).map_err(|_| WireError::Invalid {
        field,
        why: "a text is UTF-8",
    })?;
    if text.chars().any(char::is_control) {
        return Err(WireError::Invalid {
            field,
            why: "a text has no control characters",
        });
    }
    Ok(text.to_owned())
}

/// RAMBlocks: 1 to `MAX_BLOCKS`, with names that differ, sizes that are whole pages, pages that are a power of two.
pub(super) struct Blocks;

impl Codec for Blocks {
    type Value = Vec<BlockSpec>;
    fn put(value: &Vec<BlockSpec>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_BLOCKS);
        for block in value {
            Name::put(&block.name, out);
            u64::put(&block.size, out);
            u64::put(&block.page_size, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<BlockSpec>, WireError> {
        let count = input.count(field, limits::MAX_BLOCKS, 4 + 1 + 8 + 8)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a guest has at least one RAMBlock",
            });
        }
        let mut blocks: Vec<BlockSpec> = Vec::with_capacity(count);
        for _ in 0..count {
            let block = get_block(input)?;
            if blocks.iter().any(|other| other.name == block.name) {
                return Err(WireError::Invalid {
                    field,
                    why: "two RAMBlocks have the same name",
                });
            }
            blocks.push(block);
        }
        Ok(blocks)
    }
}

fn get_block(input: &mut Reader<'_>) -> Result<BlockSpec, WireError> {
    let name = Name::get("block name", input)?;
    let size = u64::get("block size", input)?;
    let page_size = u64::get("page size", input)?;
    if size > limits::MAX_BLOCK_SIZE {
        return Err(WireError::AboveLimit {
            field: "block size",
            value: size,
            limit: limits::MAX_BLOCK_SIZE,
        });
    }
    if !page_size.is_power_of_two()
        || !(limits::MIN_PAGE_SIZE..=limits::MAX_PAGE_SIZE).contains(&page_size)
    {
        return Err(WireError::Invalid {
            field: "page size",
            why: "a page is a power of two from 4 KiB to 2 MiB",
        });
    }
    if size == 0 || !size.is_multiple_of(page_size) {
        return Err(WireError::Invalid {
            field: "block size",
            why: "a RAMBlock is a whole number of pages, at least one",
        });
    }
    Ok(BlockSpec {
        name,
        size,
        page_size,
    })
}

/// Runs of pages: 1 to `MAX_RUNS`. That each is inside its block is checked by who knows the blocks.
pub(super) struct Runs;

impl Codec for Runs {
    type Value = Vec<Run>;
    fn put(value: &Vec<Run>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_RUNS);
        for run in value {
            u16::put(&run.block.0, out);
            u64::put(&run.first, out);
            u64::put(&run.pages, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<Run>, WireError> {
        let count = input.count(field, limits::MAX_RUNS, 2 + 8 + 8)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a list of runs is not empty",
            });
        }
        (0..count).map(|_| get_run(input)).collect()
    }
}

fn get_run(input: &mut Reader<'_>) -> Result<Run, WireError> {
    let block = u16::get("run block", input)?;
    let first = u64::get("run first", input)?;
    let pages = u64::get("run pages", input)?;
    if usize::from(block) >= limits::MAX_BLOCKS {
        let limit = limits::MAX_BLOCKS as u64 - 1;
        return Err(WireError::AboveLimit {
            field: "run block",
            value: block.into(),
            limit,
        });
    }
    let most = limits::MAX_BLOCK_SIZE / limits::MIN_PAGE_SIZE;
    if pages == 0 || first.checked_add(pages).is_none_or(|end| end > most) {
        return Err(WireError::Invalid {
            field: "run pages",
            why: "a run has a page and ends inside the largest RAMBlock",
        });
    }
    Ok(Run {
        block: BlockId(block),
        first,
        pages,
    })
}

/// Digests of 16 bytes: 1 to `MAX_DIGESTS`.
pub(super) struct Digests;

impl Codec for Digests {
    type Value = Vec<[u8; 16]>;
    fn put(value: &Vec<[u8; 16]>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_DIGESTS);
        for digest in value {
            out.put(digest);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<[u8; 16]>, WireError> {
        let count = input.count(field, limits::MAX_DIGESTS, 16)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a list of digests is not empty",
            });
        }
        (0..count).map(|_| input.array(field)).collect()
    }
}

/// Bytes of QEMU's device state: 1 to `MAX_DEVICE_STATE_CHUNK`.
pub(super) struct Chunk;

impl Codec for Chunk {
    type Value = Bytes;
    fn put(value: &Bytes, out: &mut Writer) {
        out.count(value.len(), limits::MAX_DEVICE_STATE_CHUNK);
        out.put(value);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Bytes, WireError> {
        let len = input.count(field, limits::MAX_DEVICE_STATE_CHUNK, 1)?;
        if len == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a piece of device state is not empty",
            });
        }
        Ok(Bytes::copy_from_slice(input.take(field, len)?))
    }
}

/// What pages are encoded as: 1 to `MAX_ENCODED` bytes.
pub(super) struct Encoded;

impl Codec for Encoded {
    type Value = Bytes;
    fn put(value: &Bytes, out: &mut Writer) {
        out.count(value.len(), limits::MAX_ENCODED);
        out.put(value);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Bytes, WireError> {
        let len = input.count(field, limits::MAX_ENCODED, 1)?;
        if len == 0 {
            return Err(WireError::Invalid {
                field,
                why: "no page is encoded as nothing",
            });
        }
        Ok(Bytes::copy_from_slice(input.take(field, len)?))
    }
}

/// Pieces of a RAMBlock: 1 to `MAX_PIECES`, in order and apart, of `MAX_ENCODED` bytes in all. That each is inside the
/// block is checked by who knows the blocks.
pub(super) struct Pieces;

impl Codec for Pieces {
    type Value = Vec<Piece>;
    fn put(value: &Vec<Piece>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_PIECES);
        for piece in value {
            u64::put(&piece.offset, out);
            u64::put(&piece.len, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<Piece>, WireError> {
        let count = input.count(field, limits::MAX_PIECES, 8 + 8)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a list of pieces is not empty",
            });
        }
        let mut pieces = Vec::with_capacity(count);
        let (mut from, mut room) = (0, limits::MAX_ENCODED as u64);
        for _ in 0..count {
            let piece = get_piece(input, from, room)?;
            (from, room) = (piece.offset + piece.len, room - piece.len);
            pieces.push(piece);
        }
        Ok(pieces)
    }
}

/// A piece that begins at `from` or later and has at most `room` bytes.
fn get_piece(input: &mut Reader<'_>, from: u64, room: u64) -> Result<Piece, WireError> {
    let offset = u64::get("piece offset", input)?;
    let len = u64::get("piece length", input)?;
    let whole = |bytes: u64| bytes.is_multiple_of(limits::MIN_PAGE_SIZE);
    if len > room {
        return Err(WireError::AboveLimit {
            field: "piece length",
            value: len,
            limit: room,
        });
    }
    if len == 0 || !whole(len) || !whole(offset) || offset < from {
        return Err(WireError::Invalid {
            field: "piece",
            why: "pieces are whole units of 4 KiB, in order and apart",
        });
    }
    if offset > limits::MAX_BLOCK_SIZE - len {
        return Err(WireError::AboveLimit {
            field: "piece offset",
            value: offset,
            limit: limits::MAX_BLOCK_SIZE - len,
        });
    }
    Ok(Piece { offset, len })
}

/// Words of a bitmap: 1 to `MAX_WORDS`. That the pages are inside their block is checked by who knows the blocks.
pub(super) struct Words;

impl Codec for Words {
    type Value = Vec<u64>;
    fn put(value: &Vec<u64>, out: &mut Writer) {
        out.count(value.len(), limits::MAX_WORDS);
        for word in value {
            u64::put(word, out);
        }
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Vec<u64>, WireError> {
        let count = input.count(field, limits::MAX_WORDS, 8)?;
        if count == 0 {
            return Err(WireError::Invalid {
                field,
                why: "a piece of a bitmap is not empty",
            });
        }
        (0..count).map(|_| u64::get(field, input)).collect()
    }
}

/// An abort code.
pub(super) struct Code;

impl Codec for Code {
    type Value = AbortCode;
    fn put(value: &AbortCode, out: &mut Writer) {
        u16::put(&(*value as u16), out);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<AbortCode, WireError> {
        let value = u16::get(field, input)?;
        AbortCode::ALL
            .into_iter()
            .find(|code| *code as u16 == value)
            .ok_or(WireError::Invalid {
                field,
                why: "no such abort code",
            })
    }
}

/// What became of a migration.
pub(super) struct Stand;

impl Codec for Stand {
    type Value = Standing;
    fn put(value: &Standing, out: &mut Writer) {
        out.put(&[*value as u8]);
    }
    fn get(field: &'static str, input: &mut Reader<'_>) -> Result<Standing, WireError> {
        let [value] = input.array::<1>(field)?;
        Standing::ALL
            .into_iter()
            .find(|standing| *standing as u8 == value)
            .ok_or(WireError::Invalid {
                field,
                why: "no such standing",
            })
    }
}
