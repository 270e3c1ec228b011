//! The status page in a real browser, with real migrations running: what it shows, what its buttons do, on a phone and on a
//! wide screen, light and dark. `PAGECOPY_SCREENSHOTS` names a folder for pictures of it.

#![allow(clippy::unwrap_used)]

use std::time::Instant;

use serde_json::Value;
use tests::real::{
    Browser, Machine, Scratch, Side, Version, World, assert_moved, assert_stayed, tunnel,
};

/// A phone, and a wide screen, in CSS pixels.
const WIDTHS: [u32; 2] = [390, 1600];

/// What is the case with the layout.
const LOOK: &str = r"(() => {
  const box = element => element.getBoundingClientRect();
  const shown = [...document.querySelectorAll('body *')].filter(one => one.checkVisibility());
  const texts = shown.filter(one => one.childNodes.length && [...one.childNodes].some(
    node => node.nodeType === 3 && node.textContent.trim()));
  const colour = text => text.match(/[\d.]+/g).slice(0, 3).map(part => {
    part /= 255; return part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4; });
  const light = text => { const [r, g, b] = colour(text); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = one => { for (; one; one = one.parentElement) {
    const found = getComputedStyle(one).backgroundColor; if (!/, 0\)$/.test(found)) return found; } };
  const contrast = one => { const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => b - a);
    return (a + .05) / (b + .05); };
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    smallest_text: Math.min(...texts.map(one => parseFloat(getComputedStyle(one).fontSize))),
    contrast: Math.min(...texts.map(contrast)),
    wide: shown.filter(one => box(one).right > innerWidth + 1 && !one.closest('svg')).length,
    low_buttons: shown.filter(one => one.localName === 'button' && box(one).height < 40).length,
    plots: shown.filter(one => one.matches('figure > svg')).length,
    named: shown.filter(one => one.matches('figure > svg') && one.getAttribute('aria-label').length > 20).length,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()";

/// An expression: whether there is a line of what would be lost with the source.
const RISK_IS_DRAWN: &str =
    "document.querySelector('figure > svg .risk').getAttribute('points')?.split(' ').length > 1";

/// Opens the status page of a daemon as one does by `ssh -L`.
fn open(world: &World, side: Side, scratch: &Scratch) -> Browser {
    let mut browser = Browser::start(scratch);
    let address = tunnel(world.daemon(side).api());
    browser.open(&format!("http://{address}/"), WIDTHS[1], false);
    browser.wait("document.getElementById('live').textContent === 'live'");
    browser
}

/// An expression: whether the page has `text`.
fn has(text: &str) -> String {
    format!("document.body.innerText.includes({text:?})")
}

/// An expression: whether the first migration of the page is in `state`.
fn is_in(state: &str) -> String {
    format!("document.querySelector('article .state')?.textContent === {state:?}")
}

/// An expression: whether a phase is the one that lasts.
fn phase(name: &str) -> String {
    format!("document.querySelector('[aria-current=step]')?.textContent === {name:?}")
}

/// Clicks a button that can be seen, and the word that asks whether it was meant.
fn click(browser: &mut Browser, label: &str, sure: &str) {
    for text in [label, sure] {
        let found = format!(
            "(() => {{ const found = [...document.querySelectorAll('button')].find(one => one.textContent === {text:?} \
             && one.checkVisibility()); found?.click(); return !!found; }})()"
        );
        browser.wait(&found);
    }
}

/// Panics unless people can read it whatever they look at it with.
fn assert_readable(browser: &mut Browser, name: &str, plots: u64) {
    let mut backgrounds = Vec::new();
    for width in WIDTHS {
        for dark in [false, true] {
            browser.look_like(width, dark);
            let found = browser.value(LOOK);
            println!("{name}: {found}");
            let number = |key: &str| found[key].as_f64().unwrap_or(f64::NAN);
            assert_eq!(found["width"], width, "{found}");
            assert!(
                number("scroll") <= number("width"),
                "it scrolls sideways: {found}"
            );
            assert!(
                number("smallest_text") >= 12.0,
                "text is too small: {found}"
            );
            assert!(number("contrast") >= 4.5, "text is too faint: {found}");
            assert_eq!(found["wide"], 0, "something sticks out: {found}");
            assert_eq!(found["low_buttons"], 0, "no finger meets it: {found}");
            assert_eq!(
                (&found["plots"], &found["named"]),
                (&plots.into(), &plots.into()),
                "{found}"
            );
            backgrounds.push(found["background"].clone());
            browser.draw(&format!(
                "{name}-{width}-{}",
                if dark { "dark" } else { "light" }
            ));
        }
    }
    assert_ne!(
        backgrounds[0], backgrounds[1],
        "it is no darker in the dark"
    );
    browser.look_like(WIDTHS[1], false);
}

