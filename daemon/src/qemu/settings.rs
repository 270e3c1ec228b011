//! QEMU's migration capabilities and parameters: set just for a migration, and put back as they were.
//!
//! `x-ignore-shared` leaves the guest's shared RAM out of QEMU's stream; `pause-before-switchover` gives the pause in
//! which the last pages go. Capabilities that change the stream's form (multifd, post-copy, compression, …) do not work
//! over one file descriptor, or would touch the RAM that is ours: they are switched off meanwhile.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::failure::{Failure, qemu};
use crate::qmp::{Qmp, QmpError};

/// Capabilities without which nothing works, with what they are for.
const NEEDED: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "events"];
/// Capabilities that may stay on: they do not change how the stream travels.
const HARMLESS: [&str; 3] = ["validate-uuid", "dirty-bitmaps", "late-block-activate"];
/// Bytes a second for QEMU's own stream. It goes to a socket of ours, so QEMU must not pace it.
const DEVICE_STATE_BANDWIDTH: u64 = 1 << 40;
/// QEMU's largest, so that it never waits for its small blocks to settle.
const DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// How long QEMU may take to have its settings put back.
const RESTORE_LIMIT: Duration = Duration::from_secs(5);

/// Which side a QEMU is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The guest leaves it.
    Source,
    /// The guest comes to it.
    Destination,
}

#[derive(Debug, Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

/// What QEMU has set before a migration changes it: exactly what will be changed, as it was.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Reads what a migration would change. To be kept before [`Settings::change`], so that it can be put back even by a
    /// daemon that was started anew.
    ///
    /// # Errors
    /// QEMU lacks a capability, or does not answer.
    pub async fn read(qmp: &Qmp, role: Role) -> Result<Settings, Failure> {
        let present: Vec<Capability> = qmp.query("query-migrate-capabilities", json!({})).await?;
        check_capabilities(qmp, &present)?;
        let capabilities = changes(&present, role)
            .into_iter()
            .map(|(name, state)| (name, !state))
            .collect();
        let mut parameters = Map::new();
        if role == Role::Source {
            let before: Map<String, Value> =
                qmp.query("query-migrate-parameters", json!({})).await?;
            parameters = wanted_parameters(&before)
                .into_iter()
                .filter_map(|(key, _)| before.get(&key).cloned().map(|value| (key, value)))
                .collect();
        }
        Ok(Settings {
            capabilities,
            parameters,
        })
    }

    /// Sets what a migration needs.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn change(&self, qmp: &Qmp) -> Result<(), Failure> {
        if !self.capabilities.is_empty() {
            let wanted: Vec<_> = self
                .capabilities
                .iter()
                .map(|(name, state)| (name.clone(), !state))
                .collect();
            set_capabilities(qmp, &wanted).await?;
        }
        if !self.parameters.is_empty() {
            qmp.execute(
                "migrate-set-parameters",
                Value::Object(wanted_parameters(&self.parameters)),
            )
            .await?;
        }
        Ok(())
    }

    /// Puts everything back. A QEMU that has ended, or is about to, is no failure. One that does not answer has its time twice (it may
    /// be this process that stood still), and a connection that is lost is made again once. What QEMU refuses it would refuse again.
    pub async fn restore(&self, qmp: &Qmp) {
        let mut again = None;
        for _ in 0..2 {
            let put_back = self.put_back(again.as_ref().unwrap_or(qmp));
            match timeout(RESTORE_LIMIT, put_back).await {
                Ok(Ok(())) => return,
                Ok(Err(QmpError::Gone)) => match timeout(RESTORE_LIMIT, qmp.again()).await {
                    Ok(Some(connected)) => again = Some(connected),
                    _ => return tracing::debug!("QEMU is gone, with its migration settings"),
                },
                Ok(Err(error @ QmpError::TimedOut { .. })) => {
                    tracing::debug!(%error, "QEMU does not put its migration settings back");
                }
                Ok(Err(error)) => {
                    return tracing::debug!(%error, "QEMU's migration settings were not put back");
                }
                Err(_) => tracing::debug!("QEMU does not put its migration settings back"),
            }
        }
    }

    async fn put_back(&self, qmp: &Qmp) -> Result<(), QmpError> {
        if !self.capabilities.is_empty() {
            set_capabilities(qmp, &self.capabilities).await?;
        }
        if !self.parameters.is_empty() {
            let before = Value::Object(self.parameters.clone());
            qmp.execute("migrate-set-parameters", before).await?;
        }
        Ok(())
    }
}

