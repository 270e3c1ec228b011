//! What the benchmarks share: medians, and tables that people and programs can read.

pub mod faults;

use serde_json::{Map, Value, json};

/// One measured migration: figures by name.
pub type Sample = Vec<(&'static str, f64)>;

/// The middle of `values`; zero when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Medians of all figures of one contender.
pub fn medians(samples: &[Sample]) -> Sample {
    let Some(first) = samples.first() else {
        return Vec::new();
    };
    let column = |at: usize| {
        samples
            .iter()
            .map(|sample| sample[at].1)
            .collect::<Vec<f64>>()
    };
    first
        .iter()
        .enumerate()
        .map(|(at, (name, _))| (*name, median(&column(at))))
        .collect()
}

/// One sample as a JSON object.
pub fn to_json(sample: &Sample) -> Value {
    let object: Map<String, Value> = sample
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect();
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&[]).abs() < f64::EPSILON);
    }
}
