//! The receiving half of a stream: any frames, whole or broken, cut at any places, fed or placed directly. However the
//! bytes come, the same must come of them.

use std::collections::VecDeque;

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::channel::{Event, Token};
use crate::error::Error;
use crate::limits::{MAX_EXTENTS, MAX_MESSAGE};
use crate::region::{Access, Extent, Region, RegionId, Regions};
use crate::stream::frame::{self, Header, Kind};
use crate::stream::receiver::Receiver;
use crate::sys::iovecs::Scatter;

/// Bytes of a region.
const LEN: usize = 8192;
/// What the peer may not write holds this.
const CANARY: u8 = 0xc5;
/// Bytes of one input's stream, at most.
const MOST: usize = 40 << 10;

/// One side's regions: 0 may be written and read, 1 may be read only, 2 may be written only.
struct Memory {
    regions: Regions,
    all: Vec<Region>,
}

impl Memory {
    fn new() -> Memory {
        let regions = Regions::new();
        let all = [(true, true), (false, true), (true, false)]
            .into_iter()
            .zip(0..)
            .filter_map(|((peer_writes, peer_reads), id)| {
                let region = Region::anonymous(LEN).ok()?;
                region.copy_in(0, &[CANARY; LEN]);
                let access = Access {
                    peer_writes,
                    peer_reads,
                };
                regions.register(RegionId(id), region.clone(), access);
                Some(region)
            })
            .collect();
        Memory { regions, all }
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        let copy = |region: &Region| {
            let mut bytes = vec![0; LEN];
            region.copy_out(0, &mut bytes);
            bytes
        };
        self.all.iter().map(copy).collect()
    }
}

/// What came of a stream.
#[derive(Debug, PartialEq)]
struct Outcome {
    events: VecDeque<Event>,
    error: Option<String>,
    /// Number, length of each read of the peer's that is to be answered.
    requests: Vec<(u64, u64)>,
    memory: Vec<Vec<u8>>,
    at_boundary: bool,
}

/// A stream of frames against the receiving half.
///
/// # Panics
/// A rule is broken.
pub fn stream(data: &[u8]) {
    let mut input = Unstructured::new(data);
    // An input that ends early is a short stream.
    let _ = run(&mut input);
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let cuts: Vec<u16> = (0..input.int_in_range(1..=8)?)
        .map(|_| u16::arbitrary(input))
        .collect::<Result<_>>()?;
    let directly = bool::arbitrary(input)?;
    let reads: Vec<u8> = (0..input.int_in_range(0..=3)?)
        .map(|_| u8::arbitrary(input))
        .collect::<Result<_>>()?;
    let mut wire = Vec::new();
    while !input.is_empty() && wire.len() < MOST {
        push_frame(input, &mut wire)?;
    }
    let whole = [u16::MAX ^ 0x3ff];
    let at_once = receive(&wire, &whole, false, &reads);
    let cut = receive(&wire, &cuts, directly, &reads);
    assert_eq!(at_once, cut, "what comes of a stream depends on its cuts");
    assert!(
        at_once.memory[1].iter().all(|byte| *byte == CANARY),
        "a region that may only be read was written"
    );
    Ok(())
}

