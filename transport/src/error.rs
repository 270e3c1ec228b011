//! Errors that say whose fault it is.

use std::io;

/// Why a connection could not be made, or a channel broke.
///
/// Clonable, because every operation of a broken channel reports the same cause.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The peer ended the connection in order.
    #[error("the peer closed the connection")]
    Closed,
    /// The network or the kernel: reset, timed out, no route.
    #[error("{what}: {message}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The kind of error, to decide by.
        kind: io::ErrorKind,
        /// The system's words.
        message: String,
    },
    /// Nobody answers where the peer should listen: the connection was refused by its host, timed out, or found no route. Not so
    /// when somebody has taken the connection, whatever becomes of it.
    #[error("nobody answers: {message}")]
    Unreached {
        /// The kind of error, to decide by.
        kind: io::ErrorKind,
        /// The system's words.
        message: String,
    },
    /// This host cannot take the peer's bytes: its memory is full (`ENOSPC`, `ENOMEM`, `EFAULT` on a full tmpfs).
    #[error("no memory for the peer's bytes: {0}")]
    NoMemory(String),
    /// The peer's bytes break the protocol: a bad checksum, length, region or order. The peer's fault.
    #[error("the peer broke the protocol: {0}")]
    PeerMisbehaved(String),
    /// Both sides are sound, but do not fit: versions, TLS against plaintext.
    #[error("the peer does not fit: {0}")]
    PeerIncompatible(String),
    /// The peer refused us, in its words.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// We refused the peer, in the words that it was told: it may not do what it asked for.
    #[error("the peer was turned away: {0}")]
    Denied(String),
    /// TLS: the peer's certificate is missing, wrong, expired, foreign, or its name is not on the allow-list.
    #[error("the peer is not trusted: {0}")]
    Untrusted(String),
    /// The local configuration or call is wrong. Our fault.
    #[error("{0}")]
    Misuse(String),
}

impl Error {
    /// An I/O error with what was being done.
    pub fn io(what: &'static str, error: &io::Error) -> Error {
        Error::Io {
            what,
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}

/// What a peer says to people: text on one line, for a log and a terminal. Control characters become blanks.
pub(crate) fn peer_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
