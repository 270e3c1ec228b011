//! What a failed handshake means, in words: by our own check of the peer's certificate, or by the alert that it sent.

use rustls::{AlertDescription, CertificateError};

use crate::error::Error;

/// What rustls's error means to the operator.
pub(crate) fn handshake_error(error: &rustls::Error) -> Error {
    match error {
        rustls::Error::InvalidCertificate(why) => Error::Untrusted(certificate_text(why)),
        rustls::Error::NoCertificatesPresented => Error::Untrusted(
            "it showed no certificate: configure cert and key in its [tls]".to_owned(),
        ),
        rustls::Error::AlertReceived(alert) => alert_error(*alert),
        rustls::Error::PeerIncompatible(why) => {
            Error::PeerIncompatible(format!("TLS 1.3 is needed: {why:?}"))
        }
        rustls::Error::InvalidMessage(_)
        | rustls::Error::PeerMisbehaved(_)
        | rustls::Error::DecryptError => {
            Error::PeerMisbehaved(format!("in the TLS handshake: {error}"))
        }
        other => Error::Misuse(format!("in the TLS handshake: {other}")),
    }
}

/// What an alert from the peer means to the operator.
pub(crate) fn alert_error(alert: AlertDescription) -> Error {
    let refused = |text: &str| Error::Refused(format!("{text} (TLS alert {alert:?})"));
    match alert {
        AlertDescription::CloseNotify => Error::Closed,
        AlertDescription::CertificateRequired => {
            refused("it wants a certificate and got none from us")
        }
        AlertDescription::CertificateExpired => refused(
            "to it our certificate has expired, or is not valid yet: renew it, or set the clocks right",
        ),
        // The second when it knows another authority of the same name.
        AlertDescription::UnknownCA | AlertDescription::DecryptError => refused(
            "it does not know the authority that signed our certificate: compare `cert` here with `ca` there",
        ),
        AlertDescription::AccessDenied => refused(
            "the name in our certificate is not on its allow-list: add it to `allow` in its [tls]",
        ),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateRevoked
        | AlertDescription::UnsupportedCertificate => refused("it does not accept our certificate"),
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            Error::PeerIncompatible(format!(
                "it speaks no TLS 1.3 that we do (TLS alert {alert:?})"
            ))
        }
        _ => refused("it broke off"),
    }
}

fn certificate_text(why: &CertificateError) -> String {
    use CertificateError as E;
    match why {
        E::Expired | E::ExpiredContext { .. } => {
            format!("its certificate has expired: renew it, or set the clocks right ({why})")
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            format!("its certificate is not valid yet: are the clocks right? ({why})")
        }
        E::UnknownIssuer | E::BadSignature => {
            "its certificate was not signed by an authority in our `ca` file: it is foreign, or `ca` is wrong".to_owned()
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            format!("its certificate is not meant for this: it needs both server and client authentication ({why})")
        }
        other => format!("its certificate does not pass: {other}"),
    }
}
