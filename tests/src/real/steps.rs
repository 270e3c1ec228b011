//! Holding a daemon at a named step: the harness's end of `daemon/src/steps.rs`.
//!
//! The daemon must have been built with the feature `steps`. It connects when its first session begins, and is told then
//! which steps are to be held. A daemon that is started again is told nothing: its steps pass.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Listens for one daemon.
#[derive(Debug)]
pub struct Steps {
    socket: PathBuf,
    held: Receiver<Held>,
}

/// A session stands at a step, until this is dropped or told to go on.
#[derive(Debug)]
pub struct Held {
    step: String,
    stream: UnixStream,
}

impl Steps {
    /// Listens at `socket`. The daemon is to be held when it comes to these steps: `"source Send(Commit) 1"` is the first
    /// time that its source's engine sends `Commit`.
    pub fn listen(socket: &Path, holds: &[String]) -> Steps {
        let listener = UnixListener::bind(socket).expect("a unix socket to listen on");
        // The daemon is a user of its own.
        let anybody = fs::Permissions::from_mode(0o666);
        fs::set_permissions(socket, anybody).expect("a socket of ours");
        let (sender, held) = channel();
        let lines: String = holds.iter().map(|hold| format!("{hold}\n")).collect();
        // Ends with the test's process, or when the daemon does.
        std::thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            std::thread::spawn(move || pass_the_rest(&listener));
            tell(stream, &lines, &sender);
        });
        Steps {
            socket: socket.to_owned(),
            held,
        }
    }

    /// Where the daemon is to connect: its `PAGECOPY_STEPS`.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until the daemon stands at one of the steps.
    ///
    /// # Errors
    /// It came to none within `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<Held, String> {
        self.held.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                format!("no step was reached within {timeout:?} (was pagecopyd built with --features steps?)")
            }
            RecvTimeoutError::Disconnected => "the daemon ended before it came to a step".to_owned(),
        })
    }
}

impl Held {
    /// Which step it is.
    pub fn step(&self) -> &str {
        &self.step
    }

    /// Lets the session go on. A daemon that was killed meanwhile does not mind.
    pub fn go(mut self) {
        let _ = self.stream.write_all(b"go\n");
    }
}

fn tell(mut stream: UnixStream, lines: &str, held: &Sender<Held>) {
    if stream.write_all(format!("{lines}\n").as_bytes()).is_err() {
        return;
    }
    let Ok(reader) = stream.try_clone() else {
        return;
    };
    for step in BufReader::new(reader).lines().map_while(Result::ok) {
        let Ok(stream) = stream.try_clone() else {
            return;
        };
        if held.send(Held { step, stream }).is_err() {
            return;
        }
    }
}

/// Daemons that were started again.
fn pass_the_rest(listener: &UnixListener) {
    for mut stream in listener.incoming().map_while(Result::ok) {
        let _ = stream.write_all(b"\n");
        // The daemon takes the end of the connection as well as any answer: it holds nothing.
    }
}
