//! QEMU's own migration, as fast as its settings allow.

use std::path::Path;
use std::time::Duration;

use benches::ways::Way;
use serde_json::json;
use tests::real::{Certs, PATIENCE, Qemu, Side};

const PORT: u16 = 4444;

fn uri() -> String {
    format!("tcp:{}:{PORT}", Side::B.address())
}

/// Sets both sides, and has the destination listen.
pub(crate) fn prepare(
    way: &Way,
    source: &mut Qemu,
    destination: &mut Qemu,
    limit_ms: u32,
) -> Result<(), String> {
    for qemu in [&mut *source, &mut *destination] {
        let names = way.capabilities();
        let on: Vec<_> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        qemu.qmp
            .execute("migrate-set-capabilities", json!({"capabilities": on}))?;
        qemu.qmp
            .execute("migrate-set-parameters", way.parameters(limit_ms).into())?;
    }
    destination
        .qmp
        .execute("migrate-incoming", json!({"uri": uri()}))?;
    Ok(())
}

/// Begins; with post-copy, switches over as soon as QEMU lets itself be told.
pub(crate) fn begin(way: &Way, source: &mut Qemu) -> Result<(), String> {
    source.qmp.execute("migrate", json!({"uri": uri()}))?;
    if way.is_postcopy() {
        let active = |data: &serde_json::Value| data["status"] == "active";
        source
            .qmp
            .event_within("MIGRATION", PATIENCE, active)
            .ok_or("QEMU does not begin")?;
        source.qmp.execute("migrate-start-postcopy", json!({}))?;
    }
    Ok(())
}

/// Waits until the side that sends says that it is done.
pub(crate) fn wait_done(source: &mut Qemu, patience: Duration) -> Result<(), String> {
    let end = source.qmp.event_within("MIGRATION", patience, |data| {
        data["status"] == "completed" || data["status"] == "failed"
    });
    match end {
        Some(data) if data["status"] == "completed" => Ok(()),
        Some(_) => {
            let told = source.qmp.execute("query-migrate", json!({}))?;
            let reason = told["error-desc"].as_str().unwrap_or("without a reason");
            Err(format!("QEMU's migration failed: {reason}"))
        }
        None => Err(format!("not done within {patience:?}")),
    }
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
