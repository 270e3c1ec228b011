//! Who speaks for a migration: whoever carries one of the names by which its peer was let in when it began.
//!
//! An id is no secret between peers, and each of them may connect for guests of its own. Without TLS nobody has a name, and
//! whoever reaches the port is believed, in this as in everything else.

use pagecopy::engine::journal::Record;
use transport::Peer;

use crate::config::Config;

/// The names by which `peer` is let in, to be kept with its migration. None without TLS.
pub(crate) fn of(config: &Config, peer: &Peer) -> Vec<String> {
    let allow = config.tls.iter().flat_map(|tls| &tls.allow);
    let allowed: Vec<&String> = allow.collect();
    let is_allowed = |name: &&String| allowed.iter().any(|other| other.eq_ignore_ascii_case(name));
    peer.names.iter().filter(is_allowed).cloned().collect()
}

/// Whether `peer` speaks for a migration that was begun with a peer of these names.
pub(crate) fn includes(names: &[String], peer: &Peer) -> bool {
    let is_known = |name: &String| names.iter().any(|other| other.eq_ignore_ascii_case(name));
    names.is_empty() || peer.names.iter().any(is_known)
}

/// The names that a journal keeps.
pub(crate) fn recorded(records: &[Record]) -> &[String] {
    match records.first() {
        Some(Record::Begun { names, .. }) => names,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(names: &[&str]) -> Peer {
        Peer {
            address: "192.0.2.1:1".to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn who_came_with_a_name_is_known_by_it() {
        let names = peer(&["b.example", "b.old.example"]).names;
        assert!(includes(&names, &peer(&["b.example"])));
        assert!(includes(&names, &peer(&["b.new.example", "B.old.example"])));
        assert!(!includes(&names, &peer(&["c.example"])));
        // A peer without a name is nobody where there were names.
        assert!(!includes(&names, &peer(&[])));
        // Where there were none, everybody is let in by the configuration alone.
        assert!(includes(&[], &peer(&[])) && includes(&[], &peer(&["c.example"])));
    }
}
