//! What a daemon takes from its configuration while it runs: on SIGHUP the file is read again, as a whole or not at all.
//!
//! Certificates and the allow-list, limits, and what `migrate` leaves out take effect at once; whatever else was changed is
//! named in the log and waits for the next start. A migration that is under way keeps its settings, and connects again with
//! the new certificates.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use toml::Table;
use transport::Security;
use transport::connect::Identity;

use crate::api::access::Roles;
use crate::config::{Config, Tls};
use crate::failure::{Failure, Shown, operator};
use crate::service::Service;

/// The keys that take effect at once.
const AT_ONCE: [&str; 13] = [
    "access",
    "tls",
    "bandwidth-limit",
    "qmp-dir",
    "destinations",
    "max-concurrent",
    "max-pending",
    "allow-postcopy",
    "throttle",
    "compress",
    "delta-cache",
    "rdma",
    "memory-margin",
];

/// What of `access` does not.
const ACCESS_LISTEN: &str = "access.listen";

/// How peers are trusted, for as long as it is held: a reload changes it for everybody.
#[derive(Clone, Debug)]
pub struct Trust(Arc<RwLock<Security>>);

impl Trust {
    pub(crate) fn new(security: Security) -> Trust {
        Trust(Arc::new(RwLock::new(security)))
    }

    /// As of now.
    pub fn now(&self) -> Security {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, security: Security) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = security;
    }
}

/// The configuration that is in force, and the file that it comes from.
#[derive(Debug)]
pub struct InForce {
    file: PathBuf,
    read: RwLock<Read>,
}

/// A file as it was read.
#[derive(Clone, Debug)]
struct Read {
    config: Arc<Config>,
    keys: Arc<Table>,
}

impl InForce {
    /// Reads and checks `file`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn load(file: &Path) -> Result<InForce, Failure> {
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        Ok(InForce {
            read: RwLock::new(Read::from_file(&file)?),
            file,
        })
    }

    /// As of now.
    pub fn now(&self) -> Arc<Config> {
        self.read().config
    }

    fn read(&self) -> Read {
        self.read
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads the file again, and checks it and all that it names. Nothing is changed.
    fn again(&self) -> Result<(Read, Security), Failure> {
        let (old, new) = (self.read(), Read::from_file(&self.file)?);
        if new.config.tls.is_some() != old.config.tls.is_some() {
            return Err(operator(
                "whether there is a [tls] table cannot be changed while pagecopyd runs",
                "start pagecopyd again",
            ));
        }
        if new.config.access.is_some() != old.config.access.is_some() {
            // Who can open the socket was decided when it was made.
            return Err(operator(
                "whether there is an [access] table cannot be changed while pagecopyd runs",
                "start pagecopyd again",
            ));
        }
        let security = new
            .config
            .tls
            .as_ref()
            .map_or(Ok(Security::Plaintext), tls)?;
        Ok((new, security))
    }

    /// Takes over what can be. The keys that were changed: those that are in force now, and those that are not.
    fn set(&self, new: &Read) -> [Vec<String>; 2] {
        let mut read = self.read.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = changed(&read.keys, &new.keys);
        let mut access = new.config.access.clone();
        if let (Some(new), Some(old)) = (&mut access, &read.config.access)
            && new.listen != old.listen
        {
            changed.push(ACCESS_LISTEN.to_owned());
            new.listen.clone_from(&old.listen);
        }
        let is_at_once = |key: &String| AT_ONCE.contains(&key.as_str());
        let Config {
            tls,
            bandwidth_limit,
            qmp_dir,
            destinations,
            max_concurrent,
            max_pending,
            allow_postcopy,
            throttle,
            compress,
            delta_cache,
            rdma,
            memory_margin,
            ..
        } = (*new.config).clone();
        read.config = Arc::new(Config {
            access,
            tls,
            bandwidth_limit,
            qmp_dir,
            destinations,
            max_concurrent,
            max_pending,
            allow_postcopy,
            throttle,
            compress,
            delta_cache,
            rdma,
            memory_margin,
            ..(*read.config).clone()
        });
        let mut keys = (*new.keys).clone();
        let (at_once, later) = changed.into_iter().partition(is_at_once);
        // What waits is told at each reload.
        for key in &later {
            match read.keys.get::<String>(key) {
                Some(old) => keys.insert(key.clone(), old.clone()),
                None => keys.remove(key),
            };
        }
        read.keys = Arc::new(keys);
        [at_once, later]
    }
}

