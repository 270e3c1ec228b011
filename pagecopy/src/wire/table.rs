//! The table of messages: number, name, fields and their codecs. `encode`, `decode` and `number` all come from it, and a
//! test holds it to the table in `WIRE.md`.

use bytes::Bytes;

use super::Message;
use super::codec::{Reader, WireError, Writer};
use super::fields::{
    Blocks, Chunk, Code, Codec, Digests, Encoded, Facts, Flag, Id, Key, Name, Pieces, Reason, Runs,
    Stand, Words,
};
use super::figures::{Cost, Faults};
use super::spawn::{Arguments, Blamed, Parts};

macro_rules! messages {
    ($($number:literal $name:ident
        $({ $($field:ident: $codec:ty),* $(,)? })?
        $(( $only:ident: $only_codec:ty ))?
    ;)*) => {
        /// Number and name of every message, in order.
        #[cfg(test)]
        pub(super) const TABLE: &[(u16, &str)] = &[$(($number, stringify!($name))),*];

        impl Message {
            /// The message's name, for people.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Message::$name { .. } => stringify!($name),)*
                }
            }

            /// The bytes of `WIRE.md`. A list above its limit is a bug of the caller's; a reason that is too long is cut.
            pub fn encode(&self) -> Bytes {
                let mut out = Writer::default();
                match self {
                    $(Message::$name $({ $($field),* })? $(($only))? => {
                        out.put(&u16::to_le_bytes($number));
                        $($(<$codec>::put($field, &mut out);)*)?
                        $(<$only_codec>::put($only, &mut out);)?
                    })*
                }
                out.finish().into()
            }

            /// Takes a message from its bytes.
            ///
            /// # Errors
            /// [`WireError`]: the peer broke the protocol.
            pub fn decode(bytes: &[u8]) -> Result<Message, WireError> {
                let mut input = Reader::new(bytes);
                let message = match u16::from_le_bytes(input.array("type")?) {
                    $($number => Message::$name
                        $({ $($field: <$codec>::get(stringify!($field), &mut input)?),* })?
                        $((<$only_codec>::get(stringify!($only), &mut input)?))?,
                    )*
                    unknown => return Err(WireError::UnknownType(unknown)),
                };
                input.end()?;
                Ok(message)
            }
        }
    };
}

messages! {
    1 Hello {
        version_min: u16,
        version_max: u16,
        capabilities: u64,
        id: Id,
        vm: Name,
        host: Name,
        verify: Flag,
        blocks: Blocks,
    };
    2 Accept { version: u16, capabilities: u64, host: Name, reason: Reason };
    3 Populate(runs: Runs);
    4 Zero(runs: Runs);
    5 Barrier { round: u32 };
    6 BarrierReached { round: u32 };
    7 Ping { nonce: u64 };
    8 Pong { nonce: u64 };
    9 Stopped { final_round: u32 };
    10 DeviceState(bytes: Chunk);
    11 DeviceStateEnd { bytes: u64, crc: u32 };
    12 Digests { block: u16, first: u64, digests: Digests };
    13 ChunkDiffers { block: u16, chunk: u64 };
    14 PageDigests { block: u16, chunk: u64, digests: Digests };
    15 Loaded;
    16 Commit;
    17 Running;
    18 Closed;
    19 Query { id: Id };
    20 Answer { id: Id, standing: Stand };
    21 Abort { code: Code, reason: Reason };
    22 Withdrawn { id: Id };
    23 Lacking { block: u16, first: u64, words: Words };
    24 LackingEnd { pages: u64, background: u64, sent: u64 };
    25 Serve { id: Id };
    26 Resumed;
    27 Lacks { bytes: u64, faults: Faults };
    28 Whole { id: Id, cost: Cost };
    29 Lost { id: Id, reason: Reason };
    30 Copied { block: u16, zstd: Flag, pieces: Pieces, bytes: Encoded };
    31 Deltas { block: u16, base_round: u32, pieces: Pieces, bytes: Encoded };
    32 RdmaOffer { channels: u16, bytes: u64 };
    33 RdmaAnswer { address: Reason, secret: Key, reason: Reason };
    34 Preflight { vm: Name, host: Name, ram: u64 };
    35 Findings { facts: Facts };
    36 Spawn { id: Id, vm: Name, host: Name, arguments: Arguments, parts: Parts };
    37 Spawned { id: Id, blame: Blamed, text: Reason, remedy: Reason };
    38 RdmaBroken { received: u64 };
    39 RdmaBack;
    40 RdmaTaken { taken: Flag };
    41 Compare { vm: Name, force: Flag };
    53 Join { id: Id, first: u16, key: Key };
    54 AddChannels { first: u16, channels: u16, key: Key };
    55 ChannelsTaken { first: u16, taken: Flag, reason: Reason };
    56 Leave { round: u32 };
}
