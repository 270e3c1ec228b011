//! A download from the guest that lasts as long as a test wants, over one TCP connection.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::switch::{Switch, ask};

/// How often a piece is taken.
const TURN: Duration = Duration::from_millis(20);
/// Of what is left, one part in so many is taken in a turn: there is always something left.
const PARTS: u64 = 1500;
/// What the kernel may hold for us; the rest is still in the guest, and has to move with it.
const HELD: usize = 32 << 10;

/// A download under way.
#[derive(Debug)]
pub struct Download {
    /// The rest is taken at once when it is dropped.
    hurry: Sender<()>,
    taken: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
    file: PathBuf,
}

impl Download {
    /// Begins to take `/blob` from the guest, slowly, into `file`.
    pub fn start(switch: &Switch, file: &Path) -> Download {
        let stream = switch.connect().expect("the guest serves HTTP");
        rustix::net::sockopt::set_socket_recv_buffer_size(&stream, HELD)
            .expect("a socket takes a size");
        let (hurry, slowly) = channel();
        let taken = Arc::default();
        let (count, to) = (Arc::clone(&taken), file.to_owned());
        Download {
            hurry,
            taken,
            thread: std::thread::spawn(move || take(stream, &to, &slowly, &count)),
            file: file.to_owned(),
        }
    }

    /// Bytes so far.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Takes all the rest at once, and returns the SHA-256 of the whole.
    ///
    /// # Errors
    /// The connection broke, in words.
    pub fn finish(self) -> Result<String, String> {
        drop(self.hurry);
        self.thread.join().expect("the download does not panic")?;
        let output = Command::new("sha256sum")
            .arg(&self.file)
            .output()
            .expect("sha256sum can be called");
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    }
}

fn take(
    mut stream: TcpStream,
    file: &Path,
    slowly: &Receiver<()>,
    taken: &AtomicU64,
) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("the download broke: {error}");
    ask(&mut stream, "/blob").map_err(broken)?;
    let mut stream = BufReader::with_capacity(4096, stream);
    let mut left = length(&mut stream).map_err(broken)?;
    let mut file = File::create(file).map_err(broken)?;
    while left > 0 {
        let piece = match slowly.recv_timeout(TURN) {
            Err(RecvTimeoutError::Timeout) => left.div_ceil(PARTS),
            _ => left,
        };
        let mut bytes = vec![0; usize::try_from(piece).expect("a file of some megabytes")];
        stream.read_exact(&mut bytes).map_err(broken)?;
        file.write_all(&bytes).map_err(broken)?;
        taken.fetch_add(piece, Ordering::Relaxed);
        left -= piece;
    }
    Ok(())
}

/// Reads the head of the answer: how long its body is.
fn length(stream: &mut impl BufRead) -> std::io::Result<u64> {
    let mut length = None;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        if line.trim().is_empty() {
            return length.ok_or_else(|| std::io::Error::other("no length"));
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
    }
}
