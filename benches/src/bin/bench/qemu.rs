//! QEMU's own migration, as fast as its settings allow.

use benches::hosts::Hosts;
use benches::hosts::ask::Ask;
use benches::ways::Way;
use serde_json::{Value, json};

/// Sets both sides, and has the destination listen.
pub(crate) fn prepare(way: &Way, hosts: &mut Hosts, limit_ms: u32) -> Result<(), String> {
    let names = way.capabilities();
    let on: Vec<_> = names
        .iter()
        .map(|name| json!({"capability": name, "state": true}))
        .collect();
    let commands = [
        ("migrate-set-capabilities", json!({"capabilities": on})),
        ("migrate-set-parameters", way.parameters(limit_ms).into()),
    ];
    let uri = json!({"uri": format!("tcp:{}", hosts.qemu_at())});
    for host in [&mut hosts.source, &mut hosts.destination] {
        for (command, arguments) in &commands {
            host.ask::<Value>(&Ask::Qmp((*command).to_owned(), arguments.clone()))?;
        }
    }
    let incoming = Ask::Qmp("migrate-incoming".to_owned(), uri);
    hosts.destination.ask::<Value>(&incoming).map(|_| ())
}
