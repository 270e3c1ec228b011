//! The two hosts that a guest is moved between, each with an agent ([`agent`]) that does there what is to be done there.
//!
//! They are two namespaces on this machine ([`Hosts::here`]), or two machines that ssh leads to ([`Hosts::reach`]). What is
//! measured, and how, is the same. Nothing depends on what their clocks show ([`clock`]).

pub mod agent;
pub mod ask;
pub mod clock;
mod facts;
mod host;
mod reach;
mod side;
mod stream;

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use tests::real::{Net, Side, Version};

use self::ask::{Ask, Route};
use self::clock::Reading;
pub use self::facts::describe;
pub use self::host::Host;
pub use self::reach::{LOCAL, SSH};
use crate::link::Link;
use crate::record::{HostFacts, Joined, Machine, TwoHosts};

/// The first of the ports that the destination listens at, unless another is said: where its daemon does.
pub const PORT: u16 = 7700;
/// So far behind it: QEMU's own migration.
const QEMU: u16 = 1;
/// iperf3.
const IPERF3: u16 = 2;
/// The clock, which is the last.
const CLOCK: u16 = 3;
/// Pings that the distance of the clocks is taken from.
const PINGS: usize = 100;

/// Two hosts, and how they reach each other.
#[derive(Debug)]
pub struct Hosts {
    /// Where the guest is.
    pub source: Host,
    /// Where it goes.
    pub destination: Host,
    /// What each sends by.
    pub routes: [Route; 2],
    /// QEMU, on each.
    pub qemus: [PathBuf; 2],
    /// Whether both count the bytes of the same device.
    pub one_device: bool,
    port: u16,
    /// The link between them, when it is on this machine. It goes last.
    _net: Option<Net>,
}

impl Hosts {
    /// Two namespaces on this machine.
    ///
    /// # Errors
    /// An agent does not start.
    pub fn here(link: Link) -> Result<Hosts, String> {
        let net = match link {
            Link::Loopback => Net::loopback(),
            Link::Veth | Link::Limited(_) => Net::new(),
            Link::Hosts => return Err("this link is one between two hosts".to_owned()),
        };
        if let Link::Limited(mbit) = link {
            net.limit(mbit);
        }
        let [bench, ..] = facts::programs()?;
        let agent = |side: Side| {
            let mut command = net.command(side, &bench);
            command.arg("agent");
            Host::start(side.name(), command, b"")
        };
        let [source, destination] = [agent(Side::A)?, agent(Side::B)?];
        let device = if link == Link::Loopback {
            "lo"
        } else {
            "veth0"
        };
        let route = |side: Side| Route {
            device: device.to_owned(),
            address: side.address().parse().expect("an address"),
        };
        Ok(Hosts {
            source,
            destination,
            routes: [route(Side::A), route(Side::B)],
            qemus: [(); 2].map(|()| Version::V10_0.binary()),
            one_device: link == Link::Loopback,
            port: PORT,
            _net: Some(net),
        })
    }

    /// Two machines.
    ///
    /// # Errors
    /// One of them cannot be reached, lacks something, or does not reach the other: which, and what to do.
    pub fn reach(plan: &TwoHosts) -> Result<Hosts, String> {
        if plan.source == plan.destination {
            return Err(format!(
                "both hosts are {}: without --source-host and --destination-host both are namespaces of this one",
                plan.source
            ));
        }
        let agent = |name: &str| reach::reach(name, &plan.ssh, plan.programs.as_deref());
        let mut source = agent(&plan.source)?;
        let mut destination = agent(&plan.destination)?;
        let to = match plan.destination_address {
            Some(address) => address,
            None => address_of(&source, &destination)?,
        };
        let here: Route = source.ask(&Ask::Route(to))?;
        let back: Route = destination.ask(&Ask::Route(here.address))?;
        let qemu = |host: &str| match &plan.qemu {
            Some(path) => path.clone(),
            None if host == LOCAL => Version::V10_0.binary(),
            None => PathBuf::from("qemu-system-x86_64"),
        };
        let mut hosts = Hosts {
            qemus: [qemu(&plan.source), qemu(&plan.destination)],
            routes: [
                here,
                Route {
                    address: to,
                    ..back
                },
            ],
            source,
            destination,
            one_device: false,
            port: plan.port,
            _net: None,
        };
        hosts.probe()?;
        Ok(hosts)
    }

