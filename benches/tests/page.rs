//! The page in a real browser, and a small real run from the command line to the page.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use benches::record::{HostFacts, Joined, Record};
use benches::report::page;
use serde_json::Value;
use tests::real::{Scratch, Version, program};

/// A phone, and a wide screen, in CSS pixels.
const WIDTHS: [u32; 2] = [390, 1600];

/// Looks at the page in a frame of a set width, once it is laid out.
const LOOK: &str = r"
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const plots = [...page.querySelectorAll('svg[role=img]')];
  const box = element => element.getBoundingClientRect();
  const named = plot => plot.getAttribute('aria-labelledby').split(' ')
    .every(id => page.getElementById(id).textContent.length > 9);
  const cut = plot => [...plot.querySelectorAll('text')]
    .some(text => box(text).right > box(plot).right + 1 || box(text).left < box(plot).left - 1);
  const collide = line => {
    const texts = [...line.children].filter(child => child.localName === 'text').slice(0, 2).map(box);
    return texts.length === 2 && texts[0].right > texts[1].left && texts[0].bottom > texts[1].top + 1;
  };
  const heights = plots.flatMap(plot => [...plot.querySelectorAll('text')]).map(text => box(text).height);
  const found = {
    width: page.defaultView.innerWidth,
    scroll: root.scrollWidth,
    plots: plots.length,
    named: plots.filter(named).length,
    cut: plots.filter(cut).length,
    collisions: [...page.querySelectorAll('svg g, svg.ours, svg.qemu')].filter(collide).length,
    smallest_text: Math.min(...heights),
    ids_twice: [...page.querySelectorAll('[id]')].length - new Set([...page.querySelectorAll('[id]')].map(e => e.id)).size,
    headings: page.querySelectorAll('h2').length,
    background: getComputedStyle(page.body).backgroundColor,
  };
  const pre = document.createElement('pre');
  pre.textContent = 'FOUND' + JSON.stringify(found) + 'END';
  document.body.replaceChildren(pre);
};";

struct Browser<'a> {
    scratch: &'a Scratch,
}

impl Browser<'_> {
    /// What is found on `page` in a frame that is `width` wide. Panics at any word on the browser's console.
    fn look(&self, page: &str, width: u32, dark: bool) -> Value {
        let source = page.replace('&', "&amp;").replace('"', "&quot;");
        let file = self.scratch.files().join("frame.html");
        let frame = format!(
            "<!doctype html><meta charset=utf-8><link rel=icon href=data:,><body>\
             <iframe id=frame style='width:{width}px;height:900px;border:0'></iframe>\
             <script>{LOOK} frame.srcdoc = frame.dataset.page;</script>"
        )
        .replace("<iframe", &format!("<iframe data-page=\"{source}\""));
        fs::write(&file, frame).expect("a file in a scratch folder");
        let scheme = format!(
            "--blink-settings=preferredColorScheme={}",
            if dark { 0 } else { 1 }
        );
        let mut command = self.command();
        command.args([
            "--window-size=1700,1000",
            &scheme,
            "--virtual-time-budget=10000",
        ]);
        let output = command
            .arg("--dump-dom")
            .arg(&file)
            .output()
            .expect("chromium can be called: scripts/install brings it");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!errors.contains("CONSOLE"), "the console says: {errors}");
        let dom = String::from_utf8_lossy(&output.stdout);
        let found = dom
            .split_once("FOUND")
            .and_then(|(_, rest)| rest.split_once("END"))
            .unwrap_or_else(|| panic!("nothing was found: {dom}{errors}"));
        serde_json::from_str(found.0).expect("the script writes JSON")
    }

    fn command(&self) -> Command {
        let mut command = Command::new("timeout");
        // Without its sandbox, which root cannot have; the page is our own.
        command
            .args([
                "60",
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
            ])
            .args([
                "--enable-logging=stderr",
                "--no-first-run",
                "--disable-dev-shm-usage",
            ])
            .arg(format!(
                "--user-data-dir={}",
                self.scratch.folder("chromium").display()
            ));
        command
    }
}

