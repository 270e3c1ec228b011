//! Two network namespaces joined by a veth pair: two hosts and the link between them.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::scratch::{is_stale, unique};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first host, 10.77.0.1.
    A,
    /// The second host, 10.77.0.2.
    B,
}

impl Side {
    /// The other host.
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }

    /// `"a"` or `"b"`.
    pub fn name(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }

    /// Its address on the link.
    pub fn address(self) -> &'static str {
        match self {
            Side::A => "10.77.0.1",
            Side::B => "10.77.0.2",
        }
    }
}

/// A host that a daemon is started on.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// One of the two on a link.
    On(&'a Net, Side),
    /// This process's own, where the daemon listens at this address.
    Here(SocketAddr),
}

impl Place<'_> {
    /// A command that will run there, with mounts of its own. The process has the pid of the command.
    pub(super) fn command(self, program: &str) -> Command {
        match self {
            Place::On(net, side) => net.command(side, program),
            Place::Here(_) => {
                let mut command = Command::new("unshare");
                command.args(["--mount", program]);
                command
            }
        }
    }
}

/// The link. The namespaces go away on drop, and the link with them.
#[derive(Debug)]
pub struct Net {
    name: String,
    /// Whether both hosts are in one namespace, joined by its loopback device.
    one: bool,
}

impl Default for Net {
    fn default() -> Self {
        Self::new()
    }
}

impl Net {
    /// Makes both namespaces and joins them; removes those of processes that are gone.
    pub fn new() -> Net {
        sweep();
        let net = Net {
            name: unique(),
            one: false,
        };
        for side in [Side::A, Side::B] {
            ip(&["netns", "add", &net.namespace(side)]);
        }
        let (a, b) = (net.namespace(Side::A), net.namespace(Side::B));
        ip(&[
            "link", "add", "veth0", "netns", &a, "type", "veth", "peer", "name", "veth0", "netns",
            &b,
        ]);
        for side in [Side::A, Side::B] {
            let address = format!("{}/24", side.address());
            net.ip(side, &["link", "set", "lo", "up"]);
            net.ip(side, &["address", "add", &address, "dev", "veth0"]);
            net.ip(side, &["link", "set", "veth0", "mtu", "9000", "up"]);
        }
        net
    }

    /// Both hosts in one namespace: what they say to each other goes over its loopback device.
    pub fn loopback() -> Net {
        sweep();
        let net = Net {
            name: unique(),
            one: true,
        };
        ip(&["netns", "add", &net.namespace(Side::A)]);
        net.ip(Side::A, &["link", "set", "lo", "up"]);
        for side in [Side::A, Side::B] {
            let address = format!("{}/32", side.address());
            net.ip(side, &["address", "add", &address, "dev", "lo"]);
        }
        net
    }

    /// Both hosts in this process's own namespace, joined by its loopback device: RDMA devices may be in no other. For a
    /// machine of one's own; it keeps the hosts' addresses.
    pub fn here() -> Net {
        sweep();
        let net = Net {
            name: unique(),
            one: true,
        };
        let own = std::process::id().to_string();
        ip(&["netns", "attach", &net.namespace(Side::A), &own]);
        for side in [Side::A, Side::B] {
            let address = format!("{}/32", side.address());
            net.ip(side, &["address", "replace", &address, "dev", "lo"]);
        }
        net
    }

    /// The name of a host's namespace.
    pub fn namespace(&self, side: Side) -> String {
        let side = if self.one { Side::A } else { side };
        format!("{}-{}", self.name, side.name())
    }

