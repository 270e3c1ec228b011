//! Who we are to peers, and which peers we talk to: certificates, the key, and the allow-list.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::client::{ClientConfig, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{InconsistentKeys, RootCertStore};

use crate::error::Error;
use crate::tls::verify::{self, AllowedServer};

/// Our certificate and key, the authorities whose certificates we accept, and the names among those that we allow.
#[derive(Debug)]
pub struct Identity {
    provider: Arc<CryptoProvider>,
    verifier: Arc<WebPkiServerVerifier>,
    resolver: Arc<SingleCertAndKey>,
    server: Arc<ServerConfig>,
    /// In lower case.
    allow: Vec<String>,
    /// The first of them. It is never sent and decides nothing; rustls wants a name.
    name: ServerName<'static>,
}

impl Identity {
    /// Reads the files (PEM): certificates of the authorities, our certificate with its chain, our key. `allow` lists the
    /// DNS names of which a peer's certificate must carry one.
    ///
    /// # Errors
    /// [`Error::Misuse`] naming the file and what is wrong with it.
    pub fn load(
        ca: &Path,
        cert: &Path,
        key: &Path,
        allow: Vec<String>,
    ) -> Result<Arc<Identity>, Error> {
        let provider = Arc::new(provider());
        let name = check_allow(&allow)?;
        let roots = Arc::new(load_roots(ca)?);
        let certified = load_own(&provider, cert, key)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| wrong(ca, &e.to_string()))?;
        let client_verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| wrong(ca, &e.to_string()))?;
        let resolver = Arc::new(SingleCertAndKey::from(certified));
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| Error::Misuse(format!("setting up TLS: {e}")))?
            .with_client_cert_verifier(client_verifier)
            .with_cert_resolver(resolver.clone());
        // Every channel shows its certificates anew: no tickets, no resumption.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.enable_secret_extraction = true;
        let allow = allow.iter().map(|name| name.to_ascii_lowercase()).collect();
        Ok(Arc::new(Identity {
            provider,
            verifier,
            resolver,
            server: Arc::new(server),
            allow,
            name,
        }))
    }

    /// For the accepting side. The names of the dialling side are checked after the handshake.
    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// TLS for clients that are no peers and speak one of `protocols`: with our certificate, and for whoever has one of the same
    /// authorities. Their names ([`dns_names`](crate::connect::dns_names)) are the caller's to check.
    pub fn for_clients(&self, protocols: &[&[u8]]) -> Arc<ServerConfig> {
        let mut config = (*self.server).clone();
        config.enable_secret_extraction = false;
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Arc::new(config)
    }

    /// For one connection of the dialling side, with the verifier that knows in the end what was wrong.
    pub(crate) fn client_config(&self) -> Result<(Arc<ClientConfig>, Arc<AllowedServer>), Error> {
        let verifier = Arc::new(AllowedServer::new(
            self.verifier.clone(),
            self.allow.clone(),
            self.name.clone(),
        ));
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| Error::Misuse(format!("setting up TLS: {e}")))?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(self.resolver.clone());
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        Ok((Arc::new(config), verifier))
    }

    /// A name for the dialling side's rustls; see the field.
    pub(crate) fn name(&self) -> ServerName<'static> {
        self.name.clone()
    }

    /// Whether one of a certificate's names is allowed.
    pub(crate) fn check_names(&self, names: &[String]) -> Result<(), Error> {
        verify::check_names(names, &self.allow)
    }
}

/// The cipher suites of TLS 1.3, the fastest on machines with AES instructions first.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider
}

fn check_allow(allow: &[String]) -> Result<ServerName<'static>, Error> {
    let mut first = None;
    for name in allow {
        match ServerName::try_from(name.clone()) {
            Ok(name @ ServerName::DnsName(_)) => first = first.or(Some(name)),
            _ => {
                return Err(Error::Misuse(format!(
                    "[tls] allow: {name:?} is not a DNS name"
                )));
            }
        }
    }
    first.ok_or_else(|| {
        Error::Misuse("[tls] allow is empty: name the peers that may connect".to_owned())
    })
}

fn load_roots(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|e| wrong(path, &format!("not a certificate of an authority: {e}")))?;
    }
    Ok(roots)
}

fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => {
            Err(wrong(path, "no certificate in it (PEM is expected)"))
        }
        Ok(certificates) => Ok(certificates),
        Err(e) => Err(wrong(path, &format!("not PEM: {e}"))),
    }
}

fn load_own(provider: &CryptoProvider, cert: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let chain = load_certificates(cert)?;
    verify::check_validity(&chain[0]).map_err(|what| wrong(cert, &what))?;
    let der = PrivateKeyDer::from_pem_slice(&read(key)?)
        .map_err(|e| wrong(key, &format!("no private key in it (PEM is expected): {e}")))?;
    CertifiedKey::from_der(chain, der, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => wrong(
            key,
            &format!(
                "this key does not belong to the certificate in {}",
                cert.display()
            ),
        ),
        error => wrong(key, &error.to_string()),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|e| wrong(path, &e.to_string()))
}

fn wrong(path: &Path, what: &str) -> Error {
    Error::Misuse(format!("{}: {what}", path.display()))
}
