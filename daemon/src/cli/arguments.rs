//! What the command line takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use pagecopy::limits::MAX_DATA_CHANNELS;

use super::set::Changes;
use crate::api::types::{Auto, Channels, Compress, MigrationRequest, Mode, Throttle, Transport};
use crate::rdma::Pin;
use crate::units::{millis, parse_duration, parse_rate, parse_size};

const EXIT_STATUS: &str = "Exit status of migrate:\n  \
    0  the guest runs at the destination\n  \
    1  failed; the guest runs on at the source, unless it had gone first (post-copy): then the last line says what came of it\n  \
    2  the arguments are wrong\n  \
    3  cancelled; the guest runs on at the source\n  \
    4  in doubt: the destination may run the guest; see `pagecopy resolve`";

const EVACUATE_STATUS: &str = "Exit status of evacuate:\n  \
    0  all guests run at the destination\n  \
    1  one has stayed, or nothing could be begun\n  \
    2  the arguments are wrong\n  \
    4  one is in doubt: the destination may run it; see `pagecopy resolve`\n\n\
    Guests that the daemon has taken go on without this command, and over a restart of the daemon. Ctrl-C cancels them.";

const PREFLIGHT_STATUS: &str = "Exit status of preflight:\n  \
    0  everything passes\n  \
    1  something fails, or could not be asked\n  \
    2  the arguments are wrong\n  \
    5  nothing fails, and something is warned of";

const RESOLVE: &str = "In doubt: at the source the destination is asked first, and its answer decides where there is one. Without an answer \
    --resume-here is taken only with --peer-fenced, and the destination is told when it comes back. --abandon needs no such \
    word: QEMU is kept, stopped, with the guest's memory.\n\n\
    At the destination a guest that was committed to it runs by itself as soon as the source asks. --run-here is taken only \
    with --peer-fenced, since the source's operator may have taken the guest back; --abandon only while the guest has not run \
    here, and the source takes it back when it asks. Where its QEMU is gone, that may have run the guest for a moment and \
    written its disks: the answer says what to do.\n\n\
    Paused (post-copy, the other host is away): at the destination --poison lets the guest go on without what it lacks, and is \
    taken only with --peer-fenced; at the source --abandon lets go of the memory that the guest depends on, and is taken only with \
    --peer-fenced, too, and only if nobody answers at the destination's address, unless that memory is gone already. The guest is \
    never run at the source again.\n\n\
    Whatever is refused says why, with exit status 1.";

