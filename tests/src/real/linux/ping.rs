//! A train of pings, one every 10 ms, and the gaps in its answers.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrV4, SocketType, ipproto};

use super::switch::{GUEST, Switch};

const PACE: Duration = Duration::from_millis(10);
/// What tells our pings from others.
const OURS: [u8; 2] = *b"pc";

/// A train under way.
#[derive(Debug)]
pub struct Ping {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Pinged>,
}

/// What came of a train.
#[derive(Clone, Copy, Debug)]
pub struct Pinged {
    /// Pings that were sent.
    pub sent: u32,
    /// Answers that came.
    pub answered: u32,
    /// The longest time between two answers.
    pub longest_gap: Duration,
}

impl Ping {
    /// Begins to ping the guest from the switch.
    pub fn start(switch: &Switch) -> Ping {
        let socket = switch.within(|| {
            rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))
                .expect("root may ping")
        });
        rustix::net::connect(&socket, &SocketAddrV4::new(GUEST, 0)).expect("the guest's address");
        let end = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&end);
        Ping {
            end,
            thread: std::thread::spawn(move || train(&socket, &until)),
        }
    }

    /// Ends the train.
    pub fn stop(self) -> Pinged {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().expect("the train does not panic")
    }
}

fn train(socket: &OwnedFd, end: &AtomicBool) -> Pinged {
    let mut pinged = Pinged {
        sent: 0,
        answered: 0,
        longest_gap: Duration::ZERO,
    };
    let mut last: Option<Instant> = None;
    let mut next = Instant::now();
    while !end.load(Ordering::Relaxed) {
        // A full queue or a guest that is nowhere: a ping that is lost.
        let _ = rustix::net::send(socket, &echo(pinged.sent), SendFlags::DONTWAIT);
        pinged.sent += 1;
        next = (next + PACE).max(Instant::now());
        while wait(socket, next) {
            if !take_answer(socket) {
                continue;
            }
            let now = Instant::now();
            pinged.answered += 1;
            let gap = last.map_or(Duration::ZERO, |last| now - last);
            pinged.longest_gap = pinged.longest_gap.max(gap);
            last = Some(now);
        }
    }
    pinged
}

/// Waits for something to read; false at `until`.
fn wait(socket: &OwnedFd, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).expect("a short time");
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)).unwrap_or(0) > 0
}

/// Whether what there is to read is an answer to one of ours.
fn take_answer(socket: &OwnedFd) -> bool {
    let mut bytes = [0_u8; 256];
    let got = rustix::net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT);
    let Ok((length, _)) = got else {
        return false;
    };
    // The header of IP, of so many words, comes along.
    let header = usize::from(bytes[0] & 15) * 4;
    length >= header + 8 && bytes[header] == 0 && bytes[header + 4..header + 6] == OURS
}

/// A request for an echo: type 8, code 0, checksum, identifier, sequence.
fn echo(sequence: u32) -> [u8; 8] {
    let [_, _, high, low] = sequence.to_be_bytes();
    let mut bytes = [8, 0, 0, 0, OURS[0], OURS[1], high, low];
    let words = bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let [_, _, high, low] = (!folded).to_be_bytes();
    (bytes[2], bytes[3]) = (high, low);
    bytes
}
