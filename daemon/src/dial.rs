//! Reaching the other daemon.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use transport::{Address, Channel, Error, Greeting, Peer, Regions, Security};
use uuid::Uuid;

use crate::failure::{Failure, Fault, host, operator};
use crate::names;
use crate::rdma::{self, Asked, Plan};
use crate::reload::Trust;
use crate::session::link_failure;

/// How long making one channel may take.
pub const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// The other daemon, and how it is trusted.
#[derive(Clone, Debug)]
pub struct Target {
    /// `HOST:PORT`, or `unix:PATH`.
    pub to: String,
    /// TLS or not.
    pub security: Trust,
    /// How to go over RDMA, if at all.
    pub(crate) rdma: Option<Plan>,
    /// Who is meant: a peer with one of these names. None: whoever is let in.
    pub names: Vec<String>,
}

/// Why there is no connection.
#[derive(Debug)]
pub struct Unreached {
    /// Whose fault it is, and what to do.
    pub failure: Failure,
    /// Somebody answers at that address: by a refusal, a certificate, or the end of what had begun. Not so where the name is not
    /// known, the connection was refused by the host, timed out, or found no route.
    pub answers: bool,
}

impl Unreached {
    /// What became of dialling, in the transport's words.
    fn by(to: &str, error: &Error) -> Unreached {
        let failure = link_failure(error);
        Unreached {
            failure: Failure {
                what: format!("{to} cannot be connected to: {}", failure.what),
                ..failure
            },
            answers: !matches!(
                error,
                Error::Unreached { .. } | Error::Misuse(_) | Error::NoMemory(_)
            ),
        }
    }

    /// Nobody was met.
    fn nobody(failure: Failure) -> Unreached {
        Unreached {
            failure,
            answers: false,
        }
    }

    /// Somebody was, and is of no use.
    pub(crate) fn met(failure: Failure) -> Unreached {
        Unreached {
            failure,
            answers: true,
        }
    }
}

impl From<Unreached> for Failure {
    fn from(unreached: Unreached) -> Failure {
        unreached.failure
    }
}

/// The addresses that `HOST:PORT` (or `unix:PATH`) stands for. HOST may be a name, an IPv4 address or an IPv6 address in
/// brackets.
///
/// # Errors
/// It is malformed, or the name is not known.
pub async fn resolve(to: &str) -> Result<Vec<Address>, Failure> {
    if let Some(path) = to.strip_prefix("unix:") {
        return Ok(vec![Address::Unix(PathBuf::from(path))]);
    }
    check_host_port(to)?;
    known(to, tokio::net::lookup_host(to).await)
}

/// The addresses to listen on. As [`resolve`], and port 0 lets the kernel choose.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_to_listen(listen: &str) -> Result<Vec<Address>, Failure> {
    match listen.strip_prefix("unix:") {
        Some(path) => Ok(vec![Address::Unix(PathBuf::from(path))]),
        None => known(listen, listen.to_socket_addrs()),
    }
}

/// What was found out about the name in `to`.
fn known(
    to: &str,
    found: io::Result<impl Iterator<Item = SocketAddr>>,
) -> Result<Vec<Address>, Failure> {
    let found: Vec<Address> = match found {
        Ok(found) => found.map(Address::Tcp).collect(),
        Err(error) => {
            return Err(operator(
                format!("the host of {to} is not known: {error}"),
                "check the name, or give an address",
            ));
        }
    };
    if found.is_empty() {
        return Err(operator(
            format!("the host of {to} has no address"),
            "check the name, or give an address",
        ));
    }
    Ok(found)
}

/// Checks the form of `HOST:PORT`.
///
/// # Errors
/// Says what would be right.
pub fn check_host_port(to: &str) -> Result<(), Failure> {
    let remedy = "write HOST:PORT, such as host-b:7070, 192.0.2.7:7070 or [2001:db8::7]:7070";
    let Some((name, port)) = to.rsplit_once(':') else {
        return Err(operator(format!("{to:?} has no port"), remedy));
    };
    if port.parse::<u16>().is_ok_and(|port| port != 0) && !name.is_empty() {
        let ambiguous = name.contains(':') && to.parse::<SocketAddr>().is_err();
        if !ambiguous {
            return Ok(());
        }
    }
    Err(operator(format!("{to:?} is not HOST:PORT"), remedy))
}