/// Moves running QEMU guests between hosts.
#[derive(Debug, Parser)]
#[command(name = "pagecopy", version, after_help = EXIT_STATUS)]
pub struct Arguments {
    /// The API socket of this host's pagecopyd [default: $PAGECOPY_API, or /run/pagecopy/api.sock]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a waiting QEMU (started with -incoming defer -S) the destination for a guest
    Receive {
        /// The guest's name, the same on both hosts
        #[arg(long, value_name = "NAME")]
        vm: String,
        /// QMP socket of the QEMU that waits
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
    },
    /// Move a running guest to another host, and wait until it has moved
    #[command(after_help = EXIT_STATUS)]
    Migrate(MigrateArguments),
    /// Move all guests of this host, or some, to another or to several, the shortest to move first, and wait until they have moved
    #[command(after_help = EVACUATE_STATUS)]
    Evacuate(EvacuateArguments),
    /// Look at everything that a migration depends on, on both hosts, without migrating
    #[command(after_help = PREFLIGHT_STATUS)]
    Preflight {
        /// The guest's name, the same on both hosts
        #[arg(long, value_name = "NAME")]
        vm: String,
        /// QMP socket of the QEMU that runs the guest
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// The other host's pagecopyd
        #[arg(long, value_name = "HOST:PORT")]
        to: String,
        /// No QEMU waits there: one would be started (migrate --spawn)
        #[arg(long)]
        spawn: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Sample how fast a guest writes its memory, without migrating it
    DirtyRate {
        /// The guest's name
        #[arg(long, value_name = "NAME")]
        vm: String,
        /// QMP socket of the QEMU that runs the guest
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// How long, from 100ms to 10min
        #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
        length: Duration,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a migration, or all
    Status {
        /// The migration's id
        id: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List migrations and waiting QEMUs
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all migrations as they go, until it is interrupted; goes on where it was when pagecopyd is back
    Watch {
        /// Print one JSON event a line
        #[arg(long)]
        json: bool,
    },
    /// Change the limits or the priority of a migration that waits or is under way, at its source
    Set {
        /// The migration's id
        id: String,
        /// What is to be changed
        #[command(flatten)]
        change: Changes,
    },
    /// Cancel a migration; the guest stays where it is
    Cancel {
        /// The migration's id
        id: String,
    },
    /// Let the guest of a migration go before its memory now (begun with --mode auto --allow-postcopy or hybrid)
    StartPostcopy {
        /// The migration's id
        id: String,
    },
    /// At the source of a paused post-copy: dial the destination now
    Recover {
        /// The migration's id
        id: String,
        /// Another address of the destination's pagecopyd
        #[arg(long, value_name = "HOST:PORT")]
        to: Option<String>,
    },
    /// Decide a migration that is in doubt or paused, when the other host cannot be asked
    #[command(after_help = RESOLVE)]
    Resolve {
        /// The migration's id
        id: String,
        /// The decision
        #[command(flatten)]
        decision: Decision,
        /// The word that the other host's QEMU and pagecopyd cannot run any more (powered off, disk gone). Given wrongly,
        /// two guests run, or memory is lost
        #[arg(long)]
        peer_fenced: bool,
    },
}

/// What `resolve` decides: exactly one of these.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Decision {
    /// At the source: take the guest back
    #[arg(long)]
    pub resume_here: bool,
    /// At the destination: run the guest that was committed to it
    #[arg(long)]
    pub run_here: bool,
    /// At the source: the guest runs at the destination, let go of it here. At the destination: it never will run here
    #[arg(long)]
    pub abandon: bool,
    /// At the destination of a paused post-copy: the guest goes on without the memory that it lacks; what touches it gets a
    /// memory error
    #[arg(long)]
    pub poison: bool,
}

/// When a hybrid migration lets the guest go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostcopyAfter {
    /// When a round does not pay any more.
    Auto,
    /// After so many rounds.
    Rounds(u32),
    /// After so long.
    Time(Duration),
}

fn parse_postcopy_after(text: &str) -> Result<PostcopyAfter, String> {
    if text == "auto" {
        return Ok(PostcopyAfter::Auto);
    }
    match text.parse() {
        Ok(0) => Err("one round at least; with --mode postcopy the guest goes at once".to_owned()),
        Ok(rounds) => Ok(PostcopyAfter::Rounds(rounds)),
        Err(_) => parse_duration(text)
            .map(PostcopyAfter::Time)
            .map_err(|_| "write auto, a number of rounds, or a time such as 5s".to_owned()),
    }
}

fn parse_channels(text: &str) -> Result<Channels, String> {
    if text == "auto" {
        return Ok(Channels::Measured(Auto::Auto));
    }
    let number = text.parse().ok();
    number
        .filter(|number| (1..=MAX_DATA_CHANNELS).contains(number))
        .map(Channels::Number)
        .ok_or_else(|| format!("write auto, or a number from 1 to {MAX_DATA_CHANNELS}"))
}

/// Arguments of `migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArguments {
    /// The guest's name, the same on both hosts
    #[arg(long, value_name = "NAME")]
    pub vm: String,
    /// QMP socket of the QEMU that runs the guest
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Where to.
    #[command(flatten)]
    pub to: To,
    /// How it moves.
    #[command(flatten)]
    pub how: How,
    /// Print one JSON event a line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `evacuate`.
#[derive(Debug, clap::Args)]
pub struct EvacuateArguments {
    /// Where to.
    #[command(flatten)]
    pub to: To,
    /// Only these guests [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub vms: Vec<String>,
    /// The folder of the guests' QMP sockets, each called NAME.qmp, NAME.sock or NAME [default: qmp-dir of the daemon's configuration]
    #[arg(long, value_name = "DIR", conflicts_with = "guests")]
    pub qmp_dir: Option<PathBuf>,
    /// A file with a guest a line, NAME=SOCKET, instead; - is standard input
    #[arg(long, value_name = "FILE")]
    pub guests: Option<PathBuf>,
    /// Show who would leave, in which order, and move nobody
    #[arg(long)]
    pub dry_run: bool,
    /// How each moves.
    #[command(flatten)]
    pub how: How,
    /// Print one JSON event a line, the last with what came of each
    #[arg(long)]
    pub json: bool,
}

/// Where guests go, and how often that is tried.
#[derive(Clone, Debug, clap::Args)]
pub struct To {
    /// The other host's pagecopyd; HOST is a name, an IPv4 address, or an IPv6 address in brackets. Of several a guest goes to the
    /// one that preflight ranks best; auto is for those in the daemon's configuration (destinations)
    #[arg(
        long = "to",
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        default_value = "auto"
    )]
    pub all: Vec<String>,
    /// Try again so often, after 1, 2, 4 ... 60 s, where it fails by the network, the other host or the guest's writes and the guest
    /// runs on here
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub retries: u32,
}

