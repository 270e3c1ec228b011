//! The link to a peer: which network device leads there, and how fast it says it is.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use pagecopy::limits::MAX_DATA_CHANNELS;
use transport::Address;

/// What one channel carries on a core of its own, in Mbit/s: measured over loopback at 9 to 13 Gbit/s in the clear and 7
/// with TLS.
const CHANNEL_MBIT_S: u32 = 10_000;
/// Channels, at least, where there is a core for each: one that waits for its peer leaves the other working.
const LEAST: u16 = 2;
/// Channels where the link does not say its speed: enough for 40 Gbit/s.
const UNKNOWN: u16 = 4;

/// Data channels of a post-copy at least: one is for pages that somebody waits for.
pub(crate) const POSTCOPY_CHANNELS: u16 = 2;

/// How many data channels to open to `address`: as many as its link needs, one besides where there may be a post-copy, since
/// that which is for pages that somebody waits for carries little else, and no more than there are cores.
pub(crate) fn default_channels(address: &Address, may_be_postcopy: bool) -> u16 {
    channels(cores(), link_mbit_s(address), may_be_postcopy)
}

/// Cores that this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn channels(cores: usize, link_mbit_s: Option<u32>, may_be_postcopy: bool) -> u16 {
    let wanted = link_mbit_s.map_or(UNKNOWN, |speed| {
        u16::try_from(speed.div_ceil(CHANNEL_MBIT_S)).unwrap_or(u16::MAX)
    });
    let (least, besides) = match may_be_postcopy {
        true => (POSTCOPY_CHANNELS, 1),
        false => (1, 0),
    };
    let wanted = wanted.max(LEAST).saturating_add(besides);
    let cores = u16::try_from(cores).unwrap_or(u16::MAX);
    wanted.min(cores).clamp(least, MAX_DATA_CHANNELS)
}

/// The speed of the device that leads to `address`, in Mbit/s, as it says itself (`/sys/class/net/NAME/speed`). Virtual
/// devices often say nothing.
fn link_mbit_s(address: &Address) -> Option<u32> {
    let Address::Tcp(address) = address else {
        return None;
    };
    let ours = local_address(*address).ok()?;
    let devices = if_addrs::get_if_addrs().ok()?;
    let device = devices.iter().find(|device| device.ip() == ours)?;
    let speed = std::fs::read_to_string(format!("/sys/class/net/{}/speed", device.name)).ok()?;
    // -1 where it is not known.
    speed.trim().parse().ok().filter(|speed| *speed > 0)
}

/// Our address towards `peer`. Connecting a datagram socket asks for the route and sends nothing.
fn local_address(peer: SocketAddr) -> std::io::Result<IpAddr> {
    let any = match peer {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn channels_follow_the_link_up_to_the_cores() {
        assert_eq!(channels(64, Some(100_000), false), 10);
        assert_eq!(channels(64, Some(25_000), false), 3);
        assert_eq!(channels(64, Some(1_000), false), 2);
        assert_eq!(channels(8, Some(100_000), false), 8);
        assert_eq!(channels(64, None, false), 4);
        assert_eq!(channels(1, Some(100_000), false), 1);
        assert_eq!(channels(1024, Some(4_000_000), false), MAX_DATA_CHANNELS);
    }

    #[test]
    fn a_postcopy_has_a_channel_more_where_there_is_a_core_for_it() {
        assert_eq!(channels(64, Some(25_000), true), 4);
        assert_eq!(channels(2, Some(25_000), true), 2);
        assert_eq!(channels(1, Some(25_000), true), POSTCOPY_CHANNELS);
        assert_eq!(channels(1024, Some(4_000_000), true), MAX_DATA_CHANNELS);
    }

    #[test]
    fn the_way_to_ourselves_is_ours() {
        let peer = "127.0.0.1:9".parse().unwrap();
        assert_eq!(local_address(peer).unwrap().to_string(), "127.0.0.1");
        assert_eq!(link_mbit_s(&Address::Unix("/nowhere".into())), None);
    }
}
