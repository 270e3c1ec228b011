//! The greeting and its answer, as bytes (`WIRE.md`, "Greeting"). Pure.
//!
//! Both begin with the same four letters, which no TLS record does: that is how each side notices that only one of them
//! uses TLS.

use crate::connect::Greeting;
use crate::error::peer_text;
use crate::limits::{MAX_CHANNELS, MAX_REASON};

/// First bytes of greeting and answer.
pub(crate) const MAGIC: [u8; 4] = *b"PGCP";
/// Lowest transport protocol version that this build speaks.
pub(crate) const VERSION_MIN: u16 = 1;
/// Highest transport protocol version that this build speaks.
pub(crate) const VERSION_MAX: u16 = 1;
/// Bytes of a greeting.
pub(crate) const GREETING_LEN: usize = 32;
/// Bytes of an answer before its text.
pub(crate) const ANSWER_LEN: usize = 16;

/// A greeting with the versions that its sender speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version_min: u16,
    pub(crate) version_max: u16,
    pub(crate) greeting: Greeting,
}

impl Hello {
    /// Ours.
    pub(crate) fn new(greeting: Greeting) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            greeting,
        }
    }

    pub(crate) fn encode(&self) -> [u8; GREETING_LEN] {
        let mut out = [0; GREETING_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.version_min.to_le_bytes());
        out[6..8].copy_from_slice(&self.version_max.to_le_bytes());
        out[8..24].copy_from_slice(&self.greeting.session);
        out[24..26].copy_from_slice(&self.greeting.channel.to_le_bytes());
        out[26..28].copy_from_slice(&self.greeting.channels.to_le_bytes());
        let crc = crc32c::crc32c(&out[..28]);
        out[28..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a greeting. The error says which rule is broken.
    pub(crate) fn decode(bytes: &[u8; GREETING_LEN]) -> Result<Hello, &'static str> {
        if bytes[..4] != MAGIC {
            return Err("its first bytes are no greeting; it is no pagecopy daemon");
        }
        if crc32c::crc32c(&bytes[..28])
            != u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]])
        {
            return Err("the greeting's checksum is wrong");
        }
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[8..24]);
        let greeting = Greeting {
            session,
            channel: u16_at(bytes, 24),
            channels: u16_at(bytes, 26),
        };
        let hello = Hello {
            version_min: u16_at(bytes, 4),
            version_max: u16_at(bytes, 6),
            greeting,
        };
        if hello.version_min > hello.version_max {
            return Err("a greeting whose versions are in the wrong order");
        }
        if greeting.channels == 0
            || greeting.channels > MAX_CHANNELS
            || greeting.channel >= greeting.channels
        {
            return Err("a greeting with no channels, too many, or one beyond the last");
        }
        Ok(hello)
    }

    /// The version to speak with a peer of that greeting, if there is one.
    pub(crate) fn common_version(&self) -> Option<u16> {
        let version = self.version_max.min(VERSION_MAX);
        (version >= self.version_min.max(VERSION_MIN)).then_some(version)
    }
}

/// What the acceptor says to a greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Code {
    /// Go on, with frames of the version named.
    Welcome = 0,
    /// Not admitted: the text says why.
    Refused = 1,
    /// The listener speaks TLS only.
    NeedsTls = 2,
    /// The listener does not speak TLS.
    NoTls = 3,
    /// No version in common.
    Version = 4,
    /// The certificate's name is not on the allow-list.
    Untrusted = 5,
    /// The greeting breaks the protocol.
    Malformed = 6,
}

/// The answer to a greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) code: Code,
    /// With `Welcome` the version to speak; otherwise the highest that the acceptor speaks.
    pub(crate) version: u16,
    /// Why, for people. Empty with `Welcome`.
    pub(crate) text: String,
}

impl Answer {
    /// A refusal with its reason, cut to its limit.
    pub(crate) fn refusal(code: Code, text: &str) -> Answer {
        Answer {
            code,
            version: VERSION_MAX,
            text: clip(text).to_owned(),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let text = clip(&self.text).as_bytes();
        let mut out = vec![0; ANSWER_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&(self.code as u16).to_le_bytes());
        out[6..8].copy_from_slice(&self.version.to_le_bytes());
        out[8..10].copy_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[..12]), text);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(text);
        out
    }

    /// Bytes of the text that follows the fixed part.
    pub(crate) fn text_len(head: &[u8; ANSWER_LEN]) -> Result<usize, &'static str> {
        if head[..4] != MAGIC {
            return Err("it does not answer like a pagecopy daemon");
        }
        let len = usize::from(u16_at(head, 8));
        if len > MAX_REASON {
            Err("an answer whose text is too long")
        } else {
            Ok(len)
        }
    }

    /// Reads and checks an answer. The error says which rule is broken.
    pub(crate) fn decode(head: &[u8; ANSWER_LEN], text: &[u8]) -> Result<Answer, &'static str> {
        if Answer::text_len(head)? != text.len() {
            return Err("an answer whose text is cut short");
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..12]), text);
        if crc != u32::from_le_bytes([head[12], head[13], head[14], head[15]]) {
            return Err("an answer's checksum is wrong");
        }
        let code = match u16_at(head, 4) {
            0 => Code::Welcome,
            1 => Code::Refused,
            2 => Code::NeedsTls,
            3 => Code::NoTls,
            4 => Code::Version,
            5 => Code::Untrusted,
            6 => Code::Malformed,
            _ => return Err("an answer of unknown code"),
        };
        let version = u16_at(head, 6);
        if u16_at(head, 10) != 0 {
            return Err("an answer with unknown flags");
        }
        if code == Code::Welcome && !(VERSION_MIN..=VERSION_MAX).contains(&version) {
            return Err("an answer with a version that was not offered");
        }
        Ok(Answer {
            code,
            version,
            text: peer_text(text),
        })
    }
}

/// The part of `text` that fits the limit, at a character's boundary.
pub(crate) fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_REASON)]
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
