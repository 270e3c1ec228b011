//! Migrations and receivers as text.

use serde_json::Value;

/// The list: one line each.
pub(super) fn list(migrations: &Value, receivers: &Value) -> String {
    let mut out = String::new();
    for one in array(migrations) {
        let place = one.get("place").and_then(Value::as_u64);
        let place = place.map_or_else(String::new, |place| format!(" {place}"));
        out += &format!(
            "{}  {:<12} {:<12} {:<20} {}\n",
            word(one, "id"),
            word(one, "state") + &place,
            word(one, "side"),
            word(one, "vm"),
            word(one, "peer")
        );
    }
    for one in array(receivers) {
        out += &format!(
            "{:<36}  {:<12} {:<12} {:<20} {}\n",
            "-",
            "waiting",
            "destination",
            word(one, "vm"),
            word(one, "qmp")
        );
    }
    if out.is_empty() {
        out = "no migrations, and no QEMU waits here\n".to_owned();
    }
    out
}

/// One migration in full.
pub(super) fn status(one: &Value) -> String {
    let mut out = format!("migration {}\n", word(one, "id"));
    for key in ["vm", "state", "side", "peer", "qmp"] {
        out += &format!("  {key:<22} {}\n", word(one, key));
    }
    for key in ["priority", "place", "channels", "reason"] {
        if let Some(value) = one.get(key).filter(|value| !value.is_null()) {
            out += &format!("  {key:<22} {}\n", plain(value));
        }
    }
    let slowed = one.get("throttle_percent").and_then(Value::as_u64);
    if let Some(percent) = slowed.filter(|percent| *percent > 0) {
        out += &format!("  {:<22} {percent}\n", "throttle_percent");
    }
    let details = one
        .get("finished")
        .filter(|end| !end.is_null())
        .or_else(|| one.get("progress"));
    let details = [details, one.get("faults")].map(|part| part.and_then(Value::as_object));
    for (key, value) in details.into_iter().flatten().flatten() {
        if !value.is_null() && !["event", "id", "remedy", "fault"].contains(&key.as_str()) {
            out += &format!("  {key:<22} {}\n", plain(value));
        }
    }
    out
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value, key: &str) -> String {
    value.get(key).map_or_else(|| "-".to_owned(), plain)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lists_and_details() {
        let one = json!({ "id": "x", "vm": "web", "state": "failed", "side": "source", "peer": "b:1", "qmp": "/q",
            "progress": null, "finished": { "event": "finished", "error": "no route", "rounds": 2, "verify_ms": null } });
        let text = list(&json!([one]), &json!([{ "vm": "db", "qmp": "/d" }]));
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("waiting"));
        let text = status(&one);
        assert!(
            text.contains("no route") && text.contains("rounds"),
            "{text}"
        );
        assert!(!text.contains("verify_ms"), "{text}");
        assert!(list(&json!([]), &json!([])).contains("no migrations"));
        let waits = json!({ "id": "y", "vm": "db", "state": "pending", "priority": 5, "place": 3 });
        assert!(list(&json!([waits]), &json!([])).contains("pending 3 "));
        let text = status(&waits);
        assert!(
            text.contains("priority") && text.contains("place"),
            "{text}"
        );
    }
}
