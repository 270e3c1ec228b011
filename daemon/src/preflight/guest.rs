//! What a QEMU and its guest are like, as far as both sides are compared: machine, CPU, disks. Asked over QMP.

use std::path::Path;
use std::time::Duration;

use pagecopy::host::process::opened_storage;
use pagecopy::preflight::{Cpu, Disk, QemuFacts, Storage, Word};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::failure::{Failure, host};
use crate::log;
use crate::qemu::Guest;
use crate::qemu::drives::{Drive, Inserted, drives};
use crate::qmp::{Qmp, QmpError};
use crate::session::blocking;

/// How long the storage of one disk may take to answer.
const STORAGE_LIMIT: Duration = Duration::from_secs(2);

/// A virtual CPU in `query-cpus-fast`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct VirtualCpu {
    qom_path: String,
    target: Option<String>,
}

/// QEMU's `X86CPUFeatureWordInfo`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FeatureWord {
    cpuid_input_eax: u32,
    cpuid_input_ecx: Option<u32>,
    cpuid_register: String,
    features: u32,
}

#[derive(Debug, Deserialize)]
struct Job {
    #[serde(rename = "type")]
    kind: String,
}

/// What a QEMU answers.
pub(super) struct Answers {
    machine: String,
    cpus: usize,
    cpu: Option<Cpu>,
    drives: Vec<Drive>,
    jobs: Vec<Job>,
}

/// Asks a QEMU, and then looks at its disks. `guest` is what was found of its memory, if it could be looked at.
///
/// # Errors
/// As [`ask`].
pub(super) async fn facts(qmp: &Qmp, guest: Option<&Guest>) -> Result<QemuFacts, Failure> {
    Ok(ask(qmp).await?.facts(qmp, guest).await)
}

/// Asks a QEMU all at once: each question is there before the last answer, and a migration waits for this.
///
/// # Errors
/// QEMU does not answer, or otherwise than documented.
pub(super) async fn ask(qmp: &Qmp) -> Result<Answers, Failure> {
    let virtual_cpus = async {
        let all: Vec<VirtualCpu> = qmp.query("query-cpus-fast", json!({})).await?;
        let cpu = match all.first() {
            // Machines have CPUs that tell nothing.
            Some(first) => cpu(qmp, first).await.ok(),
            None => None,
        };
        Ok::<_, QmpError>((all.len(), cpu))
    };
    let (machine, (cpus, cpu), drives, jobs) = tokio::try_join!(
        property::<String>(qmp, "/machine", "type"),
        virtual_cpus,
        drives(qmp),
        qmp.query::<Vec<Job>>("query-block-jobs", json!({})),
    )?;
    Ok(Answers {
        machine,
        cpus,
        cpu,
        drives,
        jobs,
    })
}

impl Answers {
    /// With the disks looked at, all of them at the same time.
    pub(super) async fn facts(self, qmp: &Qmp, guest: Option<&Guest>) -> QemuFacts {
        let version = qmp.version();
        let pid = guest.map(|guest| guest.pid).or(qmp.peer_pid());
        let blocks = guest.map_or(&[][..], |guest| guest.blocks.as_slice());
        let looks = self.drives.into_iter().map(|it| log::spawn(disk(it, pid)));
        let mut disks = Vec::new();
        for look in looks.collect::<Vec<_>>() {
            // One that panicked has told so.
            disks.extend(look.await.ok().flatten());
        }
        let machine = self.machine;
        QemuFacts {
            version: [version.major, version.minor, version.micro],
            machine: machine
                .strip_suffix("-machine")
                .unwrap_or(&machine)
                .to_owned(),
            cpus: u32::try_from(self.cpus).unwrap_or(u32::MAX),
            cpu: self.cpu,
            blocks: blocks.iter().map(|block| block.spec.clone()).collect(),
            disks,
            mirrors: self.jobs.iter().any(|job| job.kind == "mirror"),
        }
    }
}