fn assert_content(browser: &Browser) {
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn a_migration_is_seen_live_and_its_guest_goes_first_by_a_click() {
    let world = World::tls();
    // So little is written, and so little read, that a guest that has gone first lacks much for some seconds.
    let machine = Machine::new(Version::V10_0, 192, "rate=8 set=160 sweep=0");
    let (mut source, mut destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let mut browser = open(&world, Side::A, &world.scratch);
    browser.wait(&has("No migrations so far."));
    let options = [
        "--mode",
        "hybrid",
        "--postcopy-after",
        "600s",
        "--bandwidth-limit",
        "30MB/s",
    ];
    let slowly = [
        "--downtime-limit",
        "1ms",
        "--postcopy-bandwidth-limit",
        "5MB/s",
    ];
    let migration = world.begin(
        Side::A,
        "web-1",
        &source,
        &destination,
        &[&options[..], &slowly].concat(),
    );
    browser.wait(&phase("migrating"));
    for shown in [
        "web-1",
        "transferred,",
        "remaining",
        "Goodput",
        "Dirty rate",
        "Journal of decisions",
    ] {
        browser.wait(&has(shown));
    }
    browser.wait(&has("Written down before it was acted on: begun"));
    // Both lines are drawn, and go on.
    let drawn = "[...document.querySelectorAll('figure > svg polyline')].map(one => (one.getAttribute('points') ?? '')
        .split(' ').length)";
    browser.wait(&format!("({drawn})[0] > 2"));
    let before = browser.value(drawn);
    assert!(
        before[0].as_u64() > Some(2) && before[1] == before[0],
        "{before}"
    );
    browser.wait(&format!("({drawn})[0] > {}", before[0]));
    assert_readable(&mut browser, "precopy", 1);
    browser.wait(
        "[...document.querySelectorAll('.journal li')].some(one => one.textContent.includes('round 0:'))",
    );
    browser.wait(&has("Predicted downtime"));

    click(
        &mut browser,
        "Start post-copy",
        "Really let the guest go now?",
    );
    browser.wait(&phase("post-copy"));
    for shown in ["Bytes at risk", "Faults that wait", "Faults, 99 % within"] {
        browser.wait(&has(shown));
    }
    browser.wait(RISK_IS_DRAWN);
    assert_readable(&mut browser, "postcopy", 1);
    migration.finish().completed();
    browser.wait(&is_in("completed"));
    for shown in [
        "Measured downtime",
        "Predicted downtime",
        "Total time",
        "guest-moved",
    ] {
        browser.wait(&has(shown));
    }
    assert_readable(&mut browser, "completed", 1);
    // As the command line has it.
    let end = world.cli(Side::A).last_finished("web-1").unwrap();
    browser.wait(&has(&format!("Rounds\n{}\n", end["rounds"])));
    assert_content(&browser);
    // The other host tells its half to who comes late.
    let scratch = Scratch::new();
    let mut late = open(&world, Side::B, &scratch);
    late.wait(&is_in("completed"));
    late.wait("document.querySelector('article').dataset.side === 'destination'");
    late.value("document.querySelector('summary').click()");
    late.wait(&has("committed"));
    late.wait(&has("Page faults"));
    assert_content(&late);
    assert_moved(&mut source, &mut destination);
}

#[test]
fn a_migration_is_cancelled_by_a_click_and_the_page_outlives_the_daemon() {
    let mut world = World::tls();
    let machine = Machine::new(Version::V10_0, 192, "rate=20 set=32");
    let (mut source, mut destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let mut browser = open(&world, Side::A, &world.scratch);
    let from = Instant::now();
    let options = ["--bandwidth-limit", "10MB/s"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    browser.wait(&is_in("migrating"));
    // Who may only look sees no buttons.
    let buttons = "[...document.querySelectorAll('button')].some(one => one.checkVisibility())";
    browser.value("mayOperate = false; views.forEach(later)");
    browser.wait(&format!("!{buttons}"));
    browser.value("load()");
    browser.wait(buttons);
    click(&mut browser, "Cancel", "Really cancel?");
    migration.finish().not_completed("cancelled");
    browser.wait(&is_in("cancelled"));
    assert_stayed(&mut source, Some(&mut destination), from);

    // What it cannot do it says: one that may not go first. And names stay text.
    let name = "<img id=evil src=x onerror=alert(1)>";
    let failed =
        world
            .cli(Side::A)
            .migrate_socket(name, "/nonexistent".as_ref(), "127.0.0.1:1", &[]);
    failed.finish().not_completed("failed");
    browser.wait(&has(name));
    assert_eq!(
        browser.value("document.getElementById('evil')"),
        Value::Null
    );
    assert_content(&browser);
    world.daemon_mut(Side::A).kill();
    browser.wait(&has("cut off from pagecopyd; trying again"));
    world.restart(Side::A);
    browser.wait("document.getElementById('live').textContent === 'live'");
    // What never had a journal was in the memory of the daemon that is gone.
    browser.wait(&format!("!({})", has(name)));
    browser.wait(&has("rolled-back"));
}

#[test]
fn a_paused_migration_says_why_and_is_recovered_by_a_click() {
    let mut world = World::tls();
    let machine = Machine::new(Version::V10_0, 128, "rate=20 set=32");
    let (mut source, mut destination) = (
        world.guest("source", &machine),
        world.waiting("destination", &machine),
    );
    let mut browser = open(&world, Side::A, &world.scratch);
    let options = ["--mode", "postcopy", "--postcopy-bandwidth-limit", "10MB/s"];
    let migration = world.begin(Side::A, "vm", &source, &destination, &options);
    browser.wait(&phase("post-copy"));
    browser.wait(RISK_IS_DRAWN);
    world.daemon_mut(Side::B).kill();
    browser.wait(&is_in("paused"));
    browser.wait("document.querySelector('.reason').textContent.length > 20");
    click(&mut browser, "Recover", "Really dial now?");
    let answered =
        "/^Recover: (?!asked for)../.test(document.querySelector('.answer').textContent)";
    browser.wait(answered);
    assert_readable(&mut browser, "paused", 1);
    world.restart(Side::B);
    migration.finish().completed();
    browser.wait(&is_in("completed"));
    assert_moved(&mut source, &mut destination);
    assert_content(&browser);
}
