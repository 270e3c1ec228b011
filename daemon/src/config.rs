//! The configuration file of `pagecopyd`.
//!
//! Every key is checked when the daemon starts; an unknown one is refused with its name, the file, and the keys that
//! exist, so that a typing error never turns into a silent default. See `README.md` for an example.

pub mod access;
pub mod hooks;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use crate::api::types::{Compress, Throttle};
use crate::dial::check_host_port;
use crate::failure::{Failure, Fault};
use crate::limits::MAX_DELTA_CACHE;
use crate::preflight;
use crate::queue;
use crate::rdma::Rdma;
use crate::units::parse_size;
use access::Access;
use hooks::Hook;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// This daemon's name, told to peers and shown in their messages.
    pub name: String,
    /// Where peers connect: `HOST:PORT`, or `unix:PATH`.
    pub listen: String,
    /// The unix socket of the API.
    pub api: PathBuf,
    /// Where journals, receivers and measured figures are kept.
    pub state_dir: PathBuf,
    /// The user that the daemon becomes when root starts it. Without one it stays root, with the same few capabilities.
    pub user: Option<String>,
    /// Whether to run without TLS. Guest memory then crosses the network in the clear and any host may connect.
    #[serde(default)]
    pub insecure_plaintext: bool,
    /// Whether a migration of mode `auto` may let the guest go before its memory where it would fail otherwise.
    #[serde(default)]
    pub allow_postcopy: bool,
    /// Whether guests are slowed that write too much, where `migrate` does not say.
    #[serde(default)]
    pub throttle: Throttle,
    /// How pages are encoded where `migrate` does not say.
    #[serde(default)]
    pub compress: Compress,
    /// Memory for the versions of pages that deltas are made from, for each migration, where `migrate` does not say.
    #[serde(default = "default_delta_cache", deserialize_with = "size")]
    pub delta_cache: u64,
    /// Bytes a second that all migrations from this host may send together; none is unlimited.
    #[serde(default, deserialize_with = "queue::config::rate")]
    pub bandwidth_limit: Option<u64>,
    /// Bytes of memory that shall be left free beside an arriving guest.
    #[serde(
        default = "preflight::config::default_margin",
        deserialize_with = "preflight::config::margin"
    )]
    pub memory_margin: u64,
    /// Who is told over HTTP of what happens.
    #[serde(default)]
    pub hooks: Vec<Hook>,
    /// The policy under which QEMUs are started here for guests that come; none are without one.
    pub spawn_policy: Option<PathBuf>,
    /// The folder of the guests' QMP sockets, each called after its guest; for whoever wants all guests of this host.
    pub qmp_dir: Option<PathBuf>,
    /// The daemons that guests of this host may go to where nobody names one: each `HOST:PORT`.
    #[serde(default)]
    pub destinations: Vec<String>,
    /// Migrations that may leave this host at a time; the others wait.
    #[serde(
        default = "queue::config::default_concurrent",
        deserialize_with = "queue::config::concurrent"
    )]
    pub max_concurrent: usize,
    /// Migrations that may wait.
    #[serde(
        default = "queue::config::default_pending",
        deserialize_with = "queue::config::pending"
    )]
    pub max_pending: usize,
    /// TLS between the peers.
    pub tls: Option<Tls>,
    /// Who may use the API. Without it, whoever can open its socket.
    pub access: Option<Access>,
    /// RDMA between the peers.
    #[serde(default)]
    pub rdma: Rdma,
}

/// Whether it is `HOST:PORT`, as far as can be seen.
fn has_port(listen: &str) -> bool {
    let port = listen.rsplit_once(':').map(|(_, port)| port);
    port.is_some_and(|port| port.parse::<u16>().is_ok())
}

/// Beside a channel's buffers and all else, a migration stays below 64 MiB with it.
fn default_delta_cache() -> u64 {
    24 << 20
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let bytes = parse_size(&String::deserialize(from)?).map_err(serde::de::Error::custom)?;
    if bytes > MAX_DELTA_CACHE {
        let most = MAX_DELTA_CACHE >> 30;
        return Err(serde::de::Error::custom(format!(
            "the memory for versions of pages is out of range: {most} GiB at most"
        )));
    }
    Ok(bytes)
}

