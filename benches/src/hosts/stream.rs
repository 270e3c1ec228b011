//! What streams between two hosts carry that nobody packs, unpacks or places: as they are, or sealed and opened by the kernel.
//!
//! The key is the same at both ends and no secret: this is for measuring.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use ::tests::real::{Sealing, seal_by_kernel};

/// As many as the ways have that are measured beside it.
const STREAMS: usize = 2;
/// Bytes that are written or read at a time.
const PIECE: usize = 1 << 20;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads, from threads, all that one caller's streams bring.
///
/// # Errors
/// The address cannot be listened at.
pub(super) fn drain(at: SocketAddr, sealed: bool) -> Result<SocketAddr, String> {
    let listener =
        TcpListener::bind(at).map_err(|error| format!("cannot listen at {at}: {error}"))?;
    let bound = listener.local_addr().map_err(|error| error.to_string())?;
    std::thread::spawn(move || {
        for stream in listener.incoming().take(STREAMS).flatten() {
            std::thread::spawn(move || read_all(stream, sealed));
        }
    });
    Ok(bound)
}

/// To the end, which the other side sees when the stream is closed.
fn read_all(mut stream: TcpStream, sealed: bool) -> io::Result<()> {
    if sealed {
        seal_by_kernel(&stream, Sealing::Received)?;
    }
    // From here on the other side may send.
    stream.write_all(&[0])?;
    let mut piece = vec![0; PIECE];
    while stream.read(&mut piece)? > 0 {}
    Ok(())
}

/// Sends `mib` MiB to whoever [drains](drain) there; how many milliseconds until all of it was read.
///
/// # Errors
/// The kernel has no TLS, or the link broke.
pub(super) fn fill(to: SocketAddr, mib: u64, sealed: bool) -> Result<f64, String> {
    // All of them first: the other side waits for as many.
    let gone = |error: io::Error| format!("a stream to {to}: {error}");
    let streams = (0..STREAMS).map(|_| TcpStream::connect_timeout(&to, PATIENCE).map_err(gone));
    let streams: Vec<TcpStream> = streams.collect::<Result<_, _>>()?;
    for stream in &streams {
        make_ready(stream, sealed)?;
    }
    let share = mib.div_ceil(STREAMS as u64);
    let begun = Instant::now();
    let sent = std::thread::scope(|scope| {
        let threads = streams
            .into_iter()
            .map(|it| scope.spawn(move || send_all(it, share)));
        let threads: Vec<_> = threads.collect();
        let ends = threads.into_iter().map(|thread| thread.join());
        ends.map(|end| end.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
            .collect::<io::Result<Vec<()>>>()
    });
    sent.map_err(|error| format!("a stream to {to}: {error}"))?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn make_ready(mut stream: &TcpStream, sealed: bool) -> Result<(), String> {
    if sealed {
        seal_by_kernel(stream, Sealing::Sent).map_err(|error| {
            format!("the kernel has no TLS of its own ({error}): the module tls must be there (modprobe tls)")
        })?;
    }
    let answered = stream.read_exact(&mut [0]);
    answered.map_err(|error| match sealed {
        true => format!("the kernel there has no TLS of its own ({error}): modprobe tls"),
        false => format!("a stream: {error}"),
    })
}

fn send_all(mut stream: TcpStream, mib: u64) -> io::Result<()> {
    let piece = vec![0x5a; PIECE];
    for _ in 0..mib {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("it answers")),
    }
}

#[cfg(test)]
mod tests {
    use ::tests::real::{kernel_tls, skipped};

    use super::*;

    const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

    #[test]
    fn streams_carry_all() {
        let at = drain(ANY.into(), false).expect("a free port");
        assert!(fill(at, 16, false).expect("it is read") > 0.0);
    }

    #[test]
    fn ktls_streams_carry_all_where_the_kernel_has_it() {
        let at = drain(ANY.into(), true).expect("a free port");
        let filled = fill(at, 16, true);
        if let Err(reason) = kernel_tls() {
            let why = filled.expect_err("no TLS");
            assert!(why.contains("modprobe tls"), "{why}");
            return skipped(&format!("this kernel has no TLS: {reason}"));
        }
        assert!(filled.expect("it is opened and read") > 0.0);
    }
}
