//! What a source's QEMU was started with becomes what a QEMU of this host is started with, as far as the policy goes.
//!
//! Pure: nothing is opened. Every word is looked at; one that is not understood, or that the policy does not allow, is
//! refused with what would help. How QEMU itself is run (monitors, user, sandbox, logs, `-incoming`) is this host's to say.

mod kinds;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::options::{self, Kind};
use super::policy::{Policy, is_one_of};
use super::words::Props;
use crate::failure::{Failure, operator};

/// The id of our monitor inside QEMU begins so; nobody else's does.
pub(super) const OUR_ID: &str = "pagecopy-";

/// What a source asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The migration.
    pub id: Uuid,
    /// The command line of its QEMU, the program first.
    pub arguments: Vec<String>,
    /// The type of its machine in full, of which the command line may have said less.
    pub machine: Option<String>,
}

/// What is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The program.
    pub binary: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The RAM files that it makes.
    pub ram: Vec<PathBuf>,
    /// Each path that it opens, with the folder of this host that it must be in.
    pub opened: Vec<(PathBuf, PathBuf)>,
    /// What each path of the source is here.
    pub mapped: BTreeMap<String, String>,
    /// Whether QEMU starts its bridge helper, which is setuid.
    pub bridged: bool,
    /// What was left out or changed that somebody may miss.
    pub notices: Vec<String>,
}

/// The word by which a QEMU is known to have been started for `id`: its monitor's, which follows `-chardev`.
pub(super) fn mark(id: Uuid, fd: i32) -> String {
    format!("socket,id={OUR_ID}{id},fd={fd},server=on,wait=off")
}

/// The beginning of the name of every RAM file made for `id`.
pub(super) fn ram_prefix(id: Uuid) -> String {
    format!("{OUR_ID}{id}-")
}

/// Keys of properties that are never taken, and why.
const DENIED: [(&str, &str); 19] = [
    ("fd", OTHERS_FD),
    ("fds", OTHERS_FD),
    ("vhostfd", OTHERS_FD),
    ("vhostfds", OTHERS_FD),
    ("sock_fd", OTHERS_FD),
    ("fdset", OTHERS_FD),
    ("guestfwd", RUNS),
    ("smb", RUNS),
    ("cmd", RUNS),
    ("exec", RUNS),
    ("helper", RUNS),
    ("script", RUNS),
    ("downscript", RUNS),
    ("hostfwd", LISTENS),
    ("smbserver", LISTENS),
    ("abstract", LISTENS),
    ("sysfsdev", "it gives the guest a device of the host"),
    ("dumpdtb", "it has QEMU write a file and end"),
    ("snapshot", "the disk would not be the source's"),
];
/// Those of them that may be said to be off.
const SWITCHES: [&str; 4] = ["abstract", "downscript", "script", "snapshot"];
const OTHERS_FD: &str = "a descriptor of the source's QEMU does not exist here";
const RUNS: &str = "it has QEMU run a program";
const LISTENS: &str = "it opens this host to its network";
/// Keys of properties that are paths.
const PATHS: [&str; 15] = [
    "file", "filename", "path", "mem-path", "dtb", "kernel", "initrd", "firmware", "dir",
    "rootdir", "logfile", "tftp", "bootfile", "sock", "socket",
];
/// Keys of properties that QEMU may look for in its own folders.
const FIRMWARE: [&str; 2] = ["romfile", "splash"];

/// Makes the plan; QEMU's monitor is descriptor `fd` of it.
///
/// # Errors
/// What the policy does not allow or is not understood, and what would help.
pub fn plan(policy: &Policy, ask: &Ask, fd: i32) -> Result<Plan, Failure> {
    let (program, words) = ask
        .arguments
        .split_first()
        .ok_or_else(|| refuse("the source sent no command line", "report this"))?;
    let binary = policy.binary(program).ok_or_else(|| {
        refuse(
            format!("no program of this host stands for {program:?}"),
            "add it to [binaries] of the policy (spawn-policy) at the destination",
        )
    })?;
    let mut planner = Planner {
        policy,
        ask,
        plan: Plan {
            binary: binary.to_owned(),
            ..Plan::default()
        },
        monitors: monitors(words),
        json: false,
        once: false,
        has_machine: false,
        has_serial: false,
        nographic: false,
        nodefaults: false,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (name, kind) = known(word)?;
        let value = match options::takes_word(kind) {
            true => Some(words.next().ok_or_else(|| {
                refuse(
                    format!("-{name} is the last word, without its value"),
                    REPORT,
                )
            })?),
            false => None,
        };
        planner.option(name, kind, value.map_or("", String::as_str))?;
    }
    planner.finish(fd)
}

