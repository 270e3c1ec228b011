//! The links that are measured over.

use std::fmt;
use std::str::FromStr;

/// What joins the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Both are one host, and talk over its loopback device.
    Loopback,
    /// Two network namespaces, and a veth pair that lets through what the machine can.
    Veth,
    /// The same, limited to so many Mbit/s in each direction.
    Limited(u32),
    /// Whatever joins two hosts that are named.
    Hosts,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Link::Loopback => f.write_str("loopback"),
            Link::Veth => f.write_str("veth"),
            Link::Hosts => f.write_str("hosts"),
            Link::Limited(mbit) if mbit % 1000 == 0 => write!(f, "{}gbit", mbit / 1000),
            Link::Limited(mbit) => write!(f, "{mbit}mbit"),
        }
    }
}

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Link, String> {
        let limited = |number: &str, factor: u32| {
            let number: Option<u32> = number.parse().ok();
            number
                .and_then(|number| number.checked_mul(factor))
                .filter(|mbit| *mbit > 0)
        };
        let mbit = match text {
            "loopback" => return Ok(Link::Loopback),
            "veth" => return Ok(Link::Veth),
            "hosts" => return Ok(Link::Hosts),
            _ => match (text.strip_suffix("gbit"), text.strip_suffix("mbit")) {
                (Some(number), _) => limited(number, 1000),
                (_, Some(number)) => limited(number, 1),
                _ => None,
            },
        };
        mbit.map(Link::Limited).ok_or_else(|| {
            format!("{text:?} is no link: loopback, veth, or a limit such as 1gbit or 250mbit")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_as_it_is_written() {
        for text in ["loopback", "veth", "hosts", "1gbit", "10gbit", "250mbit"] {
            let link: Link = text.parse().expect("a link");
            assert_eq!(link.to_string(), text);
        }
        for text in ["", "gbit", "0gbit", "-1mbit", "9999999gbit", "wire"] {
            assert!(text.parse::<Link>().is_err(), "{text:?} was taken");
        }
    }
}
