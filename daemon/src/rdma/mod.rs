//! Whether a migration's data channels go over RDMA: where both hosts have a device, reach each other and allow it; else
//! over TCP. Decided when a connection is made, before a page has moved; what goes over RDMA falls back to TCP and returns
//! by itself (`spared.rs`).

#[cfg(feature = "rdma")]
mod again;
mod config;
#[cfg(feature = "rdma")]
mod link;
#[cfg(not(feature = "rdma"))]
#[path = "without.rs"]
mod link;
#[cfg(feature = "rdma")]
mod spared;

use std::fmt;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

pub use self::config::{Network, Pin, Rdma};
pub(crate) use self::link::{Asked, Waiting, ask};
use crate::api::types::Transport;
use crate::failure::{Failure, operator};
use crate::qmp::{Qmp, QmpError};
use crate::units::show_bytes;

/// The least and the most that is registered at a time. Small, so that little is pinned that holds nothing; large, so that a
/// large guest needs few keys.
const CHUNKS: (u64, u64) = (4 << 20, 64 << 20);
/// What a channel needs pinned for itself.
const CHANNEL_BYTES: u64 = 2 << 20;
/// What is said where the operator has not allowed it.
const NOT_ALLOWED: &str = "its configuration does not allow it: pages go over RDMA unencrypted";
const ALLOW: &str =
    "set allow-plaintext = true, and the networks, in [rdma] of both hosts' configuration";

/// Who hears of what becomes of RDMA while pages go over it, in words.
#[derive(Clone)]
#[cfg_attr(not(feature = "rdma"), expect(dead_code))]
pub(crate) struct Hearer(Arc<dyn Fn(String) + Send + Sync>);

impl Hearer {
    pub(crate) fn new(hear: impl Fn(String) + Send + Sync + 'static) -> Hearer {
        Hearer(Arc::new(hear))
    }
}

impl fmt::Debug for Hearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hearer")
    }
}

/// What is to be tried: RDMA, by this host's side of it.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "rdma"), expect(dead_code))]
pub(crate) struct Plan {
    /// Where this host may call.
    pub(crate) allowed: Rdma,
    /// Bytes of the guest's RAM.
    pub(crate) bytes: u64,
    /// Bytes that may be pinned here.
    pub(crate) pin_limit: Option<u64>,
    /// Rather no migration than TCP.
    pub(crate) must: bool,
    pub(crate) hearer: Hearer,
}

/// What the data channels of a migration are to go over.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// TCP; and why, where that is worth a word.
    Tcp(Option<String>),
    /// RDMA, if the other host takes part.
    Rdma(Box<Plan>),
}

/// What there is to decide by, at the source.
pub(crate) struct Question<'a> {
    pub(crate) transport: Transport,
    pub(crate) pin: Option<Pin>,
    pub(crate) allowed: &'a Rdma,
    /// Bytes of the guest's RAM.
    pub(crate) bytes: u64,
    /// Whether the destination may come to read all of it.
    pub(crate) is_read: bool,
    pub(crate) hearer: Hearer,
}

impl Question<'_> {
    /// Decides for the source, whose guest is in `qmp`.
    ///
    /// # Errors
    /// RDMA was asked for, and cannot be.
    pub(crate) async fn decide(self, qmp: &Qmp) -> Result<Way, Failure> {
        let plan = match self.plan() {
            _ if self.transport == Transport::Tcp => return Ok(Way::Tcp(None)),
            Ok(plan) => match discards(qmp).await {
                None => return Ok(Way::Rdma(Box::new(plan))),
                Some(why) => Err((why, "use --transport tcp for this guest".to_owned())),
            },
            Err(refused) => Err::<Plan, _>(refused),
        };
        let Err((why, remedy)) = plan else {
            return Ok(Way::Tcp(None));
        };
        if self.transport == Transport::Rdma {
            return Err(operator(format!("no RDMA on this host: {why}"), remedy));
        }
        // Who has not set it up does not miss it.
        let told = self.allowed.allow_plaintext;
        Ok(Way::Tcp(
            told.then(|| format!("pages go over TCP: {why}; {remedy}")),
        ))
    }

    fn plan(&self) -> Result<Plan, (String, String)> {
        usable(self.allowed)?;
        let pin = self.pin.unwrap_or(self.allowed.pin);
        Ok(Plan {
            allowed: self.allowed.clone(),
            bytes: self.bytes,
            pin_limit: pin_limit(pin, self.bytes, self.is_read)?,
            must: self.transport == Transport::Rdma,
            hearer: self.hearer.clone(),
        })
    }
}

/// Whether this host may use RDMA, and can. What is in the way, and what helps.
fn usable(allowed: &Rdma) -> Result<(), (String, String)> {
    link::available().map_err(|why| (why, "use --transport tcp, or auto".to_owned()))?;
    if allowed.allow_plaintext {
        Ok(())
    } else {
        Err((NOT_ALLOWED.to_owned(), ALLOW.to_owned()))
    }
}

