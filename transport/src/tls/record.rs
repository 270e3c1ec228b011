//! TLS 1.3 records (RFC 8446, section 5): sealing and opening in place, and the change of keys.

#[cfg(feature = "fuzzing")]
mod fuzzing;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::kernel::KernelConnection;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use crate::error::Error;

/// Bytes before a record's contents.
pub(crate) const HEADER_LEN: usize = 5;
/// Bytes of contents in one record, at most.
pub(crate) const MAX_CONTENT: usize = 1 << 14;
/// Bytes of a record beside its contents: header, type, authentication tag.
pub(crate) const OVERHEAD: usize = HEADER_LEN + 1 + TAG_LEN;
/// Bytes of a whole record that a peer may send, at most.
pub(crate) const MAX_RECORD: usize = HEADER_LEN + MAX_CONTENT + 256;
const TAG_LEN: usize = 16;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const KEY_UPDATE: u8 = 24;

/// What a record holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    /// Data.
    Data(&'a [u8]),
    /// An alert, by its number.
    Alert(u8),
    /// Something of TLS's own, already dealt with.
    Nothing,
}

/// Derives the next keys. rustls does.
trait NextKeys: Send {
    fn next_sealing(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
    fn next_opening(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
}

impl<Data: Send> NextKeys for KernelConnection<Data> {
    fn next_sealing(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        self.update_tx_secret().map(|(_, secrets)| secrets)
    }

    fn next_opening(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        self.update_rx_secret().map(|(_, secrets)| secrets)
    }
}

/// The key of one direction, and the number of the next record under it.
struct Key {
    key: LessSafeKey,
    iv: [u8; aead::NONCE_LEN],
    sequence: u64,
}

impl Key {
    fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Key, Error> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&aead::CHACHA20_POLY1305, key, iv)
            }
            _ => return Err(broken("a cipher suite that this build does not know")),
        };
        let unbound = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| broken("a key of the wrong length"))?;
        let iv = iv
            .as_ref()
            .try_into()
            .map_err(|_| broken("a nonce of the wrong length"))?;
        Ok(Key {
            key: LessSafeKey::new(unbound),
            iv,
            sequence,
        })
    }

    /// The nonce of the next record (section 5.3). No number comes twice under one key.
    fn next_nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[aead::NONCE_LEN - 8..]
            .iter_mut()
            .zip(self.sequence.to_be_bytes())
        {
            *byte ^= number;
        }
        self.sequence = self
            .sequence
            .checked_add(1)
            .ok_or_else(|| broken("the record numbers are used up"))?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Both directions of a connection whose handshake is over.
pub(crate) struct Records {
    sealing: Key,
    opening: Key,
    next: Box<dyn NextKeys>,
    /// Records that may be sealed under one key: the cipher suite's confidentiality limit, or less.
    limit: u64,
    /// The peer asked for a change of our key.
    update_asked: bool,
}

