//! Peers that only look, and do not keep to the protocol either: as the one that asks, and as the one that is asked.

use super::*;

fn question(vm: &str) -> Message {
    Message::Preflight {
        vm: vm.to_owned(),
        host: "mallory".to_owned(),
        ram: MIB << 20,
    }
}

fn is_findings(message: &Message) -> bool {
    matches!(message, Message::Findings { .. })
}

type Attack = fn(&mut HostileSource) -> Result<(), transport::Error>;

/// What one that looks may not do after it was told, and a word of what it hears.
const OFFENCES: [(&str, Attack, &str); 8] = [
    (
        "the question again",
        |s| s.say(0, &question("vm")),
        "Preflight",
    ),
    ("Hello behind it", |s| s.say(0, &hello("vm", MIB)), "Hello"),
    ("Commit", |s| s.say(0, &Message::Commit), "Commit"),
    (
        "a round that is not the next",
        |s| s.say(1, &Message::Barrier { round: 1 }),
        "Barrier",
    ),
    (
        "a round too many",
        |s| (0..=64).try_for_each(|round| s.say(1, &Message::Barrier { round })),
        "Barrier",
    ),
    (
        "words on a data channel",
        |s| s.say(1, &Message::Loaded),
        "data channel",
    ),
    (
        "a write into a guest's memory",
        |s| s.write(1, 0, 0, 4096),
        "",
    ),
    (
        "a write past the end",
        |s| s.write(1, 64, (16 << 20) - 1, 4096),
        "",
    ),
];

