//! What the engines ask for, as the world does it: QEMU, the disks and the network take their time, and answer.

use std::time::Duration;

use bytes::Bytes;
use pagecopy::engine::destination::{self, Destination};
use pagecopy::engine::event::Report;
use pagecopy::engine::journal::{self, Outcome, Postcopy, Record};
use pagecopy::engine::source::{self, Populated, Pushed};
use pagecopy::engine::{ChannelId, Failure, Fault, MigrationId, Time};
use pagecopy::limits::DIGEST_CHUNK;
use pagecopy::memory::{BlockId, Run};
use pagecopy::wire::{Message, Standing};

use super::{Event, ID, LATENCY, PAGE, Pair, WORK};

impl Pair {
    /// Every message crosses as bytes.
    fn crossing(message: &Message) -> Message {
        Message::decode(&message.encode()).unwrap()
    }

    pub(super) fn source_output(&mut self, output: source::Output) {
        use source::{Input, Output};
        match output {
            Output::Send(Message::Query { id }) if self.link => self.answer_query(id),
            Output::Send(Message::Serve { id }) if self.link => {
                assert_eq!(id, ID);
                self.serve();
            }
            Output::OpenReads => self.moved.open = true,
            Output::ConnectAll => self.after(WORK, Event::ReconnectAll),
            Output::Detach => self.moved.open = false,
            Output::Send(message) if self.link => {
                let message = Pair::crossing(&message);
                self.after(
                    LATENCY,
                    Event::ToDestination(destination::Input::Message(message)),
                );
            }
            Output::SendOn(channel, Message::Barrier { round }) if self.link => {
                let at = self.lane(channel);
                let at = self.arrival(channel, at);
                let barrier = destination::Input::Barrier {
                    channel,
                    round,
                    zero_bytes: 0,
                };
                self.at(at, Event::ToDestination(barrier));
            }
            Output::SendOn(channel, Message::Leave { round }) => self.leave(channel, round),
            Output::Push { channel, batch } => self.push(channel, &batch),
            Output::OpenChannels { first, channels } => self.open_channels(first, channels),
            Output::UseChannels { first } => self.channels.used(first),
            Output::CloseChannels { first } => self.channels.closed(first),
            Output::Attach => {
                let populated = self.populated();
                self.dirty.clear();
                let attached = Input::Attached {
                    stopped: Duration::from_micros(300),
                    populated,
                };
                self.after(WORK, Event::ToSource(attached));
            }
            Output::Scan { holes } => {
                let dirty = std::mem::take(&mut self.dirty)
                    .into_iter()
                    .map(run)
                    .collect();
                let populated = if holes {
                    Populated::Runs(self.populated())
                } else {
                    Populated::NotAsked
                };
                let scanned = Input::Scanned {
                    dirty,
                    populated,
                    took: WORK,
                };
                self.after(WORK, Event::ToSource(scanned));
            }
            Output::DrainIo => self.after(WORK, Event::ToSource(Input::IoDrained)),
            Output::LookAgain => self.after(WORK, Event::ToSource(Input::Unchanged)),
            Output::StopGuest => self.after(WORK, Event::ToSource(Input::GuestStopped)),
            Output::SaveDeviceState => {
                self.after(
                    WORK,
                    Event::ToSource(Input::DeviceState(Bytes::from(vec![5; 300_000]))),
                );
                self.after(WORK, Event::ToSource(Input::DeviceStateSaved));
            }
            Output::Digest => {
                let digests = vec![digests(&self.source_pages)];
                self.after(WORK, Event::ToSource(Input::Digests(digests)));
            }
            Output::PageDigests { block, chunk } => {
                let digests = page_digests(&self.source_pages, chunk);
                self.after(
                    WORK,
                    Event::ToSource(Input::PageDigests {
                        block,
                        chunk,
                        digests,
                    }),
                );
            }
            Output::Journal(record) => self.after(WORK, Event::ToSource(Input::Journaled(record))),
            Output::ResumeGuest => {
                // QEMU does one thing after the other.
                self.queue
                    .retain(|_, event| !matches!(event, Event::ToSource(Input::GuestStopped)));
                self.after(WORK, Event::ToSource(Input::GuestResumed));
            }
            Output::Connect => self.after(WORK, Event::Reconnect),
            Output::Report(Report::Notice { text }) => self.notices.push(text),
            Output::Report(Report::Round { .. }) => self.rounds += 1,
            Output::Decided(result) => self.decided.push(result),
            Output::Finished(finished) => self.finished.push(finished),
            Output::Throttle { percent } => self.throttled.push(percent),
            Output::Send(_) | Output::SendOn(..) | Output::QuitGuest | Output::Report(_) => {}
        }
    }