/// What may be pinned of a guest with so many bytes, `whole`: at a time. Without the system's limit there is none. No limit is
/// too low where all devices fetch pages on demand, for which nothing is pinned.
fn pin_limit(pin: Pin, bytes: u64, whole: bool) -> Result<Option<u64>, (String, String)> {
    let least = match link::pages_on_demand() {
        true => 0,
        false => least(pin, bytes, whole),
    };
    limit_within(getrlimit(Resource::Memlock).current, pin, bytes, least)
}

/// How much of a guest has to be pinned, where anything is.
fn least(pin: Pin, bytes: u64, whole: bool) -> u64 {
    if whole || pin == Pin::All {
        bytes
    } else {
        bytes.min(4 * chunk(bytes))
    }
}

/// What may be pinned, which is to be `least` at least.
fn limit_within(
    system: Option<u64>,
    pin: Pin,
    bytes: u64,
    least: u64,
) -> Result<Option<u64>, (String, String)> {
    let channels = CHANNEL_BYTES * u64::from(pagecopy::limits::MAX_DATA_CHANNELS).min(8);
    let system = system.map(|limit| limit.saturating_sub(channels));
    let (limit, by, remedy) = match pin {
        Pin::Bytes(size) if system.is_none_or(|system| size <= system) => (
            Some(size),
            "--rdma-pin, or pin in [rdma]",
            "raise it, or use --transport tcp",
        ),
        _ => (
            system,
            "RLIMIT_MEMLOCK",
            "LimitMEMLOCK=infinity in the daemon's unit raises it (`ulimit -l unlimited` in a shell)",
        ),
    };
    match limit {
        Some(limit) if limit < least => Err((
            format!(
                "{} of the guest's {} would have to be pinned, and {by} allows {}",
                show_bytes(least),
                show_bytes(bytes),
                show_bytes(limit)
            ),
            remedy.to_owned(),
        )),
        limit => Ok(limit),
    }
}

/// How much of a guest with so many bytes is registered at a time.
fn chunk(bytes: u64) -> u64 {
    (bytes / 4096).next_power_of_two().clamp(CHUNKS.0, CHUNKS.1)
}

/// Whether the guest's QEMU may discard memory: pages that a device has pinned are then the guest's no more, and the device
/// does not know. Returns what may.
async fn discards(qmp: &Qmp) -> Option<String> {
    match qmp.query::<Value>("query-balloon", json!({})).await {
        // There is none.
        Err(QmpError::Refused { class, .. }) if class == "DeviceNotActive" => {}
        Ok(_) => return Some("the guest has a virtio-balloon".to_owned()),
        Err(error) => {
            return Some(format!(
                "whether the guest has a balloon is not known ({error})"
            ));
        }
    }
    let devices = qmp
        .query::<Vec<Value>>("query-memory-devices", json!({}))
        .await;
    match devices {
        Ok(devices) if devices.iter().any(|it| it["type"] == "virtio-mem") => {
            Some("the guest has a virtio-mem".to_owned())
        }
        Ok(_) => None,
        Err(error) => Some(format!(
            "the guest's memory devices are not known ({error})"
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn no_more_is_pinned_than_the_system_allows_and_the_remedy_is_said() {
        let bytes = 4 * GIB;
        let limit = |system, pin, whole| limit_within(system, pin, bytes, least(pin, bytes, whole));
        assert_eq!(limit(None, Pin::Auto, true), Ok(None));
        assert_eq!(limit(None, Pin::All, false), Ok(None));
        assert_eq!(
            limit(Some(GIB), Pin::Auto, false),
            Ok(Some(GIB - (16 << 20)))
        );
        let (why, remedy) = limit(Some(GIB), Pin::Auto, true).unwrap_err();
        assert!(why.contains("RLIMIT_MEMLOCK"), "{why}");
        assert!(remedy.contains("LimitMEMLOCK=infinity"), "{remedy}");
        assert!(limit(Some(GIB), Pin::All, false).is_err());
        // 8 MiB, as systems come.
        assert!(limit(Some(8 << 20), Pin::Auto, false).is_err());
        let half = Pin::Bytes(GIB / 2);
        assert_eq!(limit(Some(GIB), half, false), Ok(Some(GIB / 2)));
        let (why, _) = limit(None, half, true).unwrap_err();
        assert!(why.contains("--rdma-pin"), "{why}");
        // Nothing is to be pinned, and no more may be than was said.
        assert_eq!(limit_within(None, half, bytes, 0), Ok(Some(GIB / 2)));
        assert_eq!(limit_within(Some(8 << 20), Pin::All, bytes, 0), Ok(Some(0)));
    }

    #[test]
    fn chunks_grow_with_the_guest() {
        assert_eq!(chunk(GIB), 4 << 20);
        assert_eq!(chunk(64 * GIB), 16 << 20);
        assert_eq!(chunk(4096 * GIB), 64 << 20);
    }

    #[test]
    fn who_has_not_allowed_it_is_told_how() {
        let off = Rdma::default();
        let (why, _) = usable(&off).unwrap_err();
        let expected = link::available().err().unwrap_or(NOT_ALLOWED.to_owned());
        assert_eq!(why, expected);
    }
}
