//! TLS records: any records, sealed by a peer that has the keys or not, against the layer that opens them.

use std::collections::VecDeque;

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::channel::Event;
use crate::error::Error;
use crate::region::Regions;
use crate::stream::frame::{self, Kind};
use crate::stream::layer::{Halves, Layer};
use crate::stream::receiver::Receiver;
use crate::stream::sender::Sender;
use crate::tls::layer::Tls;
use crate::tls::record::{MAX_CONTENT, Records};

/// Bytes of one input's stream, at most.
const MOST: usize = 40 << 10;

/// Records of a hostile peer against the layer. As long as every record is one that TLS allows, the data in them arrives
/// unchanged, however the stream was cut.
///
/// # Panics
/// A rule is broken.
pub fn records(data: &[u8]) {
    // An input that ends early is a short stream.
    let _ = run(&mut Unstructured::new(data));
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let cuts: Vec<u16> = (0..input.int_in_range(1..=6)?)
        .map(|_| u16::arbitrary(input))
        .collect::<Result<_>>()?;
    let (mut peer, ours) = Records::pair();
    let mut wire = Vec::new();
    let mut sent = Vec::new();
    let mut sound = true;
    while !input.is_empty() && wire.len() < MOST {
        sound &= push_record(input, &mut peer, &mut wire, &mut sent, sound)?;
    }
    let (events, error) = receive(Tls::new(ours), &wire, &cuts);
    let arrived: Vec<&[u8]> = events
        .iter()
        .filter_map(|event| match event {
            Event::Message(message) => Some(&message[..]),
            _ => None,
        })
        .collect();
    assert_eq!(
        arrived, sent,
        "what was sealed is not what arrived: {error:?}"
    );
    assert!(!sound || error.is_none(), "{error:?}");
    Ok(())
}

/// Appends a record. Returns whether it is one that is to be taken; if all so far were, what it says is added to `sent`.
fn push_record(
    input: &mut Unstructured<'_>,
    peer: &mut Records,
    wire: &mut Vec<u8>,
    sent: &mut Vec<Vec<u8>>,
    sound: bool,
) -> Result<bool> {
    let shape = u8::arbitrary(input)?;
    let (record, good) = match shape % 8 {
        // A message in one record, with padding or not.
        0..=3 => {
            // Most of them short: what is long takes long.
            let most = if shape & 0x40 == 0 {
                64
            } else {
                MAX_CONTENT - frame::HEADER_LEN
            };
            let len = 1 + usize::from(u16::arbitrary(input)?) % most;
            let text = vec![u8::arbitrary(input)?; len];
            let mut contents = frame::encode_message(Kind::Message, &text).to_vec();
            contents.extend_from_slice(&text);
            let padding = usize::from(u8::arbitrary(input)?);
            // Contents, type and padding together have a limit (RFC 8446, section 5.4).
            let good = contents.len() + padding <= MAX_CONTENT;
            if sound && good && shape & 0x80 == 0 {
                sent.push(text);
            }
            (peer.sealed(23, &contents, padding), good)
        }
        4 => (peer.sealed(22, &[24, 0, 0, 1, shape >> 7], 0), true),
        5 => {
            let kind = u8::arbitrary(input)?;
            let len = usize::from(u8::arbitrary(input)?).min(input.len());
            let contents = input.bytes(len)?.to_vec();
            let good = match kind {
                22 => matches!(contents[..], [24, 0, 0, 1, 0 | 1]),
                23 => len == 0,
                _ => false,
            };
            (peer.sealed(kind, &contents, 0), good)
        }
        6 => {
            let len = usize::from(u16::arbitrary(input)?).min(input.len());
            (input.bytes(len)?.to_vec(), len == 0)
        }
        _ => (
            peer.sealed(21, &[2, u8::arbitrary(input)?.max(1)], 0),
            false,
        ),
    };
    let at = wire.len();
    wire.extend_from_slice(&record);
    // Damage anywhere in it: no byte of a record is free.
    if shape & 0x80 != 0 && shape % 8 < 4 {
        let byte = at + usize::from(u16::arbitrary(input)?) % record.len();
        wire[byte] ^= 1 << (shape >> 4 & 7);
        return Ok(false);
    }
    Ok(good)
}

/// Has the layer take `wire`, cut as told.
fn receive(mut layer: Tls, wire: &[u8], cuts: &[u16]) -> (VecDeque<Event>, Option<Error>) {
    let mut halves = Halves {
        sender: Sender::default(),
        receiver: Receiver::new(Regions::new()),
        events: VecDeque::new(),
    };
    let mut rest = wire;
    let mut cuts = cuts.iter().cycle();
    let mut all = || -> std::result::Result<(), Error> {
        while !rest.is_empty() {
            let cut = cuts
                .next()
                .map_or(1, |cut| usize::from(*cut ^ 0x3ff).max(1));
            let mut scatter = layer.next_receive(&mut halves)?;
            assert!(scatter.len() > 0, "a whole record fits the buffer");
            let n = scatter
                .copy_from(&rest[..cut.min(rest.len())])
                .map_err(|error| Error::io("placing bytes in a test", &error))?;
            rest = &rest[n..];
            layer.received(&mut halves, scatter, n)?;
        }
        match layer.ended(&halves) {
            // Every stream here lacks its end.
            Error::Io { .. } => Ok(()),
            other => Err(other),
        }
    };
    let error = all().err();
    (halves.events, error)
}
