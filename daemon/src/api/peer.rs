//! Who is at the other end of a connection to the API, and the API's TCP listener.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use transport::Security;
use transport::connect::dns_names;

use crate::reload::Trust;
use crate::sys;

/// Handshakes under way at a time. Whoever comes then waits.
const HANDSHAKES: usize = 32;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long to wait when the system has no descriptor for another connection.
const NO_DESCRIPTOR: Duration = Duration::from_secs(1);

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// On the unix socket: as the kernel has it from when it connected.
    Local {
        /// Its user.
        uid: u32,
        /// Its process.
        pid: Option<i32>,
        /// Its groups, the supplementary ones too.
        groups: Vec<u32>,
    },
    /// Over TLS.
    Remote {
        /// The DNS names in its certificate, in lower case.
        names: Vec<String>,
        /// Its address.
        from: SocketAddr,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local { uid, pid, .. } => {
                write!(f, "uid {uid}")?;
                pid.map_or(Ok(()), |pid| write!(f, " (process {pid})"))
            }
            Peer::Remote { names, from } if names.is_empty() => {
                write!(f, "a certificate without DNS names, from {from}")
            }
            Peer::Remote { names, from } => write!(f, "{}, from {from}", names.join(", ")),
        }
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        let credentials = stream.io().peer_cred();
        let groups = sys::peer_groups(stream.io());
        match (credentials, groups) {
            (Ok(of), Ok(mut groups)) => {
                groups.push(of.gid());
                Peer::Local {
                    uid: of.uid(),
                    pid: of.pid(),
                    groups,
                }
            }
            // Not known, and so nobody.
            (_, error) => {
                tracing::warn!(?error, "who has connected to the API's socket is not known");
                Peer::Local {
                    uid: u32::MAX,
                    pid: None,
                    groups: Vec::new(),
                }
            }
        }
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Peer {
        Peer::Remote {
            names: stream
                .io()
                .get_ref()
                .1
                .peer_certificates()
                .map_or_else(Vec::new, |chain| {
                    chain.first().map_or_else(Vec::new, |own| dns_names(own))
                }),
            from: *stream.remote_addr(),
        }
    }
}

/// Connections over TLS whose client has shown a certificate of one of the authorities.
pub(crate) struct TlsListener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Takes connections of `listener` from now on, with the certificates that are in force when each of them comes.
    ///
    /// # Errors
    /// It is no listener.
    pub(crate) fn new(listener: std::net::TcpListener, trust: Trust) -> io::Result<TlsListener> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let (sender, ready) = mpsc::channel(1);
        tokio::spawn(take(listener, trust, sender));
        Ok(TlsListener { ready, address })
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // The runtime ends.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

async fn take(
    listener: TcpListener,
    trust: Trust,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let turns = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the API cannot take a connection");
                tokio::time::sleep(NO_DESCRIPTOR).await;
                continue;
            }
        };
        let Security::Tls(identity) = trust.now() else {
            continue;
        };
        let acceptor = TlsAcceptor::from(identity.for_clients(&[b"http/1.1"]));
        let ready = ready.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                // The receiver is gone when the daemon ends.
                Ok(Ok(stream)) => drop(ready.send((stream, from)).await),
                Ok(Err(error)) => {
                    tracing::info!(%from, %error, "a client of the API was not let in")
                }
                Err(_) => tracing::info!(%from, "a client of the API did not say who it is"),
            }
            drop(turn);
        });
    }
}