impl Read {
    fn from_file(file: &Path) -> Result<Read, Failure> {
        let text = Config::read(file)?;
        let config = Config::parse(file, &text)?;
        Ok(Read {
            config: Arc::new(config),
            // It is TOML, or it would not be a configuration.
            keys: Arc::new(toml::from_str(&text).unwrap_or_default()),
        })
    }
}

fn changed(old: &Table, new: &Table) -> Vec<String> {
    let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
    keys.sort();
    keys.dedup();
    let differs = |key: &&String| old.get(*key) != new.get(*key);
    keys.into_iter().filter(differs).cloned().collect()
}

/// TLS as the configuration says it.
///
/// # Errors
/// The file that is wrong, and what is.
pub(crate) fn tls(tls: &Tls) -> Result<Security, Failure> {
    let identity = Identity::load(&tls.ca, &tls.cert, &tls.key, tls.allow.clone());
    Ok(Security::Tls(identity.map_err(|error| {
        operator(
            format!("[tls]: {error}"),
            "see the files that [tls] names in the configuration",
        )
    })?))
}

/// Takes the file's settings over, or keeps those that are in force; the log says which. Blocks for a moment.
pub(crate) fn reload(service: &Service) {
    let file = service.in_force.file.display();
    let again = service.in_force.again().and_then(|(new, security)| {
        let roles = Roles::look_up(new.config.access.as_ref())?;
        Ok((new, security, roles))
    });
    match again {
        Ok((new, security, roles)) => {
            service.roles.set(roles);
            let [at_once, later] = service.in_force.set(&new);
            service.security.set(security);
            service.budget.limit(new.config.bandwidth_limit);
            service
                .queue
                .limit(new.config.max_concurrent, new.config.max_pending);
            // The files that a key names are read again whether or not it was changed.
            tracing::info!(%file, changed = ?at_once, "reloaded");
            if !later.is_empty() {
                tracing::warn!(%file, keys = ?later, "changed, and not in force before pagecopyd is started again");
            }
        }
        Err(mut failure) => {
            // A host whose certificate has run out must not wait for a remedy that is about the start.
            failure.remedy = format!(
                "correct it, for the user that pagecopyd runs as, and reload again (SIGHUP, `systemctl reload pagecopyd`); {}",
                "meanwhile all stays as it was"
            );
            tracing::error!(%file, failure = %Shown(&failure), "not reloaded");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::api::types::Compress;

    const TEXT: &str = "name = 'a'\nlisten = '127.0.0.1:7070'\napi = 'api.sock'\nstate-dir = '/state'\ninsecure-plaintext = true\n";

    fn folder(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("pagecopy-reload-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn limits_change_at_once_and_addresses_do_not() {
        let folder = folder("limits");
        let file = folder.join("a.toml");
        std::fs::write(&file, TEXT).unwrap();
        let in_force = InForce::load(&file).unwrap();
        let again =
            TEXT.replace(":7070", ":7071") + "bandwidth-limit = '1GB/s'\ncompress = 'zstd'\n";
        std::fs::write(&file, again).unwrap();
        for _ in 0..2 {
            let (new, _) = in_force.again().unwrap();
            let [_, later] = in_force.set(&new);
            assert_eq!(later, ["listen"], "told each time");
        }
        let now = in_force.now();
        assert_eq!(
            (now.bandwidth_limit, now.compress),
            (Some(1_000_000_000), Compress::Zstd)
        );
        assert_eq!(now.listen, "127.0.0.1:7070");
        std::fs::write(&file, TEXT).unwrap();
        let (new, _) = in_force.again().unwrap();
        let [at_once, later] = in_force.set(&new);
        assert_eq!(
            (at_once.join(" "), later.len()),
            ("bandwidth-limit compress".to_owned(), 0)
        );
        assert_eq!(in_force.now().bandwidth_limit, None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_bad_file_changes_nothing() {
        let folder = folder("bad");
        let file = folder.join("a.toml");
        std::fs::write(&file, TEXT).unwrap();
        let in_force = InForce::load(&file).unwrap();
        let tls = "[tls]\nca = 'ca'\ncert = 'c'\nkey = 'k'\nallow = ['b']\n";
        for (bad, word) in [
            (TEXT.replace("name", "nam"), "`nam`"),
            (TEXT.replace("insecure-plaintext = true", tls), "[tls]"),
            (format!("{TEXT}compress = 'zip'\n"), "zip"),
        ] {
            std::fs::write(&file, bad).unwrap();
            let failure = in_force.again().unwrap_err();
            assert!(failure.what.contains(word), "{failure:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(in_force.again().unwrap_err().what.contains("a.toml"));
        assert_eq!(in_force.now().name, "a");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
