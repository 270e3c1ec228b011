//! The options of QEMU's command line, as far as they are understood: whether each takes a word, and what that word is.
//!
//! An option that is not here is refused, whatever the policy says. Those that run code, read what cannot be seen here, or
//! say how QEMU itself is run are here so that the refusal, or what is done with them, is right.

/// What an option is, and so how its word is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Takes no word.
    Flag,
    /// A word without a path in it, passed on as it is.
    Plain,
    /// A word that is only text: nothing is opened by it.
    Text,
    /// Properties, the first of which may stand without its name.
    Props(Option<&'static str>),
    /// Properties that may hold any text; those that are paths are known by their names.
    TextProps(Option<&'static str>),
    /// A path.
    Path,
    /// A name that QEMU looks for in its own folders, or a path.
    Firmware,
    /// How QEMU runs, which is this host's to say: left out.
    Ours,
    /// The same, and it takes no word.
    OursAlone,
    /// Never: why.
    Never(&'static str),
    /// Never, and it takes no word.
    NeverAlone(&'static str),
    /// `-machine`.
    Machine,
    /// `-drive` and `-blockdev`.
    Disk(Option<&'static str>),
    /// `-device`.
    Device,
    /// `-object`.
    Object,
    /// `-netdev`.
    Netdev,
    /// `-chardev`.
    Chardev,
    /// `-serial` and `-parallel`.
    Serial,
    /// `-display`.
    Display,
    /// `-nographic`.
    Nographic,
    /// `-net` and `-nic`, of which only `none` is known.
    OldNet,
    /// `-qmp`, `-monitor`, `-mon`.
    Monitor,
}

use Kind::{
    Chardev, Device, Disk, Display, Firmware, Flag, Machine, Monitor, Netdev, Never, NeverAlone,
    Nographic, Object, OldNet, Ours, OursAlone, Path, Plain, Props, Serial, Text, TextProps,
};

const CODE: &str = "it makes QEMU run code";
const UNSEEN: &str = "QEMU would take what cannot be seen here from a file";
const DESCRIPTORS: &str = "descriptors of the source's QEMU do not exist here";
const STATE: &str = "it changes what QEMU starts with";

const OPTIONS: [(&str, Kind); 105] = [
    ("D", Ours),
    ("L", Ours),
    ("M", Machine),
    ("S", OursAlone),
    ("accel", Plain),
    ("acpitable", Never("it takes several files in one word")),
    ("action", Plain),
    ("add-fd", Never(DESCRIPTORS)),
    ("append", Text),
    ("async-teardown", Flag),
    ("audio", Props(Some("driver"))),
    ("audiodev", Props(Some("driver"))),
    ("bios", Firmware),
    ("blockdev", Disk(Some("driver"))),
    ("boot", Props(Some("order"))),
    ("cdrom", Path),
    ("chardev", Chardev),
    ("chroot", Ours),
    ("compat", Plain),
    ("cpu", Plain),
    ("d", Ours),
    ("daemonize", OursAlone),
    ("debugcon", Serial),
    ("device", Device),
    ("dfilter", Ours),
    ("display", Display),
    ("drive", Disk(None)),
    ("dtb", Path),
    ("dump-vmstate", Never(STATE)),
    ("enable-kvm", Flag),
    ("fda", Path),
    ("fdb", Path),
    ("fsdev", Props(Some("fsdriver"))),
    ("full-screen", OursAlone),
    ("fw_cfg", TextProps(Some("name"))),
    ("gdb", Ours),
    ("global", Props(None)),
    ("hda", Path),
    ("hdb", Path),
    ("hdc", Path),
    ("hdd", Path),
    ("icount", Plain),
    ("incoming", Ours),
    ("initrd", Path),
    ("k", Plain),
    ("kernel", Path),
    ("loadvm", Never(STATE)),
    ("m", Plain),
    ("machine", Machine),
    (
        "mem-path",
        Never("name the guest's RAM by -object memory-backend-file"),
    ),
    ("mem-prealloc", Flag),
    ("mon", Monitor),
    ("monitor", Monitor),
    ("msg", Plain),
    ("name", TextProps(Some("guest"))),
    ("net", OldNet),
    ("netdev", Netdev),
    ("nic", OldNet),
    ("no-acpi", Flag),
    ("no-fd-bootchk", Flag),
    ("no-hpet", Flag),
    ("no-reboot", Flag),
    ("no-shutdown", Flag),
    ("no-user-config", OursAlone),
    ("nodefaults", Flag),
    ("nographic", Nographic),
    ("numa", Props(Some("type"))),
    ("object", Object),
    ("only-migratable", Flag),
    ("option-rom", Path),
    ("overcommit", Plain),
    ("parallel", Serial),
    ("perfmap", OursAlone),
    ("pflash", Path),
    ("pidfile", Ours),
    ("plugin", Never(CODE)),
    ("preconfig", NeverAlone(STATE)),
    ("qmp", Monitor),
    ("qmp-pretty", Monitor),
    ("readconfig", Never(UNSEEN)),
    ("rtc", Plain),
    ("run-with", Ours),
    ("runas", Ours),
    ("s", OursAlone),
    ("sandbox", Ours),
    ("seed", Plain),
    ("semihosting", NeverAlone(CODE)),
    ("semihosting-config", Never(CODE)),
    ("serial", Serial),
    ("set", Never(STATE)),
    ("singlestep", Flag),
    ("smbios", TextProps(None)),
    ("smp", Plain),
    (
        "snapshot",
        NeverAlone("its disks would not be the source's"),
    ),
    ("spice", Props(None)),
    ("tpmdev", Props(Some("type"))),
    ("trace", Ours),
    ("usb", Flag),
    ("uuid", Plain),
    ("vga", Plain),
    ("virtfs", Props(Some("fsdriver"))),
    ("vnc", Props(Some("vnc"))),
    ("watchdog", Plain),
    ("watchdog-action", Plain),
    ("writeconfig", Never(UNSEEN)),
];

/// What an option is, if it is known.
pub(super) fn kind(name: &str) -> Option<Kind> {
    let at = OPTIONS
        .binary_search_by(|(known, _)| known.cmp(&name))
        .ok()?;
    OPTIONS.get(at).map(|(_, kind)| *kind)
}

/// Whether a policy may name it.
pub(super) fn may_be_allowed(name: &str) -> bool {
    kind(name)
        .is_some_and(|kind| !matches!(kind, Never(_) | NeverAlone(_) | Ours | OursAlone | Monitor))
}

/// Those that a policy allows which does not say: what a guest is made of, without what listens on a network or gives the
/// guest files or devices of the host.
pub(super) fn usual() -> Vec<String> {
    const NOT: [&str; 9] = [
        "audio",
        "audiodev",
        "fsdev",
        "icount",
        "option-rom",
        "spice",
        "tpmdev",
        "virtfs",
        "vnc",
    ];
    let names = OPTIONS.iter().map(|(name, _)| *name);
    names
        .filter(|name| may_be_allowed(name) && !NOT.contains(name))
        .map(str::to_owned)
        .collect()
}

/// Whether the option is followed by a word.
pub(super) fn takes_word(kind: Kind) -> bool {
    !matches!(kind, Flag | OursAlone | NeverAlone(_) | Nographic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_for_the_search() {
        assert!(OPTIONS.is_sorted_by(|(a, _), (b, _)| a < b));
        for (name, found) in OPTIONS {
            assert_eq!(kind(name), Some(found));
        }
    }

    #[test]
    fn what_runs_code_or_cannot_be_seen_cannot_be_allowed() {
        for never in [
            "plugin",
            "readconfig",
            "writeconfig",
            "add-fd",
            "loadvm",
            "set",
            "incoming",
            "qmp",
            "semihosting",
            "xen-domid",
            "",
        ] {
            assert!(!may_be_allowed(never), "{never}");
        }
        for not_usual in ["vnc", "spice", "fsdev", "virtfs", "tpmdev"] {
            assert!(may_be_allowed(not_usual), "{not_usual}");
            assert!(!usual().contains(&not_usual.to_owned()), "{not_usual}");
        }
    }
}
