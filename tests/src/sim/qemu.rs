//! The simulated QEMU of either side: states as real ones go through, with seeded delays and failures.
//!
//! A QEMU is a process of its own: it outlives its daemon, goes on with what it was asked for, and decides by itself
//! when the daemon's end of a stream goes away. The drivers ask; [`Source`] and [`Destination`] only hold the state and
//! say what follows, so that every illegal request is seen.

/// The source's QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceState {
    /// The guest runs.
    Running,
    /// `migrate` was given: the virtual processors stand, disk I/O in flight is waited for.
    Stopping,
    /// The guest's RAM is final, until told to go on or back.
    PreSwitchover,
    /// The device state is being written.
    Saving,
    /// The device state is out.
    PostMigrate,
    /// The guest stands after a failure.
    Stopped,
    /// The process has ended.
    Gone,
}

/// The source's QEMU, with the number of the command that it is busy with.
#[derive(Debug)]
pub(super) struct Source {
    /// Where it stands.
    pub(super) state: SourceState,
    /// Steps of earlier commands do not count.
    pub(super) command: u32,
    /// How often the guest was stopped: tells the stops, and their device states, apart.
    pub(super) stops: u32,
}

impl Source {
    /// A running guest.
    pub(super) fn new() -> Source {
        Source {
            state: SourceState::Running,
            command: 0,
            stops: 0,
        }
    }

    /// Goes to `state`; steps under way of the command before are void. Returns the command's number.
    pub(super) fn enter(&mut self, state: SourceState) -> u32 {
        self.state = state;
        self.command += 1;
        self.command
    }

    /// Whether the guest runs.
    pub(super) fn running(&self) -> bool {
        self.state == SourceState::Running
    }
}

/// The destination's QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DestinationState {
    /// Waits for a guest.
    InMigrate,
    /// Reads the device state.
    Loading,
    /// Has loaded it; the guest stands.
    Paused,
    /// The guest runs.
    Running,
    /// The process has ended.
    Gone,
}

/// The destination's QEMU, with the number of the command that it is busy with.
#[derive(Debug)]
pub(super) struct Destination {
    /// Where it stands.
    pub(super) state: DestinationState,
    /// Steps of earlier commands do not count.
    pub(super) command: u32,
}

impl Destination {
    /// Waiting.
    pub(super) fn new() -> Destination {
        Destination {
            state: DestinationState::InMigrate,
            command: 0,
        }
    }

    /// Goes to `state`; steps under way of the command before are void. Returns the command's number.
    pub(super) fn enter(&mut self, state: DestinationState) -> u32 {
        self.state = state;
        self.command += 1;
        self.command
    }
}

/// The device state of a guest: says which stop it is of and what the guest's RAM was then, and fills the rest.
pub(super) fn device_state(stop: u32, ram: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 12);
    bytes.extend_from_slice(&ram.to_le_bytes());
    bytes.extend_from_slice(&stop.to_le_bytes());
    bytes.extend((0..len).map(|index| (index % 251).to_le_bytes()[0]));
    bytes
}

/// What a device state says of the RAM that belongs to it.
///
/// # Errors
/// The bytes are no device state, or not a whole one.
pub(super) fn ram_of(bytes: &[u8]) -> Result<u64, String> {
    let (head, rest) = bytes
        .split_at_checked(8)
        .ok_or("a device state of less than 8 bytes")?;
    let filler = rest.get(4..).ok_or("a device state without its stop")?;
    if let Some(index) =
        (0..filler.len()).find(|index| filler[*index] != (index % 251).to_le_bytes()[0])
    {
        return Err(format!("byte {} of the device state is wrong", index + 12));
    }
    let mut word = [0; 8];
    word.copy_from_slice(head);
    Ok(u64::from_le_bytes(word))
}
