//! The wire codec and the journal: what decodes is encoded to the same bytes, and nothing is kept that was not sent.

use pagecopy::engine::journal::{self, Record};
use pagecopy::wire::Message;

/// A control message.
///
/// # Panics
/// A rule is broken.
pub fn message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else {
        return;
    };
    assert_eq!(&message.encode()[..], data, "{message:?}");
    assert!(!message.name().is_empty());
}

/// A journal: the bytes as they are, and as lines whose checksums are put right.
///
/// # Panics
/// A rule is broken.
pub fn journal(data: &[u8]) {
    check(data);
    let mut lines = Vec::new();
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        let (json, end) = match line.split_last() {
            Some((b'\n', json)) => (json, "\n"),
            _ => (line, ""),
        };
        let sum = crc32c::crc32c(json);
        lines.extend_from_slice(format!("{sum:08x} ").as_bytes());
        lines.extend_from_slice(json);
        lines.extend_from_slice(end.as_bytes());
    }
    check(&lines);
}

fn check(bytes: &[u8]) {
    let Ok(decoded) = journal::decode(bytes) else {
        return;
    };
    let (whole, torn) = bytes.split_at(decoded.whole_bytes);
    assert!(!torn.contains(&b'\n'), "a line that ends was left out");
    assert_eq!(
        journal::decode(whole).map(|again| again.records),
        Ok(decoded.records.clone()),
        "the whole lines say the same alone"
    );
    let again: Vec<u8> = decoded.records.iter().flat_map(journal::encode).collect();
    assert_eq!(
        journal::decode(&again).map(|again| again.records),
        Ok(decoded.records.clone()),
        "what was read is written and read again"
    );
    let first = decoded.records.first();
    assert!(first.is_none_or(|record| matches!(record, Record::Begun { .. })));
    let _ = journal::outcome(&decoded.records);
    let _ = journal::standing_for(Some(&decoded.records));
}
