//! Whatever is asked, in a hundred thousand command lines that nobody would write.

use super::*;

/// Words put together at random from what options are made of, good and bad.
struct Words(u64);

impl Words {
    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        of[usize::try_from(self.0 >> 33).unwrap() % of.len()]
    }

    fn value(&mut self) -> String {
        const VALUES: [&str; 24] = [
            "/images/a",
            "/etc/shadow",
            "/images/../etc/shadow",
            "/run/vm/x",
            "/dev/shm/a",
            "/dev/urandom",
            "on",
            "off",
            "5",
            "a",
            "socket",
            "tap",
            "bridge",
            "raw",
            "nbd",
            "virtio-net-pci",
            "loader",
            "memory-backend-file",
            "",
            "json:{}",
            "exec:sh",
            "file",
            "x,,y",
            "br0",
        ];
        self.one(&VALUES).to_owned()
    }

    fn list(&mut self, json: bool) -> String {
        const KEYS: [&str; 24] = [
            "file",
            "path",
            "filename",
            "id",
            "driver",
            "fd",
            "vhostfd",
            "server",
            "mem-path",
            "share",
            "romfile",
            "script",
            "helper",
            "br",
            "ifname",
            "type",
            "property",
            "value",
            "format",
            "file.filename",
            "a.file.driver",
            "qom-type",
            "logfile",
            "host",
        ];
        let mut text = String::new();
        let items = self.one(&["1", "2", "3", "5"]).parse().unwrap();
        for at in 0..items {
            let (key, value) = (self.one(&KEYS), self.value());
            text += match (json, at) {
                (_, 0) => "",
                (true, _) => ",",
                (false, _) => self.one(&[",", ",", ",", ",,", ",,,"]),
            };
            text += &match (json, self.one(&["=", "=", "=", "", "bare"])) {
                (true, _) => format!("{key:?}:{value:?}"),
                (false, "=") => format!("{key}={value}"),
                (false, "bare") => value,
                (false, _) => key.to_owned(),
            };
        }
        if json { format!("{{{text}}}") } else { text }
    }

    fn all(&mut self) -> Vec<String> {
        const OPTIONS: [&str; 20] = [
            "-drive",
            "-blockdev",
            "-device",
            "-object",
            "-netdev",
            "-chardev",
            "-machine",
            "-global",
            "-serial",
            "-kernel",
            "-bios",
            "-boot",
            "-mon",
            "-cdrom",
            "-readconfig",
            "-S",
            "--display",
            "-numa",
            "-plugin",
            "-nographic",
        ];
        let mut words = Vec::new();
        for _ in 0..3 {
            words.push(self.one(&OPTIONS).to_owned());
            let shape = self.one(&["list", "list", "json", "value"]);
            words.push(match shape {
                "value" => self.value(),
                shape => self.list(shape == "json"),
            });
            if self.one(&["same", "without"]) == "without" {
                words.pop();
            }
        }
        words
    }
}

/// What in a word (in which two commas are one of a value) has QEMU open the network, take a descriptor of another, or run something.
fn never(word: &str) -> Option<(&'static str, &'static str)> {
    const NEVER: [(&str, &str); 10] = [
        ("driver", "nbd"),
        ("driver", "loader"),
        ("format", "nbd"),
        ("file", "json:"),
        ("file", "exec:"),
        ("filename", "json:"),
        ("vhostfd", ""),
        ("helper", ""),
        ("script", "/"),
        ("script", "exec:"),
    ];
    let word = format!(",{}", word.replace(",,", "\0"));
    let says = |key: &str, value: &str| {
        [",", "."]
            .iter()
            .any(|before| word.contains(&format!("{before}{key}={value}")))
            || word.contains(&format!("{key}\":\"{value}"))
    };
    NEVER.into_iter().find(|(key, value)| says(key, value))
}

/// Where the policy lets files be.
const GOOD: [&str; 4] = [
    "/mnt/images/",
    "/run/guests/",
    "/dev/shm/pagecopy/pagecopy-",
    "/dev/urandom",
];

/// What may be a path in the word of an option.
fn parts(option: &str, word: &str) -> Vec<String> {
    let properties = word.replace(",,", "\0");
    let parts: Vec<&str> = match option {
        // The whole word is one.
        "-bios" | "-kernel" | "-cdrom" => vec![word],
        "-serial" => word.splitn(2, ':').collect(),
        _ => properties
            .split([',', '"', '{', '}'])
            .map(|property| {
                property
                    .split_once('=')
                    .map_or(property, |(_, value)| value)
            })
            .collect(),
    };
    let paths = parts.into_iter().filter(|part| part.contains('/'));
    paths.map(str::to_owned).collect()
}

/// Whatever comes out names no file but where the policy lets it be, whichever way a word is cut, and no descriptor.
#[test]
fn whatever_is_asked_no_other_path_comes_out() {
    let policy = Policy::parse(POLICY).unwrap();
    let mut words = Words(0x9e37_79b9_7f4a_7c15);
    let mut taken = 0;
    for _ in 0..100_000 {
        let mut ask = ask(&["-object", RAM]);
        ask.arguments.extend(words.all());
        let Ok(plan) = plan(&policy, &ask, 9) else {
            continue;
        };
        taken += 1;
        let ours = plan
            .arguments
            .iter()
            .rposition(|word| word == "-no-user-config")
            .unwrap();
        // Each of the options at hand takes a word.
        for pair in plan.arguments[..ours].chunks(2) {
            let (option, word) = (&*pair[0], &pair[1]);
            let from = || format!("{pair:?} from {:?}", ask.arguments);
            for part in parts(option, word) {
                let good = GOOD.iter().any(|folder| part.starts_with(folder));
                assert!(good && !part.contains(".."), "{part}: {}", from());
            }
            // To other options a driver is a property that they do not have.
            if ["-drive", "-blockdev", "-device", "-netdev", "-chardev"].contains(&option) {
                assert_eq!(never(word), None, "{}", from());
            }
            assert_ne!(option, "-plugin", "{}", from());
            assert!(
                !word.starts_with("exec:") || option != "-serial",
                "{}",
                from()
            );
        }
    }
    assert!(taken > 1000, "{taken}");
}
