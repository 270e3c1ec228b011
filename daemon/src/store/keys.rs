//! Idempotency keys: a request that comes again, because its answer was lost on the way, begins nothing anew.
//!
//! The latest are kept, over restarts too. A key is written down when its migration has begun, before the answer: whoever was
//! answered will be answered the same. What failed has no answer to keep, and may be asked for again with the same key.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::files::Folder;

/// The file.
const NAME: &str = "keys.json";
/// Keys that are kept.
const KEPT: usize = 500;

/// A key, with what was asked and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    key: String,
    request: Value,
    id: Uuid,
}

/// All keys of this daemon.
#[derive(Debug)]
pub struct Keys {
    folder: Arc<Folder>,
    /// The oldest first. Held while a request with a key is being taken: the same one may come twice at once.
    kept: Mutex<VecDeque<Kept>>,
}

/// What has become of a request with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Once {
    /// It has begun this.
    Begun(Uuid),
    /// It had begun this when it came first.
    Again(Uuid),
    /// The key is another request's, which has begun this.
    Another(Uuid),
}

impl Keys {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is none of ours.
    pub(crate) fn open(folder: Arc<Folder>) -> io::Result<Keys> {
        let kept: VecDeque<Kept> = folder.read_json(NAME)?.unwrap_or_default();
        Ok(Keys {
            folder,
            kept: Mutex::new(kept),
        })
    }

    /// Has `begin` done for `request`, unless it was done before under this `key`.
    ///
    /// # Errors
    /// `begin` has failed.
    pub(crate) async fn once<E>(
        &self,
        key: &str,
        request: Value,
        begin: impl Future<Output = Result<Uuid, E>>,
    ) -> Result<Once, E> {
        let mut kept = self.kept.lock().await;
        if let Some(earlier) = kept.iter().find(|earlier| earlier.key == key) {
            return Ok(match earlier.request == request {
                true => Once::Again(earlier.id),
                false => Once::Another(earlier.id),
            });
        }
        let id = begin.await?;
        kept.push_back(Kept {
            key: key.to_owned(),
            request,
            id,
        });
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
        let (folder, all) = (Arc::clone(&self.folder), kept.clone());
        let written = tokio::task::spawn_blocking(move || folder.write_json(NAME, &all)).await;
        // It has begun, whatever the disk says: the key holds for as long as this daemon runs.
        if let Err(error) = written.unwrap_or_else(|error| Err(io::Error::other(error))) {
            tracing::warn!(%error, "an idempotency key could not be kept");
        }
        Ok(Once::Begun(id))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;

    use serde_json::json;

    use super::super::test_dir;
    use super::*;

    fn keys(dir: &std::path::Path) -> Keys {
        Keys::open(Arc::new(Folder::open(dir).unwrap())).unwrap()
    }

    async fn begin() -> Result<Uuid, Infallible> {
        Ok(Uuid::new_v4())
    }

    #[tokio::test]
    async fn the_same_is_answered_the_same_over_a_restart() {
        let dir = test_dir("keys");
        let first = keys(&dir);
        let Once::Begun(id) = first.once("a", json!(1), begin()).await.unwrap() else {
            panic!("nothing has begun");
        };
        for keys in [first, keys(&dir)] {
            let again = keys.once("a", json!(1), begin()).await.unwrap();
            assert_eq!(again, Once::Again(id));
            let other = keys.once("a", json!(2), begin()).await.unwrap();
            assert_eq!(other, Once::Another(id));
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn what_failed_may_be_asked_again() {
        let dir = test_dir("keys-failed");
        let keys = keys(&dir);
        let failed = keys.once("a", json!(1), async { Err("no") }).await;
        assert_eq!(failed, Err("no"));
        let begun = keys.once("a", json!(2), begin()).await.unwrap();
        assert!(matches!(begun, Once::Begun(_)));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn they_are_bounded_and_the_oldest_go() {
        let dir = test_dir("keys-many");
        let keys = keys(&dir);
        let all: VecDeque<Kept> = (0..KEPT)
            .map(|number| Kept {
                key: number.to_string(),
                request: json!(1),
                id: Uuid::nil(),
            })
            .collect();
        *keys.kept.lock().await = all;
        keys.once("new", json!(1), begin()).await.unwrap();
        assert_eq!(keys.kept.lock().await.len(), KEPT);
        let oldest = keys.once("0", json!(1), begin()).await.unwrap();
        assert!(matches!(oldest, Once::Begun(_)), "{oldest:?}");
        let kept = keys.once("2", json!(1), begin()).await.unwrap();
        assert_eq!(kept, Once::Again(Uuid::nil()));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn the_same_twice_at_once_begins_once() {
        let dir = test_dir("keys-twice");
        let keys = keys(&dir);
        let slowly = async {
            tokio::task::yield_now().await;
            begin().await
        };
        let (one, two) = tokio::join!(
            keys.once("a", json!(1), slowly),
            keys.once("a", json!(1), begin())
        );
        let Once::Begun(id) = one.unwrap() else {
            panic!("nothing has begun");
        };
        assert_eq!(two.unwrap(), Once::Again(id));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