/// A page that a person can read, whoever looks at it with what.
fn assert_readable(page: &str, sections: u64) {
    for banned in ["<script", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(banned), "the page has {banned}");
    }
    let scratch = Scratch::new();
    let browser = Browser { scratch: &scratch };
    let mut backgrounds = Vec::new();
    for width in WIDTHS {
        for dark in [false, true] {
            let found = browser.look(page, width, dark);
            println!("{found}");
            let number = |name: &str| found[name].as_f64().unwrap_or(f64::NAN);
            assert_eq!(found["width"], width, "{found}");
            assert!(
                number("scroll") <= number("width"),
                "it scrolls sideways: {found}"
            );
            assert!(number("plots") >= 5.0, "too few plots: {found}");
            assert_eq!(
                found["named"], found["plots"],
                "a plot has no words: {found}"
            );
            assert_eq!(found["cut"], 0, "text is cut off: {found}");
            assert_eq!(found["collisions"], 0, "texts overlap: {found}");
            assert!(
                number("smallest_text") >= 11.0,
                "text is too small: {found}"
            );
            assert_eq!(found["ids_twice"], 0, "{found}");
            assert_eq!(found["headings"], sections, "{found}");
            backgrounds.push(found["background"].clone());
        }
    }
    assert_ne!(
        backgrounds[0], backgrounds[1],
        "it is no darker in the dark"
    );
}

fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded.json")
}

#[test]
fn a_recorded_run_is_readable_on_a_phone_and_on_a_wide_screen() {
    let record = Record::read(&recorded()).expect("a record of this schema");
    let page = page(&record);
    assert!(page.contains("not allocated before"), "an older record");
    assert_readable(&page, sections(&record));
}

#[test]
fn a_run_into_memory_that_is_there_says_so_and_what_it_reached() {
    let mut record = Record::read(&recorded()).expect("a record of this schema");
    record.plan.allocated = true;
    let page = page(&record);
    // On top, and beside the rates.
    assert_eq!(page.matches("allocated before (prealloc=on)").count(), 2);
    let (_, rates) = page
        .split_once("id=\"limit\"")
        .expect("iperf3 was measured, too");
    let (rates, _) = rates.split_once("</section>").expect("it ends");
    let lines: Vec<&str> = rates.split("<li>").skip(1).collect();
    assert_eq!(lines.len(), 4, "the four ways of the idle guest: {rates}");
    for line in lines {
        assert!(
            line.starts_with("veth, idle, ") && line.contains("of limit: iperf3, 2 streams"),
            "{line}"
        );
    }
    assert_readable(&page, sections(&record));
}

/// Of the recorded run: each link and work, the ratios, what is reached of iperf3's rate, what the figures are, how each way was set.
fn sections(record: &Record) -> u64 {
    let groups = record.plan.links.len() * record.plan.work.len();
    u64::try_from(groups).expect("few") + 4
}

#[test]
fn a_run_between_two_machines_is_as_readable_and_shows_both() {
    let mut record = Record::read(&recorded()).expect("a record of this schema");
    let host = |name: &str, address: &str| HostFacts {
        name: name.to_owned(),
        address: address.parse().expect("an address"),
        device: "enp65s0f0np0".to_owned(),
        machine: record.machine.clone(),
    };
    record.hosts = Some(Joined {
        source: host("alpha.rack-17.example.org", "2001:db8:17:4::a1fa"),
        destination: host("root@beta.rack-18.example.org", "2001:db8:18:4::be7a"),
        rtt_us: 61.0,
        clock_error_ms: 0.021,
        iperf3_mbit_s: Some(24_310.0),
    });
    let page = page(&record);
    for shown in [
        "alpha.rack-17",
        "2001:db8:18:4::be7a",
        "round trip 61",
        "24310 Mbit/s",
    ] {
        assert!(page.contains(shown), "{shown} is not on the page");
    }
    assert_readable(&page, sections(&record));
}

#[test]
fn what_a_record_says_cannot_become_markup() {
    let mut record = Record::read(&recorded()).expect("a record of this schema");
    let hostile = "\"><script>alert(1)</script><img src=x>";
    record.commit = hostile.to_owned();
    record.command.push(hostile.to_owned());
    record.cells[0].link = hostile.to_owned();
    record.cells[1].way = hostile.to_owned();
    record.cells[0].runs[0].failed = Some(hostile.to_owned());
    record.ways[0].title = hostile.to_owned();
    let page = page(&record);
    assert!(page.contains("alert(1)"), "it is shown");
    assert!(
        !page.contains("<script") && !page.contains("<img"),
        "as text"
    );
}

#[test]
fn a_record_survives_its_file() {
    let text = fs::read_to_string(recorded()).expect("a file");
    let record = Record::parse(&text).expect("a record of this schema");
    assert_eq!(Record::parse(&record.to_text()), Ok(record));
}

/// Calls `bench`, which must succeed.
fn bench(words: &[&str], out: &Path) -> Record {
    let pagecopyd = program("pagecopyd");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(words)
        .arg("--out")
        .arg(out)
        .env("PAGECOPY_BIN_DIR", pagecopyd.parent().expect("a folder"))
        .env("PAGECOPY_QEMU_10_0", Version::V10_0.binary())
        .output()
        .expect("bench can be called");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Record::read(&out.with_extension("json")).expect("it has written a record")
}

