//! The guest's vCPUs, as QEMU tells them.

use serde::Deserialize;
use serde_json::json;

use crate::pull::Vcpu;
use crate::qmp::{Qmp, QmpError};

/// The guest's vCPUs, and the threads that run them.
///
/// # Errors
/// QEMU refused or left.
pub(crate) async fn vcpus(qmp: &Qmp) -> Result<Vec<Vcpu>, QmpError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Cpu {
        cpu_index: u32,
        thread_id: u32,
    }
    let cpus: Vec<Cpu> = qmp.query("query-cpus-fast", json!({})).await?;
    let vcpu = |cpu: Cpu| Vcpu {
        index: cpu.cpu_index,
        thread: cpu.thread_id,
    };
    Ok(cpus.into_iter().map(vcpu).collect())
}