/// Whether a QEMU has what is needed at all.
///
/// # Errors
/// Names the missing capability and the versions that have it.
pub async fn check(qmp: &Qmp) -> Result<(), Failure> {
    let present: Vec<Capability> = qmp.query("query-migrate-capabilities", json!({})).await?;
    check_capabilities(qmp, &present)
}

/// The capabilities that are needed, in words.
pub(crate) fn needed() -> String {
    NEEDED.join(", ")
}

fn check_capabilities(qmp: &Qmp, present: &[Capability]) -> Result<(), Failure> {
    let missing = NEEDED.iter().find(|needed| {
        present
            .iter()
            .all(|capability| capability.capability != **needed)
    });
    match missing {
        None => Ok(()),
        Some(missing) => Err(qemu(
            format!(
                "QEMU {} lacks the migration capability {missing}",
                qmp.version()
            ),
            "use QEMU 4.1 or later (7.2 and 10.0 are tested)",
        )),
    }
}

fn changes(present: &[Capability], role: Role) -> Vec<(String, bool)> {
    let wanted = |name: &str| match role {
        Role::Source => NEEDED.contains(&name),
        Role::Destination => NEEDED.contains(&name) && name != "pause-before-switchover",
    };
    present
        .iter()
        .filter(|capability| !HARMLESS.contains(&capability.capability.as_str()))
        .map(|capability| {
            (
                capability.capability.clone(),
                wanted(&capability.capability),
                capability.state,
            )
        })
        .filter(|(_, wanted, state)| wanted != state)
        .map(|(name, wanted, _)| (name, wanted))
        .collect()
}

/// The parameters to set.
fn wanted_parameters(before: &Map<String, Value>) -> Map<String, Value> {
    let mut wanted = Map::new();
    wanted.insert("max-bandwidth".to_owned(), json!(DEVICE_STATE_BANDWIDTH));
    wanted.insert("downtime-limit".to_owned(), json!(DOWNTIME_LIMIT_MS));
    // With credentials set, QEMU would speak TLS to our socket; the device state is protected by our own channel.
    if before
        .get("tls-creds")
        .and_then(Value::as_str)
        .is_some_and(|creds| !creds.is_empty())
    {
        wanted.insert("tls-creds".to_owned(), json!(""));
    }
    wanted
}

async fn set_capabilities(qmp: &Qmp, states: &[(String, bool)]) -> Result<(), QmpError> {
    let list: Vec<Value> = states
        .iter()
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_must_change_is_changed() {
        let present: Vec<Capability> = [
            ("events", true),
            ("x-ignore-shared", false),
            ("pause-before-switchover", false),
            ("multifd", true),
            ("validate-uuid", true),
            ("xbzrle", false),
        ]
        .map(|(name, state)| Capability {
            capability: name.to_owned(),
            state,
        })
        .into();
        let source = changes(&present, Role::Source);
        let expected = [
            ("x-ignore-shared", true),
            ("pause-before-switchover", true),
            ("multifd", false),
        ];
        assert_eq!(
            source,
            expected.map(|(name, state)| (name.to_owned(), state))
        );
        let destination = changes(&present, Role::Destination);
        assert_eq!(
            destination,
            [
                ("x-ignore-shared".to_owned(), true),
                ("multifd".to_owned(), false)
            ]
        );
    }

    #[test]
    fn tls_of_qemus_own_is_off_meanwhile() {
        let mut before = Map::new();
        before.insert("tls-creds".to_owned(), json!("tls0"));
        assert_eq!(
            wanted_parameters(&before).get("tls-creds"),
            Some(&json!(""))
        );
        before.insert("tls-creds".to_owned(), json!(""));
        assert_eq!(wanted_parameters(&before).get("tls-creds"), None);
    }
}