/// Table `[tls]`: mutual TLS 1.3 between the daemons.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// PEM file with the certificates that peers' certificates must be signed by.
    pub ca: PathBuf,
    /// PEM file with this daemon's certificate (and intermediates).
    pub cert: PathBuf,
    /// PEM file with its private key.
    pub key: PathBuf,
    /// DNS names of the peers that may send to this host or take from it.
    pub allow: Vec<String>,
}

impl Config {
    /// The text of `file`, to be parsed.
    ///
    /// # Errors
    /// [`ConfigError`], ready for the operator.
    pub(crate) fn read(file: &Path) -> Result<String, ConfigError> {
        std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.to_owned(),
            line: None,
            what: format!("cannot be read: {error}"),
        })
    }

    /// Checks `text`, the content of `file`. Relative paths in it are relative to the file.
    ///
    /// # Errors
    /// [`ConfigError`], ready for the operator.
    pub fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
        let fail = |line, what| ConfigError {
            file: file.to_owned(),
            line,
            what,
        };
        let mut config: Config = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start].matches('\n').count());
            let message = error
                .message()
                .replace("unknown field", "unknown key")
                .replace("missing field", "missing key");
            fail(line, message.replace("expected one of", "the keys are"))
        })?;
        config.check().map_err(|what| fail(None, what))?;
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        config.make_absolute(file.parent().unwrap_or(Path::new("/")));
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.name.is_empty() || self.name.len() > pagecopy::limits::MAX_NAME {
            return Err(format!(
                "name must have 1 to {} bytes",
                pagecopy::limits::MAX_NAME
            ));
        }
        if self.user.as_ref().is_some_and(String::is_empty) {
            return Err("user is empty: name a user, or remove the key".to_owned());
        }
        self.rdma.check()?;
        if !self.listen.starts_with("unix:") && !has_port(&self.listen) {
            return Err(format!(
                "listen = {:?} is not HOST:PORT, such as \"0.0.0.0:7070\" or \"[::]:7070\"",
                self.listen
            ));
        }
        for to in &self.destinations {
            check_host_port(to)
                .map_err(|failure| format!("destinations: {}; {}", failure.what, failure.remedy))?;
        }
        self.hooks.iter().try_for_each(Hook::check)?;
        if let Some(access) = &self.access {
            access.check(self)?;
        }
        match &self.tls {
            None if !self.insecure_plaintext => Err("there is no [tls] table. Guest memory would cross the network in \
                 the clear; if that is wanted, say insecure-plaintext = true"
                .to_owned()),
            Some(_) if self.insecure_plaintext => {
                Err("there is a [tls] table and insecure-plaintext = true: remove one of them".to_owned())
            }
            Some(tls) if tls.allow.is_empty() => {
                Err("tls.allow is empty, so no peer could ever connect: list the DNS names of the peers' certificates"
                    .to_owned())
            }
            _ => Ok(()),
        }
    }

    fn make_absolute(&mut self, base: &Path) {
        let paths = [&mut self.api, &mut self.state_dir].into_iter();
        let paths = paths.chain(&mut self.spawn_policy).chain(&mut self.qmp_dir);
        let tls = self
            .tls
            .iter_mut()
            .flat_map(|tls| [&mut tls.ca, &mut tls.cert, &mut tls.key]);
        let hooks = self.hooks.iter_mut();
        let hooks = hooks.flat_map(|hook| hook.secret_file.iter_mut().chain([&mut hook.ca]));
        for path in paths.chain(tls).chain(hooks) {
            *path = base.join(&*path);
        }
    }
}

