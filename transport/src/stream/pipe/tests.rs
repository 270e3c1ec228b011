//! What comes out of the pipe is what would have been copied, and what it cannot give is copied.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::read;

use super::Pipe;
use crate::channel::{Event, Token};
use crate::region::{Extent, Region, RegionId};
use crate::stream::sender::{Pieces, Sender};
use crate::sys::iovecs::Gather;

const LEN: u64 = 8 << 20;
const REGION: RegionId = RegionId(1);

/// A file's region with a different word in each place.
fn region() -> Region {
    let region = Region::memfd(LEN as usize).unwrap();
    let words: Vec<u8> = (0..LEN / 8).flat_map(u64::to_le_bytes).collect();
    region.copy_in(0, &words);
    region
}

/// Everything of `sender`, through a pipe where it wants that. Second: the bytes that went through the pipe.
fn drain(sender: &mut Sender, cuts: &[usize], events: &mut VecDeque<Event>) -> (Vec<u8>, usize) {
    let mut pipe = Pipe::new().unwrap();
    let mut out = Vec::new();
    let mut spliced = 0;
    let mut cuts = cuts.iter().cycle();
    while !sender.is_empty() {
        let mut bytes;
        if sender.is_long() {
            sender.splice(&mut pipe);
            assert!(pipe.len() > 0);
            spliced += pipe.len();
            // In as many steps as the socket likes.
            while pipe.len() > 0 {
                bytes = vec![0; pipe.len().min(*cuts.next().unwrap())];
                let n = read(&pipe.read, &mut bytes).unwrap();
                pipe.taken(n);
                sender.advance(n, events);
                out.extend(&bytes[..n]);
            }
            continue;
        }
        let mut gather = Gather::default();
        sender.gather_short(&mut gather);
        bytes = vec![0; gather.len()];
        gather.copy_to(&mut [&mut bytes]).unwrap();
        sender.advance(bytes.len(), events);
        out.extend(bytes);
    }
    (out, spliced)
}

#[derive(Clone, Debug)]
enum Frame {
    Long { offset: u64, len: u64 },
    Short { offset: u64, count: u64 },
    Message(usize),
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let frame = prop_oneof![
        (0..LEN / 2, 64 << 10..=LEN / 2).prop_map(|(offset, len)| Frame::Long { offset, len }),
        (0..LEN / 4, 1..200u64).prop_map(|(offset, count)| Frame::Short { offset, count }),
        (1..20_000usize).prop_map(Frame::Message),
    ];
    prop::collection::vec(frame, 1..8)
}

fn queue(sender: &mut Sender, region: &Region, frames: &[Frame]) {
    for (token, frame) in (0..).map(Token).zip(frames) {
        let extents = match *frame {
            Frame::Long { offset, len } => vec![Extent { offset, len }],
            Frame::Short { offset, count } => (0..count)
                .map(|n| Extent {
                    offset: offset + 8192 * n,
                    len: 4096,
                })
                .collect(),
            Frame::Message(len) => {
                sender.message(token, Bytes::from(vec![7; len]));
                continue;
            }
        };
        sender.write(token, REGION, region.clone(), extents);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_spliced_is_what_would_be_copied(
        frames in frames(),
        cuts in prop::collection::vec(1..3_000_000usize, 1..5),
    ) {
        let region = region();
        let mut copied = Sender::default();
        queue(&mut copied, &region, &frames);
        let mut model = Vec::new();
        let mut expected = VecDeque::new();
        while !copied.is_empty() {
            let mut gather = Gather::default();
            copied.gather(&mut gather, usize::MAX);
            let mut bytes = vec![0; gather.len()];
            gather.copy_to(&mut [&mut bytes]).unwrap();
            copied.advance(bytes.len(), &mut expected);
            model.extend(bytes);
        }

        let mut sender = Sender::default();
        queue(&mut sender, &region, &frames);
        let mut events = VecDeque::new();
        let (out, spliced) = drain(&mut sender, &cuts, &mut events);
        prop_assert!(out == model);
        prop_assert_eq!(events, expected);
        let long: u64 = frames.iter().map(|frame| match frame {
            Frame::Long { len, .. } => *len,
            Frame::Short { .. } | Frame::Message(_) => 0,
        }).sum();
        prop_assert!(spliced as u64 >= long, "{} of {}", spliced, long);
    }
}

#[test]
fn what_a_file_does_not_give_is_copied() {
    // It ends where its mapping goes on.
    let short = File::from(memfd_create("short", MemfdFlags::CLOEXEC).unwrap());
    short.set_len(LEN / 2).unwrap();
    let region = Region::anonymous(LEN as usize)
        .unwrap()
        .sent_from(Arc::new(short));
    let mut sender = Sender::default();
    queue(
        &mut sender,
        &region,
        &[Frame::Long {
            offset: LEN / 2,
            len: LEN / 2,
        }],
    );
    assert!(sender.is_long());
    let mut pipe = Pipe::new().unwrap();
    sender.splice(&mut pipe);
    let head = pipe.len();
    assert!(head > 0 && !sender.is_long(), "the header is all that went");
    sender.advance(head, &mut VecDeque::new());
    let mut gather = Gather::default();
    sender.gather_short(&mut gather);
    assert_eq!(gather.len() as u64, LEN / 2);
}

#[test]
fn a_full_pipe_takes_no_more() {
    let region = region();
    let mut pipe = Pipe::new().unwrap();
    let all = [Extent {
        offset: 0,
        len: LEN,
    }];
    pipe.push_region(&region, &all, 0, usize::MAX);
    let most = pipe.len();
    assert!(
        pipe.is_full() && most >= 1 << 20 && most < LEN as usize,
        "{most}"
    );
    pipe.push_bytes(Bytes::from_static(b"more"));
    pipe.push_region(&region, &all, 0, usize::MAX);
    assert_eq!(pipe.len(), most);
    let mut bytes = vec![0; most];
    let mut got = 0;
    while got < most {
        got += read(&pipe.read, &mut bytes[got..]).unwrap();
    }
    let end = read(&pipe.read, &mut [0; 1]).map_err(|errno| errno.kind());
    assert_eq!(end, Err(ErrorKind::WouldBlock));
    let mut expected = vec![0; most];
    region.copy_out(0, &mut expected);
    assert!(bytes == expected);
}