/// None of them begins anything, and whoever waits there still takes its guest.
#[test]
fn one_that_looks_and_does_more() {
    let (world, mallory, _) = world();
    let mut source = world.guest("source", &machine());
    let mut destination = world.waiting("destination", &machine());
    world
        .cli(Side::B)
        .receive("vm", destination.socket())
        .unwrap();
    let daemon = world.daemon(Side::B).pid();
    let before = Levels::of(daemon);
    let watch = Watch::over(daemon);
    for (what, attack, word) in OFFENCES {
        let mut peer = mallory.dial(&world.net, Side::B, 2, 0..2).unwrap();
        let told = peer.ask(&question("vm"), is_findings);
        let Message::Findings { facts } = told else {
            unreachable!()
        };
        assert!(facts.contains("pc-q35-10.0"), "{facts}");
        let _ = attack(&mut peer);
        peer.assert_blamed(what, &[word]);
        assert_api_answers(&world, Side::B);
    }
    // One that is about to begin says nothing but Hello.
    let begins = Message::Compare {
        vm: "vm".to_owned(),
        force: true,
    };
    for next in [begins.clone(), Message::Commit, Message::Ping { nonce: 1 }] {
        let mut peer = mallory.dial(&world.net, Side::B, 2, 0..2).unwrap();
        peer.ask(&begins, is_findings);
        peer.say(0, &next).unwrap();
        peer.assert_blamed(next.name(), &[next.name(), "Hello"]);
    }
    // More at a time than are served.
    let mut peers: Vec<_> = (0..4)
        .map(|_| mallory.dial(&world.net, Side::B, 1, 0..1).unwrap())
        .collect();
    let first = peers[0].ask(&question("vm"), |_| true);
    let second = peers[1].ask(&question("nobody"), |_| true);
    assert!(
        is_findings(&first) && is_findings(&second),
        "{first:?} {second:?}"
    );
    peers[2].say(0, &question("vm")).unwrap();
    match peers[2].end(PATIENCE) {
        Ended::Aborted(AbortCode::Busy, reason) => {
            assert!(reason.contains("try again"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    // Those that stay are ended when their time is over.
    match peers[0].end(PATIENCE) {
        Ended::Aborted(AbortCode::TimedOut, reason) => {
            assert!(reason.contains("too long"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    drop(peers);
    let most = watch.most();
    println!("{before} before, {most} at most");
    assert!(
        most.memory_kib <= before.memory_kib + (64 << 10),
        "{before} before, {most} at most"
    );
    println!("{} after", wait_level(daemon, before, 32 << 10));
    honest_migration(&world, &mut source, &mut destination);
}

/// It ends the connection for a question that it does not know, as any daemon does: the guest comes all the same, and people hear what
/// was left out. Another answer that is none ends the migration before it has begun.
#[test]
fn one_that_does_not_know_the_comparison() {
    let (world, _, mallory) = world();
    let mut source = world.guest("source", &machine());
    let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);
    peer.forget_compare();
    let (to, begun) = (peer.address(), Instant::now());
    let cli = world.cli(Side::A);
    let migrate = || cli.migrate_socket("vm", source.socket(), &to, &["--channels", "2"]);
    let asked = |message: &Message| matches!(message, Message::Compare { force: false, .. });
    let abort = |code, reason: &str| Message::Abort {
        code,
        reason: reason.to_owned(),
    };

    let migration = migrate();
    peer.accept();
    peer.honest_until(Conduct::Confirms, asked);
    peer.say(0, &abort(AbortCode::Protocol, "unknown type 41"))
        .unwrap();
    peer.flush();
    peer.accept();
    peer.honest_until(Conduct::Confirms, |message| {
        matches!(message, Message::Hello { .. })
    });
    peer.say(0, &abort(AbortCode::Host, "no room today"))
        .unwrap();
    peer.flush();
    let outcome = migration.finish();
    outcome.failed_with(&["no room today"]);
    let notices = outcome.events.iter().filter(|it| it["event"] == "notice");
    let texts: Vec<_> = notices.map(|it| it["text"].to_string()).collect();
    assert!(
        texts.len() == 1 && texts[0].contains("were not compared"),
        "{texts:?}"
    );

    let migration = migrate();
    peer.accept();
    peer.honest_until(Conduct::Confirms, asked);
    peer.say(0, &accept()).unwrap();
    peer.flush();
    let outcome = migration.finish();
    outcome.failed_with(&["Accept came"]);
    assert_eq!(outcome.finished()["fault"], "peer-host");
    assert_stayed(&mut source, None, begun);
}

type Lie = fn(&mut HostileDestination) -> Result<(), transport::Error>;

fn findings(facts: &str) -> Message {
    let facts = facts.to_owned();
    Message::Findings { facts }
}

/// What one that is asked may say, and a word of what the operator is told.
const LIES: [(&str, Lie, &str); 9] = [
    ("garbage", |d| d.raw(0, vec![0xa5; 300]), "type"),
    ("no JSON", |d| d.say(0, &findings("{]")), "findings"),
    (
        "a terminal's commands",
        |d| d.say(0, &findings(r#"{"lines":[{"found":"\u001b]0;x"}]}"#)),
        "control characters",
    ),
    (
        "another shape",
        |d| d.say(0, &findings(r#"{"qemu":{"cpus":"many"}}"#)),
        "findings",
    ),
    ("Accept", |d| d.say(0, &accept()), "Accept"),
    (
        "no such word",
        |d| {
            d.say(
                0,
                &Message::Abort {
                    code: AbortCode::Protocol,
                    reason: "unknown".to_owned(),
                },
            )
        },
        "unknown",
    ),
    (
        "another's pong",
        |d| {
            d.say(0, &findings("{}"))?;
            d.say(0, &Message::Pong { nonce: 77 })
        },
        "Pong",
    ),
    (
        "rounds that never are over",
        |d| {
            d.say(0, &findings("{}"))?;
            (0..5).try_for_each(|nonce| d.say(0, &Message::Pong { nonce }))
        },
        "in time",
    ),
    (
        "the connection, closed",
        |d| {
            d.hang_up();
            Ok(())
        },
        "",
    ),
];

fn accept() -> Message {
    Message::Accept {
        version: 1,
        capabilities: 1,
        host: "mallory".to_owned(),
        reason: String::new(),
    }
}

/// Whatever the one that is asked says is a line of the report, and the guest is none the worse.
#[test]
fn one_that_is_asked_and_lies() {
    let (world, _, mallory) = world();
    let mut source = world.guest("source", &machine());
    let mut peer = HostileDestination::listen(&mallory, &world.net, Side::B, MIB);
    let to = peer.address();
    let qmp = source.socket().to_str().unwrap().to_owned();
    let begun = Instant::now();
    for (what, lie, word) in LIES {
        let cli = world.cli(Side::A);
        let words = [
            "preflight",
            "--vm",
            "vm",
            "--qmp",
            &qmp,
            "--to",
            &to,
            "--json",
        ];
        let output = std::thread::scope(|scope| {
            let asks = scope.spawn(|| cli.run(&words));
            peer.accept();
            let _ = lie(&mut peer);
            peer.flush();
            asks.join().unwrap()
        });
        assert_eq!(output.status.code(), Some(1), "{what}");
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        let lines = said["lines"].as_array().unwrap();
        let line = lines.iter().find(|line| line["verdict"] == "fail").unwrap();
        assert_eq!(line["check"], "network", "{what}: {line}");
        assert!(
            line["found"].as_str().unwrap().contains(word),
            "{what}: {line}"
        );
        assert!(
            !line["remedy"].as_str().unwrap().is_empty(),
            "{what}: {line}"
        );
        peer.hang_up();
    }
    assert_stayed(&mut source, None, begun);
}