async fn property<T: serde::de::DeserializeOwned>(
    qmp: &Qmp,
    path: &str,
    name: &str,
) -> Result<T, QmpError> {
    qmp.query("qom-get", json!({ "path": path, "property": name }))
        .await
}

async fn cpu(qmp: &Qmp, cpu: &VirtualCpu) -> Result<Cpu, QmpError> {
    let (kind, words) = tokio::join!(
        property::<String>(qmp, &cpu.qom_path, "type"),
        property::<Vec<FeatureWord>>(qmp, &cpu.qom_path, "feature-words"),
    );
    let kind = kind?;
    let tail = format!("-{}-cpu", cpu.target.as_deref().unwrap_or_default());
    let words = match words {
        Ok(words) => words,
        // No x86.
        Err(QmpError::Refused { .. }) => Vec::new(),
        Err(error) => return Err(error),
    };
    let word = |word: FeatureWord| Word {
        leaf: word.cpuid_input_eax,
        subleaf: word.cpuid_input_ecx,
        register: word.cpuid_register,
        features: word.features,
    };
    Ok(Cpu {
        model: kind.strip_suffix(&tail).unwrap_or(&kind).to_owned(),
        words: words.into_iter().map(word).collect(),
    })
}

/// The disk in a drive, if there is one that the guest may write.
async fn disk(drive: Drive, pid: Option<i32>) -> Option<Disk> {
    let Inserted {
        file,
        ro,
        drv,
        image,
    } = drive.inserted?;
    if ro {
        return None;
    }
    let id = match drive.qdev {
        _ if !drive.device.is_empty() => drive.device,
        Some(qdev) => qdev,
        // Nobody has it.
        None => return None,
    };
    let storage = match path_in(&file) {
        None => Storage::Remote,
        Some(path) => storage(pid, path).await,
    };
    Some(Disk {
        id,
        driver: drv,
        name: file,
        bytes: image.virtual_size,
        storage,
    })
}

/// The path in QEMU's name of a disk; none in what it reaches by itself (`nbd://…`).
fn path_in(name: &str) -> Option<String> {
    if let Some(options) = name.strip_prefix("json:") {
        let options: Value = serde_json::from_str(options).ok()?;
        return filename(&options).map(str::to_owned);
    }
    let scheme = name.split(['/', '.']).next().unwrap_or_default();
    (!scheme.contains(':')).then(|| name.to_owned())
}

/// The file below all formats and filters.
fn filename(options: &Value) -> Option<&str> {
    match options.get("filename") {
        Some(name) => name.as_str(),
        None => filename(options.get("file").or(options.get("image"))?),
    }
}

async fn storage(pid: Option<i32>, path: String) -> Storage {
    let Some(pid) = pid else {
        let why = "QEMU's process is not known".to_owned();
        return Storage::Unknown { why };
    };
    let asked = blocking(move || {
        opened_storage(pid, Path::new(&path)).map_err(|error| host(error.to_string(), ""))
    });
    match tokio::time::timeout(STORAGE_LIMIT, asked).await {
        Ok(Ok(storage)) => storage,
        Ok(Err(failure)) => Storage::Unknown { why: failure.what },
        Err(_) => Storage::Unknown {
            why: format!("its storage says nothing for {} s", STORAGE_LIMIT.as_secs()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_the_names_of_disks() {
        let path = |name| path_in(name).unwrap_or_default();
        assert_eq!(path("/srv/a.qcow2"), "/srv/a.qcow2");
        assert_eq!(path("a.img"), "a.img");
        assert_eq!(path("/dev/disk/by-id/x:y"), "/dev/disk/by-id/x:y");
        for remote in ["nbd://h/x", "rbd:pool/image", "null-co://", "json:{}"] {
            assert_eq!(path_in(remote), None, "{remote}");
        }
        let nested = r#"json:{"driver":"qcow2","file":{"driver":"throttle","file":{"driver":"file","filename":"/d"}}}"#;
        assert_eq!(path(nested), "/d");
        assert_eq!(
            path_in(r#"json:{"driver":"nbd","file":{"driver":"nbd"}}"#),
            None
        );
    }
}
