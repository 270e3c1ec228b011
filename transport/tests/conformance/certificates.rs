//! Certificates made on the spot, and every way in which they can be wrong.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use transport::{Address, Channel, Error, Identity, Listener, Peer, Regions, Security, connect};

use crate::harness::{PATIENCE, Sockets, greeting, loopback};

/// An authority, and a folder for what it signs.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    pub fn new() -> Authority {
        Authority::named("an authority")
    }

    pub fn named(common_name: &str) -> Authority {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "transport-ca-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(
            folder.join("ca.pem"),
            params.self_signed(&key).unwrap().pem(),
        )
        .unwrap();
        Authority {
            issuer: Issuer::new(params, key),
            folder,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes `NAME.pem` and `NAME.key`.
    pub fn issue(&self, name: &str) {
        self.issue_with(name, |_| {});
    }

    pub fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    pub fn load(&self, ca: &Authority, name: &str, allow: &[&str]) -> Result<Arc<Identity>, Error> {
        let allow = allow.iter().map(|name| (*name).to_owned()).collect();
        Identity::load(
            &ca.path("ca.pem"),
            &self.path(&format!("{name}.pem")),
            &self.path(&format!("{name}.key")),
            allow,
        )
    }

    /// What `name` needs to talk to those in `allow`.
    pub fn identity(&self, name: &str, allow: &[&str]) -> Security {
        self.issue(name);
        Security::Tls(self.load(self, name, allow).unwrap())
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The TLS back end.
pub fn sockets() -> Sockets {
    let ca = Authority::new();
    Sockets {
        address: loopback(),
        dial: ca.identity("source.test", &["destination.test"]),
        accept: ca.identity("destination.test", &["other.test", "source.test"]),
        kind: "tls",
        of_files: false,
    }
}

type Dialled = Result<(Box<dyn Channel>, Peer), Error>;

/// Both sides' outcomes.
fn meet(dial: &Security, accept: &Security) -> (Result<Peer, Error>, Result<Peer, Error>) {
    meet_with(
        |address| connect(address, dial, &greeting(), &Regions::new(), PATIENCE),
        accept,
    )
}

fn meet_with(
    dial: impl FnOnce(&Address) -> Dialled,
    accept: &Security,
) -> (Result<Peer, Error>, Result<Peer, Error>) {
    let listener = Listener::bind(&loopback()).unwrap();
    std::thread::scope(|scope| {
        let acceptor = scope.spawn(|| {
            let pending = listener.accept(PATIENCE).unwrap().unwrap();
            pending
                .establish(accept, PATIENCE, |_, _| Ok(Regions::new()))
                .map(|(_, peer, _)| peer)
        });
        let dialled = dial(&listener.local_address()).map(|(_, peer)| peer);
        (dialled, acceptor.join().unwrap())
    })
}

fn says(result: Result<Peer, Error>, kind: fn(&Error) -> bool, words: &[&str]) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(kind(&error), "{error:?}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

const UNTRUSTED: fn(&Error) -> bool = |error| matches!(error, Error::Untrusted(_));
const REFUSED: fn(&Error) -> bool = |error| matches!(error, Error::Refused(_));
const INCOMPATIBLE: fn(&Error) -> bool = |error| matches!(error, Error::PeerIncompatible(_));

#[test]
fn peers_learn_each_other_s_names() {
    let ca = Authority::new();
    let (a, b) = meet(
        &ca.identity("a.test", &["b.test"]),
        &ca.identity("b.test", &["A.test"]),
    );
    assert_eq!(a.unwrap().names, ["b.test"]);
    assert_eq!(b.unwrap().names, ["a.test"]);
}

#[test]
fn a_foreign_authority_is_refused() {
    foreign(&Authority::named("ours"), &Authority::named("theirs"));
    // Not even one of the same name.
    foreign(&Authority::named("same"), &Authority::named("same"));
}

fn foreign(ours: &Authority, theirs: &Authority) {
    ours.issue("a.test");
    theirs.issue("b.test");
    // The dialling side sees the foreign certificate first.
    let a = Security::Tls(ours.load(ours, "a.test", &["b.test"]).unwrap());
    let b = Security::Tls(theirs.load(theirs, "b.test", &["a.test"]).unwrap());
    let (dialled, accepted) = meet(&a, &b);
    says(dialled, UNTRUSTED, &["not signed by an authority", "`ca`"]);
    says(accepted, REFUSED, &["does not know the authority"]);
    // Here only the accepting side does not know the other's.
    let a = Security::Tls(ours.load(theirs, "a.test", &["b.test"]).unwrap());
    let (dialled, accepted) = meet(&a, &b);
    says(dialled, REFUSED, &["does not know the authority"]);
    says(accepted, UNTRUSTED, &["not signed by an authority"]);
}

#[test]
fn a_name_that_is_not_allowed_is_refused() {
    let ca = Authority::new();
    // The dialling side objects.
    let (dialled, accepted) = meet(
        &ca.identity("a.test", &["c.test"]),
        &ca.identity("b.test", &["a.test"]),
    );
    says(dialled, UNTRUSTED, &["b.test", "c.test", "allow-list"]);
    says(accepted, REFUSED, &["allow-list", "AccessDenied"]);
    // The accepting side objects.
    let (dialled, accepted) = meet(
        &ca.identity("a.test", &["b.test"]),
        &ca.identity("b.test", &["c.test", "d.test"]),
    );
    says(
        dialled,
        REFUSED,
        &["a.test", "c.test, d.test", "allow-list"],
    );
    says(
        accepted,
        UNTRUSTED,
        &["a.test", "c.test, d.test", "allow-list"],
    );
}

#[test]
fn plaintext_and_tls_notice_each_other() {
    let ca = Authority::new();
    let tls = ca.identity("a.test", &["a.test"]);
    let (dialled, accepted) = meet(&Security::Plaintext, &tls);
    says(dialled, INCOMPATIBLE, &["only speaks TLS", "[tls]"]);
    says(accepted, INCOMPATIBLE, &["peer does not use TLS"]);
    let (dialled, accepted) = meet(&tls, &Security::Plaintext);
    says(
        dialled,
        INCOMPATIBLE,
        &["the peer does not use TLS", "[tls]"],
    );
    says(accepted, INCOMPATIBLE, &["the peer speaks TLS"]);
}

/// A client of rustls's own, whose certificate we would not load ourselves.
fn stranger(
    ca: &Authority,
    certificate: Option<&str>,
    address: &Address,
) -> Result<(), rustls::Error> {
    use std::io::{Read, Write};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(ca.path("ca.pem")).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let config = match certificate {
        None => builder.with_no_client_auth(),
        Some(name) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(ca.path(&format!("{name}.pem"))).unwrap()],
                PrivateKeyDer::from_pem_file(ca.path(&format!("{name}.key"))).unwrap(),
            )
            .unwrap(),
    };
    let Address::Tcp(address) = address else {
        unreachable!()
    };
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    let mut connection =
        rustls::ClientConnection::new(Arc::new(config), "b.test".try_into().unwrap()).unwrap();
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    let done = stream
        .write_all(b"hello")
        .and_then(|()| stream.read(&mut [0; 64]));
    match done {
        Ok(_) => Ok(()),
        Err(error) => Err(error
            .downcast::<rustls::Error>()
            .unwrap_or(rustls::Error::DecryptError)),
    }
}

/// What our listener says about a stranger, and what the stranger is told.
fn accept_stranger(
    ca: &Authority,
    certificate: Option<&str>,
) -> (Result<Peer, Error>, rustls::AlertDescription) {
    let accept = ca.identity("b.test", &["a.test"]);
    let mut told = None;
    let (_, accepted) = meet_with(
        |address| {
            told = stranger(ca, certificate, address).err();
            Err(Error::Closed)
        },
        &accept,
    );
    match told {
        Some(rustls::Error::AlertReceived(alert)) => (accepted, alert),
        other => panic!("no alert but {other:?}"),
    }
}

#[test]
fn no_certificate_is_refused() {
    let (accepted, told) = accept_stranger(&Authority::new(), None);
    says(accepted, UNTRUSTED, &["no certificate"]);
    assert_eq!(told, rustls::AlertDescription::CertificateRequired);
}

#[test]
fn an_expired_certificate_is_refused() {
    let ca = Authority::new();
    ca.issue_with("a.test", |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let (accepted, told) = accept_stranger(&ca, Some("a.test"));
    says(accepted, UNTRUSTED, &["expired"]);
    assert_eq!(told, rustls::AlertDescription::CertificateExpired);
}

#[test]
fn our_own_files_are_checked() {
    let ca = Authority::new();
    ca.issue("a.test");
    ca.issue("b.test");
    let fails = |name: &str, allow: &[&str], words: &[&str]| {
        let error = ca.load(&ca, name, allow).unwrap_err();
        assert!(matches!(error, Error::Misuse(_)), "{error:?}");
        for word in words {
            assert!(
                error.to_string().contains(word),
                "{word:?} is not in {error}"
            );
        }
    };
    fails("missing", &["b.test"], &["missing.pem", "No such file"]);
    fails("a.test", &[], &["allow is empty"]);
    fails("a.test", &["not a name"], &["not a name", "DNS name"]);
    fs::write(ca.path("junk.pem"), "junk").unwrap();
    fails("junk", &["b.test"], &["junk.pem", "PEM"]);
    fs::copy(ca.path("a.test.pem"), ca.path("mixed.pem")).unwrap();
    fs::copy(ca.path("b.test.key"), ca.path("mixed.key")).unwrap();
    fails(
        "mixed",
        &["b.test"],
        &["mixed.key", "does not belong", "mixed.pem"],
    );
    fs::write(ca.path("mixed.key"), "junk").unwrap();
    fails("mixed", &["b.test"], &["mixed.key", "no private key"]);
    ca.issue_with("old", |params| params.not_after = date_time_ymd(2002, 1, 1));
    fails("old", &["b.test"], &["old.pem", "expired", "2002"]);
    ca.issue_with("early", |params| {
        params.not_before = date_time_ymd(2999, 1, 1)
    });
    fails("early", &["b.test"], &["early.pem", "not valid before"]);
}