#[test]
fn a_small_run_of_all_kinds_becomes_a_readable_page() {
    let scratch = Scratch::new();
    let out = scratch.files().join("small");
    let ways = "tcp,qemu-multifd2,hybrid,qemu-preempt,iperf3,memcpy";
    let words = [
        "--ways",
        ways,
        "--work",
        "texthot20",
        "--links",
        "loopback,10gbit",
    ];
    let record = bench(
        &[&words[..], &["--mib", "64", "--pairs", "1"]].concat(),
        &out,
    );
    assert_eq!(record.cells.len(), 12);
    for cell in &record.cells {
        let [run] = cell.runs.as_slice() else {
            panic!("{} has not run once", cell.way);
        };
        let value = |name: &str| run.figures.get(name).copied();
        assert!(value("total_ms").is_some_and(|ms| ms > 0.0), "{cell:?}");
        let Some(series) = &run.guest else {
            assert!(
                ["iperf3", "memcpy"].contains(&cell.way.as_str()),
                "{cell:?}"
            );
            continue;
        };
        // 32 MiB are the guest's, and nobody compresses them here.
        assert!(
            value("wire_mb").is_some_and(|mb| (30.0..120.0).contains(&mb)),
            "{cell:?}"
        );
        assert!(
            value("loops_before").is_some_and(|loops| loops > 500.0),
            "{cell:?}"
        );
        assert!(
            value("loops_after").is_some_and(|loops| loops > 500.0),
            "{cell:?}"
        );
        assert!(series.loops_s.len() > 40, "{cell:?}");
    }
    let text = fs::read_to_string(out.with_extension("html")).expect("it has written a page");
    assert_eq!(text, page(&record));
    assert_readable(&text, 2 + 3);
}

/// Memory of the destination's that was there before, in MB, of each way that moves a guest.
fn there_before(record: &Record) -> Vec<f64> {
    let moved = record.cells.iter().filter(|cell| cell.way != "iperf3");
    moved
        .map(|cell| cell.runs[0].figures["allocated_mb"])
        .collect()
}

#[test]
fn both_destinations_have_their_memory_before_when_that_is_asked_for() {
    let scratch = Scratch::new();
    let at = |name: &str| scratch.files().join(name);
    let words = [
        "--ways",
        "tcp,qemu-multifd2,iperf3",
        "--work",
        "idle",
        "--mib",
        "64",
        "--pairs",
        "1",
    ];
    let usual = bench(&words, &at("usual"));
    let touched = there_before(&usual);
    assert!(
        touched.len() == 2 && touched.iter().all(|mb| *mb < 8.0),
        "{touched:?}"
    );
    let first = bench(&[&words[..], &["--allocated"]].concat(), &at("first"));
    assert_eq!(there_before(&first), [f64::from(64_u32 << 20) / 1e6; 2]);
    for way in &first.ways {
        let there = way.settings["destination"]["memory"] == "prealloc=on";
        assert_eq!(there, way.way != "iperf3", "{way:?}");
    }
    // The idle guest is the one that a share of the link is told of.
    let text = fs::read_to_string(at("first.html")).expect("a page");
    assert_eq!(text, page(&first));
    assert_readable(&text, 1 + 4);

    // All that is needed is in the file.
    let json = at("first.json");
    let again = bench(&["--replay", json.to_str().expect("a path")], &at("again"));
    assert!(again.plan == first.plan && again.plan.allocated);
    assert_eq!(there_before(&again), there_before(&first));
}

#[test]
fn a_record_can_be_run_again() {
    let scratch = Scratch::new();
    let at = |name: &str| scratch.files().join(name);
    let first = bench(
        &["--ways", "memcpy", "--mib", "64", "--pairs", "2"],
        &at("first"),
    );
    let json = at("first.json");
    let again = bench(&["--replay", json.to_str().expect("a path")], &at("again"));
    assert_eq!(again.plan, first.plan);
    assert_eq!(again.cells[0].runs.len(), 2);
    // The page alone, of the file alone.
    let before = fs::read_to_string(at("again.html")).expect("a page");
    fs::remove_file(at("again.html")).expect("it is there");
    let report = Command::new(env!("CARGO_BIN_EXE_bench"))
        .arg("--report")
        .arg(at("again.json"))
        .status()
        .expect("bench can be called");
    assert!(report.success());
    assert_eq!(fs::read_to_string(at("again.html")).ok(), Some(before));
}
