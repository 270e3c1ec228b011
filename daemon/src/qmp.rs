//! A client of QEMU's machine protocol, QMP, over a unix socket.
//!
//! One task reads lines: answers go to whoever asked, events to every subscriber in the order in which QEMU sent them.
//! The connection's end means that QEMU has left (or was told to let go of us): every call under way fails then, and
//! [`Qmp::gone`] returns.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::timeout;

use crate::failure::{Failure, operator, qemu};
use crate::log;

/// How long QEMU may take to greet. It does so at once unless another client holds the socket.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a command may take. QEMU answers in milliseconds; while it drains slow disks it may take seconds.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Events kept for a subscriber that is behind.
const EVENT_BACKLOG: usize = 256;
/// Longest line that is read; `query-qmp-schema`, which nobody here calls, is the longest by far with 300 KB.
const MAX_LINE: usize = 8 << 20;

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused, in its words.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, such as `CommandNotFound`.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {seconds} s")]
    TimedOut {
        /// The command.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection is gone.
    #[error("QEMU is gone: its QMP connection closed")]
    Gone,
    /// An answer that does not look as documented.
    #[error("QEMU's answer to {command} is not as documented: {what}")]
    Unexpected {
        /// The command.
        command: String,
        /// What does not fit.
        what: String,
    },
}

impl From<QmpError> for Failure {
    fn from(error: QmpError) -> Failure {
        let remedy = match &error {
            QmpError::Refused { .. } => "see QEMU's words; its log may say more",
            QmpError::TimedOut { .. } => "see whether QEMU is stuck (a slow disk?), then try again",
            QmpError::Gone => "see QEMU's log for why it ended",
            QmpError::Unexpected { .. } => "report this with QEMU's version",
        };
        qemu(error.to_string(), remedy)
    }
}

/// An event as QEMU sent it.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, such as `MIGRATION`.
    pub name: String,
    /// Its data, `Null` when it has none.
    pub data: Value,
}

impl QmpEvent {
    /// The status of a `MIGRATION` event.
    pub fn migration_status(&self) -> Option<&str> {
        if self.name != "MIGRATION" {
            return None;
        }
        self.data.get("status")?.as_str()
    }
}

/// QEMU's version, from the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// As in **7**.2.22.
    pub major: u32,
    /// As in 7.**2**.22.
    pub minor: u32,
    /// As in 7.2.**22**.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU returns, or the class and words of its error.
type Answer = Result<Value, (String, String)>;
type Waiting = Mutex<HashMap<u64, oneshot::Sender<Answer>>>;

