//! Changing a migration that waits or is under way: its limits, and its priority.

use std::time::Duration;

use pagecopy::engine::source::Change;

use super::begin::check_limits;
use crate::api::types::{ChangeRequest, MigrationRequest};
use crate::failure::{Failure, operator};

/// Checks what can be checked without the migration.
///
/// # Errors
/// What is wrong with the request.
pub(crate) fn check(change: &ChangeRequest) -> Result<(), Failure> {
    if *change == ChangeRequest::default() {
        return Err(operator(
            "nothing is to be changed",
            "give a bandwidth limit, a downtime limit or a priority",
        ));
    }
    let limit = change.bandwidth_limit.flatten();
    check_limits(
        change.downtime_limit_ms,
        change.priority.unwrap_or(0),
        &[limit],
    )
}

/// What of it concerns the engine.
pub(super) fn of_engine(change: &ChangeRequest) -> Option<Change> {
    let downtime_limit = change.downtime_limit_ms;
    let change = Change {
        downtime_limit: downtime_limit.map(|ms| Duration::from_secs_f64(ms / 1e3)),
        bandwidth_limit: change.bandwidth_limit,
    };
    (change != Change::default()).then_some(change)
}

/// The request as it is from now on.
pub(super) fn changed(request: &MigrationRequest, change: &ChangeRequest) -> MigrationRequest {
    let mut request = request.clone();
    request.bandwidth_limit = change.bandwidth_limit.unwrap_or(request.bandwidth_limit);
    request.downtime_limit_ms = change.downtime_limit_ms.or(request.downtime_limit_ms);
    request.priority = change.priority.unwrap_or(request.priority);
    request
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn change(text: &str) -> ChangeRequest {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_absent_stays_and_null_is_unlimited() {
        let request = r#"{"vm":"a","qmp":"/q","to":"b:1","bandwidth_limit":5,"priority":3}"#;
        let request: MigrationRequest = serde_json::from_str(request).unwrap();
        let slow = changed(&request, &change(r#"{"downtime_limit_ms":20.5}"#));
        assert_eq!(
            (slow.bandwidth_limit, slow.downtime_limit_ms, slow.priority),
            (Some(5), Some(20.5), 3)
        );
        let unlimited = change(r#"{"bandwidth_limit":null,"priority":-1}"#);
        let fast = changed(&request, &unlimited);
        assert_eq!((fast.bandwidth_limit, fast.priority), (None, -1));
        assert_eq!(
            of_engine(&unlimited).unwrap().bandwidth_limit,
            Some(None),
            "told to the engine, too"
        );
        assert_eq!(of_engine(&change(r#"{"priority":1}"#)), None);
        let text = serde_json::to_string(&unlimited).unwrap();
        assert_eq!(change(&text), unlimited);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for wrong in [
            "{}",
            r#"{"bandwidth_limit":0}"#,
            r#"{"downtime_limit_ms":0}"#,
            r#"{"priority":101}"#,
        ] {
            assert!(check(&change(wrong)).is_err(), "{wrong}");
        }
        check(&change(r#"{"bandwidth_limit":null}"#)).unwrap();
    }
}
