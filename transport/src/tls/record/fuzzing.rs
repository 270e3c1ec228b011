//! Both ends of a connection with known keys, and records that an honest end would never seal: for `crate::fuzzing`.

use rustls::ConnectionTrafficSecrets;
use rustls::crypto::cipher::{AeadKey, Iv};

use super::{HANDSHAKE, HEADER_LEN, KEY_UPDATE, Key, NextKeys, Records, TAG_LEN};

/// Keys that follow from their number.
struct Counted {
    sealing: u8,
    opening: u8,
}

fn secrets(number: u8) -> ConnectionTrafficSecrets {
    ConnectionTrafficSecrets::Aes256Gcm {
        key: AeadKey::from([number; 32]),
        iv: Iv::from([number; 12]),
    }
}

impl NextKeys for Counted {
    fn next_sealing(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        self.sealing = self.sealing.wrapping_add(2);
        Ok(secrets(self.sealing))
    }

    fn next_opening(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        self.opening = self.opening.wrapping_add(2);
        Ok(secrets(self.opening))
    }
}

fn records(sealing: u8, opening: u8) -> Records {
    let key = |number| Key::new(0, &secrets(number)).expect("a key of the right length");
    Records {
        sealing: key(sealing),
        opening: key(opening),
        next: Box::new(Counted { sealing, opening }),
        limit: u64::MAX,
        update_asked: false,
    }
}

impl Records {
    /// Two ends that understand each other.
    pub(crate) fn pair() -> (Records, Records) {
        (records(0, 1), records(1, 0))
    }

    /// A record of any type and contents, with so many bytes of padding. After a change of keys the next is under the new.
    pub(crate) fn sealed(&mut self, kind: u8, contents: &[u8], padding: usize) -> Vec<u8> {
        let inner = contents.len() + 1 + padding;
        let mut record = vec![0; HEADER_LEN + inner + TAG_LEN];
        record[HEADER_LEN..HEADER_LEN + contents.len()].copy_from_slice(contents);
        record[HEADER_LEN + contents.len()] = kind;
        // The last byte of what is sealed is the type, or padding behind it.
        let last = if padding == 0 { kind } else { 0 };
        self.seal_as(last, &mut record).expect("a record is sealed");
        if kind == HANDSHAKE && matches!(contents, [KEY_UPDATE, 0, 0, 1, 0 | 1]) {
            let secrets = self.next.next_sealing().expect("the next keys");
            self.sealing = Key::new(0, &secrets).expect("a key of the right length");
        }
        record
    }
}