/// A connection to one QEMU. Shared by reference; commands may be given by several tasks at once.
#[derive(Debug)]
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Arc<Waiting>,
    events: broadcast::Sender<QmpEvent>,
    gone: watch::Receiver<bool>,
    next_id: AtomicU64,
    version: Version,
    path: PathBuf,
    peer_pid: Option<i32>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// The socket is absent, is none, refuses, or is held by another client; each with what to do.
    pub async fn connect(path: &Path) -> Result<Qmp, Failure> {
        let (mut lines, write, peer_pid) = open(path).await?;
        let greeting = match timeout(GREETING_TIMEOUT, lines.next()).await {
            Ok(Ok(Some(line))) => line,
            Ok(_) => return Err(not_qmp(path, "closed the connection instead of greeting")),
            Err(_) => return Err(taken(path)),
        };
        let version = greeting
            .pointer("/QMP/version/qemu")
            .and_then(|version| Version::deserialize(version).ok())
            .ok_or_else(|| not_qmp(path, "did not greet as QMP does"))?;
        let qmp = Qmp::start(path, lines, write, peer_pid, version);
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Connects without waiting for any word of QEMU's: its main loop may stand in a page fault that is ours to serve.
    /// Commands are answered when it gets to them. The version is not known: 0.0.0.
    ///
    /// # Errors
    /// The socket is absent, is none or refuses; each with what to do.
    pub async fn connect_unheard(path: &Path) -> Result<Qmp, Failure> {
        let (lines, mut write, peer_pid) = open(path).await?;
        // Its answer comes behind the greeting, and commands that follow are behind it.
        write
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
            .await
            .map_err(|error| connect_failure(path, &error))?;
        let unknown = Version {
            major: 0,
            minor: 0,
            micro: 0,
        };
        Ok(Qmp::start(path, lines, write, peer_pid, unknown))
    }

    /// Connects once more, if the same process is there still.
    pub(crate) async fn again(&self) -> Option<Qmp> {
        let connected = Qmp::connect(&self.path).await.ok()?;
        let is_same = self.peer_pid.is_some() && connected.peer_pid == self.peer_pid;
        is_same.then_some(connected)
    }

    fn start(
        path: &Path,
        lines: Lines,
        write: OwnedWriteHalf,
        peer_pid: Option<i32>,
        version: Version,
    ) -> Qmp {
        let waiting = Arc::new(Waiting::default());
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let (gone_sender, gone) = watch::channel(false);
        let reader = log::spawn(read_all(
            lines,
            Arc::clone(&waiting),
            events.clone(),
            gone_sender,
        ));
        let writer = tokio::sync::Mutex::new(write);
        let next_id = AtomicU64::new(1);
        Qmp {
            writer,
            waiting,
            events,
            gone,
            next_id,
            version,
            path: path.to_owned(),
            peer_pid,
            reader,
        }
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process that made the socket listen: QEMU, or whoever handed the socket to it.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Every event from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Returns when the connection has ended.
    pub async fn gone(&self) {
        let mut gone = self.gone.clone();
        // An error says that the reading task has ended, which is the same.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.call(command, arguments, None).await
    }

    /// Gives a command together with a file descriptor (`getfd`).
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        self.call(command, arguments, Some(fd)).await
    }

    /// Gives a command and reads its answer as a `T`.
    ///
    /// # Errors
    /// [`QmpError`]; `Unexpected` when the answer is no `T`.
    pub async fn query<T: serde::de::DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Unexpected {
            command: command.to_owned(),
            what: error.to_string(),
        })
    }

    /// Gives a command of the human monitor, for what QMP does not tell.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn human(&self, line: &str) -> Result<String, QmpError> {
        self.query("human-monitor-command", json!({ "command-line": line }))
            .await
    }

    async fn call(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        self.give(command, arguments, fd).await?.answered().await
    }

    /// Gives a command, and does not wait for its answer. QEMU carries commands out in the order in which they were given.
    ///
    /// # Errors
    /// `Gone`.
    pub async fn give(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Given<'_>, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments, "id": id })
        );
        let forget = Forget {
            waiting: &self.waiting,
            id,
        };
        // The reader marks the connection gone before it empties the table, so an entry made after that is seen here.
        if *self.gone.borrow() || self.write(line.as_bytes(), fd).await.is_err() {
            return Err(QmpError::Gone);
        }
        Ok(Given {
            command: command.to_owned(),
            answer,
            _forget: forget,
        })
    }

    async fn write(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        let sent = match fd {
            None => 0,
            Some(fd) => {
                let stream: &UnixStream = writer.as_ref();
                stream
                    .async_io(Interest::WRITABLE, || send_with_fd(stream, line, fd))
                    .await?
            }
        };
        writer.write_all(&line[sent..]).await
    }
}

async fn open(path: &Path) -> Result<(Lines, OwnedWriteHalf, Option<i32>), Failure> {
    let stream = UnixStream::connect(path)
        .await
        .map_err(|error| connect_failure(path, &error))?;
    let peer_pid = stream
        .peer_cred()
        .ok()
        .and_then(|credentials| credentials.pid());
    let (read, write) = stream.into_split();
    Ok((Lines::new(read), write, peer_pid))
}

/// A command that was given.
#[derive(Debug)]
pub struct Given<'a> {
    command: String,
    answer: oneshot::Receiver<Answer>,
    _forget: Forget<'a>,
}

impl Given<'_> {
    /// Waits for its answer.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn answered(self) -> Result<Value, QmpError> {
        let Given {
            command, answer, ..
        } = self;
        match timeout(COMMAND_TIMEOUT, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err((class, description)))) => Err(QmpError::Refused {
                command,
                class,
                description,
            }),
            Ok(Err(_)) => Err(QmpError::Gone),
            Err(_) => Err(QmpError::TimedOut {
                command,
                seconds: COMMAND_TIMEOUT.as_secs(),
            }),
        }
    }
}

