//! QEMU's own migration, as fast as its settings allow.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tests::real::{Certs, Qemu, Side};

use super::contender::Contender;

const PORT: u16 = 4444;
/// The longest that a migration may take.
const PATIENCE: Duration = Duration::from_secs(300);

fn uri() -> String {
    format!("tcp:{}:{PORT}", Side::B.address())
}

/// Sets both sides, and has the destination listen.
pub(crate) fn prepare(
    contender: Contender,
    source: &mut Qemu,
    destination: &mut Qemu,
    limit_ms: u32,
) {
    let mut parameters = json!({
        "multifd-channels": 2,
        "max-bandwidth": 1_u64 << 40,
        "downtime-limit": limit_ms,
    });
    if contender.has_tls() {
        parameters["tls-creds"] = json!("tls0");
        parameters["tls-hostname"] = json!("b");
    }
    for qemu in [&mut *source, &mut *destination] {
        qemu.qmp.capabilities(contender.capabilities());
        qemu.qmp
            .execute("migrate-set-parameters", parameters.clone())
            .expect("QEMU takes these parameters");
    }
    destination
        .qmp
        .execute("migrate-incoming", json!({"uri": uri()}))
        .expect("QEMU listens");
}

/// Begins; with post-copy, switches over as soon as QEMU lets itself be told.
pub(crate) fn begin(contender: Contender, source: &mut Qemu) {
    source
        .qmp
        .execute("migrate", json!({"uri": uri()}))
        .expect("QEMU begins");
    if contender.is_postcopy() {
        source
            .qmp
            .wait_event("MIGRATION", PATIENCE, |data| data["status"] == "active");
        source
            .qmp
            .execute("migrate-start-postcopy", json!({}))
            .expect("QEMU switches over");
    }
}

/// Waits until the side that sends says that it is done.
pub(crate) fn wait_done(source: &mut Qemu) {
    source.qmp.wait_event("MIGRATION", PATIENCE, |data| {
        assert_ne!(data["status"], "failed", "QEMU's own migration failed");
        data["status"] == "completed"
    });
}

/// QEMU's arguments for mutual TLS: those of the destination (a server), and those of the source (a client).
pub(crate) fn credentials(folder: &Path) -> (Vec<String>, Vec<String>) {
    let certs = Certs::new(folder, "qemu-authority");
    let end = |host: &str, role: &str| {
        let identity = certs.identity(host);
        let files = folder.join(format!("qemu-tls-{role}"));
        let copy = |from: &Path, to: &str| {
            std::fs::copy(from, files.join(to)).expect("a certificate can be copied")
        };
        std::fs::create_dir_all(&files).expect("a folder for certificates");
        copy(&identity.ca, "ca-cert.pem");
        copy(&identity.cert, &format!("{role}-cert.pem"));
        copy(&identity.key, &format!("{role}-key.pem"));
        let object = format!(
            "tls-creds-x509,id=tls0,dir={},endpoint={role},verify-peer=on",
            files.display()
        );
        vec!["-object".to_owned(), object]
    };
    (end("b", "server"), end("a", "client"))
}
