//! Table `[access]`: who may use the API, and whether it is on the network, too.

use std::fmt;

use serde::{Deserialize, Deserializer, de};

use super::Config;

/// Who may use the API, and for what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Access {
    /// Who may look.
    #[serde(default)]
    pub read: Vec<Who>,
    /// Who may look and have things done.
    #[serde(default)]
    pub operate: Vec<Who>,
    /// Where the API is served over TCP, with the certificates of `[tls]`: `HOST:PORT`.
    pub listen: Option<String>,
}

/// Somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A user of this host.
    User(String),
    /// Whoever is in a group of this host.
    Group(String),
    /// Whoever has a certificate with this DNS name.
    Certificate(String),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::User(name) => write!(f, "user:{name}"),
            Who::Group(name) => write!(f, "group:{name}"),
            Who::Certificate(name) => write!(f, "cert:{name}"),
        }
    }
}

impl<'de> Deserialize<'de> for Who {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Who, D::Error> {
        let text = String::deserialize(from)?;
        let who = match text.split_once(':') {
            Some((_, "")) | None => None,
            Some(("user", name)) => Some(Who::User(name.to_owned())),
            Some(("group", name)) => Some(Who::Group(name.to_owned())),
            Some(("cert", name)) => Some(Who::Certificate(name.to_owned())),
            Some(_) => None,
        };
        who.ok_or_else(|| {
            de::Error::custom(format!(
                "{text:?} is nobody: write user:NAME, group:NAME or cert:NAME (a DNS name of a certificate)"
            ))
        })
    }
}

impl Access {
    /// What is wrong with it in `config`.
    pub(super) fn check(&self, config: &Config) -> Result<(), String> {
        let names = self.read.iter().chain(&self.operate);
        match &self.listen {
            Some(listen) if !super::has_port(listen) => Err(format!(
                "access.listen = {listen:?} is not HOST:PORT, such as \"0.0.0.0:7071\" or \"[::]:7071\""
            )),
            Some(_) if config.tls.is_none() => Err(
                "access.listen puts the API on the network, which wants certificates: there is no [tls] table"
                    .to_owned(),
            ),
            Some(_) => Ok(()),
            None => match names.clone().find(|who| matches!(who, Who::Certificate(_))) {
                Some(who) => Err(format!(
                    "{who} in [access] can never be shown: certificates come with access.listen"
                )),
                None => Ok(()),
            },
        }
    }
}