/// How a guest moves.
#[derive(Clone, Debug, clap::Args)]
pub struct How {
    /// Have the other host start the QEMU that the guest comes to, with this one's options as far as its spawn-policy allows
    #[arg(long)]
    pub spawn: bool,
    /// How the memory moves
    #[arg(long, value_enum, default_value = "auto")]
    pub mode: Mode,
    /// With --mode auto: rather than fail, let the guest go first; it then depends on both hosts for a while
    #[arg(long)]
    pub allow_postcopy: bool,
    /// With --mode hybrid: when the guest goes first [default: auto, when a round does not pay any more]
    #[arg(long, value_name = "auto|ROUNDS|TIME", value_parser = parse_postcopy_after)]
    pub postcopy_after: Option<PostcopyAfter>,
    /// What pages go over: auto is RDMA where both hosts have it, reach each other and allow it, and TCP otherwise
    #[arg(long, value_enum, default_value = "auto")]
    pub transport: Transport,
    /// Memory that may be pinned here for RDMA [default: auto, what the system allows, or the daemon's configuration]
    #[arg(long, value_name = "auto|SIZE|all", value_parser = str::parse::<Pin>)]
    pub rdma_pin: Option<Pin>,
    /// Data channels. auto: as by default at first, and then, while pages are sent, as many as are measured to pay [default: as many as
    /// the link needs, one more where there may be a post-copy, at most one a core]
    #[arg(long, value_name = "auto|N", value_parser = parse_channels)]
    pub channels: Option<Channels>,
    /// Longest downtime, such as 50ms [default: 300ms]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// Bytes a second for pages, such as 500MB/s [default: unlimited]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth_limit: Option<u64>,
    /// The same for a guest that has gone first; pages that it waits for are never limited [default: --bandwidth-limit]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub postcopy_bandwidth_limit: Option<u64>,
    /// How pages are encoded [default: off, or the daemon's configuration]
    #[arg(long, value_enum)]
    pub compress: Option<Compress>,
    /// Memory for the versions of pages that deltas are made from, such as 64MiB [default: 24MiB, or the daemon's configuration]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub delta_cache: Option<u64>,
    /// Slow the guest where it writes more than the link carries: its vCPUs that write stand still for a share of their time, no larger
    /// than it takes. Not with --mode hybrid or postcopy, nor with auto where the guest may go first [default: off, or the daemon's configuration]
    #[arg(long, value_enum)]
    pub throttle: Option<Throttle>,
    /// From -100 to 100: the most urgent of those that wait begins first, and has a larger share of the host's bandwidth
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-100..=100))]
    pub priority: i32,
    /// Give up after so many rounds without convergence [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: Option<u32>,
    /// Give up after so long without convergence, such as 60s [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Compare the memory of both sides before the guest is handed over; costs downtime
    #[arg(long)]
    pub verify: bool,
    /// Go on where the guest fits into the destination's free memory and the margin beside it (memory-margin) does not; what
    /// fails is never passed over
    #[arg(long)]
    pub force: bool,
    /// Quit the QEMU here once the guest has moved
    #[arg(long)]
    pub quit_source: bool,
}

