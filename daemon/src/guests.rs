//! The guests of this host, as their QMP sockets show them: those in a folder, or those that the caller lists.
//!
//! The daemon keeps no list of guests: whoever starts QEMUs has one already, and a second would be wrong one day. A folder with
//! a socket a guest, called after it, is what shells, systemd's units and libvirt's `qemu:commandline` all can make, and it is
//! read anew each time.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pagecopy::engine::journal::Side;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::failure::{Failure, host, operator, qemu};
use crate::qemu::status::query_status;
use crate::qmp::Qmp;
use crate::service::Service;
use crate::session::begin::check_name;

/// The most that are looked at for one request.
pub const MAX_GUESTS: usize = 4096;
/// QEMUs that are asked at a time.
const AT_A_TIME: usize = 8;
/// How long one may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// What a guest's socket may be called behind its name.
const ENDINGS: [&str; 2] = [".qmp", ".sock"];

/// `POST /v1/guests`: which guests are looked at. With neither, those in the folder `qmp-dir` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GuestsRequest {
    /// A folder of QMP sockets, each called `NAME.qmp`, `NAME.sock` or `NAME`.
    #[schema(value_type = Option<String>)]
    pub folder: Option<PathBuf>,
    /// The guests themselves.
    pub guests: Option<Vec<GuestSocket>>,
}

/// A guest, and where its QEMU is spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestSocket {
    /// The guest's name.
    pub vm: String,
    /// Its QMP socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
}

/// What was found of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestFound {
    /// The guest's name.
    pub vm: String,
    /// Its QMP socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// QEMU's word for its state, such as `running`, `paused`, `inmigrate` (waits for a guest) or `postmigrate` (its guest has
    /// moved away); `ended` where nobody listens on the socket any more. None where it could not be asked.
    pub state: Option<String>,
    /// Its memory, in bytes, as far as it is known.
    pub ram_bytes: Option<u64>,
    /// The migration that moves it away just now, or with which it waits for its turn. QEMU is not asked then.
    pub migration: Option<Uuid>,
    /// Why it could not be asked.
    pub error: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// Looks at the guests, and changes nothing. They come by their names.
///
/// # Errors
/// The request is wrong, or the folder cannot be read. What is wrong with one guest is told with it.
pub(crate) async fn look(
    service: &Arc<Service>,
    request: GuestsRequest,
) -> Result<Vec<GuestFound>, Failure> {
    let sockets = match (request.guests, request.folder) {
        (Some(_), Some(_)) => {
            return Err(operator(
                "both a folder and guests are named",
                "name one of them",
            ));
        }
        (Some(guests), None) => guests,
        (None, Some(folder)) => listed(&folder)?,
        (None, None) => listed(&configured(service)?)?,
    };
    if sockets.len() > MAX_GUESTS {
        return Err(operator(
            format!(
                "{} guests are named, and {MAX_GUESTS} may be",
                sockets.len()
            ),
            "ask for fewer at a time",
        ));
    }
    for socket in &sockets {
        check_name(&socket.vm)?;
    }
    let (places, mut asked) = (Arc::new(Semaphore::new(AT_A_TIME)), JoinSet::new());
    for socket in sockets {
        let (service, places) = (Arc::clone(service), Arc::clone(&places));
        asked.spawn(async move {
            // Only a closed one refuses.
            let _place = places.acquire().await;
            look_at(&service, socket).await
        });
    }
    // A panic in one has been told already.
    let mut found: Vec<GuestFound> = asked.join_all().await;
    found.sort_by(|one, other| one.vm.cmp(&other.vm));
    Ok(found)
}

fn configured(service: &Service) -> Result<PathBuf, Failure> {
    service.in_force.now().qmp_dir.clone().ok_or_else(|| {
        operator(
            "pagecopyd does not know this host's guests: its configuration names no folder of their QMP sockets",
            "set qmp-dir in its configuration and reload it, or name the folder (--qmp-dir) or the guests (--guests)",
        )
    })
}

