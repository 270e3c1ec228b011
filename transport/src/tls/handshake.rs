//! The handshake: rustls's unbuffered interface over a bounded socket.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus,
};

use crate::connect::greeting::{ANSWER_LEN, Answer, MAGIC};
use crate::connect::socket::Bounded;
use crate::error::Error;
use crate::tls::Identity;
use crate::tls::alert::handshake_error;
use crate::tls::link::TlsLink;
use crate::tls::record::Records;
use crate::tls::verify::dns_names;

/// Bytes that a peer may send for a handshake to go on; certificates are a few KiB.
pub(crate) const MAX_FLIGHT: usize = 64 << 10;
/// A link, and the names in the peer's certificate.
pub(crate) type Secured = (Box<TlsLink>, Vec<String>);

const WHAT: &str = "shaking hands over TLS";

/// The dialling side.
pub(crate) fn client(mut socket: Bounded, identity: &Identity) -> Result<Secured, Error> {
    let (config, verifier) = identity.client_config()?;
    let mut connection = UnbufferedClientConnection::new(config, identity.name())
        .map_err(|e| handshake_error(&e))?;
    let mut buffers = Buffers::new(true);
    if let Err(error) = shake(&mut *connection, &mut socket, &mut buffers) {
        // Our own verdict on the peer's names says more than the alert that it became.
        let error = verifier.verdict().unwrap_or(error);
        socket.close_gently();
        return Err(error);
    }
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(|e| handshake_error(&e))?;
    let records = Records::new(&secrets, kernel)?;
    Ok((buffers.into_link(socket, records), verifier.names()))
}

/// The accepting side. When only the names are wrong the link comes back
/// with the error, so that the peer can be told.
pub(crate) fn server(
    mut socket: Bounded,
    identity: &Identity,
) -> Result<Secured, (Option<Box<TlsLink>>, Error)> {
    let alone = |error| (None, error);
    let mut connection = UnbufferedServerConnection::new(identity.server_config())
        .map_err(|e| alone(handshake_error(&e)))?;
    let mut buffers = Buffers::new(false);
    if let Err(error) = shake(&mut *connection, &mut socket, &mut buffers) {
        socket.close_gently();
        return Err(alone(error));
    }
    let certificates = connection.peer_certificates().unwrap_or_default();
    let names = certificates.first().map(dns_names).unwrap_or_default();
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(|e| alone(handshake_error(&e)))?;
    let records = Records::new(&secrets, kernel).map_err(alone)?;
    let link = buffers.into_link(socket, records);
    match identity.check_names(&names) {
        Ok(()) => Ok((link, names)),
        Err(error) => Err((Some(link), error)),
    }
}

/// What the handshake reads and writes.
struct Buffers {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Data that came right behind the handshake.
    early: Vec<u8>,
    /// The peer may still turn out to speak no TLS.
    expect_plaintext: bool,
}

impl Buffers {
    fn new(expect_plaintext: bool) -> Buffers {
        Buffers {
            incoming: Vec::new(),
            outgoing: Vec::new(),
            early: Vec::new(),
            expect_plaintext,
        }
    }

    /// The link, with what came right behind the handshake.
    fn into_link(self, socket: Bounded, records: Records) -> Box<TlsLink> {
        Box::new(TlsLink::new(socket, records, self.early, self.incoming))
    }

    /// Reads more of what the peer sends.
    fn read(&mut self, socket: &mut Bounded) -> Result<(), Error> {
        if self.incoming.len() >= MAX_FLIGHT {
            return Err(Error::PeerMisbehaved(
                "a TLS handshake that is too long".to_owned(),
            ));
        }
        let filled = self.incoming.len();
        self.incoming.resize(filled + 4096, 0);
        let read = socket.read(&mut self.incoming[filled..], WHAT);
        self.incoming
            .truncate(filled + read.as_ref().map_or(0, |n| *n));
        read?;
        if std::mem::take(&mut self.expect_plaintext) && self.incoming[0] == MAGIC[0] {
            return Err(self.read_plaintext_refusal(socket));
        }
        Ok(())
    }