/// A connection that was made.
pub struct Dialled {
    /// Its channels, the control channel first.
    pub channels: Vec<Box<dyn Channel>>,
    /// Who is at the other end.
    pub peer: Peer,
    /// What its data channels go over, and why, where that is worth a word.
    pub notice: Option<String>,
}

/// Makes a connection, the control channel first. `channels` says how many channels it has with the address that is
/// connected to, since another of the name's addresses may be reached by another link.
///
/// # Errors
/// The name is not known, nobody answers, the peer refuses, or one side does not trust the other.
pub async fn dial(
    target: &Target,
    channels: impl Fn(&Address) -> u16 + Send + 'static,
    regions: &Regions,
) -> Result<Dialled, Unreached> {
    let addresses = resolve(&target.to).await.map_err(Unreached::nobody)?;
    let (security, regions, to) = (target.security.now(), regions.clone(), target.to.clone());
    let (names, plan) = (target.names.clone(), target.rdma.clone());
    let task = tokio::task::spawn_blocking(move || {
        // Of several addresses, what one says at which somebody answers tells most.
        let mut failure: Option<Unreached> = None;
        for address in addresses {
            match dial_one(&address, &security, channels(&address), &regions) {
                Ok((made, peer)) if names::includes(&names, &peer) => {
                    let again = || dial_one(&address, &security, channels(&address), &regions);
                    return over_rdma(&to, made, peer, plan.as_ref(), &regions, again);
                }
                Ok((_, peer)) => return Err(Unreached::met(another(&to, &names, &peer))),
                // Another of the name's addresses may be the one that is listened on; a refusal is an answer.
                Err(error) => {
                    let unreached = Unreached::by(&to, &error);
                    let goes_on = matches!(error, Error::Io { .. } | Error::Unreached { .. });
                    if unreached.answers || failure.is_none() {
                        failure = Some(unreached);
                    }
                    if !goes_on {
                        break;
                    }
                }
            }
        }
        let none = || Unreached::nobody(Failure::new(Fault::Network, "no address", ""));
        Err(failure.unwrap_or_else(none))
    });
    task.await
        .map_err(|error| Unreached::nobody(host(error.to_string(), "report this")))?
}

/// Has the data channels go over RDMA, if that is planned and the other host takes part. Where a connection was spoiled by
/// trying, there is another by `again`.
fn over_rdma(
    to: &str,
    channels: Vec<Box<dyn Channel>>,
    peer: Peer,
    plan: Option<&Plan>,
    regions: &Regions,
    again: impl Fn() -> Result<(Vec<Box<dyn Channel>>, Peer), Error>,
) -> Result<Dialled, Unreached> {
    let Some(plan) = plan.filter(|_| channels.len() > 1) else {
        return Ok(Dialled {
            channels,
            peer,
            notice: None,
        });
    };
    let (channels, why) = match rdma::ask(channels, regions, plan) {
        Asked::Over(channels, address) => {
            return Ok(Dialled {
                channels,
                peer,
                notice: Some(format!("pages go over RDMA, to {address}, unencrypted")),
            });
        }
        Asked::Declined(channels, why) => (Some(channels), why),
        Asked::Spoiled(why) => (None, why),
    };
    if plan.must {
        return Err(Unreached::met(operator(
            format!("no RDMA to the destination: {why}"),
            "see to that, or use --transport auto or tcp",
        )));
    }
    let (channels, peer) = match channels {
        Some(channels) => (channels, peer),
        None => again().map_err(|error| Unreached::by(to, &error))?,
    };
    Ok(Dialled {
        channels,
        peer,
        notice: Some(format!("pages go over TCP: {why}")),
    })
}

