//! The puller against a model that knows of each page what it is, and the way of some guests through their memory.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const PAGES: [u64; 2] = [3000, 700];

fn specs(page_size: u64) -> Vec<BlockSpec> {
    let spec = |(number, pages): (usize, &u64)| BlockSpec {
        name: format!("ram{number}"),
        size: pages * page_size,
        page_size,
    };
    PAGES.iter().enumerate().map(spec).collect()
}

fn run(block: u16, first: u64, pages: u64) -> Run {
    Run {
        block: BlockId(block),
        first,
        pages,
    }
}

fn everything() -> Vec<Run> {
    vec![run(0, 0, PAGES[0]), run(1, 0, PAGES[1])]
}

fn pages_of(runs: &[Run]) -> Vec<(u16, u64)> {
    runs.iter()
        .flat_map(|run| (run.first..run.end()).map(|page| (run.block.0, page)))
        .collect()
}

/// Something that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    Fault(u16, u64),
    Next(Class),
    /// The oldest, or the youngest, request under way ends.
    Arrives(bool),
    Lost,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        // Near each other, so that windows meet.
        8 => (0..2_u16, 0..300_u64).prop_map(|(block, page)| Step::Fault(block, page)),
        2 => (0..3_u16, 0..4000_u64).prop_map(|(block, page)| Step::Fault(block, page)),
        4 => Just(Step::Next(Class::Demand)),
        4 => Just(Step::Next(Class::Neighbour)),
        2 => Just(Step::Next(Class::Rest)),
        10 => any::<bool>().prop_map(Step::Arrives),
        1 => Just(Step::Lost),
    ];
    prop::collection::vec(step, 0..400)
}

/// What a guest and its driver would see.
#[derive(Default)]
struct Model {
    here: BTreeSet<(u16, u64)>,
    mapped: BTreeSet<(u16, u64)>,
    /// Who waits.
    waiting: BTreeSet<(u16, u64)>,
    flights: BTreeMap<u64, Vec<(u16, u64)>>,
}

impl Model {
    fn exists((block, page): (u16, u64)) -> bool {
        PAGES
            .get(usize::from(block))
            .is_some_and(|pages| page < *pages)
    }

    fn fault(&mut self, puller: &mut Puller, block: u16, page: u64) {
        let place = (block, page);
        // A page that is mapped does not fault.
        if self.mapped.contains(&place) {
            return;
        }
        let answer = puller.fault(BlockId(block), page);
        if self.here.contains(&place) || !Model::exists(place) {
            assert_eq!(answer, Answer::Map, "{place:?}");
            self.mapped.insert(place);
            return;
        }
        let flies = self.flights.values().flatten().any(|page| *page == place);
        assert_ne!(answer, Answer::Map, "{place:?} is not here");
        if flies || self.waiting.contains(&place) {
            assert_eq!(answer, Answer::Wait, "{place:?}");
        }
        self.waiting.insert(place);
    }

    fn next(&mut self, puller: &mut Puller, class: Class) {
        let Some(request) = puller.next(class) else {
            return;
        };
        assert!(request.class <= class);
        let asked = pages_of(&request.runs);
        let bytes = asked.len() as u64 * 4096;
        assert!(bytes <= MAX_BATCH_BYTES && request.runs.len() <= MAX_RUNS);
        for place in &asked {
            assert!(Model::exists(*place));
            assert!(!self.here.contains(place), "{place:?} is here already");
            let flies = self.flights.values().flatten().any(|page| page == place);
            assert!(!flies, "{place:?} is on its way already");
        }
        if request.class != Class::Demand {
            let flying: BTreeSet<_> = self.flights.values().flatten().copied().collect();
            let idle = self.waiting.difference(&flying).copied();
            let idle: Vec<_> = idle.filter(|place| !asked.contains(place)).collect();
            // What somebody waits for is on its way, unless it was a neighbour when the fault came.
            assert!(
                idle.iter()
                    .all(|(block, page)| { puller.fault(BlockId(*block), *page) == Answer::Wait })
            );
        }
        self.flights.insert(request.id, asked);
    }

    fn arrives(&mut self, puller: &mut Puller, oldest: bool) {
        let mut ids = self.flights.keys().copied();
        let id = if oldest { ids.next() } else { ids.next_back() };
        let Some(id) = id else {
            assert_eq!(puller.arrived(u64::MAX), None);
            return;
        };
        let asked = self.flights.remove(&id).unwrap();
        let arrival = puller.arrived(id).unwrap();
        assert_eq!(pages_of(&arrival.runs), asked);
        assert_eq!(puller.arrived(id), None, "only once");
        let held = arrival.held.map(|(block, page)| (block.0, page));
        for place in asked {
            self.here.insert(place);
            if held == Some(place) {
                assert!(!self.waiting.contains(&place), "{place:?} is waited for");
            } else {
                self.waiting.remove(&place);
                self.mapped.insert(place);
            }
        }
    }

