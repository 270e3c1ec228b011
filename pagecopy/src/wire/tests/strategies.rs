//! Any message, for tests that hold for each.

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9äß ._-]{1,100}"
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    let run = (0u16..64, 0u64..1 << 33, 1u64..1 << 33);
    vec(
        run.prop_map(|(block, first, pages)| Run {
            block: BlockId(block),
            first,
            pages,
        }),
        1..=limits::MAX_RUNS,
    )
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    vec((0u64..9, 1u64..5), 1..13).prop_map(|list| {
        let mut end = 0;
        let place = |(gap, units): (u64, u64)| {
            let piece = Piece {
                offset: end + gap * 4096,
                len: units * 4096,
            };
            end = piece.offset + piece.len;
            piece
        };
        list.into_iter().map(place).collect()
    })
}

fn encoded() -> impl Strategy<Value = Message> {
    (
        any::<(u16, Option<u32>, bool)>(),
        pieces(),
        vec(any::<u8>(), 1..500),
    )
        .prop_map(|((block, base, zstd), pieces, bytes)| {
            let bytes = bytes.into();
            match base {
                Some(base_round) => Message::Deltas {
                    block,
                    base_round,
                    pieces,
                    bytes,
                },
                None => Message::Copied {
                    block,
                    zstd,
                    pieces,
                    bytes,
                },
            }
        })
}

fn block_list() -> impl Strategy<Value = Vec<BlockSpec>> {
    vec((12u32..=21, 1u64..1 << 20), 1..=limits::MAX_BLOCKS).prop_map(|list| {
        let spec = |(index, (bits, pages)): (usize, (u32, u64))| BlockSpec {
            name: format!("ram{index}"),
            size: pages << bits,
            page_size: 1 << bits,
        };
        list.into_iter().enumerate().map(spec).collect()
    })
}

fn digests() -> impl Strategy<Value = Vec<[u8; 16]>> {
    vec(any::<[u8; 16]>(), 1..64)
}

fn hello() -> impl Strategy<Value = Message> {
    (
        any::<(u16, u16, u64, [u8; 16], bool)>(),
        name(),
        name(),
        block_list(),
    )
        .prop_map(
            |((version_min, version_max, capabilities, id, verify), vm, host, blocks)| {
                Message::Hello {
                    version_min,
                    version_max,
                    capabilities,
                    id: MigrationId(id),
                    vm,
                    host,
                    verify,
                    blocks,
                }
            },
        )
}

fn spawn() -> impl Strategy<Value = Message> {
    let part = (0..PartKind::ALL.len(), name(), "[a-z/ß]{0,50}");
    let part = part.prop_map(|(kind, name, what)| Part {
        kind: PartKind::ALL[kind],
        name,
        what,
    });
    (
        any::<[u8; 16]>(),
        name(),
        vec("[a-z,=/-]{0,50}", 1..40),
        vec(part, 0..20),
    )
        .prop_map(|(id, vm, arguments, parts)| Message::Spawn {
            id: MigrationId(id),
            host: vm.clone(),
            vm,
            arguments,
            parts,
        })
}

