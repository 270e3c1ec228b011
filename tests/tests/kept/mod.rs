//! Runs that once failed, each with its story and the smallest plan that was found for it.

use tests::sim::Theme;

/// Other chances that each plan is run with, besides its own.
pub(crate) const CHANCES: u64 = 200;

/// The theme says what counts as a failure: in `Quiet` nothing may fail at all.
pub(crate) const KEPT: &[(Theme, &str, &str)] = &[
    (
        Theme::Quiet,
        "With --verify the digests were ordered together with the last scan. They were ready before it, went out ahead of \
         Stopped, and the destination refused them as out of place.",
        r#"{"chance":11200,"wanted":{"downtime_limit_us":133984,"max_rounds":23,"quit_source":true,"verify":true}}"#,
    ),
    (
        Theme::Quiet,
        "Populate came on the control channel after the barriers of round 0 had come on all data channels, and the \
         destination refused it as out of place.",
        r#"{"chance":39000,"network":{"delay_max":235154,"delay_min":327}}"#,
    ),
    (
        Theme::Chaos,
        "The operator of a source in doubt said that the guest runs at the destination, which was not so. QEMU kept it, as it \
         should, until the daemon was started anew: GuestMoved in the journal does not say who said so, and with \
         --quit-source the engine quit QEMU with the only copy of the guest.",
        r#"{"faults":[[{"Named":["Destination","Journal(Committed)",1,"Before"]},{"DaemonDies":["Destination",3000]}],[{"Named":["Source","Connect",1,"After"]},{"Ask":["Source","LetGo"]}],[{"Time":900000},{"DaemonDies":["Source",null]}]],"wanted":{"quit_source":true}}"#,
    ),
    (
        Theme::Torn,
        "The disk refused that the guest is whole. The session told the source all the same and ended; the source's daemon died \
         before it heard, and one that was started anew was sent away for ever by a journal that did not know.",
        r#"{"blocks":[{"name":"ram0","page_size":4096,"size":8192}],"chance":62634,"data_channels":2,"destination":{"disk":{"refuses":200,"sync_us":268}},"faults":[[{"Named":["Source","Journal(GuestMoved)",1,"Before"]},{"DaemonDies":["Source",70000]}]],"wanted":{"how":"Postcopy"}}"#,
    ),
    (
        Theme::Torn,
        "The destination was whole before it ran, and its daemon died when it was about to say so. One that was started anew \
         found the guest standing, and did not take it up when it turned out to run.",
        r#"{"blocks":[{"name":"ram0","page_size":4096,"size":77824}],"chance":47233,"data_channels":2,"destination":{"qemu_us":8699},"faults":[[{"Named":["Destination","Release",1,"Before"]},{"DaemonDies":["Destination",4000]}]],"network":{"bytes_per_second":13385728,"delay_max":222363,"delay_min":1271},"wanted":{"how":"Postcopy"}}"#,
    ),
    (
        Theme::Crashes,
        "The simulation's own: a restarted daemon's record was refused and left half a line, and the session that was begun \
         when the source asked wrote behind it. A journal is cut to its whole lines when it is opened.",
        r#"{"destination":{"disk":{"refuses":300,"sync_us":145}},"faults":[[{"Named":["Destination","Journal(Running)",1,"Before"]},{"DaemonDies":["Destination",800]}],[{"Named":["Source","Journal(GuestMoved)",1,"After"]},{"DaemonDies":["Destination",800]}]]}"#,
    ),
];