const REPORT: &str = "start the destination's QEMU by hand, and use `pagecopy receive`";

fn refuse(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
    operator(what, remedy)
}

fn known(word: &str) -> Result<(&str, Kind), Failure> {
    let name = word
        .strip_prefix("--")
        .or_else(|| word.strip_prefix('-'))
        .ok_or_else(|| {
            refuse(
                format!("{} on QEMU's command line is no option", shown(word)),
                "name disks by -drive or -blockdev",
            )
        })?;
    let kind = options::kind(name).ok_or_else(|| {
        refuse(
            format!("QEMU's option {} is not known here", shown(word)),
            REPORT,
        )
    })?;
    Ok((name, kind))
}

/// The ids of character devices that only a monitor uses: they go with it.
fn monitors(words: &[String]) -> BTreeSet<String> {
    let mut of_monitors = BTreeSet::new();
    let mut of_others = String::new();
    for pair in words.windows(2) {
        let name = pair[0].trim_start_matches('-');
        match options::kind(name) {
            Some(Kind::Monitor) => {
                let implied = (name == "mon").then_some("chardev");
                let id = Props::parse(&pair[1], implied, false)
                    .ok()
                    .and_then(|props| props.get("chardev"));
                of_monitors
                    .extend(id.or_else(|| pair[1].strip_prefix("chardev:").map(str::to_owned)));
            }
            _ => of_others.extend([pair[1].as_str(), "\n"]),
        }
    }
    let used = |id: &String| {
        ["chardev=", "chardev:", "\"chardev\":\""]
            .iter()
            .any(|word| of_others.contains(&format!("{word}{id}")))
    };
    of_monitors.retain(|id| !used(id));
    of_monitors
}

struct Planner<'a> {
    policy: &'a Policy,
    ask: &'a Ask,
    plan: Plan,
    monitors: BTreeSet<String>,
    /// What the option at hand is like: whether its word may be JSON, and whether each property comes once.
    json: bool,
    once: bool,
    has_machine: bool,
    has_serial: bool,
    nographic: bool,
    nodefaults: bool,
}

