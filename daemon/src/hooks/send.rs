//! Telling one hook: one message after the other, each again with growing pauses until it is taken or given up.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::aws_lc_rs as provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::Message;
use crate::config::hooks::{Hook, Url};
use crate::failure::{Failure, operator};

/// Attempts for each message.
const ATTEMPTS: u32 = 8;
/// The pause before the second; each that follows is twice as long, …
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long one attempt may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The shortest secret that is taken, in bytes.
const SHORTEST_SECRET: usize = 16;

/// One who is told.
#[derive(Debug)]
pub(super) struct Target {
    url: Url,
    secret: Option<hmac::Key>,
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    /// Reads what `hook` names.
    ///
    /// # Errors
    /// A file that is wrong, and what is.
    pub(super) fn new(hook: &Hook) -> Result<Target, Failure> {
        let wrong = |file: &Path, what: String| {
            operator(
                format!("the hook {}: {}: {what}", hook.url.text, file.display()),
                "correct the file, for the user that pagecopyd runs as, or the configuration",
            )
        };
        let secret = hook.secret_file.as_ref().map(|file| {
            let secret = std::fs::read(file).map_err(|error| wrong(file, error.to_string()))?;
            // The end of the line is an editor's.
            let secret = secret.trim_ascii_end();
            if secret.len() < SHORTEST_SECRET {
                let least = format!("a secret has at least {SHORTEST_SECRET} bytes");
                return Err(wrong(file, least));
            }
            Ok(hmac::Key::new(hmac::HMAC_SHA256, secret))
        });
        let tls = hook
            .url
            .is_tls
            .then(|| tls(&hook.ca).map_err(|what| wrong(&hook.ca, what)));
        Ok(Target {
            url: hook.url.clone(),
            secret: secret.transpose()?,
            tls: tls.transpose()?,
        })
    }

    /// Tells everything that comes, in this order.
    pub(super) async fn send_all(self, mut waiting: mpsc::Receiver<Message>) {
        while let Some(message) = waiting.recv().await {
            self.send(&message).await;
        }
    }

    async fn send(&self, message: &Message) {
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=ATTEMPTS {
            let what = match tokio::time::timeout(PATIENCE, self.post(message)).await {
                Ok(Ok(status)) if status.is_success() => return,
                Ok(Ok(status)) if !is_passing(status) => {
                    tracing::warn!(url = self.url.text, %status, "a hook refuses what it is told");
                    return;
                }
                Ok(Ok(status)) => status.to_string(),
                Ok(Err(error)) => error,
                Err(_) => "no answer".to_owned(),
            };
            if attempt == ATTEMPTS {
                tracing::warn!(
                    url = self.url.text,
                    error = what,
                    "a hook cannot be told: given up"
                );
                return;
            }
            tracing::debug!(
                url = self.url.text,
                error = what,
                attempt,
                "a hook will be told again"
            );
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn post(&self, message: &Message) -> Result<StatusCode, String> {
        let address = (self.url.host.as_str(), self.url.port);
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| error.to_string())?;
        match &self.tls {
            None => self.post_on(stream, message).await,
            Some(tls) => {
                let name = ServerName::try_from(self.url.host.clone());
                let name = name.map_err(|error| error.to_string())?;
                let stream = TlsConnector::from(Arc::clone(tls))
                    .connect(name, stream)
                    .await;
                self.post_on(stream.map_err(|error| error.to_string())?, message)
                    .await
            }
        }
    }

    async fn post_on<S>(&self, stream: S, message: &Message) -> Result<StatusCode, String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let shown = |error: hyper::Error| error.to_string();
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(shown)?;
        let connection = tokio::spawn(connection);
        let answer = sender.send_request(self.request(message)?).await;
        // What the answer says beside its status is nobody's business here.
        connection.abort();
        Ok(answer.map_err(shown)?.status())
    }

    fn request(&self, message: &Message) -> Result<Request<Full<Bytes>>, String> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = time.map_or(0, |time| time.as_secs()).to_string();
        let mut request = Request::post(&self.url.path)
            .header("host", &self.url.authority)
            .header(
                "user-agent",
                concat!("pagecopyd/", env!("CARGO_PKG_VERSION")),
            )
            .header("content-type", "application/json")
            .header("pagecopy-event", message.about.word())
            .header("pagecopy-delivery", message.delivery.to_string())
            .header("pagecopy-time", &time);
        if let Some(secret) = &self.secret {
            let signature = sign(secret, &time, &message.body);
            request = request.header("pagecopy-signature", signature);
        }
        let body = Full::new(Bytes::copy_from_slice(message.body.as_bytes()));
        request.body(body).map_err(|error| error.to_string())
    }
}

/// `sha256=` and HMAC-SHA-256 over the time, a dot and the body, in hexadecimal: what was heard cannot be sent again later.
fn sign(secret: &hmac::Key, time: &str, body: &str) -> String {
    let tag = hmac::sign(secret, format!("{time}.{body}").as_bytes());
    tag.as_ref()
        .iter()
        .fold("sha256=".to_owned(), |mut text, byte| {
            // A text takes everything.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Whether it may be another answer later.
fn is_passing(status: StatusCode) -> bool {
    let named = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    status.is_server_error() || named.contains(&status)
}

fn tls(ca: &Path) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca).map_err(|error| error.to_string())?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| error.to_string())?;
        // Of many old authorities some are not understood; the others count.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err("no certificate of an authority in it (PEM is expected)".to_owned());
    }
    let config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_what_others_compute() {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, b"0123456789abcdef");
        // printf '17.{}' | openssl dgst -sha256 -hmac 0123456789abcdef
        let expected = "47fbe0b0fc46f5c1c83c07456c70992bb9ad376f5f8bd7e3c695a76445ac2cbc";
        assert_eq!(sign(&secret, "17", "{}"), format!("sha256={expected}"));
    }

    #[test]
    fn what_may_pass_is_told_again() {
        for (status, again) in [
            (500, true),
            (503, true),
            (429, true),
            (408, true),
            (404, false),
            (301, false),
        ] {
            let status = StatusCode::from_u16(status).unwrap_or_default();
            assert_eq!(is_passing(status), again, "{status}");
        }
    }
}
