//! The greeting and its answer against known bytes and damage.

#![allow(clippy::unwrap_used)]

use crate::connect::Greeting;
use crate::connect::greeting::{Answer, Code, Hello, clip};
use crate::limits::MAX_REASON;

fn hello() -> Hello {
    Hello::new(Greeting {
        session: *b"0123456789abcdef",
        channel: 2,
        channels: 5,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The samples of `WIRE.md`. A difference is a change of the wire.
#[test]
fn golden_samples() {
    assert_eq!(
        hex(&hello().encode()),
        include_str!("golden/greeting.hex").trim()
    );
    let welcome = Answer {
        code: Code::Welcome,
        version: 1,
        text: String::new(),
    };
    assert_eq!(
        hex(&welcome.encode()),
        include_str!("golden/welcome.hex").trim()
    );
    let refusal = Answer::refusal(Code::Refused, "no guest of that name");
    assert_eq!(
        hex(&refusal.encode()),
        include_str!("golden/refusal.hex").trim()
    );
}

#[test]
fn what_is_encoded_is_decoded() {
    assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
    for code in [
        Code::Refused,
        Code::NeedsTls,
        Code::NoTls,
        Code::Version,
        Code::Untrusted,
        Code::Malformed,
    ] {
        let answer = Answer::refusal(code, "because");
        let bytes = answer.encode();
        assert_eq!(
            Answer::decode(bytes.first_chunk().unwrap(), &bytes[16..]),
            Ok(answer)
        );
    }
}

#[test]
fn damage_is_noticed() {
    let good = hello().encode();
    for byte in 0..good.len() {
        let mut bad = good;
        bad[byte] ^= 4;
        assert!(Hello::decode(&bad).is_err(), "byte {byte}");
    }
    let good = Answer::refusal(Code::Refused, "because").encode();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 4;
        assert!(
            Answer::decode(bad.first_chunk().unwrap(), &bad[16..]).is_err(),
            "byte {byte}"
        );
    }
}

#[test]
fn a_greeting_keeps_to_its_limits() {
    for (channel, channels) in [(0, 0), (1, 1), (66, 65), (0, 66)] {
        let hello = Hello::new(Greeting {
            session: [0; 16],
            channel,
            channels,
        });
        assert!(
            Hello::decode(&hello.encode()).is_err(),
            "{channel} of {channels}"
        );
    }
    let backwards = Hello {
        version_min: 2,
        version_max: 1,
        ..hello()
    };
    assert!(Hello::decode(&backwards.encode()).is_err());
}

#[test]
fn the_highest_common_version_is_spoken() {
    let speaks = |version_min, version_max| {
        Hello {
            version_min,
            version_max,
            ..hello()
        }
        .common_version()
    };
    assert_eq!(
        [
            speaks(1, 1),
            speaks(1, 9),
            speaks(0, 1),
            speaks(2, 9),
            speaks(0, 0)
        ],
        [Some(1), Some(1), Some(1), None, None]
    );
}

#[test]
fn long_reasons_are_cut_at_a_character() {
    let long = "ä".repeat(MAX_REASON);
    assert_eq!(clip(&long).len(), MAX_REASON);
    assert_eq!(clip(&format!("x{long}")).len(), MAX_REASON - 1);
    let answer = Answer::refusal(Code::Refused, &long);
    assert!(answer.encode().len() <= 16 + MAX_REASON);
}

/// A peer that is not trusted yet writes neither lines of its own into a log nor commands to a terminal.
#[test]
fn text_of_a_peer_has_no_control_characters() {
    let answer = Answer {
        code: Code::Refused,
        version: 0,
        text: "no\nERROR forged\u{1b}[2J\u{9b}2J\r\0".to_owned(),
    };
    let bytes = answer.encode();
    let read = Answer::decode(bytes.first_chunk().unwrap(), &bytes[16..]).unwrap();
    assert_eq!(read.text, "no ERROR forged [2J 2J  ");
}
