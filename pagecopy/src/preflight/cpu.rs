//! The guest's CPU as QEMU shows it to the guest: a model and CPUID words.

use serde::{Deserialize, Serialize};

use super::{Line, Whose};

/// A virtual CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Its model, such as `qemu64`.
    pub model: String,
    /// CPUID words; none on machines that have no CPUID.
    pub words: Vec<Word>,
}

/// A CPUID word: QEMU's `X86CPUFeatureWordInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Word {
    /// EAX on the way in.
    pub leaf: u32,
    /// ECX on the way in, where it matters.
    pub subleaf: Option<u32>,
    /// The register on the way out.
    pub register: String,
    /// What it has.
    pub features: u32,
}

impl Word {
    fn is(&self, other: &Word) -> bool {
        (self.leaf, self.subleaf, &self.register) == (other.leaf, other.subleaf, &other.register)
    }
}

/// Names of features that people know, by leaf, register and bit.
const NAMES: [(u32, &str, u32, &str); 46] = [
    (1, "ECX", 0, "sse3"),
    (1, "ECX", 1, "pclmulqdq"),
    (1, "ECX", 5, "vmx"),
    (1, "ECX", 9, "ssse3"),
    (1, "ECX", 12, "fma"),
    (1, "ECX", 13, "cx16"),
    (1, "ECX", 17, "pcid"),
    (1, "ECX", 19, "sse4.1"),
    (1, "ECX", 20, "sse4.2"),
    (1, "ECX", 21, "x2apic"),
    (1, "ECX", 22, "movbe"),
    (1, "ECX", 23, "popcnt"),
    (1, "ECX", 25, "aes"),
    (1, "ECX", 26, "xsave"),
    (1, "ECX", 28, "avx"),
    (1, "ECX", 29, "f16c"),
    (1, "ECX", 30, "rdrand"),
    (7, "EBX", 0, "fsgsbase"),
    (7, "EBX", 3, "bmi1"),
    (7, "EBX", 4, "hle"),
    (7, "EBX", 5, "avx2"),
    (7, "EBX", 7, "smep"),
    (7, "EBX", 8, "bmi2"),
    (7, "EBX", 9, "erms"),
    (7, "EBX", 10, "invpcid"),
    (7, "EBX", 11, "rtm"),
    (7, "EBX", 16, "avx512f"),
    (7, "EBX", 17, "avx512dq"),
    (7, "EBX", 18, "rdseed"),
    (7, "EBX", 19, "adx"),
    (7, "EBX", 20, "smap"),
    (7, "EBX", 23, "clflushopt"),
    (7, "EBX", 24, "clwb"),
    (7, "EBX", 28, "avx512cd"),
    (7, "EBX", 29, "sha"),
    (7, "EBX", 30, "avx512bw"),
    (7, "EBX", 31, "avx512vl"),
    (0x8000_0001, "ECX", 0, "lahf_lm"),
    (0x8000_0001, "ECX", 2, "svm"),
    (0x8000_0001, "ECX", 5, "abm"),
    (0x8000_0001, "ECX", 6, "sse4a"),
    (0x8000_0001, "EDX", 20, "nx"),
    (0x8000_0001, "EDX", 26, "pdpe1gb"),
    (0x8000_0001, "EDX", 27, "rdtscp"),
    (0x8000_0001, "EDX", 29, "lm"),
    (0x8000_0007, "EDX", 8, "invtsc"),
];

/// The features of `has` that `other` lacks, by name or place.
fn beyond(has: &Cpu, other: &Cpu) -> Vec<String> {
    let mut names = Vec::new();
    for word in &has.words {
        let theirs = other.words.iter().find(|one| one.is(word));
        let more = word.features & !theirs.map_or(0, |word| word.features);
        let bits = (0..32).filter(|bit| more & (1 << bit) != 0);
        names.extend(bits.map(|bit| name(word, bit)));
    }
    names
}

fn name(word: &Word, bit: u32) -> String {
    let known = NAMES
        .iter()
        .find(|(leaf, register, at, _)| {
            (*leaf, *register, *at) == (word.leaf, word.register.as_str(), bit)
        })
        .filter(|_| word.subleaf.unwrap_or(0) == 0);
    match (known, word.subleaf) {
        (Some((.., name)), _) => (*name).to_owned(),
        (None, None) => format!("CPUID {:X}.{} bit {bit}", word.leaf, word.register),
        (None, Some(subleaf)) => {
            format!(
                "CPUID {:X}.{subleaf:X}.{} bit {bit}",
                word.leaf, word.register
            )
        }
    }
}