    /// Whether the source reaches all ports that are needed.
    fn probe(&mut self) -> Result<(), String> {
        for at in [0, QEMU, IPERF3, CLOCK].map(|more| self.at(more)) {
            self.destination.ask::<SocketAddr>(&Ask::Listen(at))?;
            let answered: Result<Reading, String> = self.source.ask(&Ask::Ping(at, 1));
            answered.map_err(|error| {
                let (port, last) = (self.port, self.port + CLOCK);
                let there = self.destination.name();
                match self.source.lost() {
                    Some(lost) => lost.to_owned(),
                    None => format!(
                        "{error}: it does not reach {at} of {there}; open ports {port} to {last} of {there} to it, choose \
                         others with --port, or name another address with --destination-address"
                    ),
                }
            })?;
        }
        Ok(())
    }

    fn at(&self, more: u16) -> SocketAddr {
        SocketAddr::new(self.routes[1].address, self.port + more)
    }

    /// Where the daemons listen.
    pub fn daemons(&self) -> [SocketAddr; 2] {
        let listens = |route: &Route| SocketAddr::new(route.address, self.port);
        [listens(&self.routes[0]), listens(&self.routes[1])]
    }

    /// Where QEMU waits for its own migration.
    pub fn qemu_at(&self) -> SocketAddr {
        self.at(QEMU)
    }

    /// The destination's clock, as the source reads it over the link.
    ///
    /// # Errors
    /// The link does not carry it.
    pub fn clocks(&mut self) -> Result<Reading, String> {
        let at = self.at(CLOCK);
        self.destination.ask::<SocketAddr>(&Ask::Listen(at))?;
        self.source.ask(&Ask::Ping(at, PINGS))
    }

    /// Bits per second that iperf3 brings over the link.
    ///
    /// # Errors
    /// Either host has no iperf3.
    pub fn iperf3(&mut self) -> Result<f64, String> {
        let at = self.at(IPERF3);
        self.destination.ask::<()>(&Ask::Iperf3Server(at))?;
        self.source.ask(&Ask::Iperf3(at))
    }

    /// How many milliseconds `mib` MiB take over two streams, as they are or sealed by both kernels.
    ///
    /// # Errors
    /// A kernel has no TLS.
    pub fn streams(&mut self, mib: u64, sealed: bool) -> Result<f64, String> {
        let at = self.at(IPERF3);
        self.destination
            .ask::<SocketAddr>(&Ask::Drain(at, sealed))?;
        self.source.ask(&Ask::Fill(at, mib, sealed))
    }

    /// Ends all that was started for a run.
    pub fn stop(&mut self) {
        for host in [&mut self.source, &mut self.destination] {
            // A host that does not do so is lost, and its agent cleans up by itself.
            let _ = host.ask::<()>(&Ask::Stop);
        }
    }

    /// Why one of them answers no more.
    pub fn lost(&self) -> Option<&str> {
        self.source.lost().or(self.destination.lost())
    }

    /// What both are, and the link between them.
    ///
    /// # Errors
    /// QEMU is missing on one, or is not of the same version; or the link carries nothing.
    pub fn facts(&mut self) -> Result<Joined, String> {
        let source = described(&mut self.source, &self.routes[0], &self.qemus[0])?;
        let destination = described(&mut self.destination, &self.routes[1], &self.qemus[1])?;
        if source.machine.qemu != destination.machine.qemu {
            return Err(format!(
                "the QEMUs differ: {:?} on {}, {:?} on {}; install the same on both, or name one with --qemu",
                source.machine.qemu, source.name, destination.machine.qemu, destination.name
            ));
        }
        let reading = self.clocks()?;
        let iperf3 = self.iperf3();
        if let Err(error) = &iperf3 {
            eprintln!("the record will not say what the link carries: {error}");
        }
        Ok(Joined {
            source,
            destination,
            rtt_us: reading.rtt_us,
            clock_error_ms: reading.error_ms,
            iperf3_mbit_s: iperf3.ok().map(|bits| bits / 1e6),
        })
    }
}

fn described(host: &mut Host, route: &Route, qemu: &Path) -> Result<HostFacts, String> {
    let machine: Machine = host.ask(&Ask::Describe(qemu.to_owned()))?;
    Ok(HostFacts {
        name: host.name().to_owned(),
        address: route.address,
        device: route.device.clone(),
        machine,
    })
}

/// The destination's address, as ssh knows it.
fn address_of(source: &Host, destination: &Host) -> Result<IpAddr, String> {
    // The caller's address and port, and those of the host that is called.
    let word = |host: &Host, at: usize| {
        let mut words = host.hello.ssh_connection.split(' ');
        words.nth(at).and_then(|word| word.parse().ok())
    };
    let address = match destination.name() {
        LOCAL => word(source, 0),
        _ => word(destination, 2),
    };
    address.ok_or_else(|| {
        format!(
            "ssh does not say which address {} has for {}: say it with --destination-address",
            destination.name(),
            source.name()
        )
    })
}

/// The words of a panic: the harness says so what it misses.
pub fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

/// The command word for word, as in `--ssh`: words apart by blanks.
pub fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}
