//! Whether a peer's certificate passes: its chain by webpki, its names by the allow-list. The same rules hold in both
//! directions, and no name is taken from the address that was dialled.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::error::Error;

/// The DNS names that a certificate carries, in lower case.
pub fn dns_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(extension)) = parsed.subject_alternative_name() else {
        return Vec::new();
    };
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    };
    extension
        .value
        .general_names
        .iter()
        .filter_map(dns)
        .collect()
}

/// Whether one of `names` is in `allow`.
pub(crate) fn check_names(names: &[String], allow: &[String]) -> Result<(), Error> {
    if names.iter().any(|name| allow.contains(name)) {
        return Ok(());
    }
    let seen = if names.is_empty() {
        "no DNS name".to_owned()
    } else {
        names.join(", ")
    };
    Err(Error::Untrusted(format!(
        "its certificate carries {seen}, of which none is on the allow-list ({}): issue it one with an allowed name, \
         or add its name to `allow` in [tls]",
        allow.join(", ")
    )))
}

/// Whether our own certificate is within its dates.
pub(crate) fn check_validity(certificate: &CertificateDer<'_>) -> Result<(), String> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|e| format!("not a certificate: {e}"))?;
    let validity = parsed.validity();
    if validity.is_valid() {
        return Ok(());
    }
    if validity.time_to_expiration().is_none()
        && validity.not_after < x509_parser::time::ASN1Time::now()
    {
        return Err(format!(
            "this certificate expired at {}: renew it",
            validity.not_after
        ));
    }
    Err(format!(
        "this certificate is not valid before {}: is the clock right?",
        validity.not_before
    ))
}

/// Checks the accepting side's certificate for one connection.
#[derive(Debug)]
pub(crate) struct AllowedServer {
    chain: Arc<WebPkiServerVerifier>,
    allow: Vec<String>,
    /// Any name: webpki looks at it only after the chain.
    name: ServerName<'static>,
    names: Mutex<Vec<String>>,
    verdict: Mutex<Option<Error>>,
}

impl AllowedServer {
    pub(crate) fn new(
        chain: Arc<WebPkiServerVerifier>,
        allow: Vec<String>,
        name: ServerName<'static>,
    ) -> Self {
        AllowedServer {
            chain,
            allow,
            name,
            names: Mutex::default(),
            verdict: Mutex::default(),
        }
    }

    /// The names of the certificate that was checked.
    pub(crate) fn names(&self) -> Vec<String> {
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Why its names were refused, if they were.
    pub(crate) fn verdict(&self) -> Option<Error> {
        self.verdict
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl ServerCertVerifier for AllowedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        match self.chain.verify_server_cert(
            end_entity,
            intermediates,
            &self.name,
            ocsp_response,
            now,
        ) {
            // The chain is checked before the name; the name is judged below.
            Ok(_)
            | Err(rustls::Error::InvalidCertificate(
                NotValidForName | NotValidForNameContext { .. },
            )) => {}
            Err(error) => return Err(error),
        }
        let names = dns_names(end_entity);
        let checked = check_names(&names, &self.allow);
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = names;
        checked
            .map(|()| ServerCertVerified::assertion())
            .map_err(|error| {
                *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Its alert is `access_denied`.
                rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
            })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
