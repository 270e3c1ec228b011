//! Certificates made for one test: an authority, a certificate for each host, and the wrong ones.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

/// Files of one host's certificate, as the daemon's configuration names them.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The authority that this host trusts.
    pub ca: PathBuf,
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A certificate authority whose files are kept in one folder.
#[derive(Debug)]
pub struct Certs {
    folder: PathBuf,
    ca: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Certs {
    /// Makes an authority. `name` tells it from others in the same folder.
    pub fn new(folder: &Path, name: &str) -> Certs {
        let mut params = CertificateParams::new(Vec::new()).expect("no names are valid names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key pair");
        let certificate = params.self_signed(&key).expect("a self-signed certificate");
        let ca = folder.join(format!("{name}.pem"));
        fs::write(&ca, certificate.pem()).expect("a certificate file");
        Certs {
            folder: folder.to_owned(),
            ca,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate for `host` that is valid now, and for years.
    pub fn identity(&self, host: &str) -> Identity {
        self.issue(host, "good", Duration::from_secs(10 * 365 * 86400))
    }

    /// A certificate for `host` that is valid for `time` from now; zero makes one that has expired.
    pub fn expiring(&self, host: &str, time: Duration) -> Identity {
        self.issue(host, "expiring", time)
    }

    fn issue(&self, host: &str, kind: &str, valid: Duration) -> Identity {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("the clock is past 1970");
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("a valid DNS name");
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(1970, 1, 1) + now + valid;
        let key = KeyPair::generate().expect("a key pair");
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("a signed certificate");
        let stem = self
            .ca
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let file = |end: &str| self.folder.join(format!("{stem}-{host}-{kind}.{end}"));
        let identity = Identity {
            ca: self.ca.clone(),
            cert: file("pem"),
            key: file("key"),
        };
        fs::write(&identity.cert, certificate.pem()).expect("a certificate file");
        fs::write(&identity.key, key.serialize_pem()).expect("a key file");
        fs::set_permissions(&identity.key, Permissions::from_mode(0o600))
            .expect("a key file takes a mode");
        identity
    }
}
