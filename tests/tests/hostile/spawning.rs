//! Sources that are let in and ask for QEMUs: nothing is opened or executed that the policy does not name, and none of what was started
//! stays without its guest.

use std::fs;

use pagecopy::engine::MigrationId;
use pagecopy::wire::{Blame, Part, PartKind};
use tests::real::{SpawnAs, SpawnHost};

use super::*;

/// A host that starts QEMUs, and a peer that it lets in.
fn host() -> (World, Mallory, SpawnHost) {
    let scratch = Scratch::new();
    let certs = Certs::new(scratch.files(), "authority");
    let trusted = vec!["mallory".to_owned()];
    let [a, b] = ["a", "b"].map(|name| Trust::Tls(certs.identity(name), trusted.clone()));
    let mallory = Mallory::with(&certs.identity("mallory"), "b");
    let from = ("theirs", std::path::Path::new("/theirs"));
    let host = SpawnHost::new(&scratch, Side::B, from, Version::V10_0, SpawnAs::Root);
    (World::with(scratch, &a, &b), mallory, host)
}

fn id_of(hello: &Message) -> MigrationId {
    match hello {
        Message::Hello { id, .. } => *id,
        other => panic!("{other:?}"),
    }
}

/// What makes the guest of `hello` with these words more.
fn spawn(hello: &Message, more: &[&str]) -> Message {
    let Message::Hello { id, vm, .. } = hello else {
        panic!("{hello:?}");
    };
    let ram = format!("memory-backend-file,id=ram0,size={MIB}M,mem-path=/theirs/ram,share=on");
    let size = format!("{MIB}M");
    let words = [
        "qemu-system-x86_64",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "q35,memory-backend=ram0",
        "-m",
        &size,
        "-object",
        &ram,
    ];
    let part = |kind, name: &str, what: &str| Part {
        kind,
        name: name.to_owned(),
        what: what.to_owned(),
    };
    Message::Spawn {
        id: *id,
        vm: vm.clone(),
        host: "mallory".to_owned(),
        arguments: words
            .iter()
            .chain(more)
            .map(|&word| word.to_owned())
            .collect(),
        parts: vec![
            part(PartKind::Machine, "pc-q35-10.0", ""),
            part(PartKind::Object, "ram0", "memory-backend-file"),
        ],
    }
}

/// What the daemon answers to being asked.
fn answer(source: &mut HostileSource, ask: &Message) -> (Blame, String) {
    match source.ask(ask, |_| true) {
        Message::Spawned { blame, text, .. } => (blame, text),
        other => panic!("{other:?}"),
    }
}

/// A peer for which a QEMU waits.
fn with_qemu(world: &World, mallory: &Mallory, vm: &str) -> (HostileSource, Message) {
    let mut source = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
    let hello = hello(vm, MIB);
    let (blame, text) = answer(&mut source, &spawn(&hello, &[]));
    assert_eq!(blame, Blame::Nobody, "{text}");
    (source, hello)
}

#[test]
fn a_qemu_whose_source_does_not_keep_to_its_word_is_ended() {
    let (world, mallory, host) = host();
    let left = |what: &str| {
        println!("{what}");
        host.assert_nothing_left();
        assert_api_answers(&world, Side::B);
    };
    let (source, _) = with_qemu(&world, &mallory, "vm");
    drop(source);
    left("it leaves");
    let (mut source, _) = with_qemu(&world, &mallory, "vm");
    source.say(0, &hello("vm", MIB)).unwrap();
    source.assert_blamed("another migration's Hello", &["Hello"]);
    left("another migration's Hello");
    let (mut source, hello) = with_qemu(&world, &mallory, "vm");
    source.say(0, &spawn(&hello, &[])).unwrap();
    source.assert_blamed("asks once more", &["Spawn"]);
    left("asks once more");
    let (mut source, hello) = with_qemu(&world, &mallory, "vm");
    source.accepted(&hello);
    source.say(0, &Message::Commit).unwrap();
    source.assert_blamed("commits at once", &["Commit"]);
    left("commits at once");
    let (mut source, _) = with_qemu(&world, &mallory, "vm");
    match source.end(2 * PATIENCE) {
        Ended::Aborted(AbortCode::TimedOut, reason) => {
            assert!(reason.contains("did not begin"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    left("says nothing more");
}

#[test]
fn what_a_source_asks_for_is_neither_opened_nor_executed() {
    let (world, mallory, host) = host();
    let evil = world.scratch.files().join("evil");
    let evil = evil.to_str().unwrap();
    let file = format!("file,id=c,path={evil}");
    let pipe = format!("user,id=n,guestfwd=tcp:10.0.2.9:1-cmd:touch {evil}");
    let drive = format!("file={evil},if=none,id=d,format=raw");
    let climbing = format!("file={}/../../../etc/passwd,if=none,format=raw", "/theirs");
    for more in [
        ["-chardev", file.as_str()],
        ["-netdev", &pipe],
        ["-drive", &drive],
        ["-drive", &climbing],
        ["-drive", "file=/etc/passwd,if=none,id=d,format=raw"],
        ["-plugin", evil],
        ["-readconfig", evil],
        ["-netdev", "tap,id=n,script=/bin/sh"],
        ["-netdev", "bridge,id=n,helper=/bin/sh"],
        ["-chardev", "socket,id=c,host=0.0.0.0,port=7999,server=on"],
        ["-device", "vfio-pci,host=00:00.0"],
        [
            "-object",
            "memory-backend-file,id=x,size=1M,mem-path=/etc/x,share=on",
        ],
        ["/etc/passwd", "-S"],
    ] {
        let mut source = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
        let (blame, text) = answer(&mut source, &spawn(&hello("vm", MIB), &more));
        assert_eq!(blame, Blame::Request, "{more:?}: {text}");
        assert!(host.pids().is_empty(), "{more:?}");
    }
    // A program of its own, by the name of one that is allowed.
    let mut source = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
    let hello = hello("vm", MIB);
    let Message::Spawn {
        id,
        vm,
        host: from,
        mut arguments,
        parts,
    } = spawn(&hello, &[])
    else {
        unreachable!()
    };
    assert_eq!(id, id_of(&hello));
    arguments[0] = "/bin/sh".to_owned();
    let ask = Message::Spawn {
        id,
        vm,
        host: from,
        arguments,
        parts,
    };
    assert_eq!(answer(&mut source, &ask).0, Blame::Request);
    host.assert_nothing_left();
    assert!(!fs::exists(evil).unwrap());
}

#[test]
fn so_many_at_a_time_and_no_more() {
    let (world, mallory, host) = host();
    let mut sources: Vec<_> = (0..8)
        .map(|n| with_qemu(&world, &mallory, &format!("vm{n}")).0)
        .collect();
    let mut another = mallory.dial(&world.net, Side::B, 3, 0..3).unwrap();
    let (blame, text) = answer(&mut another, &spawn(&hello("vm9", MIB), &[]));
    assert!(blame == Blame::Destination && text.contains('8'), "{text}");
    sources.clear();
    host.assert_nothing_left();
    with_qemu(&world, &mallory, "vm9");
    host.assert_nothing_left();
}
