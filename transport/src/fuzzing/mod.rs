//! What a peer's bytes reach in this crate, as functions that take any bytes: for the fuzzer, and for the tests that run
//! its corpus again (`tests/fuzz`). Each panics when a rule is broken, and returns otherwise.

mod stream;
mod tls;

pub use stream::stream;
pub use tls::records;

use crate::connect::greeting::{ANSWER_LEN, Answer, GREETING_LEN, Hello};

/// The greeting and its answer: what decodes is encoded to the same bytes. The checksum is put right first, so that the
/// fuzzer gets behind it.
///
/// # Panics
/// A rule is broken.
pub fn greeting(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<GREETING_LEN>() {
        let mut bytes = *bytes;
        let _ = Hello::decode(&bytes);
        let sum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&sum.to_le_bytes());
        if let Ok(hello) = Hello::decode(&bytes) {
            assert_eq!(hello.encode(), bytes, "{hello:?}");
            assert!(hello.greeting.channel < hello.greeting.channels);
            let _ = hello.common_version();
        }
    }
    let Some((head, text)) = data.split_first_chunk::<ANSWER_LEN>() else {
        return;
    };
    let mut head = *head;
    let Ok(len) = Answer::text_len(&head) else {
        return;
    };
    let text = &text[..len.min(text.len())];
    head[8..10].copy_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&head[..12]), text);
    head[12..].copy_from_slice(&sum.to_le_bytes());
    // What is shown to people loses its control characters; any other text comes back as it was.
    let plain = str::from_utf8(text).is_ok_and(|text| !text.chars().any(char::is_control));
    if let Ok(answer) = Answer::decode(&head, text) {
        assert!(!answer.text.chars().any(char::is_control), "{answer:?}");
        if !plain {
            return;
        }
        assert_eq!(answer.encode(), [&head[..], text].concat(), "{answer:?}");
    }
}