/// Why a configuration was refused.
#[derive(Debug)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, where it is known.
    pub line: Option<usize>,
    /// What is wrong with it, and what would be right.
    pub what: String,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "configuration {}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::new(
            Fault::Operator,
            error.to_string(),
            "correct the configuration file and start pagecopyd again",
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PLAIN: &str = "name = 'a'\nlisten = '127.0.0.1:7070'\napi = 'api.sock'\nstate-dir = '/var/lib/pagecopy'\n";
    const TLS: &str =
        "[tls]\nca = 'ca.pem'\ncert = 'a.pem'\nkey = 'a.key'\nallow = ['b.example']\n";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("/etc/pagecopy/a.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn tls_and_relative_paths() {
        let config = parse(&format!("{PLAIN}{TLS}")).unwrap();
        assert_eq!(config.api, Path::new("/etc/pagecopy/api.sock"));
        assert_eq!(config.state_dir, Path::new("/var/lib/pagecopy"));
        let tls = config.tls.unwrap();
        assert_eq!(tls.ca, Path::new("/etc/pagecopy/ca.pem"));
        assert_eq!(tls.allow, ["b.example"]);
    }

    #[test]
    fn destinations_are_hosts_with_ports() {
        let with = |destinations: &str| {
            let head = format!("{PLAIN}destinations = {destinations}\n");
            parse(&format!("{head}{TLS}")).map(|config| config.destinations)
        };
        assert_eq!(with("['b:1', '[::1]:2']").unwrap(), ["b:1", "[::1]:2"]);
        let wrong = with("['b:1', 'c']").unwrap_err();
        for part in ["destinations", "\"c\" has no port", "HOST:PORT"] {
            assert!(wrong.contains(part), "{part} is not in: {wrong}");
        }
    }

    #[test]
    fn plaintext_must_be_asked_for() {
        let error = parse(PLAIN).unwrap_err();
        assert!(error.contains("insecure-plaintext = true"), "{error}");
        assert!(
            parse(&format!("{PLAIN}insecure-plaintext = true\n"))
                .unwrap()
                .insecure_plaintext
        );
        let both = parse(&format!("{PLAIN}insecure-plaintext = true\n{TLS}")).unwrap_err();
        assert!(both.contains("remove one"), "{both}");
    }

    #[test]
    fn an_unknown_key_is_named_with_the_file_and_the_known_keys() {
        let error = parse(&format!("{PLAIN}lisen = 'x'\n")).unwrap_err();
        for part in [
            "/etc/pagecopy/a.toml",
            "line 5",
            "`lisen`",
            "`listen`",
            "`state-dir`",
            "`insecure-plaintext`",
        ] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        let nested = parse(&format!("{PLAIN}{TLS}alow = []\n")).unwrap_err();
        assert!(
            nested.contains("`alow`") && nested.contains("`allow`"),
            "{nested}"
        );
    }

    #[test]
    fn missing_and_malformed_values() {
        let error = parse("name = 'a'\nlisten = '1.2.3.4:1'\napi = 'x'\n").unwrap_err();
        assert!(error.contains("missing key `state-dir`"), "{error}");
        let error = parse(&PLAIN.replace(":7070", "")).unwrap_err();
        assert!(error.contains("HOST:PORT"), "{error}");
        let error = parse(&format!("{PLAIN}{}", TLS.replace("'b.example'", ""))).unwrap_err();
        assert!(error.contains("tls.allow is empty"), "{error}");
    }

    #[test]
    fn who_is_told() {
        use hooks::About;

        let with = |hook: &str| parse(&format!("{PLAIN}{TLS}[[hooks]]\n{hook}"));
        let hook = with("url = 'http://ops.example/a'\nsecret-file = 'hook.key'\n").unwrap();
        let hook = &hook.hooks[0];
        assert_eq!(
            hook.secret_file.as_deref(),
            Some(Path::new("/etc/pagecopy/hook.key"))
        );
        assert_eq!(
            hook.events,
            [About::State, About::Finished, About::Outpaced]
        );
        for (wrong, word) in [
            ("events = []\nurl = 'http://a/'", "never be told"),
            ("events = ['end']\nurl = 'http://a/'", "`outpaced`"),
            ("url = 'ftp://a/'", "https://"),
            ("", "missing key `url`"),
            ("url = 'http://a/'\nsecret = 'x'", "`secret-file`"),
        ] {
            let error = with(wrong).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn who_may_use_the_api() {
        use access::Who;

        let with = |access: &str| parse(&format!("{PLAIN}{TLS}[access]\n{access}"));
        let all = "read = ['group:adm', 'cert:grafana.example']\noperate = ['user:root']\nlisten = '[::]:7071'\n";
        let access = with(all).unwrap().access.unwrap();
        assert_eq!(access.operate, [Who::User("root".into())]);
        let read: Vec<String> = access.read.iter().map(Who::to_string).collect();
        assert_eq!(read, ["group:adm", "cert:grafana.example"]);
        assert_eq!(with("").unwrap().access, Some(Access::default()));
        for (wrong, word) in [
            ("read = ['adm']", "group:NAME"),
            ("read = ['group:']", "is nobody"),
            ("read = ['role:x']", "is nobody"),
            ("operate = ['cert:a.example']", "access.listen"),
            ("listen = '0.0.0.0'", "HOST:PORT"),
            ("write = []", "`operate`"),
        ] {
            let error = with(wrong).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let plain = format!("{PLAIN}insecure-plaintext = true\n[access]\nlisten = '[::]:1'\n");
        assert!(parse(&plain).unwrap_err().contains("no [tls] table"));
    }

    #[test]
    fn the_hosts_bandwidth_is_a_rate() {
        let with = |value: &str| parse(&format!("{PLAIN}bandwidth-limit = {value}\n{TLS}"));
        assert_eq!(
            parse(&format!("{PLAIN}{TLS}")).unwrap().bandwidth_limit,
            None
        );
        let limit = with("'10GB/s'").unwrap().bandwidth_limit;
        assert_eq!(limit, Some(10_000_000_000));
        for wrong in ["'0'", "'fast'", "5"] {
            assert!(with(wrong).unwrap_err().contains("line 5"), "{wrong}");
        }
    }

    #[test]
    fn rdma_is_off_until_the_networks_are_named() {
        let with = |table: &str| parse(&format!("{PLAIN}{TLS}[rdma]\n{table}\n"));
        assert!(!with("").unwrap().rdma.allow_plaintext);
        let error = with("allow-plaintext = true").unwrap_err();
        assert!(error.contains("rdma.networks is empty"), "{error}");
        let rdma = with("allow-plaintext = true\nnetworks = ['192.0.2.0/24']\npin = '8GiB'");
        let rdma = rdma.unwrap().rdma;
        assert!(rdma.allow_plaintext && rdma.networks.len() == 1);
        assert_eq!(rdma.pin, crate::rdma::Pin::Bytes(8 << 30));
        for wrong in ["networks = ['192.0.2.0']", "pin = 'some'", "device = 'x'"] {
            assert!(with(wrong).unwrap_err().contains("line 11"), "{wrong}");
        }
    }

    #[test]
    fn how_many_leave_at_a_time_and_how_many_wait() {
        let with = |key: &str| parse(&format!("{PLAIN}{key}\n{TLS}"));
        let config = with("").unwrap();
        assert_eq!((config.max_concurrent, config.max_pending), (2, 1000));
        let config = with("max-concurrent = 8\nmax-pending = 0").unwrap();
        assert_eq!((config.max_concurrent, config.max_pending), (8, 0));
        for (wrong, right) in [
            ("max-concurrent = 0", "1 to 256"),
            ("max-concurrent = -1", "1 to 256"),
            ("max-pending = 10001", "0 to 10000"),
            ("max-pending = 'all'", "line 5"),
        ] {
            assert!(with(wrong).unwrap_err().contains(right), "{wrong}");
        }
    }

    #[test]
    fn an_absent_file_is_named() {
        let error = Config::read(Path::new("/nonexistent/p.toml"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/p.toml"), "{error}");
    }
}
