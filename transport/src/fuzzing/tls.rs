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
use crate::sys::uring::Incoming;
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
    let mut so_far = Record::Good;
    while !input.is_empty() && wire.len() < MOST {
        let record = push_record(input, &mut peer, &mut wire, &mut sent, so_far)?;
        if so_far == Record::Good {
            so_far = record;
        }
    }
    let (events, error) = receive(Tls::new(ours), &wire, &cuts);
    let arrived: Vec<&[u8]> = events
        .iter()
        .filter_map(|event| match event {
            Event::Message(message) => Some(&message[..]),
            _ => None,
        })
        .collect();
    // What comes behind data of the peer's making, nobody said beforehand.
    let foretold = match so_far {
        Record::Unknown => arrived.len().min(sent.len()),
        Record::Good | Record::Bad => arrived.len(),
    };
    assert_eq!(
        arrived[..foretold],
        sent[..],
        "what was sealed is not what arrived: {error:?}"
    );
    assert!(so_far != Record::Good || error.is_none(), "{error:?}");
    Ok(())
}

/// What a record is to the layer, and a stream by the first of its records that is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    /// To be taken, with what it says.
    Good,
    /// Nothing of it, nor of what follows, is to arrive.
    Bad,
    /// Sound for TLS, with data of the peer's making, which may well be a frame.
    Unknown,
}

/// Appends a record, and says what it is. If all before it are good, what a good one says is added to `sent`.
fn push_record(
    input: &mut Unstructured<'_>,
    peer: &mut Records,
    wire: &mut Vec<u8>,
    sent: &mut Vec<Vec<u8>>,
    so_far: Record,
) -> Result<Record> {
    let good_if = |good| if good { Record::Good } else { Record::Bad };
    let shape = u8::arbitrary(input)?;
    let (record, is) = match shape % 8 {
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
            if so_far == Record::Good && good && shape & 0x80 == 0 {
                sent.push(text);
            }
            (peer.sealed(23, &contents, padding), good_if(good))
        }
        4 => (peer.sealed(22, &[24, 0, 0, 1, shape >> 7], 0), Record::Good),
        5 => {
            let kind = u8::arbitrary(input)?;
            let len = usize::from(u8::arbitrary(input)?).min(input.len());
            let contents = input.bytes(len)?.to_vec();
            // The type is the last byte that is not zero, wherever it came from.
            let inner = [&contents[..], &[kind]].concat();
            let end = inner.iter().rposition(|byte| *byte != 0);
            let is = match end.map(|end| (inner[end], &inner[..end])) {
                Some((23, [])) | Some((22, [24, 0, 0, 1, 0 | 1])) => Record::Good,
                Some((23, _)) => Record::Unknown,
                _ => Record::Bad,
            };
            (peer.sealed(kind, &contents, 0), is)
        }
        6 => {
            let len = usize::from(u16::arbitrary(input)?).min(input.len());
            (input.bytes(len)?.to_vec(), good_if(len == 0))
        }
        _ => (
            peer.sealed(21, &[2, u8::arbitrary(input)?.max(1)], 0),
            Record::Bad,
        ),
    };
    let at = wire.len();
    wire.extend_from_slice(&record);
    // Damage anywhere in it: no byte of a record is free.
    if shape & 0x80 != 0 && shape % 8 < 4 {
        let byte = at + usize::from(u16::arbitrary(input)?) % record.len();
        wire[byte] ^= 1 << (shape >> 4 & 7);
        return Ok(Record::Bad);
    }
    Ok(is)
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
            let Incoming::Copied(mut scatter) = layer.next_receive(&mut halves)? else {
                unreachable!("what has to be opened is copied first");
            };
            assert!(scatter.len() > 0, "a whole record fits the buffer");
            let n = scatter
                .copy_from(&rest[..cut.min(rest.len())])
                .map_err(|error| Error::io("placing bytes in a test", &error))?;
            rest = &rest[n..];
            layer.received(&mut halves, Incoming::Copied(scatter), n)?;
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
