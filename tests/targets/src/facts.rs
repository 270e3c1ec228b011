//! What a peer tells of itself in preflight: what is taken is bounded, can be shown on a terminal, and is told again the same;
//! and comparing it never panics.

use pagecopy::preflight::{Facts, compare};

/// A peer's facts, behind which may be another's after a zero byte.
///
/// # Panics
/// A rule is broken.
pub fn facts(data: &[u8]) {
    let mut taken = Vec::new();
    for text in data.split(|byte| *byte == 0).take(2) {
        let Ok(text) = std::str::from_utf8(text) else {
            continue;
        };
        let Ok(facts) = Facts::from_text(text) else {
            continue;
        };
        for line in &facts.lines {
            let shown = [&line.check, &line.found, &line.remedy];
            assert!(shown.iter().all(|text| !text.chars().any(char::is_control)));
        }
        assert_eq!(Facts::from_text(&facts.to_text()), Ok(facts.clone()));
        taken.push(facts);
    }
    for source in &taken {
        for destination in &taken {
            let lines = compare(source, destination);
            assert!(lines.len() <= 1024, "{} lines", lines.len());
        }
    }
}
