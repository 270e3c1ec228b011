//! The units are what systemd takes, and harden the daemon no less than they say.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The most exposure that `systemd-analyze security` may find, of 100. What it finds are the two capabilities, processes,
/// devices and users of the host that must stay visible, the network, and sockets in other people's folders.
const EXPOSURE: u32 = 32;

/// The units with a program that is there, in a folder that goes away.
struct Units(PathBuf);

impl Units {
    fn new(name: &str) -> Units {
        let folder =
            std::env::temp_dir().join(format!("pagecopy-units-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
        for unit in ["pagecopyd.service", "pagecopyd.socket"] {
            let text = fs::read_to_string(shipped.join(unit)).unwrap();
            fs::write(
                folder.join(unit),
                text.replace("/usr/sbin/pagecopyd", "/bin/true"),
            )
            .unwrap();
        }
        Units(folder)
    }

    /// What `systemd-analyze` says; none where there is none.
    fn analyze(&self, arguments: &[&str]) -> Option<Output> {
        let mut command = Command::new("systemd-analyze");
        match command.args(arguments).current_dir(&self.0).output() {
            Ok(output) => Some(output),
            Err(_) => {
                println!("SKIPPED: there is no systemd-analyze to look at the units");
                None
            }
        }
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        // The system's folder for temporary files is emptied by others, too.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|said| String::from_utf8_lossy(said))
        .concat()
}

#[test]
fn systemd_understands_every_line() {
    let units = Units::new("verify");
    let verify = [
        "verify",
        "--man=no",
        "./pagecopyd.service",
        "./pagecopyd.socket",
    ];
    let Some(said) = units.analyze(&verify) else {
        return;
    };
    // What it does not know it says, and goes on.
    assert!(
        said.status.success() && text(&said).is_empty(),
        "{}",
        text(&said)
    );
    let service = fs::read_to_string(units.0.join("pagecopyd.service")).unwrap();
    fs::write(
        units.0.join("pagecopyd.service"),
        service.replace("NoNewPrivileges", "NoOldPrivileges"),
    )
    .unwrap();
    let said = units.analyze(&verify).unwrap();
    assert!(text(&said).contains("NoOldPrivileges"), "{}", text(&said));
}

#[test]
fn the_daemon_is_exposed_no_more_than_its_work_needs() {
    let units = Units::new("security");
    let threshold = format!("--threshold={EXPOSURE}");
    let security = [
        "security",
        "--offline=true",
        "--no-pager",
        &threshold,
        "./pagecopyd.service",
    ];
    let Some(said) = units.analyze(&security) else {
        return;
    };
    assert!(said.status.success(), "{}", text(&said));
    let service = fs::read_to_string(units.0.join("pagecopyd.service")).unwrap();
    fs::write(
        units.0.join("pagecopyd.service"),
        service.replace("CapabilityBoundingSet", "#"),
    )
    .unwrap();
    let said = units.analyze(&security).unwrap();
    assert!(!said.status.success(), "{}", text(&said));
}
