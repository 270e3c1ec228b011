//! The network that the guest is in: on each host a bridge with the guest's tap device, and a switch that joins them. Who
//! talks to the guest from outside does so from the switch.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::super::net::{Net, Side, in_namespace, run};
use super::super::scratch::unique;
use super::super::{PATIENCE, eventually};

/// The guest's address.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
/// The address from which it is talked to.
const OUTSIDE: &str = "10.78.0.1/24";
/// How long an answer over HTTP may take. A guest that stands still takes longer than one that moves.
const ANSWER: Duration = Duration::from_secs(60);

/// The switch, in a namespace of its own, with a port to each host: `to-a` and `to-b`. It goes away on drop.
#[derive(Debug)]
pub struct Switch {
    name: String,
}

impl Switch {
    /// Makes the switch, and on each host a bridge with the device `tap0` and a cable to the switch.
    pub fn between(net: &Net) -> Switch {
        let switch = Switch {
            name: format!("{}-switch", unique()),
        };
        ip(&["netns", "add", &switch.name]);
        switch.bridge(OUTSIDE);
        for side in [Side::A, Side::B] {
            let (host, port) = (net.namespace(side), port(side));
            let on_host = |arguments: &[&str]| ip(&[&["-n", &host], arguments].concat());
            on_host(&["link", "add", "br0", "type", "bridge"]);
            on_host(&[
                "link",
                "add",
                "uplink",
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                &switch.name,
            ]);
            on_host(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
            for device in ["uplink", "tap0"] {
                on_host(&["link", "set", device, "master", "br0", "up"]);
            }
            on_host(&["link", "set", "br0", "up"]);
            switch.ip(&["link", "set", port, "master", "br0", "up"]);
        }
        switch
    }

    fn bridge(&self, address: &str) {
        self.ip(&["link", "add", "br0", "type", "bridge"]);
        self.ip(&["address", "add", address, "dev", "br0"]);
        self.ip(&["link", "set", "br0", "up"]);
    }

    /// The port behind which the switch believes this card to be, as `bridge fdb` shows it.
    pub fn port_of(&self, mac: &str) -> Option<String> {
        let output = Command::new("bridge")
            .args(["-n", &self.name, "-j", "fdb", "show", "br", "br0"])
            .output()
            .expect("bridge can be called");
        let table: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("bridge prints JSON");
        let entry = table
            .as_array()?
            .iter()
            .find(|entry| entry["mac"].as_str() == Some(mac))?;
        entry["ifname"].as_str().map(str::to_owned)
    }

    /// Waits until the switch has learnt that this card is on `side`.
    pub fn wait_learnt(&self, mac: &str, side: Side) {
        let learnt = eventually(PATIENCE, || match self.port_of(mac) {
            Some(found) if found == port(side) => Ok(()),
            found => Err(format!("{found:?}")),
        });
        assert_eq!(learnt, Ok(()), "the guest is on {side:?}");
    }

    /// Runs `work` in the switch's namespace; sockets that it makes stay there.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_namespace(&Path::new("/run/netns").join(&self.name), work)
    }

    /// Connects to the guest.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn connect(&self) -> Result<TcpStream, String> {
        let to = SocketAddr::from((GUEST, 80));
        let stream = self.within(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
        let stream = stream.map_err(|error| format!("no connection: {error}"))?;
        stream
            .set_read_timeout(Some(ANSWER))
            .map_err(|error| error.to_string())?;
        Ok(stream)
    }

    /// The body of what the guest answers to a request for `path`.
    ///
    /// # Errors
    /// It does not answer, or not with success.
    pub fn get(&self, path: &str) -> Result<String, String> {
        let mut stream = self.connect()?;
        let mut answer = String::new();
        ask(&mut stream, path)
            .and_then(|()| stream.read_to_string(&mut answer))
            .map_err(|error| format!("no answer: {error}"))?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or_else(|| format!("no answer of HTTP: {answer:?}"))?;
        match head.split_whitespace().nth(1) {
            Some("200") => Ok(body.to_owned()),
            _ => Err(head.to_owned()),
        }
    }

    fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.name], arguments].concat());
    }
}

/// Asks for `path`.
pub(super) fn ask(stream: &mut TcpStream, path: &str) -> std::io::Result<()> {
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Nothing to be done about a failure here: the next run sweeps.
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

/// The switch's port to a host.
fn port(side: Side) -> &'static str {
    match side {
        Side::A => "to-a",
        Side::B => "to-b",
    }
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}
