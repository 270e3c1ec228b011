//! `WIRE.md` against the code: numbers, fields and limits.

use crate::limits;
use crate::wire::table::TABLE;
use crate::wire::{AbortCode, Standing, capability};

const TEXT: &str = include_str!("../../../WIRE.md");

/// First two cells of every row of the table under `heading` in `WIRE.md` whose first cell is a number.
fn rows(heading: &str) -> Vec<(u16, String)> {
    let (_, section) = TEXT.split_once(&format!("\n### {heading}\n")).unwrap();
    let section = section.split("\n#").next().unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
        Some((cells.next()?.parse().ok()?, cells.next()?.to_owned()))
    };
    section.lines().filter_map(row).collect()
}

#[test]
fn the_document_and_the_code_name_the_same_numbers() {
    let of_code: Vec<(u16, String)> = TABLE
        .iter()
        .map(|(number, name)| (*number, (*name).to_owned()))
        .collect();
    assert_eq!(rows("Messages"), of_code);
    let of_code = AbortCode::ALL.map(|code| (code as u16, format!("{code:?}")));
    assert_eq!(rows("Abort codes"), of_code);
    let mut of_code = Standing::ALL.map(|standing| (standing as u16, format!("{standing:?}")));
    of_code.sort();
    assert_eq!(rows("Standings"), of_code);
    let bits: Vec<u64> = rows("Versions and capabilities")
        .iter()
        .map(|(bit, _)| 1 << bit)
        .collect();
    let ours = [
        capability::VERIFY,
        capability::POSTCOPY,
        capability::ZSTD,
        capability::DELTA,
        capability::CHANNELS,
    ];
    assert_eq!(bits, ours);
}

#[test]
fn the_document_and_the_code_have_the_same_fields() {
    // `12 Digests { block: u16, …}` in the table against the fourth cell of its row.
    let code = include_str!("../table.rs");
    for (number, name) in TABLE {
        let row = TEXT
            .lines()
            .find(|line| line.starts_with(&format!("| {number} | {name} |")))
            .unwrap();
        let document = row.split('|').nth(4).unwrap();
        let fields = document
            .split(',')
            .map(|field| field.trim().split(' ').next().unwrap().to_owned());
        let documented: Vec<String> = fields.filter(|field| !field.is_empty()).collect();
        let line = code
            .split(&format!("    {number} {name}"))
            .nth(1)
            .unwrap()
            .split(';')
            .next()
            .unwrap();
        let coded: Vec<String> = line
            .split(['{', '(', ',', '}', ')', '\n'])
            .filter_map(|field| {
                field
                    .trim()
                    .split_once(':')
                    .map(|(name, _)| name.to_owned())
            })
            .map(|field| {
                if field == "bytes" && *name == "DeviceState" {
                    "chunk".into()
                } else if field == "bytes" && matches!(*name, "Copied" | "Deltas") {
                    "encoded".into()
                } else {
                    field
                }
            })
            .collect();
        assert_eq!(documented, coded, "{name}");
    }
}

#[test]
fn the_document_and_the_code_have_the_same_limits() {
    let data_channels = format!("1 to {} data channels", limits::MAX_DATA_CHANNELS);
    let expected = [
        format!("*n* from 1 to {};", limits::MAX_NAME),
        format!("*n* from 0 to {};", limits::MAX_REASON),
        format!("*n* from 1 to {}; names differ", limits::MAX_BLOCKS),
        format!(
            "| runs | u32 *n*, then *n* runs | *n* from 1 to {} |",
            limits::MAX_RUNS
        ),
        format!("*n* from 1 to {} |\n| words", limits::MAX_DIGESTS),
        format!(
            "| words | u32 *n*, then *n* × u64 | *n* from 1 to {}; bit 0 of the first is the first page |",
            limits::MAX_WORDS
        ),
        format!(
            "| chunk | u32 *n*, then [n] | *n* from 1 to {} |",
            limits::MAX_DEVICE_STATE_CHUNK
        ),
        format!(
            "| pieces | u32 *n*, then *n* × (u64, u64) | *n* from 1 to {};",
            limits::MAX_PIECES
        ),
        format!("{} KiB in all", limits::MAX_ENCODED >> 10),
        format!(
            "| encoded | u32 *n*, then [n] | *n* from 1 to {} |",
            limits::MAX_ENCODED
        ),
        format!("*n* from 2 to {}; JSON", limits::MAX_FACTS),
        format!("Region {} of", limits::PROBE_REGION),
        format!("is {} MiB at the destination", limits::PROBE_BYTES >> 20),
        format!("at most {} rounds", limits::MAX_PROBE_ROUNDS),
        format!("each list at most {} entries", limits::MAX_FACTS_EACH),
        format!("each text at most {} bytes", limits::MAX_FACT),
        format!("1 page to {} TiB", limits::MAX_BLOCK_SIZE >> 40),
        format!(
            "from {} KiB to {} MiB",
            limits::MIN_PAGE_SIZE >> 10,
            limits::MAX_PAGE_SIZE >> 20
        ),
        format!("{} GiB in all at most", limits::MAX_DEVICE_STATE >> 30),
        format!("a chunk of {} MiB", limits::DIGEST_CHUNK >> 20),
        format!(
            "A time is at most 2^{} microseconds",
            limits::MAX_TIME_US.ilog2()
        ),
        data_channels,
        format!(
            "| arguments | u32 *n*, then *n* × (u32 *m*, [m]) | *n* from 1 to {}; {} KiB in all;",
            limits::MAX_ARGUMENTS,
            limits::MAX_ARGUMENT_BYTES >> 10
        ),
        format!(
            "| parts | u32 *n*, then *n* parts | *n* from 0 to {}; {} KiB in all |",
            limits::MAX_PARTS,
            limits::MAX_PARTS_BYTES >> 10
        ),
        format!("at most {} bytes", limits::MAX_PART),
    ];
    for limit in expected {
        assert!(TEXT.contains(&limit), "WIRE.md does not say: {limit}");
    }
}