/// Who listens is let in, and is not the one that the migration was begun with.
fn another(to: &str, names: &[String], peer: &Peer) -> Failure {
    operator(
        format!(
            "{to} is not the host that the migration was begun with: its certificate says {}, and not {}",
            peer.names.join(", "),
            names.join(" or ")
        ),
        "check the address (`pagecopy recover ID --to HOST:PORT` gives another), or give pagecopyd there the certificate back with \
         which the migration began, or one with the same DNS name",
    )
}

/// Makes a connection of a control channel alone, to ask what became of a migration.
///
/// # Errors
/// As [`dial`].
pub async fn dial_control(target: &Target) -> Result<Box<dyn Channel>, Unreached> {
    let dialled = dial(target, |_| 1, &Regions::new()).await?;
    dialled
        .channels
        .into_iter()
        .next()
        .ok_or_else(|| Unreached::met(host("no channel was made", "report this")))
}

/// What nobody else knows: random, but for six bits of each half.
pub(crate) fn fresh_secret() -> [u8; 32] {
    let mut secret = [0; 32];
    for half in secret.chunks_exact_mut(16) {
        half.copy_from_slice(Uuid::new_v4().as_bytes());
    }
    secret
}

fn dial_one(
    address: &Address,
    security: &Security,
    channels: u16,
    regions: &Regions,
) -> Result<(Vec<Box<dyn Channel>>, Peer), Error> {
    let session = *Uuid::new_v4().as_bytes();
    let mut made = Vec::new();
    let mut peer = None;
    for channel in 0..channels {
        let greeting = Greeting {
            session,
            channel,
            channels,
        };
        let (channel, who) =
            transport::connect::connect(address, security, &greeting, regions, DIAL_LIMIT)?;
        made.push(channel);
        peer = Some(who);
    }
    let peer =
        peer.ok_or_else(|| Error::Misuse("a connection has at least one channel".to_owned()))?;
    Ok((made, peer))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn forms_of_an_address() {
        for good in [
            "host:1",
            "127.0.0.1:7070",
            "[::1]:7070",
            "a.b.example:65535",
        ] {
            check_host_port(good).unwrap();
        }
        for bad in [
            "host",
            "host:",
            ":1",
            "host:0",
            "host:70000",
            "::1:7070",
            "host:port",
        ] {
            assert!(
                check_host_port(bad)
                    .unwrap_err()
                    .remedy
                    .contains("HOST:PORT"),
                "{bad}"
            );
        }
    }

    /// Whether an operator's word that the other host is fenced may count.
    #[tokio::test]
    async fn what_failed_is_told_and_whether_anybody_is_there() {
        for error in [
            Error::Closed,
            Error::Refused("full".into()),
            Error::Untrusted("another name".into()),
            Error::PeerIncompatible("no TLS".into()),
            Error::PeerMisbehaved("no greeting".into()),
            // It has let us in, and says nothing.
            Error::io("waiting", &io::ErrorKind::TimedOut.into()),
        ] {
            assert!(Unreached::by("host-b:1", &error).answers, "{error}");
        }
        let target = |to: &str| Target {
            to: to.to_owned(),
            security: Trust::new(Security::Plaintext),
            rdma: None,
            names: Vec::new(),
        };
        // Port 1 of this host is nobody's.
        for (to, word) in [
            ("127.0.0.1:1", "nobody answers: Connection refused"),
            ("no-such-host.invalid:1", "is not known"),
            ("unix:/nowhere/sock", "nobody answers: No such file"),
        ] {
            let unreached = dial_control(&target(to)).await.err().unwrap();
            assert!(!unreached.answers, "{unreached:?}");
            let what = unreached.failure.what;
            assert!(what.contains(word) && what.contains(to), "{what}");
        }
    }

    #[tokio::test]
    async fn names_and_sockets_are_resolved() {
        let found = resolve("[::1]:7070").await.unwrap();
        assert_eq!(found, [Address::Tcp("[::1]:7070".parse().unwrap())]);
        assert_eq!(
            resolve("unix:/run/x").await.unwrap(),
            [Address::Unix("/run/x".into())]
        );
        assert!(
            resolve("no-such-host.invalid:1")
                .await
                .unwrap_err()
                .what
                .contains("no-such-host.invalid")
        );
    }
}