pub(super) fn with_payload() -> impl Strategy<Value = Message> {
    prop_oneof![
        hello(),
        encoded(),
        spawn(),
        (any::<[u8; 16]>(), 0..Blame::ALL.len(), name()).prop_map(|(id, blame, text)| {
            Message::Spawned {
                id: MigrationId(id),
                blame: Blame::ALL[blame],
                remedy: text.clone(),
                text,
            }
        }),
        (any::<u16>(), any::<u64>(), name(), "[a-zß]{0,50}").prop_map(
            |(version, capabilities, host, reason)| Message::Accept {
                version,
                capabilities,
                host,
                reason,
            }
        ),
        runs().prop_map(Message::Populate),
        runs().prop_map(Message::Zero),
        vec(any::<u8>(), 1..2000).prop_map(|bytes| Message::DeviceState(bytes.into())),
        (any::<u16>(), any::<u64>(), digests()).prop_map(|(block, first, digests)| {
            Message::Digests {
                block,
                first,
                digests,
            }
        }),
        (any::<u16>(), any::<u64>(), digests()).prop_map(|(block, chunk, digests)| {
            Message::PageDigests {
                block,
                chunk,
                digests,
            }
        }),
        (0..AbortCode::ALL.len(), name()).prop_map(|(code, reason)| Message::Abort {
            code: AbortCode::ALL[code],
            reason
        }),
        (any::<[u8; 16]>(), name()).prop_map(|(id, reason)| Message::Lost {
            id: MigrationId(id),
            reason
        }),
        (
            "[0-9.:]{0,20}",
            any::<[u8; 16]>(),
            any::<[u8; 16]>(),
            "[a-zß]{0,50}"
        )
            .prop_map(|(address, a, b, reason)| Message::RdmaAnswer {
                address,
                secret: Secret(std::array::from_fn(|at| if at < 16 {
                    a[at]
                } else {
                    b[at - 16]
                })),
                reason,
            }),
        (any::<u16>(), any::<u64>())
            .prop_map(|(channels, bytes)| Message::RdmaOffer { channels, bytes }),
        any::<u64>().prop_map(|received| Message::RdmaBroken { received }),
        (any::<[u8; 16]>(), any::<u16>(), any::<[u8; 16]>()).prop_map(|(id, first, key)| {
            Message::Join {
                id: MigrationId(id),
                first,
                key: twice(key),
            }
        }),
        (any::<u16>(), any::<u16>(), any::<[u8; 16]>()).prop_map(|(first, channels, key)| {
            Message::AddChannels {
                first,
                channels,
                key: twice(key),
            }
        }),
        (any::<u16>(), any::<bool>(), "[a-zß]{0,50}").prop_map(|(first, taken, reason)| {
            Message::ChannelsTaken {
                first,
                taken,
                reason,
            }
        }),
        any::<u32>().prop_map(|round| Message::Leave { round }),
        Just(Message::RdmaBack),
        any::<bool>().prop_map(|taken| Message::RdmaTaken { taken }),
        (any::<[u8; 16]>(), 0..Standing::ALL.len()).prop_map(|(id, s)| Message::Answer {
            id: MigrationId(id),
            standing: Standing::ALL[s]
        }),
        (name(), name(), any::<u64>()).prop_map(|(vm, host, ram)| Message::Preflight {
            vm,
            host,
            ram
        }),
        (name(), any::<bool>()).prop_map(|(vm, force)| Message::Compare { vm, force }),
        "[{}a-zß]{2,200}".prop_map(|facts| Message::Findings { facts }),
        any::<[u8; 16]>().prop_map(|id| Message::Withdrawn {
            id: MigrationId(id)
        }),
        (any::<u16>(), any::<u64>(), vec(any::<u64>(), 1..64)).prop_map(|(block, first, words)| {
            Message::Lacking {
                block,
                first,
                words,
            }
        }),
    ]
}

fn twice(key: [u8; 16]) -> Secret {
    Secret(std::array::from_fn(|at| key[at % 16]))
}

fn in_order(faults: u64, b: u32, c: u16) -> FaultFigures {
    let (b, c) = (u64::from(b), u64::from(c));
    let most = if faults == 0 { 0 } else { limits::MAX_TIME_US };
    let [p50, p99, p999, max] =
        [c, c + b, c + b, (c + b) << 20].map(|figure: u64| figure.min(most));
    FaultFigures {
        faults,
        faults_waiting: c,
        fault_us: Quantiles {
            p50,
            p99,
            p999,
            max,
        },
    }
}

pub(super) fn of_numbers() -> impl Strategy<Value = Message> {
    (
        0..17,
        any::<u64>(),
        any::<u32>(),
        any::<u16>(),
        any::<[u8; 16]>(),
    )
        .prop_map(|(which, a, b, c, id)| match which {
            0 => Message::Barrier { round: b },
            1 => Message::BarrierReached { round: b },
            2 => Message::Ping { nonce: a },
            3 => Message::Pong { nonce: a },
            4 => Message::Stopped { final_round: b },
            5 => Message::DeviceStateEnd { bytes: a, crc: b },
            6 => Message::ChunkDiffers { block: c, chunk: a },
            7 => Message::Loaded,
            8 => Message::Commit,
            9 => Message::Running,
            10 => Message::Closed,
            11 => Message::LackingEnd {
                pages: a,
                background: b.into(),
                sent: c.into(),
            },
            12 => Message::Serve {
                id: MigrationId(id),
            },
            13 => Message::Resumed,
            14 => Message::Lacks {
                bytes: a,
                faults: in_order(a, b, c),
            },
            15 => Message::Whole {
                id: MigrationId(id),
                cost: (c % 3 > 0).then(|| PostcopyCost {
                    faults: in_order(a, b, c),
                    postcopy_us: u64::from(b),
                    paused_us: u64::from(b.min(c.into())),
                }),
            },
            _ => Message::Query {
                id: MigrationId(id),
            },
        })
}