/// Takes a call out of the table when it is answered, times out, or is dropped half-way.
#[derive(Debug)]
struct Forget<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.id);
    }
}

fn send_with_fd(stream: &UnixStream, line: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a file descriptor"));
    }
    Ok(rustix::net::sendmsg(
        stream,
        &[IoSlice::new(line)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?)
}

async fn read_all(
    mut lines: Lines,
    waiting: Arc<Waiting>,
    events: broadcast::Sender<QmpEvent>,
    gone: watch::Sender<bool>,
) {
    while let Ok(Some(mut line)) = lines.next().await {
        if let Some(name) = line.get("event").and_then(Value::as_str) {
            let event = QmpEvent {
                name: name.to_owned(),
                data: line.get("data").cloned().unwrap_or(Value::Null),
            };
            tracing::trace!(event = event.name, data = %event.data, "QMP event");
            // Without a subscriber nobody needs it.
            let _ = events.send(event);
            continue;
        }
        let Some(asker) = line
            .get("id")
            .and_then(Value::as_u64)
            .and_then(|id| lock(&waiting).remove(&id))
        else {
            continue;
        };
        let answer = match line.get("error") {
            Some(error) => Err((text(error, "class"), text(error, "desc"))),
            None => Ok(line
                .get_mut("return")
                .map(Value::take)
                .unwrap_or(Value::Null)),
        };
        // Whoever asked may have stopped waiting.
        let _ = asker.send(answer);
    }
    gone.send_replace(true);
    lock(&waiting).clear();
}

fn text(value: &Value, key: &str) -> String {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or("(no words)")
        .to_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// QMP's stream of JSON texts, one a line.
struct Lines {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    fn new(read: OwnedReadHalf) -> Lines {
        Lines {
            reader: BufReader::new(read),
            line: Vec::new(),
        }
    }

    /// The next text, or `None` at the end of the stream. What is no JSON, or is too long, is an error.
    async fn next(&mut self) -> io::Result<Option<Value>> {
        loop {
            let (done, used) = {
                let buffer = self.reader.fill_buf().await?;
                if buffer.is_empty() {
                    return Ok(None);
                }
                let end = buffer.iter().position(|&byte| byte == b'\n');
                let used = end.map_or(buffer.len(), |end| end + 1);
                self.line.extend_from_slice(&buffer[..used]);
                (end.is_some(), used)
            };
            self.reader.consume(used);
            if self.line.len() > MAX_LINE {
                return Err(io::Error::other("a line of QMP is too long"));
            }
            if done {
                let line = std::mem::take(&mut self.line);
                if !line.trim_ascii().is_empty() {
                    return serde_json::from_slice(&line)
                        .map(Some)
                        .map_err(io::Error::other);
                }
            }
        }
    }
}

fn connect_failure(path: &Path, error: &io::Error) -> Failure {
    let shown = path.display();
    let start = format!("start QEMU with -qmp unix:{shown},server=on,wait=off, and give that path");
    match error.kind() {
        io::ErrorKind::NotFound => operator(format!("there is no QMP socket {shown}"), start),
        io::ErrorKind::PermissionDenied => operator(
            format!("not permitted to open the QMP socket {shown}"),
            "pagecopyd's user needs write permission on that socket, and search permission on its directory: put the user \
             into the socket's group and let the group write (QEMU's umask), or use setfacl",
        ),
        io::ErrorKind::ConnectionRefused if !is_socket(path) => {
            operator(format!("{shown} is not a socket"), start)
        }
        io::ErrorKind::ConnectionRefused => operator(
            format!("nobody listens on the QMP socket {shown}: its QEMU has ended"),
            start,
        ),
        _ => operator(
            format!("the QMP socket {shown} cannot be used: {error}"),
            start,
        ),
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

fn taken(path: &Path) -> Failure {
    operator(
        format!(
            "the QMP socket {} is taken by another client (no greeting within 2 s)",
            path.display()
        ),
        "add a second one to QEMU: -qmp unix:/path,server=on,wait=off",
    )
}

fn not_qmp(path: &Path, what: &str) -> Failure {
    operator(
        format!("{} is not a QMP socket: it {what}", path.display()),
        "give the path of QEMU's -qmp unix:…,server=on,wait=off",
    )
}
