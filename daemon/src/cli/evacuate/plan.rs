//! In which order guests leave: those that take the shortest first, so that most of them are away soon.

use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use super::super::client::Client;
use super::super::preflight;
use crate::guests::GuestFound;
use crate::preflight::PreflightRequest;

/// What a link carries where none could be measured, in bytes a second: 1 Gbit/s. It orders guests by their memory.
const GUESSED: f64 = 125e6;

/// A guest that is to leave.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Leaving {
    /// Its name.
    pub(super) vm: String,
    /// Its QMP socket.
    pub(super) qmp: PathBuf,
    /// Its memory, as far as it is known.
    pub(super) ram_bytes: Option<u64>,
    /// How long it will likely take, in milliseconds, where its writes and the link could be sampled.
    pub(super) predicted_ms: Option<f64>,
    /// The migration that it is in already.
    pub(super) id: Option<Uuid>,
    /// Why its QEMU could not be asked.
    #[serde(skip)]
    pub(super) unasked: Option<(String, String)>,
}

impl Leaving {
    pub(super) fn of(found: GuestFound) -> Leaving {
        Leaving {
            vm: found.vm,
            qmp: found.qmp,
            ram_bytes: found.ram_bytes,
            predicted_ms: None,
            id: found.migration,
            unasked: found
                .error
                .map(|error| (error, found.remedy.unwrap_or_default())),
        }
    }

    /// Whether it is worth a look at what it would take: not one that is on its way already.
    fn is_open(&self) -> bool {
        self.id.is_none() && self.unasked.is_none()
    }
}

/// Has the daemon predict what each takes, two at a time (more of one host a destination does not take), and puts them in their
/// order. Of several destinations the first that answers says it for all, since an order is all that is wanted here; where none can be
/// asked nothing is predicted.
pub(super) async fn in_order(
    client: &Client,
    to: &[String],
    mut leaving: Vec<Leaving>,
) -> Vec<Leaving> {
    let mut open: Vec<&mut Leaving> = leaving.iter_mut().filter(|one| one.is_open()).collect();
    let (mut to, mut goodput) = (to, None::<f64>);
    for pair in open.chunks_mut(2) {
        while let [here, others @ ..] = to {
            let seen = predict_pair(client, here, pair).await;
            if seen.contains(&Link::Away) {
                to = others;
                continue;
            }
            for link in seen {
                if let Link::Carries(rate) = link {
                    goodput = Some(goodput.unwrap_or(0.0).max(rate));
                }
            }
            break;
        }
    }
    sort(&mut leaving, goodput.unwrap_or(GUESSED));
    leaving
}

async fn predict_pair(client: &Client, to: &str, pair: &mut [&mut Leaving]) -> Vec<Link> {
    match pair {
        [one, two] => {
            let (one, two) = tokio::join!(predict(client, to, one), predict(client, to, two));
            vec![one, two]
        }
        [one] => vec![predict(client, to, one).await],
        _ => Vec::new(),
    }
}

/// What was seen of the link, on the way to one guest's prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Link {
    /// So many bytes a second.
    Carries(f64),
    /// The destination could not be asked.
    Away,
    /// This guest could not be looked at.
    Unseen,
}

/// Looks at one guest. What is in the way of it is told when it is to move: an order is all that is wanted here.
async fn predict(client: &Client, to: &str, leaving: &mut Leaving) -> Link {
    let request = PreflightRequest {
        vm: leaving.vm.clone(),
        qmp: leaving.qmp.clone(),
        to: to.to_owned(),
        spawn: false,
    };
    let Ok(found) = preflight::ask(client, &request).await else {
        return Link::Unseen;
    };
    leaving.predicted_ms = found.predicted.map(|predicted| predicted.total_ms.likely);
    found.goodput_bytes_per_s.map_or(Link::Away, Link::Carries)
}

/// The shortest first; by the memory of those whose writes could not be sampled; last those of which nothing is known.
fn sort(leaving: &mut [Leaving], goodput: f64) {
    let takes = |one: &Leaving| {
        #[allow(clippy::cast_precision_loss)] // For an order.
        let by_size = one.ram_bytes.map(|bytes| bytes as f64 / goodput * 1e3);
        one.predicted_ms.or(by_size).unwrap_or(f64::INFINITY)
    };
    leaving.sort_by(|one, other| {
        // Those under way are ahead already.
        let ahead = other.id.is_some().cmp(&one.id.is_some());
        ahead
            .then(takes(one).total_cmp(&takes(other)))
            .then_with(|| one.vm.cmp(&other.vm))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(vm: &str, ram_bytes: Option<u64>, predicted_ms: Option<f64>) -> Leaving {
        Leaving {
            vm: vm.to_owned(),
            qmp: "/q".into(),
            ram_bytes,
            predicted_ms,
            id: None,
            unasked: None,
        }
    }

    #[test]
    fn the_shortest_first_by_what_is_known_of_each() {
        let mut under_way = one("under way", Some(1 << 40), None);
        under_way.id = Some(Uuid::nil());
        let mut all = [
            one("unknown", None, None),
            one("writes a lot", Some(1_000), Some(9_000.0)),
            one("b of 1 GB", Some(1_000_000_000), None),
            one("a of 1 GB", Some(1_000_000_000), None),
            one("large and idle", Some(1 << 40), Some(70.0)),
            under_way,
        ];
        sort(&mut all, 1e9);
        let order: Vec<&str> = all.iter().map(|one| one.vm.as_str()).collect();
        assert_eq!(
            order,
            [
                "under way",
                "large and idle",
                "a of 1 GB",
                "b of 1 GB",
                "writes a lot",
                "unknown"
            ]
        );
    }
}