    /// What the destination's daemon does with a `Query`.
    pub(super) fn answer_query(&mut self, id: MigrationId) {
        assert_eq!(id, ID);
        if self.destination.is_some() && self.destination_finished.is_none() {
            let lost = Failure::new(Fault::Network, "the source has made a new connection", "");
            self.tell_destination(destination::Input::LinkLost(lost));
        }
        let records = journal::decode(&self.destination_journal).unwrap().records;
        let served = self.destination.is_some() && self.destination_finished.is_none();
        let standing = match journal::standing_for(Some(&records)) {
            Standing::Unknown if journal::outcome(&records) == Outcome::Open && !served => {
                self.destination_journal
                    .extend(journal::encode(&Record::Aborted));
                Standing::Aborted
            }
            Standing::Committed if !served => {
                let armed = journal::postcopy(&records) == Postcopy::Open;
                let setup = self.arriving.clone();
                self.destination = Some(Destination::recover(setup, armed, self.now));
                self.stop_pulling();
                self.destination_finished = None;
                Standing::Committed
            }
            standing => standing,
        };
        let answer = Message::Answer { id, standing };
        self.after(LATENCY, Event::ToSource(source::Input::Message(answer)));
    }

    /// 1 GB/s a channel; the content is that of the moment of reading.
    fn push(&mut self, channel: ChannelId, batch: &source::Batch) {
        let pages: Vec<usize> = batch
            .runs
            .iter()
            .flat_map(|run| run.first..run.end())
            .map(|p| usize::try_from(p).unwrap())
            .collect();
        let mut content: Vec<(usize, u64)> = pages
            .iter()
            .map(|page| (*page, self.source_pages[*page]))
            .collect();
        let zero = content.iter().filter(|(_, content)| *content == 0).count() as u64 * PAGE;
        let raw = pages.len() as u64 * PAGE - zero;
        if let Some(spoiled) = content
            .iter_mut()
            .find(|(page, _)| Some(*page) == self.spoil)
        {
            spoiled.1 ^= 1 << 40;
        }
        let took = Duration::from_nanos(raw * self.byte_ns);
        let done = self.lane(channel).after(took);
        self.lanes.insert(channel, done);
        let pushed = Pushed {
            raw_bytes: raw,
            zero_bytes: zero,
            ..Pushed::default()
        };
        self.at(
            done,
            Event::ToSource(source::Input::Pushed {
                channel,
                batch: batch.id,
                pushed,
            }),
        );
        if self.link {
            let at = self.arrival(channel, done);
            self.at(at, Event::Land(channel, content));
        }
    }

    pub(super) fn lane(&mut self, channel: ChannelId) -> Time {
        self.channels.check_used(channel);
        let busy = self.lanes.get(&channel).copied();
        busy.unwrap_or_default().max(self.now)
    }

    pub(super) fn destination_output(&mut self, output: destination::Output) {
        use destination::{Input, Output};
        let answer = match output {
            Output::Send(message) => {
                if self.link {
                    let message = Pair::crossing(&message);
                    self.after(LATENCY, Event::ToSource(source::Input::Message(message)));
                }
                return;
            }
            Output::Journal(record) => Input::Journaled(record),
            Output::Prepare { .. } => Input::Prepared,
            Output::Digest => Input::Digests(vec![digests(&self.destination_pages)]),
            Output::PageDigests { block, chunk } => Input::PageDigests {
                block,
                chunk,
                digests: page_digests(&self.destination_pages, chunk),
            },
            Output::LoadDeviceState => Input::DeviceStateLoaded,
            Output::RunGuest => Input::GuestRunning,
            Output::Finished { state, failure, .. } => {
                self.stop_pulling();
                self.destination_finished = Some((state, failure));
                return;
            }
            Output::Report(Report::Notice { text }) => {
                self.notices.push(text);
                return;
            }
            Output::TakeChannels {
                first,
                channels,
                key,
                ..
            } => Input::ChannelsTaken {
                first,
                refused: self.channels.take(first, channels, key),
            },
            Output::Arm { lacking, .. } => return self.arm(lacking),
            Output::Pull => return self.pull(),
            Output::StopPulling => return self.stop_pulling(),
            Output::Poison => return self.poison(),
            Output::Decided(result) => return self.decided.push(result),
            Output::Allocate(_) | Output::KeepDeviceState(_) | Output::Report(_) => return,
        };
        self.after(WORK, Event::ToDestination(answer));
    }

    fn populated(&self) -> Vec<Run> {
        let held = self
            .source_pages
            .iter()
            .enumerate()
            .filter(|(_, content)| **content != 0);
        held.map(|(page, _)| run(page)).collect()
    }
}

fn run(page: usize) -> Run {
    Run {
        block: BlockId(0),
        first: page as u64,
        pages: 1,
    }
}

fn digest(pages: &[u64]) -> [u8; 16] {
    let sum = pages.iter().fold(7u128, |sum, page| {
        sum.wrapping_mul(0x1_0000_0000_01b3) ^ u128::from(*page)
    });
    sum.to_le_bytes()
}

fn digests(pages: &[u64]) -> Vec<[u8; 16]> {
    pages
        .chunks(usize::try_from(DIGEST_CHUNK / PAGE).unwrap())
        .map(digest)
        .collect()
}

fn page_digests(pages: &[u64], chunk: u64) -> Vec<[u8; 16]> {
    let per_chunk = usize::try_from(DIGEST_CHUNK / PAGE).unwrap();
    let start = usize::try_from(chunk).unwrap() * per_chunk;
    pages[start..]
        .iter()
        .take(per_chunk)
        .map(|page| digest(&[*page]))
        .collect()
}
