//! Every limit of what peers may take of this daemon: connections, threads, memory, time, lines of its log. The peer's
//! figures are checked against these and against those of the crates `transport` and `pagecopy`.

use std::time::Duration;

/// How long a peer may take to greet (TLS included).
pub const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Peers that may be greeting at a time; each costs a thread.
pub const MAX_GREETING: usize = 128;
/// Of these, from one address: a host that dials and says nothing does not keep the others out.
pub const MAX_GREETING_PER_ADDRESS: usize = 32;

/// How long the channels of a connection may take to be all there.
pub const GATHER_LIMIT: Duration = Duration::from_secs(10);
/// Connections that may be incomplete at a time.
pub const MAX_GATHERING: usize = 64;
/// Of these, of one peer (by the names of its certificate; without TLS, by its address).
pub const MAX_GATHERING_PER_PEER: usize = 16;
/// Channels that may wait in connections that are in no migration yet, all together; each costs three descriptors and its
/// buffers.
pub const MAX_GATHERED_CHANNELS: usize = 1024;
/// Of these, of one peer: three connections of the largest kind.
pub const MAX_GATHERED_CHANNELS_PER_PEER: usize = 200;

/// Connections whose data channels are being made over RDMA at a time; each keeps a thread waiting.
pub const MAX_GATHERING_RDMA: usize = 16;

/// Complete connections: those in a migration, those that have not said what they want, those that ask what became of a
/// migration, and those that are being closed.
pub const MAX_CONNECTIONS: usize = 256;
/// Of these, of one peer.
pub const MAX_CONNECTIONS_PER_PEER: usize = 128;
/// How long a peer may take to say what it wants.
pub const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// How long a source that was answered (what is here, or that a QEMU was started) may take to begin: its journal comes first, and
/// its disk may be slow.
pub const BEGIN_LIMIT: Duration = Duration::from_secs(30);
/// How long a source that asks may be silent between two questions. An honest one asks at least every 30 seconds.
pub const ASKING_PAUSE: Duration = Duration::from_secs(90);

/// How long data channels that have joined a migration are kept until the source asks for them.
pub const JOIN_LIMIT: Duration = Duration::from_secs(10);

/// How long a peer may look at this host, and fill the link for it.
pub const PREFLIGHT_LIMIT: Duration = Duration::from_secs(10);
/// Peers that may do so at a time; each asks a QEMU, and has 16 MiB to write to.
pub const MAX_PREFLIGHTS: usize = 8;
/// Of these, one peer.
pub const MAX_PREFLIGHTS_PER_PEER: usize = 2;
/// QEMUs that may be started at a time for guests that have not arrived.
pub const MAX_SPAWNING: u32 = 8;
/// How long such a QEMU may take until its monitor answers: it may allocate all of its memory first.
pub const SPAWN_LIMIT: Duration = Duration::from_secs(60);

/// What a lane has told its session and the session has not dealt with. At so many it takes nothing more from the peer,
/// until the session has caught up with half of them.
pub const MAX_BACKLOG: usize = 64;
/// Pings and queries of a peer that were not answered, or whose answers it has not taken. An honest peer pings once a
/// second.
pub const MAX_UNANSWERED: usize = 64;
/// How long a channel that is being closed may take to send what waits.
pub const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// How long a control channel that is being closed waits for the peer to take what was sent and close, too.
pub const LINGER: Duration = Duration::from_secs(2);
/// Runs of pages that wait to be allocated ahead. What does not fit is allocated when it arrives.
pub const MAX_ALLOCATING: usize = 64 << 10;

/// Bytes of memory that a client may ask for to keep versions of pages in.
pub const MAX_DELTA_CACHE: u64 = 16 << 30;

/// Events of a migration that are kept for late readers; the oldest notices go first.
pub const MAX_HISTORY: usize = 1000;
/// Lines of the log a second about peers that never got into a migration.
pub const MAX_LINES_A_SECOND: u32 = 10;

const _: () = assert!(
    MAX_GREETING_PER_ADDRESS < MAX_GREETING
        && MAX_GATHERING_PER_PEER < MAX_GATHERING
        && MAX_CONNECTIONS_PER_PEER < MAX_CONNECTIONS
        && MAX_PREFLIGHTS_PER_PEER < MAX_PREFLIGHTS,
    "no peer can take all of it"
);
const _: () = assert!(
    MAX_GATHERED_CHANNELS_PER_PEER >= 2 * (pagecopy::limits::MAX_DATA_CHANNELS as usize + 1),
    "a peer may make two of the largest connections at a time"
);