    /// The network device that a host's packets leave by.
    fn device(&self) -> &'static str {
        if self.one { "lo" } else { "veth0" }
    }

    /// A command that will run on a host. The process has the pid of the command.
    pub fn command(&self, side: Side, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.namespace(side)])
            .arg(program);
        command
    }

    /// Runs `work` on a thread of this process that is in a host's namespace; sockets that it makes stay there.
    pub fn within<T: Send>(&self, side: Side, work: impl FnOnce() -> T + Send) -> T {
        let namespace = std::path::Path::new("/run/netns").join(self.namespace(side));
        in_namespace(&namespace, work)
    }

    /// Gives a host one more address on the link.
    pub fn add_address(&self, side: Side, address: &str) {
        self.ip(
            side,
            &["address", "add", &format!("{address}/24"), "dev", "veth0"],
        );
    }

    /// Bytes that went over the link so far, in both directions.
    pub fn bytes_carried(&self) -> u64 {
        match self.one {
            true => self.bytes_sent(Side::A),
            false => self.bytes_sent(Side::A) + self.bytes_sent(Side::B),
        }
    }

    /// Cuts the link: both ends lose their carrier, packets go nowhere.
    pub fn cut(&self) {
        self.ip(Side::A, &["link", "set", "veth0", "down"]);
    }

    /// Joins it again.
    pub fn mend(&self) {
        self.ip(Side::A, &["link", "set", "veth0", "up"]);
    }

    /// Joins the namespaces by a second link, 10.78.0.1 and 10.78.0.2, with a switch between its ends and a software RDMA
    /// device at each.
    ///
    /// # Errors
    /// That this kernel has none in a namespace.
    pub fn add_rail(&self) -> Result<(), String> {
        let switch = self.switch();
        ip(&["netns", "add", &switch]);
        let within = |arguments: &[&str]| ip(&[&["-n", &switch], arguments].concat());
        within(&[
            "link", "add", "bridge", "mtu", "9000", "up", "type", "bridge",
        ]);
        for side in [Side::A, Side::B] {
            let (host, port) = (self.namespace(side), port(side));
            ip(&[
                "link", "add", "rail0", "netns", &host, "type", "veth", "peer", "name", &port,
                "netns", &switch,
            ]);
            within(&[
                "link", "set", &port, "mtu", "9000", "master", "bridge", "up",
            ]);
            let address = format!("{}/24", side.address().replace("10.77.", "10.78."));
            self.ip(side, &["address", "add", &address, "dev", "rail0"]);
            self.ip(side, &["link", "set", "rail0", "mtu", "9000", "up"]);
            self.plug_in(side)?;
        }
        Ok(())
    }

    /// Makes the RDMA device of a host's end of the second link.
    ///
    /// # Errors
    /// That this kernel has none in a namespace.
    pub fn plug_in(&self, side: Side) -> Result<(), String> {
        self.rdma(
            side,
            &["add", &self.rail(side), "type", "rxe", "netdev", "rail0"],
        )
    }

    /// Takes it away.
    ///
    /// # Errors
    /// Why it stays.
    pub fn unplug(&self, side: Side) -> Result<(), String> {
        self.rdma(side, &["delete", &self.rail(side)])
    }

    fn rdma(&self, side: Side, arguments: &[&str]) -> Result<(), String> {
        let mut rdma = self.command(side, "rdma");
        let output = rdma
            .arg("link")
            .args(arguments)
            .output()
            .map_err(|error| format!("rdma does not start: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        let why = String::from_utf8_lossy(&output.stderr);
        let what = arguments.join(" ");
        Err(format!("rdma link {what}, in a namespace: {}", why.trim()))
    }

    /// Its name, which all namespaces may share.
    fn rail(&self, side: Side) -> String {
        format!("{}-{}", self.name, side.name())
    }

    fn switch(&self) -> String {
        format!("{}-s", self.name)
    }

    /// Cuts the second link, as if both cables were pulled: its ends lose their carrier.
    pub fn cut_rail(&self) {
        self.set_ports("down");
    }

    /// Joins it again.
    pub fn mend_rail(&self) {
        self.set_ports("up");
    }

    fn set_ports(&self, state: &str) {
        for side in [Side::A, Side::B] {
            ip(&["-n", &self.switch(), "link", "set", &port(side), state]);
        }
    }

    /// Drops every packet that arrives at `side`, in silence: the link looks up, and nobody answers.
    pub fn drop_arriving(&self, side: Side) {
        let rules = "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }";
        let mut nft = self.command(side, "nft");
        run(nft.arg(rules));
    }

    /// Ends [`drop_arriving`](Self::drop_arriving).
    pub fn accept_arriving(&self, side: Side) {
        let mut nft = self.command(side, "nft");
        run(nft.args(["delete", "table", "inet", "cut"]));
    }

    /// Makes the link slow and lossy in both directions, as `tc-netem(8)` understands it: `delay 20ms loss 0.5%`.
    ///
    /// # Errors
    /// That this kernel has no netem.
    pub fn impair(&self, netem: &[&str]) -> Result<(), String> {
        for side in [Side::A, Side::B] {
            // One packet at a time: netem would else drop or pass the 64 KiB that a veth hands over at once.
            self.ip(side, &["link", "set", "veth0", "gso_max_segs", "1"]);
            let mut tc = self.command(side, "tc");
            // The queue holds what a fast sender has under way; the default of 1000 packets would drop more than asked.
            tc.args(["qdisc", "replace", "dev", "veth0", "root", "netem"]);
            let output = tc
                .args(["limit", "10000"])
                .args(netem)
                .output()
                .map_err(|error| format!("tc does not start: {error}"))?;
            if !output.status.success() {
                return Err(format!(
                    "this kernel has no netem: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
            }
        }
        Ok(())
    }

    /// Lets no more than `mbit` Mbit/s through in each direction (`tc-tbf(8)`), with a queue of 50 ms.
    pub fn limit(&self, mbit: u32) {
        for side in [Side::A, Side::B] {
            let mut tc = self.command(side, "tc");
            tc.args(["qdisc", "replace", "dev", "veth0", "root", "tbf"]);
            // A millisecond of the link at least: a fast one would else wait for its timer.
            let burst = (256 << 10).max(mbit.saturating_mul(125));
            tc.args(["rate", &format!("{mbit}mbit"), "burst", &burst.to_string()]);
            run(tc.args(["latency", "50ms"]));
        }
    }

    /// Lets no more than `stream_mbit` Mbit/s of one TCP connection through, and `mbit` of all, from `side` on (`tc-htb(8)`): its port says which
    /// of 128 classes a connection is of, so two seldom share one.
    pub fn limit_streams(&self, side: Side, mbit: u32, stream_mbit: u32) {
        let mut lines = format!(
            "qdisc replace dev veth0 root handle 1: htb default 2\n\
             class add dev veth0 parent 1: classid 1:1 htb rate {mbit}mbit quantum 60000\n\
             class add dev veth0 parent 1:1 classid 1:2 htb rate 1mbit ceil {mbit}mbit quantum 60000\n"
        );
        let mut classes = Vec::new();
        for port in (0..=254).step_by(2) {
            let class = 0x10 + port / 2;
            lines += &format!(
                "class add dev veth0 parent 1:1 classid 1:{class:x} htb rate 1mbit ceil {stream_mbit}mbit cburst 64k quantum 60000\n"
            );
            classes.push(format!("{port} : 1:{class:x}"));
        }
        let file = std::env::temp_dir().join(format!("{}.tc", self.name));
        std::fs::write(&file, lines).expect("a file for tc");
        run(self.command(side, "tc").arg("-batch").arg(&file));
        // What it said is done.
        let _ = std::fs::remove_file(&file);
        let rules = format!(
            "add table inet streams; add chain inet streams out {{ type filter hook output priority 0; }}; \
             add rule inet streams out meta priority set tcp sport & 254 map {{ {} }}",
            classes.join(", ")
        );
        run(self.command(side, "nft").arg(rules));
    }

    /// Packets that [`impair`](Self::impair) has dropped so far of those that `side` sent.
    pub fn dropped(&self, side: Side) -> u64 {
        let mut tc = self.command(side, "tc");
        let output = tc
            .args(["-s", "-j", "qdisc", "show", "dev", "veth0"])
            .output()
            .expect("tc can be called");
        let shown: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("tc prints JSON");
        shown[0]["drops"].as_u64().expect("the queue's count")
    }

    /// Bytes that `side` has sent over the link so far, with all headers. On loopback, both sides together.
    pub fn bytes_sent(&self, side: Side) -> u64 {
        let counter = format!("/sys/class/net/{}/statistics/tx_bytes", self.device());
        let output = self.command(side, "cat").arg(counter).output();
        let text = output
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn ip(&self, side: Side, arguments: &[&str]) {
        run(Command::new("ip")
            .args(["-n", &self.namespace(side)])
            .args(arguments));
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let sides = [Side::A, Side::B];
        let mut namespaces = Vec::new();
        for side in &sides[..if self.one { 1 } else { 2 }] {
            namespaces.push(self.namespace(*side));
        }
        let switch = self.switch();
        if std::path::Path::new("/run/netns").join(&switch).exists() {
            for side in sides {
                // It goes with its namespace, which may take the kernel a while; or it is gone.
                let _ = self.unplug(side);
            }
            namespaces.push(switch);
        }
        for namespace in namespaces {
            // Nothing to be done about a failure here: the next run sweeps.
            let _ = Command::new("ip")
                .args(["netns", "delete", &namespace])
                .status();
        }
    }
}

/// Runs `work` on a thread of this process that is in a network namespace.
pub(super) fn in_namespace<T: Send>(
    namespace: &std::path::Path,
    work: impl FnOnce() -> T + Send,
) -> T {
    let handle = std::fs::File::open(namespace).expect("the namespace exists");
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("root may enter a namespace");
            work()
        });
        match inside.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        if is_stale(&name) {
            let _ = Command::new("ip").args(["netns", "delete", &name]).output();
        }
    }
}

/// The switch's end of a host's cable.
fn port(side: Side) -> String {
    format!("port-{}", side.name())
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

pub(super) fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