/// At most so many names are told.
const NAMED: usize = 12;

fn list(names: &[String]) -> String {
    let shown = names.iter().take(NAMED).cloned().collect::<Vec<_>>();
    let more = names.len().saturating_sub(NAMED);
    let tail = if more == 0 {
        String::new()
    } else {
        format!(" and {more} more")
    };
    format!("{}{tail}", shown.join(", "))
}

/// What a guest that runs on `source` finds on `destination`.
pub(super) fn compare(source: Option<&Cpu>, destination: Option<&Cpu>) -> Line {
    let (Some(source), Some(destination)) = (source, destination) else {
        return Line::warn(
            "cpu",
            Whose::Both,
            "a QEMU does not tell what CPU its guest has",
            "see that both QEMUs were started with the same -cpu, and that both hosts have what it needs",
        );
    };
    let (lacks, gains) = (beyond(source, destination), beyond(destination, source));
    let models = if source.model == destination.model {
        source.model.clone()
    } else {
        format!(
            "{} at the source, {} at the destination",
            source.model, destination.model
        )
    };
    let remedy =
        "start both QEMUs with the same -cpu, a named model that both hosts have (not host or max)";
    if !lacks.is_empty() {
        let found = format!("{models}: the destination's lacks {}", list(&lacks));
        return Line::fail("cpu", Whose::Both, found, remedy);
    }
    if !gains.is_empty() {
        let found = format!(
            "{models}: the guest would see {} come while it runs",
            list(&gains)
        );
        return Line::warn("cpu", Whose::Both, found, remedy);
    }
    if source.model != destination.model {
        let found = format!("{models}, with the same features");
        return Line::warn("cpu", Whose::Both, found, remedy);
    }
    let features: u32 = source
        .words
        .iter()
        .map(|word| word.features.count_ones())
        .sum();
    let found = if source.words.is_empty() {
        format!("{models} on both sides")
    } else {
        format!("{models}, the same {features} features on both sides")
    };
    Line::pass("cpu", Whose::Both, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Verdict;

    fn cpu(model: &str, words: &[(u32, Option<u32>, &str, u32)]) -> Cpu {
        let word = |(leaf, subleaf, register, features): &(u32, Option<u32>, &str, u32)| Word {
            leaf: *leaf,
            subleaf: *subleaf,
            register: (*register).to_owned(),
            features: *features,
        };
        Cpu {
            model: model.to_owned(),
            words: words.iter().map(word).collect(),
        }
    }

    #[test]
    fn what_a_guest_would_lose_fails_and_what_it_would_gain_warns() {
        let plain = cpu("m", &[(1, None, "ECX", 1), (7, Some(0), "EBX", 0)]);
        let avx2 = cpu("m", &[(1, None, "ECX", 1), (7, Some(0), "EBX", 1 << 5)]);
        let line = compare(Some(&avx2), Some(&plain));
        assert_eq!(line.verdict, Verdict::Fail);
        assert!(line.found.contains("lacks avx2"), "{}", line.found);
        let line = compare(Some(&plain), Some(&avx2));
        assert_eq!(line.verdict, Verdict::Warn);
        assert!(line.found.contains("avx2"), "{}", line.found);
        let line = compare(Some(&plain), Some(&plain));
        assert_eq!(line.verdict, Verdict::Pass, "{}", line.found);
        let other = cpu("n", &[(1, None, "ECX", 1)]);
        assert_eq!(compare(Some(&plain), Some(&other)).verdict, Verdict::Warn);
        assert_eq!(compare(None, Some(&other)).verdict, Verdict::Warn);
        // A word that the other does not have at all, without a name, and more than are told.
        let all = cpu("m", &[(0xd, Some(1), "EAX", u32::MAX)]);
        let line = compare(Some(&all), Some(&plain));
        assert!(line.found.contains("CPUID D.1.EAX bit 0"), "{}", line.found);
        assert!(line.found.contains("and 20 more"), "{}", line.found);
    }
}
