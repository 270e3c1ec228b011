//! libFuzzer around one of the targets, which the environment variable `PAGECOPY_FUZZ` names: one program for all, so that
//! it is linked once.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use targets::{TARGETS, Target};

fn chosen() -> Target {
    let name = std::env::var("PAGECOPY_FUZZ").unwrap_or_default();
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    let Some((_, target)) = found else {
        let names: Vec<&str> = TARGETS.iter().map(|(target, _)| *target).collect();
        eprintln!("PAGECOPY_FUZZ={name:?}: no such target, there are {names:?}");
        std::process::exit(2);
    };
    *target
}

fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<Target> = OnceLock::new();
    TARGET.get_or_init(chosen)(data);
});