    fn lost(&mut self, puller: &mut Puller) {
        puller.lost();
        self.flights.clear();
        assert_eq!(puller.flying_bytes(), 0);
        // They are woken, and fault anew.
        for (block, page) in std::mem::take(&mut self.waiting) {
            self.fault(puller, block, page);
        }
    }

    fn check(&self, puller: &Puller) {
        let all: u64 = PAGES.iter().sum();
        let lacking = (all - self.here.len() as u64) * 4096;
        assert_eq!(puller.lacking_bytes(), lacking);
        assert_eq!(puller.is_whole(), lacking == 0);
        let flying: usize = self.flights.values().map(Vec::len).sum();
        assert_eq!(puller.flying_bytes(), flying as u64 * 4096);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever happens: a page is fetched once, answered for what it is, nobody waits for ever, and all comes in the end.
    #[test]
    fn every_page_comes_once(steps in steps()) {
        let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Fault(block, page) => model.fault(&mut puller, block, page),
                Step::Next(class) => model.next(&mut puller, class),
                Step::Arrives(oldest) => model.arrives(&mut puller, oldest),
                Step::Lost => model.lost(&mut puller),
            }
            model.check(&puller);
        }
        while !puller.is_whole() {
            model.next(&mut puller, Class::Rest);
            model.arrives(&mut puller, true);
        }
        prop_assert!(model.waiting.is_empty(), "still waiting: {:?}", model.waiting);
        prop_assert_eq!(puller.next(Class::Rest), None);
    }
}

#[test]
fn who_waits_comes_first_then_its_neighbours() {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    let rest = puller.next(Class::Rest).unwrap();
    assert_eq!((rest.class, rest.runs), (Class::Rest, vec![run(0, 0, 512)]));
    assert_eq!(puller.fault(BlockId(0), 100), Answer::Wait);
    assert_eq!(puller.fault(BlockId(0), 2000), Answer::Fetch);
    assert_eq!(puller.fault(BlockId(1), 5), Answer::Fetch);
    let mut order = Vec::new();
    for _ in 0..5 {
        let request = puller.next(Class::Rest).unwrap();
        order.push((request.class, request.runs));
    }
    let expected = [
        (Class::Demand, vec![run(0, 2000, 1)]),
        (Class::Demand, vec![run(1, 5, 1)]),
        (Class::Neighbour, vec![run(0, 1992, 8)]),
        (Class::Neighbour, vec![run(0, 2001, 8)]),
        (Class::Neighbour, vec![run(1, 0, 5)]),
    ];
    assert_eq!(order, expected);
    assert_eq!(puller.next(Class::Demand), None);
}

/// Fetches everything that is wanted now, but nothing of the rest.
fn serve(puller: &mut Puller, mapped: &mut BTreeSet<u64>) {
    while let Some(request) = puller.next(Class::Neighbour) {
        let arrival = puller.arrived(request.id).unwrap();
        mapped.extend(pages_of(&arrival.runs).iter().map(|(_, page)| page));
        if let Some((_, held)) = arrival.held {
            mapped.remove(&held);
        }
    }
}

/// A guest that touches pages one after the other: how often it had to wait for one to be fetched, and how useful
/// neighbours were.
fn walk(way: impl Iterator<Item = u64>) -> (u64, Prefetched) {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    let (mut mapped, mut waits) = (BTreeSet::new(), 0);
    for page in way {
        if !mapped.contains(&page) {
            waits += u64::from(puller.fault(BlockId(0), page) == Answer::Fetch);
            mapped.insert(page);
            serve(&mut puller, &mut mapped);
        }
    }
    (waits, puller.prefetched())
}

#[test]
fn a_guest_that_goes_straight_on_waits_seldom() {
    let (waits, figures) = walk(0..3000);
    assert_eq!(waits, 1, "{figures:?}");
    assert!(figures.hits + 1 >= figures.windows, "{figures:?}");
}

#[test]
fn a_guest_that_goes_straight_down_waits_seldom() {
    let (waits, figures) = walk((0..3000).rev());
    assert!(waits <= 3, "{waits} waits, {figures:?}");
}

#[test]
fn a_guest_with_several_ways_waits_seldom() {
    let ways = (0..700).flat_map(|step| [step, 800 + step, 2999 - step]);
    let (waits, figures) = walk(ways);
    assert!(waits <= 6, "{waits} waits, {figures:?}");
}