/// Appends a frame, most often one whose checksums are right.
fn push_frame(input: &mut Unstructured<'_>, wire: &mut Vec<u8>) -> Result<()> {
    let shape = u8::arbitrary(input)?;
    if shape % 16 == 15 {
        let len = usize::from(u8::arbitrary(input)?).min(input.len());
        wire.extend_from_slice(input.bytes(len)?);
        return Ok(());
    }
    let kind = [
        Kind::Write,
        Kind::Read,
        Kind::Reply,
        Kind::Message,
        Kind::Fault,
    ][usize::from(shape % 5)];
    let mut extents = Vec::new();
    if matches!(kind, Kind::Write | Kind::Read) {
        for _ in 0..input.int_in_range(0..=4)? {
            extents.push(extent(input)?);
        }
        if shape & 0x40 != 0 {
            extents.resize(MAX_EXTENTS, Extent { offset: 0, len: 1 });
        }
    }
    let mut table = Vec::new();
    for extent in &extents {
        table.extend_from_slice(&extent.offset.to_le_bytes());
        table.extend_from_slice(&extent.len.to_le_bytes());
    }
    let total = extents
        .iter()
        .fold(0_u64, |sum, extent| sum.saturating_add(extent.len));
    let mut payload = if extents.is_empty() {
        // Most of them short: what is long takes long.
        let most = if shape & 0x40 == 0 { 64 } else { u16::MAX };
        u64::from(u16::arbitrary(input)? % most)
    } else {
        total
    };
    if shape & 0x80 != 0 {
        payload = u64::arbitrary(input)?;
    }
    let fill = u8::arbitrary(input)?;
    let follows = match kind {
        Kind::Read => 0,
        _ => usize::try_from(payload).unwrap_or(MOST).min(MOST),
    };
    let body = vec![fill; follows];
    let check = match kind {
        Kind::Write | Kind::Read => crc32c::crc32c(&table),
        Kind::Reply => 0,
        Kind::Message | Kind::Fault => crc32c::crc32c(&body),
    };
    let header = Header {
        kind,
        extents: u16::try_from(extents.len()).unwrap_or(u16::MAX),
        region: RegionId(if extents.is_empty() {
            0
        } else {
            u32::from(u8::arbitrary(input)? % 4)
        }),
        check,
        payload,
        number: match kind {
            Kind::Read | Kind::Reply => u64::from(u8::arbitrary(input)? % 4),
            _ => 0,
        },
    };
    let at = wire.len();
    wire.extend_from_slice(&header.encode());
    wire.extend_from_slice(&table);
    wire.extend_from_slice(&body);
    // Damage, or a frame that is cut short.
    if shape & 0x20 != 0 {
        let byte = at + usize::from(u16::arbitrary(input)?) % (wire.len() - at);
        if bool::arbitrary(input)? {
            wire.truncate(byte);
        } else {
            wire[byte] ^= 1 << (fill % 8);
        }
    }
    Ok(())
}

fn extent(input: &mut Unstructured<'_>) -> Result<Extent> {
    if input.ratio(1, 8)? {
        let (offset, len) = (u64::arbitrary(input)?, u64::arbitrary(input)?);
        return Ok(Extent { offset, len });
    }
    let offset = u64::from(u16::arbitrary(input)?) % LEN as u64;
    let len = u64::from(u16::arbitrary(input)?) % (LEN as u64 + 1 - offset);
    Ok(Extent { offset, len })
}

/// Has a fresh receiver take `wire`, cut as told.
fn receive(wire: &[u8], cuts: &[u16], directly: bool, reads: &[u8]) -> Outcome {
    let memory = Memory::new();
    let mut receiver = Receiver::new(memory.regions.clone());
    for (token, len) in (0..).map(Token).zip(reads) {
        let extents = vec![Extent {
            offset: 0,
            len: 1 + u64::from(*len),
        }];
        receiver.expect(token, memory.all[0].clone(), extents);
    }
    let mut events = VecDeque::new();
    let mut error = None;
    let mut rest = wire;
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let cut = cuts
            .next()
            .map_or(1, |cut| usize::from(*cut ^ 0x3ff).max(1));
        let n = cut.min(rest.len());
        match take(&mut receiver, &rest[..n], directly, &mut events) {
            Ok(taken) => rest = &rest[taken..],
            Err(broken) => {
                error = Some(broken.to_string());
                break;
            }
        }
        assert!(
            receiver.held() <= MAX_MESSAGE.max(frame::EXTENT_LEN * MAX_EXTENTS),
            "the receiver holds {} bytes",
            receiver.held()
        );
    }
    let requests = std::iter::from_fn(|| receiver.next_request())
        .map(|request| (request.number, request.extents.iter().map(|e| e.len).sum()))
        .collect();
    Outcome {
        events,
        requests,
        memory: memory.bytes(),
        // Where it stands after an error does not matter.
        at_boundary: error.is_none() && receiver.at_boundary(),
        error,
    }
}

/// One receive; returns how many bytes it took.
fn take(
    receiver: &mut Receiver,
    bytes: &[u8],
    directly: bool,
    events: &mut VecDeque<Event>,
) -> std::result::Result<usize, Error> {
    let mut scatter = Scatter::default();
    if directly {
        receiver.direct(&mut scatter)?;
    }
    if scatter.len() == 0 {
        receiver.feed(bytes, events)?;
        return Ok(bytes.len());
    }
    let n = scatter
        .copy_from(bytes)
        .map_err(|error| Error::io("placing bytes in a test", &error))?;
    receiver.landed(&mut scatter, n, events)?;
    Ok(n)
}
