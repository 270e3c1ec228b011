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
];