#[test]
fn a_guest_that_jumps_about_is_fetched_little_ahead() {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    let mut mapped = BTreeSet::new();
    // Every 151st page, in an order that no window foresees.
    for step in 0..19_u64 {
        puller.fault(BlockId(0), step * 7 % 19 * 151);
        serve(&mut puller, &mut mapped);
    }
    let figures = puller.prefetched();
    assert_eq!(
        figures,
        Prefetched {
            windows: 19,
            hits: 0
        }
    );
    assert!(mapped.len() <= 19 * 17, "{} pages", mapped.len());
}

#[test]
fn huge_pages_have_no_neighbours() {
    let mut puller = Puller::new(&specs(2 << 20), &everything()).unwrap();
    assert_eq!(puller.fault(BlockId(0), 7), Answer::Fetch);
    let request = puller.next(Class::Neighbour).unwrap();
    assert_eq!(request.runs, [run(0, 7, 1)]);
    assert_eq!(puller.arrived(request.id).unwrap().held, None);
    assert_eq!(puller.next(Class::Neighbour), None);
    let rest = puller.next(Class::Rest).unwrap();
    assert_eq!(rest.runs, [run(0, 0, 1)], "one page fills a request");
}

#[test]
fn only_what_lacks_is_fetched() {
    let lacking = [run(0, 10, 2), run(0, 500, 1)];
    let mut puller = Puller::new(&specs(4096), &lacking).unwrap();
    assert_eq!(puller.lacking_bytes(), 3 * 4096);
    assert_eq!(puller.fault(BlockId(0), 9), Answer::Map);
    assert_eq!(puller.fault(BlockId(0), 10), Answer::Fetch);
    assert_eq!(puller.next(Class::Rest).unwrap().runs, [run(0, 10, 1)]);
    assert_eq!(puller.next(Class::Rest).unwrap().runs, [run(0, 11, 1)]);
    assert_eq!(puller.next(Class::Rest).unwrap().runs, [run(0, 500, 1)]);
    assert_eq!(puller.next(Class::Rest), None);
    assert!(!puller.is_whole());
    for id in 0..3 {
        puller.arrived(id).unwrap();
    }
    assert!(puller.is_whole());
    assert!(Puller::new(&specs(4096), &[run(0, 2999, 2)]).is_err());
}

#[test]
fn the_rest_comes_in_requests_as_small_as_asked_for() {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    let bytes = |request: Request| request.runs.iter().map(|run| run.pages * 4096).sum::<u64>();
    let small = puller.next_within(Class::Rest, 16 << 10).unwrap();
    assert_eq!(bytes(small), 16 << 10);
    let page = puller.next_within(Class::Rest, 1).unwrap();
    assert_eq!(bytes(page), 4096);
    let large = puller.next_within(Class::Rest, u64::MAX).unwrap();
    assert_eq!(bytes(large), MAX_BATCH_BYTES);
}

#[test]
fn a_neighbour_that_somebody_waits_for_goes_first() {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    assert_eq!(puller.fault(BlockId(0), 100), Answer::Fetch);
    assert_eq!(puller.next(Class::Demand).unwrap().runs, [run(0, 100, 1)]);
    // Its neighbours were claimed, and not requested yet.
    assert_eq!(puller.fault(BlockId(0), 103), Answer::Fetch);
    assert_eq!(puller.next(Class::Demand).unwrap().runs, [run(0, 103, 1)]);
    // Now it is on its way.
    assert_eq!(puller.fault(BlockId(0), 103), Answer::Wait);
    let mut rest = Vec::new();
    while let Some(request) = puller.next(Class::Neighbour) {
        rest.extend(pages_of(&request.runs));
    }
    assert!(rest.contains(&(0, 102)) && rest.contains(&(0, 104)) && !rest.contains(&(0, 103)));
}

#[test]
fn neighbours_are_fetched_in_small_requests_ahead_of_the_rest() {
    let mut puller = Puller::new(&specs(4096), &everything()).unwrap();
    puller.fault(BlockId(0), 1000);
    puller.next(Class::Demand).unwrap();
    let mut ahead = Vec::new();
    loop {
        let request = puller.next_ahead(3 * 4096).unwrap();
        let pages = pages_of(&request.runs);
        assert!(pages.len() <= 3, "{request:?}");
        if request.class == Class::Rest {
            assert_eq!(pages[0], (0, 0));
            break;
        }
        ahead.extend(pages);
    }
    assert_eq!(ahead.len(), 16, "32 KiB on each side");
}