/// The sockets in a folder, with the names of their guests. Whatever else is in it is no guest.
fn listed(folder: &Path) -> Result<Vec<GuestSocket>, Failure> {
    if !folder.is_absolute() {
        return Err(operator(
            format!("the folder {} is no absolute path", folder.display()),
            "name it from / on: pagecopyd's working directory is another",
        ));
    }
    let sockets = || -> io::Result<Vec<GuestSocket>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let qmp = entry?.path();
            let is_socket =
                std::fs::metadata(&qmp).is_ok_and(|metadata| metadata.file_type().is_socket());
            // A name that is no text is nobody's who could ask for it.
            let name = qmp.file_name().and_then(|name| name.to_str());
            if let Some(vm) = name.filter(|_| is_socket).map(name_of) {
                found.push(GuestSocket { vm, qmp });
            }
        }
        Ok(found)
    };
    let mut sockets = sockets().map_err(|error| {
        host(
            format!("the folder {} cannot be read: {error}", folder.display()),
            "see that it is there, and that pagecopyd's user may read and search it",
        )
    })?;
    sockets.sort_by(|one, other| (&one.vm, &one.qmp).cmp(&(&other.vm, &other.qmp)));
    if let Some(two) = sockets.windows(2).find(|two| two[0].vm == two[1].vm) {
        return Err(operator(
            format!(
                "{} and {} would be the same guest, {:?}",
                two[0].qmp.display(),
                two[1].qmp.display(),
                two[0].vm
            ),
            "remove one of them, or list the guests (--guests)",
        ));
    }
    Ok(sockets)
}

fn name_of(file: &str) -> String {
    let stripped = ENDINGS.iter().find_map(|ending| file.strip_suffix(ending));
    stripped
        .filter(|name| !name.is_empty())
        .unwrap_or(file)
        .to_owned()
}

async fn look_at(service: &Service, GuestSocket { vm, qmp }: GuestSocket) -> GuestFound {
    let mut found = GuestFound {
        migration: service.migrations.running(&vm, Side::Source),
        vm,
        qmp,
        state: None,
        ram_bytes: None,
        error: None,
        remedy: None,
    };
    if found.migration.is_some() {
        return found;
    }
    let answered = timeout(ANSWER_LIMIT, ask(&found.qmp)).await;
    let answered = answered.unwrap_or_else(|_| {
        let limit = ANSWER_LIMIT.as_secs();
        Err(qemu(
            format!("QEMU did not answer within {limit} s"),
            "see whether it is stuck (a slow disk?)",
        ))
    });
    match answered {
        Ok((state, ram_bytes)) => (found.state, found.ram_bytes) = (Some(state), ram_bytes),
        Err(_) if has_ended(&found.qmp).await => found.state = Some("ended".to_owned()),
        Err(failure) => (found.error, found.remedy) = (Some(failure.what), Some(failure.remedy)),
    }
    found
}

/// QEMU's state, and its memory if it says how much that is.
async fn ask(qmp: &Path) -> Result<(String, Option<u64>), Failure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Summary {
        base_memory: u64,
        plugged_memory: Option<u64>,
    }
    let qmp = Qmp::connect(qmp).await?;
    let state = query_status(&qmp).await?.status;
    let summary: Result<Summary, _> = qmp.query("query-memory-size-summary", json!({})).await;
    let bytes = summary.ok().map(|sum| {
        sum.base_memory
            .saturating_add(sum.plugged_memory.unwrap_or(0))
    });
    Ok((state, bytes))
}

/// Whether nobody listens on a socket any more.
async fn has_ended(qmp: &Path) -> bool {
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    UnixStream::connect(qmp).await.is_err_and(refused)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_is_called_after_its_guest() {
        for (file, vm) in [
            ("web1.qmp", "web1"),
            ("db.prod.sock", "db.prod"),
            ("plain", "plain"),
            (".qmp", ".qmp"),
        ] {
            assert_eq!(name_of(file), vm);
        }
    }

    #[test]
    fn a_folder_has_sockets_and_other_things() {
        let dir = std::env::temp_dir().join(format!("pagecopy-guests-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("notes.qmp"), "").unwrap();
        let bind = |name: &str| UnixListener::bind(dir.join(name)).unwrap();
        let _sockets = ["b.qmp", "a.sock"].map(bind);
        let found = listed(&dir).unwrap();
        let names: Vec<&str> = found.iter().map(|one| one.vm.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let _twice = bind("b.sock");
        let failure = listed(&dir).unwrap_err();
        assert!(failure.what.contains("the same guest"), "{}", failure.what);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(listed(&dir).unwrap_err().what.contains("cannot be read"));
        assert!(listed(Path::new("here")).is_err());
    }
}
