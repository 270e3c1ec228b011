//! What an operator says about RDMA: the table `[rdma]`, and how much memory may be pinned.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::parse_size;

/// Table `[rdma]`: whether pages may go over RDMA, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Rdma {
    /// Whether guest memory may cross `networks` unencrypted, by RDMA.
    pub allow_plaintext: bool,
    /// The networks that it may cross: this host listens at an address of an RDMA device in one of them, and calls only
    /// addresses in them.
    pub networks: Vec<Network>,
    /// How much memory may be pinned for a migration, where `migrate` does not say.
    pub pin: Pin,
}

impl Rdma {
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.allow_plaintext && self.networks.is_empty() {
            return Err(
                "rdma.allow-plaintext is true and rdma.networks is empty: name the networks that guest memory may cross \
                 unencrypted, such as [\"192.0.2.0/24\"]"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// Whether an address is in one of the networks.
    #[cfg_attr(not(feature = "rdma"), expect(dead_code))]
    pub(crate) fn includes(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|it| it.includes(address))
    }
}

/// The addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether it holds `address`.
    pub fn includes(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(other)) => {
                let beyond = 32 - u32::from(self.bits);
                (ours.to_bits() ^ other.to_bits())
                    .checked_shr(beyond)
                    .unwrap_or(0)
                    == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(other)) => {
                let beyond = 128 - u32::from(self.bits);
                (ours.to_bits() ^ other.to_bits())
                    .checked_shr(beyond)
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Network, String> {
        let wrong = || format!("{text:?} is no network, such as 192.0.2.0/24 or 2001:db8::/64");
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.parse().ok().filter(|bits| *bits <= most);
        Ok(Network {
            address,
            bits: bits.ok_or_else(wrong)?,
        })
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Network, String> {
        text.parse()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// How much memory may be pinned for RDMA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pin {
    /// As much as the system lets this process pin.
    #[default]
    Auto,
    /// All of the guest's, or RDMA is not used.
    All,
    /// So many bytes.
    Bytes(u64),
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Pin, String> {
        match text {
            "auto" => Ok(Pin::Auto),
            "all" => Ok(Pin::All),
            size => parse_size(size)
                .map(Pin::Bytes)
                .map_err(|_| format!("{text:?} is not auto, all, or a size such as 8GiB")),
        }
    }
}

impl TryFrom<String> for Pin {
    type Error = String;

    fn try_from(text: String) -> Result<Pin, String> {
        text.parse()
    }
}

impl From<Pin> for String {
    fn from(pin: Pin) -> String {
        match pin {
            Pin::Auto => "auto".to_owned(),
            Pin::All => "all".to_owned(),
            Pin::Bytes(bytes) => bytes.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn networks_hold_what_begins_as_they_do() {
        let includes = |network: &str, address: &str| {
            let network: Network = network.parse().unwrap();
            network.includes(address.parse().unwrap())
        };
        assert!(includes("192.0.2.0/24", "192.0.2.255"));
        assert!(!includes("192.0.2.0/24", "192.0.3.0"));
        assert!(includes("0.0.0.0/0", "203.0.113.9"));
        assert!(includes("192.0.2.7/32", "192.0.2.7"));
        assert!(!includes("192.0.2.7/32", "192.0.2.6"));
        assert!(includes("2001:db8::/32", "2001:db8:ffff::1"));
        assert!(!includes("2001:db8::/32", "2001:db9::1"));
        assert!(!includes("::/0", "192.0.2.7"));
        for wrong in ["192.0.2.0", "192.0.2.0/33", "host/24", "::/129", "::/-1"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
        let network: Network = "192.0.2.0/24".parse().unwrap();
        assert_eq!(network.to_string(), "192.0.2.0/24");
    }

    #[test]
    fn how_much_may_be_pinned() {
        for (text, pin) in [
            ("auto", Pin::Auto),
            ("all", Pin::All),
            ("8MiB", Pin::Bytes(8 << 20)),
        ] {
            assert_eq!(text.parse(), Ok(pin));
            assert_eq!(String::from(pin).parse(), Ok(pin));
        }
        assert!("some".parse::<Pin>().unwrap_err().contains("8GiB"));
    }
}