impl Planner<'_> {
    fn parse(&self, value: &str, implied: Option<&str>) -> Result<Props, Failure> {
        let props = Props::parse(value, implied, self.json).map_err(|what| refuse(what, REPORT))?;
        match props.repeated().filter(|_| self.once) {
            Some(key) => Err(refuse(format!("{key} is given twice"), REPORT)),
            None => Ok(props),
        }
    }

    fn option(&mut self, name: &str, kind: Kind, value: &str) -> Result<(), Failure> {
        let at = |what: Failure| Failure {
            what: format!("-{name} {}: {}", shown(value), what.what),
            ..what
        };
        match kind {
            Kind::Ours | Kind::OursAlone | Kind::Monitor => return Ok(()),
            Kind::Never(why) | Kind::NeverAlone(why) => {
                return Err(at(refuse(format!("refused: {why}"), REPORT)));
            }
            _ => {}
        }
        if !self.policy.options.iter().any(|allowed| allowed == name) {
            return Err(refuse(
                format!("the policy of the destination does not allow the option -{name}"),
                "add it to options of the policy (spawn-policy) at the destination, or start the guest without it",
            ));
        }
        if value.chars().any(char::is_control) {
            return Err(at(refuse("it has control characters in it", REPORT)));
        }
        self.json = JSON.contains(&name);
        self.once = !matches!(kind, Kind::Props(_) | Kind::TextProps(_));
        self.allowed(name, kind, value).map_err(at)
    }

    fn allowed(&mut self, name: &str, kind: Kind, value: &str) -> Result<(), Failure> {
        let mut text = value.to_owned();
        match kind {
            Kind::Flag => {
                self.nodefaults |= name == "nodefaults";
                self.plan.arguments.push(format!("-{name}"));
                return Ok(());
            }
            Kind::Nographic => {
                self.nographic = true;
                return Ok(());
            }
            Kind::Display => {
                if value != "none" {
                    self.notice(format!("-display {value}: there is none here"));
                }
                text = "none".to_owned();
            }
            Kind::Plain => self.without_path(value)?,
            Kind::Text => {}
            Kind::OldNet => {
                if value != "none" {
                    return Err(refuse("only none is known", "use -netdev and -device"));
                }
            }
            Kind::Path => text = self.path(value)?,
            Kind::Firmware => text = self.firmware(value)?,
            Kind::Serial => {
                self.has_serial |= name == "serial";
                text = self.serial(value)?;
            }
            Kind::Chardev => match self.chardev(value)? {
                Some(kept) => text = kept,
                None => return Ok(()),
            },
            Kind::Props(implied) => text = self.props(value, implied, |_, _| Ok(()))?,
            Kind::TextProps(implied) => text = self.text_props(value, implied)?,
            Kind::Machine => {
                let pinned = self.ask.machine.clone();
                text = self.props(value, Some("type"), |this, props| {
                    if props.get("type").is_some() {
                        this.has_machine = true;
                        if let Some(machine) = &pinned {
                            check_machine(machine)?;
                            props.set("type", machine);
                        }
                    }
                    Ok(())
                })?;
            }
            Kind::Disk(implied) => text = self.disk(value, implied)?,
            Kind::Device => {
                text = self.props(value, Some("driver"), |this, props| {
                    let list = &this.policy.devices;
                    this.one_of("devices", list, props.get("driver"))
                })?;
            }
            Kind::Object => text = self.object(value)?,
            Kind::Netdev => text = self.netdev(value)?,
            // Dealt with before.
            Kind::Ours | Kind::OursAlone | Kind::Monitor | Kind::Never(_) | Kind::NeverAlone(_) => {
                return Ok(());
            }
        }
        self.plan.arguments.extend([format!("-{name}"), text]);
        Ok(())
    }

    /// Properties, changed by `change` and looked at one by one.
    fn props(
        &mut self,
        value: &str,
        implied: Option<&str>,
        change: impl FnOnce(&mut Self, &mut Props) -> Result<(), Failure>,
    ) -> Result<String, Failure> {
        let mut props = self.parse(value, implied)?;
        change(self, &mut props)?;
        // -global driver=…,property=…,value=…: the property is named by another.
        if let (Some(property), Some(value)) = (props.get("property"), props.get("value")) {
            if let Some(new) = self.property(&property, &value)? {
                props.set("value", &new);
            }
            props.each(|key, _| match key {
                "driver" | "property" | "value" => Ok(None),
                other => Err(refuse(format!("{other} does not belong here"), REPORT)),
            })?;
            return Ok(props.write());
        }
        props.each(|key, value| self.property(key, value))?;
        Ok(props.write())
    }

    /// Looks at one property. A new value where it is a path.
    fn property(&mut self, key: &str, value: &str) -> Result<Option<String>, Failure> {
        if key.contains('/') {
            return Err(refuse(format!("{key} is no property's name"), REPORT));
        }
        let name = key.rsplit('.').next().unwrap_or(key);
        if let Some((_, why)) = DENIED.iter().find(|(denied, _)| *denied == name)
            && !(SWITCHES.contains(&name) && matches!(value, "off" | "no" | "false"))
        {
            return Err(refuse(format!("{key} is refused: {why}"), REPORT));
        }
        if FIRMWARE.contains(&name) {
            return self.firmware(value).map(Some);
        }
        if PATHS.contains(&name) || value.contains('/') {
            return self.path(value).map(Some);
        }
        Ok(None)
    }

    fn text_props(&mut self, value: &str, implied: Option<&str>) -> Result<String, Failure> {
        let mut props = self.parse(value, implied)?;
        props.each(|key, value| {
            if PATHS.contains(&key) {
                return self.path(value).map(Some);
            }
            Ok(None)
        })?;
        Ok(props.write())
    }

    fn path(&mut self, path: &str) -> Result<String, Failure> {
        let (here, folder) = self.policy.path(path).ok_or_else(|| {
            refuse(
                format!("the policy of the destination does not let QEMU open {}", shown(path)),
                "add its folder to [paths] of the policy (spawn-policy) at the destination; only absolute paths of files are known",
            )
        })?;
        let text = here
            .to_str()
            .ok_or_else(|| refuse("the path is no text", REPORT))?
            .to_owned();
        self.plan.opened.push((here, folder));
        self.plan.mapped.insert(path.to_owned(), text.clone());
        Ok(text)
    }

    fn firmware(&mut self, name: &str) -> Result<String, Failure> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        // An empty name is that of no ROM.
        if name.chars().all(is_name) && !name.starts_with('.') {
            return Ok(name.to_owned());
        }
        self.path(name)
    }

    fn without_path(&self, value: &str) -> Result<(), Failure> {
        match value.contains('/') {
            true => Err(refuse(
                "there is a path in it, and none is expected",
                REPORT,
            )),
            false => Ok(()),
        }
    }

    fn one_of(&self, key: &str, list: &[String], name: Option<String>) -> Result<(), Failure> {
        let name = name.unwrap_or_default();
        if is_one_of(list, &name) {
            return Ok(());
        }
        Err(refuse(
            format!(
                "the policy of the destination does not allow {}",
                shown(&name)
            ),
            format!(
                "add it to {key} of the policy (spawn-policy) at the destination, or start the guest without it"
            ),
        ))
    }

    fn notice(&mut self, text: String) {
        self.plan.notices.push(text);
    }

    fn finish(mut self, fd: i32) -> Result<Plan, Failure> {
        let mut add = |words: &[&str]| {
            self.plan
                .arguments
                .extend(words.iter().map(|&word| word.to_owned()));
        };
        if self.nographic {
            add(&["-display", "none"]);
            if !self.has_serial && !self.nodefaults {
                add(&["-serial", "null"]);
            }
        }
        if let Some(machine) = self.ask.machine.as_deref().filter(|_| !self.has_machine) {
            check_machine(machine)?;
            add(&["-machine", machine]);
        }
        if !self.nodefaults {
            add(&["-monitor", "none"]);
        }
        add(&["-no-user-config", "-S", "-incoming", "defer"]);
        if self.policy.sandbox {
            // A bridge's helper is a program of its own, with privileges of its own.
            let sandbox = match self.plan.bridged {
                false => "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                true => "on,obsolete=deny,elevateprivileges=children,resourcecontrol=deny",
            };
            add(&["-sandbox", sandbox]);
        }
        let id = self.ask.id;
        add(&["-chardev", &mark(id, fd)]);
        add(&["-mon", &format!("chardev={OUR_ID}{id},mode=control")]);
        if self.plan.ram.is_empty() {
            return Err(refuse(
                "the source's QEMU has no RAM in a file",
                "start the guest with -object memory-backend-file,…,share=on",
            ));
        }
        Ok(self.plan)
    }
}

/// Options whose word QEMU takes as JSON, too, since 7.2 or before. In any other it would read the same text as a list.
const JSON: [&str; 5] = ["audiodev", "blockdev", "device", "netdev", "object"];

fn check_machine(machine: &str) -> Result<(), Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !machine.is_empty() && machine.chars().all(good) {
        true => Ok(()),
        false => Err(refuse(
            "the source tells a machine that is none",
            "report this",
        )),
    }
}

/// A word as people are shown it: quoted, and not at any length.
fn shown(word: &str) -> String {
    const MOST: usize = 120;
    let end = word.floor_char_boundary(MOST);
    match end < word.len() {
        true => format!("{:?}…", &word[..end]),
        false => format!("{word:?}"),
    }
}

#[cfg(test)]
mod tests;