impl Records {
    /// Takes over from the handshake.
    pub(crate) fn new<Data: Send + 'static>(
        secrets: &ExtractedSecrets,
        kernel: KernelConnection<Data>,
    ) -> Result<Records, Error> {
        let suite = kernel.negotiated_cipher_suite();
        let suite = suite
            .tls13()
            .ok_or_else(|| broken("a version other than TLS 1.3"))?;
        Ok(Records {
            sealing: Key::new(secrets.tx.0, &secrets.tx.1)?,
            opening: Key::new(secrets.rx.0, &secrets.rx.1)?,
            next: Box::new(kernel),
            limit: suite.common.confidentiality_limit,
            update_asked: false,
        })
    }

    /// Seals data. `record` has [`HEADER_LEN`] free bytes, the contents, and free bytes for the rest of [`OVERHEAD`].
    pub(crate) fn seal(&mut self, record: &mut [u8]) -> Result<(), Error> {
        self.seal_as(APPLICATION_DATA, record)
    }

    /// A record that announces a change of our key, sealed under the old key, when one is due: the key may not seal
    /// `ahead` records more, or the peer asked. Records sealed after it are under the new key.
    pub(crate) fn key_update(&mut self, ahead: u64) -> Result<Option<Vec<u8>>, Error> {
        // One number is kept for the announcement itself.
        if !self.update_asked && self.sealing.sequence.saturating_add(ahead) < self.limit {
            return Ok(None);
        }
        self.update_asked = false;
        // A handshake message of one byte: 0, "update not requested" of the other side.
        let record = self.small(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])?;
        let secrets = self
            .next
            .next_sealing()
            .map_err(|error| broken(&error.to_string()))?;
        self.sealing = Key::new(0, &secrets)?;
        Ok(Some(record))
    }

    /// Makes a change of our key due after so many records.
    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Whether the peer waits for a change of our key.
    pub(crate) fn owes_update(&self) -> bool {
        self.update_asked
    }

    /// A record that says that nothing follows.
    pub(crate) fn close_notify(&mut self) -> Result<Vec<u8>, Error> {
        self.small(ALERT, &[1, 0])
    }

    /// Seals a few bytes of data.
    pub(crate) fn data(&mut self, contents: &[u8]) -> Result<Vec<u8>, Error> {
        self.small(APPLICATION_DATA, contents)
    }

    fn small(&mut self, kind: u8, contents: &[u8]) -> Result<Vec<u8>, Error> {
        let mut record = vec![0; contents.len() + OVERHEAD];
        record[HEADER_LEN..HEADER_LEN + contents.len()].copy_from_slice(contents);
        self.seal_as(kind, &mut record)?;
        Ok(record)
    }

    fn seal_as(&mut self, kind: u8, record: &mut [u8]) -> Result<(), Error> {
        let header = header(record.len() - HEADER_LEN);
        let (head, rest) = record.split_at_mut(HEADER_LEN);
        head.copy_from_slice(&header);
        let (inner, tag_place) = rest.split_at_mut(rest.len() - TAG_LEN);
        if let Some(last) = inner.last_mut() {
            *last = kind;
        }
        let nonce = self.sealing.next_nonce()?;
        let tag = self
            .sealing
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(header), inner);
        tag_place.copy_from_slice(tag.map_err(|_| broken("encryption failed"))?.as_ref());
        Ok(())
    }

    /// The length of the record that begins `bytes`, header included; none while its header is not whole.
    pub(crate) fn record_len(bytes: &[u8]) -> Result<Option<usize>, Error> {
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let len = HEADER_LEN + usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[..3] != [APPLICATION_DATA, 3, 3] || !(OVERHEAD..=MAX_RECORD).contains(&len) {
            return Err(misbehaved("bytes that are no TLS record"));
        }
        Ok(Some(len))
    }

    /// Opens a whole record.
    pub(crate) fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<Content<'a>, Error> {
        let (head, rest) = record.split_at_mut(HEADER_LEN);
        let header: [u8; HEADER_LEN] = header(rest.len());
        if *head != header {
            return Err(misbehaved("bytes that are no TLS record"));
        }
        let nonce = self.opening.next_nonce()?;
        let inner = self
            .opening
            .key
            .open_in_place(nonce, Aad::from(header), rest)
            .map_err(|_| {
                misbehaved("a TLS record that does not decrypt: it was damaged or forged")
            })?;
        // Padding counts, too (section 5.4).
        if inner.len() > MAX_CONTENT + 1 {
            return Err(misbehaved("a TLS record that is too long"));
        }
        // The type is the last byte that is not padding.
        let end = inner
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or_else(|| misbehaved("a TLS record of no type"))?;
        let (kind, contents) = (inner[end], &inner[..end]);
        match (kind, contents) {
            (APPLICATION_DATA, data) => Ok(Content::Data(data)),
            (ALERT, &[_, description]) => Ok(Content::Alert(description)),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, asked @ (0 | 1)]) => {
                let secrets = self
                    .next
                    .next_opening()
                    .map_err(|error| broken(&error.to_string()))?;
                self.opening = Key::new(0, &secrets)?;
                self.update_asked |= asked == 1;
                Ok(Content::Nothing)
            }
            _ => Err(misbehaved("a TLS message that does not belong here")),
        }
    }
}

/// The header of a protected record with so many bytes after it. It is also authenticated.
fn header(len: usize) -> [u8; HEADER_LEN] {
    let len = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    [APPLICATION_DATA, 3, 3, len[0], len[1]]
}

fn misbehaved(what: &str) -> Error {
    Error::PeerMisbehaved(what.to_owned())
}

fn broken(what: &str) -> Error {
    Error::Misuse(format!("TLS: {what}"))
}
