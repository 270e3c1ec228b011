//! What the daemon and the starter say to each other: JSON in a file in memory, passed with other descriptors over a socket that
//! keeps what is sent apart.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pagecopy::engine::{Failure, Fault};
use rustix::fs::MemfdFlags;
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

use super::plan::Ask;

/// The largest text: a command line of 256 KiB, each byte of which JSON may write as six.
const MOST: u64 = 4 << 20;
/// Descriptors that come with a text, besides its own.
const WITH: usize = 2;

/// What the daemon asks of the starter.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// Comes back with the answer.
    pub(super) number: u64,
    pub(super) order: What,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum What {
    /// Start a QEMU; its monitor's socket and its log come with it.
    Start(Ask),
    /// End the QEMU that was started for that migration, if it runs, and remove its RAM files.
    End(Uuid),
    /// Remove the RAM files of a QEMU that has ended; one that runs is left alone.
    Tidy(Uuid),
}

/// What the starter answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) number: u64,
    pub(super) answer: Done,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Done {
    /// It runs; a descriptor of its process comes with it.
    Started(Started),
    /// Whether there was a process.
    Gone(bool),
    Refused {
        fault: Fault,
        what: String,
        remedy: String,
    },
}

/// A QEMU that was started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Started {
    /// Its process.
    pub pid: i32,
    /// What each path of the source is here.
    pub mapped: BTreeMap<String, String>,
    /// What was left out or changed that somebody may miss.
    pub notices: Vec<String>,
}

impl From<Failure> for Done {
    fn from(failure: Failure) -> Done {
        Done::Refused {
            fault: failure.fault,
            what: failure.what,
            remedy: failure.remedy,
        }
    }
}

/// Sends a text and descriptors.
pub(super) fn send(
    socket: impl AsFd,
    text: &impl Serialize,
    with: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let memory = rustix::fs::memfd_create("pagecopy", MemfdFlags::CLOEXEC)?;
    let mut memory = File::from(memory);
    serde_json::to_writer(&memory, text).map_err(io::Error::other)?;
    memory.flush()?;
    memory.rewind()?;
    let descriptors: Vec<BorrowedFd<'_>> = std::iter::once(memory.as_fd())
        .chain(with.iter().copied())
        .collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + WITH))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for the descriptors"));
    }
    let socket = socket.as_fd();
    retry_on_intr(|| {
        let byte = [IoSlice::new(b"!")];
        rustix::net::sendmsg(socket, &byte, &mut ancillary, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Takes a text and the descriptors with it; `None` when the other side has ended.
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + WITH))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    let socket = socket.as_fd();
    let got = retry_on_intr(|| {
        let mut byte = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(socket, &mut byte, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    if got.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let memory = descriptors
        .next()
        .ok_or_else(|| io::Error::other("no text came"))?;
    let mut text = Vec::new();
    let read = File::from(memory).take(MOST + 1).read_to_end(&mut text)?;
    if read as u64 > MOST {
        return Err(io::Error::other("the text is too long"));
    }
    let text = serde_json::from_slice(&text).map_err(io::Error::other)?;
    Ok(Some((text, descriptors.collect())))
}
