//! Medians and how far the values spread: few runs on a noisy machine have no use for a mean.

use serde_json::{Map, Value, json};

/// The middle of some values, and the least and the greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The median.
    pub median: f64,
    /// The greatest.
    pub most: f64,
}

impl Spread {
    /// Of `values`; none when there are none.
    pub fn of(values: &[f64]) -> Option<Spread> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = match sorted.len() {
            0 => return None,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        };
        Some(Spread {
            least: *sorted.first()?,
            median: middle,
            most: *sorted.last()?,
        })
    }

    /// Of so many times the values.
    #[must_use]
    pub fn times(self, factor: f64) -> Spread {
        let [least, median, most] = [self.least, self.median, self.most].map(|it| it * factor);
        Spread {
            least,
            median,
            most,
        }
    }

    /// Of the ratios of what ran one after the other: `ours[0] / theirs[0]`, and so on. A pair in which one is missing,
    /// or theirs is zero, does not count.
    pub fn of_ratios(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<Spread> {
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .filter_map(|(ours, theirs)| Some((*ours)? / theirs.filter(|theirs| *theirs > 0.0)?))
            .collect();
        Spread::of(&ratios)
    }
}

/// One measured run of a benchmark that has no record: figures by name.
pub type Sample = Vec<(&'static str, f64)>;

/// Medians of all figures of runs of the same kind.
pub fn medians(samples: &[Sample]) -> Sample {
    let Some(first) = samples.first() else {
        return Vec::new();
    };
    let figures = first.iter().enumerate();
    let of = |(at, (name, _)): (usize, &(&'static str, f64))| {
        let column: Vec<f64> = samples.iter().map(|sample| sample[at].1).collect();
        Some((*name, Spread::of(&column)?.median))
    };
    figures.filter_map(of).collect()
}

/// One sample as a JSON object.
pub fn to_json(sample: &Sample) -> Value {
    let figures = sample.iter();
    let object: Map<String, Value> = figures
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect();
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_odd_and_even() {
        let spread = Spread::of(&[3.0, 1.0, 2.0]).expect("three values");
        assert_eq!((spread.least, spread.median, spread.most), (1.0, 2.0, 3.0));
        let spread = Spread::of(&[4.0, 1.0, 2.0, 3.0]).expect("four values");
        assert!((spread.median - 2.5).abs() < f64::EPSILON);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn medians_are_of_each_figure() {
        let samples = [(1.0, 9.0), (2.0, 7.0), (3.0, 8.0)].map(|(a, b)| vec![("a", a), ("b", b)]);
        let medians = medians(&samples);
        assert_eq!(to_json(&medians), json!({"a": 2.0, "b": 8.0}));
    }

    #[test]
    fn ratios_are_of_pairs() {
        let ours = [Some(1.0), Some(4.0), None, Some(1.0)];
        let theirs = [Some(2.0), Some(2.0), Some(1.0), Some(0.0)];
        let spread = Spread::of_ratios(&ours, &theirs).expect("two pairs count");
        assert_eq!((spread.least, spread.most), (0.5, 2.0));
        assert!((spread.median - 1.25).abs() < f64::EPSILON);
        let twice = spread.times(2.0);
        assert_eq!((twice.least, twice.median, twice.most), (1.0, 2.5, 4.0));
    }
}