    /// The peer answers without TLS: what does it say?
    fn read_plaintext_refusal(&mut self, socket: &mut Bounded) -> Error {
        let mut parse = || -> Result<Answer, Error> {
            let misbehaved = |what: &str| Error::PeerMisbehaved(what.to_owned());
            let mut wanted = ANSWER_LEN;
            loop {
                if let Some(head) = self.incoming.first_chunk::<ANSWER_LEN>() {
                    wanted = ANSWER_LEN + Answer::text_len(head).map_err(misbehaved)?;
                    if self.incoming.len() >= wanted {
                        return Answer::decode(head, &self.incoming[ANSWER_LEN..wanted])
                            .map_err(misbehaved);
                    }
                }
                let filled = self.incoming.len();
                self.incoming.resize(wanted, 0);
                let n = socket.read(&mut self.incoming[filled..], WHAT)?;
                self.incoming.truncate(filled + n);
            }
        };
        match parse() {
            Ok(answer) => Error::PeerIncompatible(answer.text),
            Err(error) => error,
        }
    }
}

/// Both kinds of connection; rustls has the same method on each, but no trait for it.
trait Process {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Process for UnbufferedConnectionCommon<ClientConnectionData> {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Process for UnbufferedConnectionCommon<ServerConnectionData> {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

/// Runs the handshake to its end.
fn shake<C: Process>(
    connection: &mut C,
    socket: &mut Bounded,
    buffers: &mut Buffers,
) -> Result<(), Error> {
    loop {
        let UnbufferedStatus {
            mut discard, state, ..
        } = connection.process(&mut buffers.incoming);
        let mut blocked = false;
        let mut done = false;
        let mut failed = None;
        match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(|to| data.encode(to), &mut buffers.outgoing)?
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                socket.write_all(&buffers.outgoing, WHAT)?;
                buffers.outgoing.clear();
                data.done();
            }
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(Ok(record)) = traffic.next_record() {
                    discard += record.discard;
                    buffers.early.extend_from_slice(record.payload);
                }
            }
            Ok(ConnectionState::BlockedHandshake) => blocked = true,
            Ok(ConnectionState::WriteTraffic(_)) => done = true,
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => return Err(Error::Closed),
            Ok(_) => {
                return Err(Error::PeerMisbehaved(
                    "an unexpected turn of the TLS handshake".to_owned(),
                ));
            }
            Err(error) => failed = Some(error),
        }
        buffers.incoming.drain(..discard);
        if let Some(error) = failed {
            tell(connection, socket, buffers);
            return Err(handshake_error(&error));
        }
        if done {
            return Ok(());
        }
        if blocked {
            buffers.read(socket)?;
        }
    }
}

/// Sends the alert that a failure left behind, if there is one. rustls wants the same received bytes once more; it panics
/// when they are gone. It is asked once only: what it had to send before was encoded before it looked at the bytes that
/// are wrong, and at the next call it would look at them again, and panic on its second alert in a debug build.
fn tell<C: Process>(connection: &mut C, socket: &mut Bounded, buffers: &mut Buffers) {
    if let Ok(ConnectionState::EncodeTlsData(mut data)) =
        connection.process(&mut buffers.incoming).state
        && encode(|to| data.encode(to), &mut buffers.outgoing).is_err()
    {
        return;
    }
    let _ = socket.write_all(&buffers.outgoing, WHAT);
}

/// Appends what rustls encodes to `outgoing`.
fn encode(
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
    outgoing: &mut Vec<u8>,
) -> Result<(), Error> {
    let filled = outgoing.len();
    let needed = match encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        _ => return Ok(()),
    };
    outgoing.resize(filled + needed, 0);
    match encode(&mut outgoing[filled..]) {
        Ok(n) => outgoing.truncate(filled + n),
        Err(error) => return Err(Error::Misuse(format!("encoding a TLS handshake: {error}"))),
    }
    Ok(())
}
