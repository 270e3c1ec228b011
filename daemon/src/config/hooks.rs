//! `[[hooks]]`: who is told over HTTP of what happens.

use std::path::PathBuf;

use hyper::Uri;
use serde::{Deserialize, Deserializer, Serialize, de};

/// What can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum About {
    /// A migration's state has changed.
    State,
    /// A migration has ended.
    Finished,
    /// A guest that is leaving has written nine tenths of what the link carries away, or more, for two seconds.
    Outpaced,
}

impl About {
    /// As it is spelt in the configuration and in what is sent.
    pub fn word(self) -> &'static str {
        match self {
            About::State => "state",
            About::Finished => "finished",
            About::Outpaced => "outpaced",
        }
    }
}

/// One who is told.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Hook {
    /// Where it is posted to. Nothing else is ever connected to: no redirection is followed.
    pub url: Url,
    /// What is told.
    #[serde(default = "everything")]
    pub events: Vec<About>,
    /// A file with the secret that signs what is sent.
    pub secret_file: Option<PathBuf>,
    /// With `https`: the authorities (PEM) of which the other side's certificate must be.
    #[serde(default = "system_authorities")]
    pub ca: PathBuf,
}

fn everything() -> Vec<About> {
    vec![About::State, About::Finished, About::Outpaced]
}

fn system_authorities() -> PathBuf {
    "/etc/ssl/certs/ca-certificates.crt".into()
}

impl Hook {
    /// What is wrong with it.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.events.is_empty() {
            let url = &self.url.text;
            return Err(format!(
                "the hook {url} has no events, so it would never be told anything: leave events out, or name some"
            ));
        }
        Ok(())
    }
}

/// An address of HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// As it was written.
    pub text: String,
    /// Whether over TLS.
    pub is_tls: bool,
    /// A name, or an address without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Host and port, as in the request.
    pub authority: String,
    /// Path and query.
    pub path: String,
}

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Url, D::Error> {
        let text = String::deserialize(from)?;
        Url::parse(&text).ok_or_else(|| {
            de::Error::custom(format!(
                "{text:?} is no address for a hook: write http://HOST[:PORT]/PATH or https://…, without a user and a password"
            ))
        })
    }
}

impl Url {
    fn parse(text: &str) -> Option<Url> {
        let uri: Uri = text.parse().ok()?;
        let is_tls = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return None;
        }
        let default = if is_tls { 443 } else { 80 };
        Some(Url {
            text: text.to_owned(),
            is_tls,
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(default),
            authority: authority.to_string(),
            path: uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses() {
        let url = Url::parse("https://ops.example/a?b=c").unwrap();
        assert_eq!((url.is_tls, url.port), (true, 443));
        assert_eq!(
            (url.host.as_str(), url.path.as_str()),
            ("ops.example", "/a?b=c")
        );
        let url = Url::parse("http://[::1]:8080").unwrap();
        assert_eq!((url.host.as_str(), url.port), ("::1", 8080));
        assert_eq!(
            (url.authority.as_str(), url.path.as_str()),
            ("[::1]:8080", "/")
        );
        for wrong in [
            "",
            "ops.example",
            "/a",
            "ftp://ops.example/",
            "http://user:secret@ops.example/",
            "http://",
            "file:///etc/passwd",
        ] {
            assert_eq!(Url::parse(wrong), None, "{wrong}");
        }
    }
}