impl MigrateArguments {
    /// The request to the daemon, to one of the destinations.
    pub fn request(&self, to: &str) -> MigrationRequest {
        self.how.clone().request(&self.vm, &self.qmp, to)
    }
}

impl How {
    /// The request to the daemon.
    pub fn request(self, vm: &str, qmp: &Path, to: &str) -> MigrationRequest {
        let (postcopy_after_rounds, postcopy_after_ms) = match self.postcopy_after {
            Some(PostcopyAfter::Rounds(rounds)) => (Some(rounds), None),
            Some(PostcopyAfter::Time(time)) => (
                None,
                Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            ),
            Some(PostcopyAfter::Auto) | None => (None, None),
        };
        MigrationRequest {
            vm: vm.to_owned(),
            qmp: super::absolute(qmp),
            to: to.to_owned(),
            spawn: self.spawn,
            mode: self.mode,
            allow_postcopy: self.allow_postcopy,
            postcopy_after_rounds,
            postcopy_after_ms,
            transport: self.transport,
            rdma_pin: self.rdma_pin,
            channels: self.channels,
            downtime_limit_ms: self.downtime_limit.map(millis),
            bandwidth_limit: self.bandwidth_limit,
            postcopy_bandwidth_limit: self.postcopy_bandwidth_limit,
            throttle: self.throttle,
            compress: self.compress,
            delta_cache: self.delta_cache,
            priority: self.priority,
            max_rounds: self.max_rounds,
            timeout_ms: self
                .timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            verify: self.verify,
            force: self.force,
            quit_source: self.quit_source,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MIGRATE: [&str; 8] = [
        "pagecopy", "migrate", "--vm", "web", "--qmp", "/q", "--to", "b:7070",
    ];

    fn migrate(more: &[&str]) -> Result<MigrationRequest, String> {
        let words = MIGRATE.iter().chain(more);
        let arguments = Arguments::try_parse_from(words).map_err(|error| error.to_string())?;
        match arguments.command {
            Command::Migrate(arguments) => Ok(arguments.request(&arguments.to.all[0])),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_whole_of_migrate() {
        let request = migrate(&[
            "--mode",
            "precopy",
            "--transport",
            "rdma",
            "--rdma-pin",
            "1GiB",
            "--channels",
            "3",
            "--downtime-limit",
            "50ms",
            "--bandwidth-limit",
            "500MB/s",
            "--postcopy-bandwidth-limit",
            "1MB/s",
            "--throttle",
            "auto",
            "--compress",
            "delta",
            "--delta-cache",
            "64MiB",
            "--priority",
            "-7",
            "--max-rounds",
            "9",
            "--timeout",
            "60s",
            "--verify",
            "--force",
            "--quit-source",
            "--spawn",
            "--json",
        ])
        .unwrap();
        assert_eq!(request.channels, Some(Channels::Number(3)));
        let measured = migrate(&["--channels", "auto"]).unwrap().channels;
        assert_eq!(measured, Some(Channels::Measured(Auto::Auto)));
        assert_eq!(
            (request.transport, request.rdma_pin),
            (Transport::Rdma, Some(Pin::Bytes(1 << 30)))
        );
        assert_eq!(request.downtime_limit_ms, Some(50.0));
        assert_eq!(request.bandwidth_limit, Some(500_000_000));
        assert_eq!(request.postcopy_bandwidth_limit, Some(1_000_000));
        assert_eq!(
            (request.compress, request.delta_cache),
            (Some(Compress::Delta), Some(64 << 20))
        );
        assert_eq!(request.throttle, Some(Throttle::Auto));
        assert_eq!((request.priority, request.max_rounds), (-7, Some(9)));
        assert_eq!(request.timeout_ms, Some(60_000));
        assert!(request.verify && request.quit_source && request.spawn);
        assert!(request.force);
    }

    #[test]
    fn defaults_are_the_daemons() {
        let request = migrate(&[]).unwrap();
        assert_eq!(
            (
                request.channels,
                request.downtime_limit_ms,
                request.timeout_ms
            ),
            (None, None, None)
        );
        assert!(!request.verify && !request.quit_source && !request.spawn);
        assert!(!request.force);
        assert_eq!(request.throttle, None);
        assert_eq!((request.mode, request.allow_postcopy), (Mode::Auto, false));
    }

    #[test]
    fn when_the_guest_goes_first() {
        let after = |text: &str| {
            let request = migrate(&["--mode", "hybrid", "--postcopy-after", text])?;
            Ok::<_, String>((request.postcopy_after_rounds, request.postcopy_after_ms))
        };
        assert_eq!(after("auto"), Ok((None, None)));
        assert_eq!(after("3"), Ok((Some(3), None)));
        assert_eq!(after("5s"), Ok((None, Some(5_000))));
        for wrong in ["0", "soon", "-1"] {
            assert!(after(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_wrong_says_what_would_be_right() {
        assert!(
            migrate(&["--downtime-limit", "50"])
                .unwrap_err()
                .contains("50ms")
        );
        assert!(
            migrate(&["--bandwidth-limit", "fast"])
                .unwrap_err()
                .contains("500MB/s")
        );
        assert!(
            migrate(&["--mode", "warp"])
                .unwrap_err()
                .contains("precopy")
        );
        assert!(migrate(&["--channels", "0"]).is_err());
        assert!(migrate(&["--priority", "101"]).is_err());
    }

    #[test]
    fn an_evacuation_takes_what_a_migration_takes() {
        let parse_all = |words: &[&str]| {
            let words = [&["pagecopy", "evacuate"], words].concat();
            match Arguments::try_parse_from(words).map(|arguments| arguments.command) {
                Ok(Command::Evacuate(arguments)) => Ok(arguments),
                Ok(other) => Err(format!("{other:?}")),
                Err(error) => Err(error.to_string()),
            }
        };
        let parse = |words: &[&str]| parse_all(&[&["--to", "b:7070"], words].concat());
        assert_eq!(parse_all(&[]).unwrap().to.all, ["auto"]);
        let all = parse(&["--spawn", "--mode", "hybrid", "--vms", "a,b", "--vms", "c"]).unwrap();
        assert_eq!(all.vms, ["a", "b", "c"]);
        let request = all.how.request("a", Path::new("/q"), &all.to.all[0]);
        assert_eq!((request.vm.as_str(), request.to.as_str()), ("a", "b:7070"));
        assert!(request.spawn && request.mode == Mode::Hybrid);
        let more = parse(&["--to", "c:7070,d:7070", "--retries", "3"]).unwrap();
        assert_eq!(more.to.all, ["b:7070", "c:7070", "d:7070"]);
        assert_eq!((more.to.retries, all.to.retries), (3, 0));
        assert!(parse(&["--qmp-dir", "/run", "--guests", "list"]).is_err());
        assert!(parse(&["--mode", "warp"]).is_err());
    }

    #[test]
    fn resolve_needs_one_decision() {
        let parse = |words: &[&str]| {
            Arguments::try_parse_from([&["pagecopy", "resolve", "ID"], words].concat())
        };
        for good in ["--resume-here", "--run-here", "--poison"] {
            assert!(parse(&[good]).is_ok());
            assert!(parse(&[good, "--peer-fenced"]).is_ok());
            assert!(parse(&[good, "--abandon"]).is_err());
        }
        assert!(parse(&["--abandon", "--peer-fenced"]).is_ok());
        assert!(parse(&["--peer-fenced"]).is_err());
        assert!(parse(&["--abandon"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--abandon", "--resume-here"]).is_err());
    }

    #[test]
    fn the_api_may_be_named_before_and_after() {
        for words in [
            ["pagecopy", "--api", "/s", "list"],
            ["pagecopy", "list", "--api", "/s"],
        ] {
            assert_eq!(
                Arguments::try_parse_from(words).unwrap().api,
                Some("/s".into())
            );
        }
    }
}
