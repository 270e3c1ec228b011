//! Serving the page faults of live processes: who touches what has not arrived waits, and reads what then arrives, whoever
//! is killed meanwhile.
#![cfg(feature = "host")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_types,
    clippy::disallowed_methods
)]
#![cfg(target_arch = "x86_64")]

mod host_support;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pagecopy::host::attach::{find_device, may_see_kernel_faults};
use pagecopy::host::pager::{UffdPager, share_out};
use pagecopy::host::{DemandFault, Pager, PagerError, process};
use pagecopy::memory::Run;

use host_support::sys::{self, Child};
use host_support::{
    Command, HUGE, HugePages, PAGE, RamFile, Target, is_registered, is_root, pipe, run,
};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Long enough for a thread that does not wait to be through, on a busy machine, too.
const A_WHILE: Duration = Duration::from_millis(200);

fn page(number: u64) -> Run {
    run(0, number, 1)
}

fn arm(target: &Target) -> UffdPager {
    let stretches = share_out(&target.blocks, 1).remove(0);
    UffdPager::arm(target.pid(), stretches, None).unwrap()
}

/// The next fault that waits.
fn next_fault(pager: &UffdPager) -> DemandFault {
    let (begun, mut faults) = (Instant::now(), Vec::new());
    while faults.is_empty() {
        assert!(begun.elapsed() < LIMIT, "nobody faults");
        pager
            .faults(&mut faults, Duration::from_millis(50))
            .unwrap();
    }
    assert_eq!(faults.len(), 1, "one thread waits for one page");
    faults.remove(0)
}

/// Puts a page's bytes into the file, as a transport does.
fn place(file: &RamFile, page: u64, byte: u8) {
    let bytes = vec![byte; file.page_size as usize];
    file.map().copy_in(page * file.page_size, &bytes);
}

/// Has the target touch a page (`wanted`: which, and whether the file has it already), checks that it waits, places the page,
/// and gives what was read.
fn touch_and_serve(
    target: &mut Target,
    file: &RamFile,
    pager: &UffdPager,
    wanted: (u64, bool),
    byte: u8,
) -> u8 {
    let through = AtomicBool::new(false);
    let orders = &mut target.orders;
    thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let read = orders.get(0, wanted.0);
            through.store(true, Ordering::SeqCst);
            read
        });
        let fault = next_fault(pager);
        assert_eq!((fault.page, fault.present), wanted);
        assert_ne!(fault.thread, 0);
        assert!(!through.load(Ordering::SeqCst), "it does not wait");
        place(file, fault.page, byte);
        pager.map(page(fault.page)).unwrap();
        toucher.join().unwrap()
    })
}

#[test]
fn who_touches_what_has_not_arrived_waits_and_reads_what_arrives() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(64 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    // In the file and in the page table, in the file only, and nowhere.
    target.write(0, 5, 1);
    place(&file, 6, 0x66);
    let pager = arm(&target);
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (5, true), 0xA5),
        0xA5
    );
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (6, true), 0xA6),
        0xA6
    );
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (7, false), 0xA7),
        0xA7
    );
    // Mapped by now: nobody waits, and what the guest writes stays.
    target.write(0, 7, 1);
    pager.map(run(0, 5, 3)).unwrap();
    assert_eq!(target.orders.get(0, 7), 0x5A);
    pager.release().unwrap();
    assert!(!is_registered(target.pid()));
    assert_eq!(process::userfaultfds(target.pid()).unwrap(), 0);
    assert_eq!(target.orders.get(0, 30), 0, "the kernel serves again");
}

#[test]
fn faults_in_the_kernel_wait_too() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(16 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    let pager = arm(&target);
    let orders = &mut target.orders;
    thread::scope(|scope| {
        let writer = scope.spawn(|| orders.tell(Command::KernelWrite { block: 0, page: 3 }));
        assert_eq!(next_fault(&pager).page, 3);
        place(&file, 3, 0x33);
        pager.map(page(3)).unwrap();
        writer.join().unwrap();
    });
    let map = file.map();
    assert_eq!(
        (map.read_byte(3 * PAGE), map.read_byte(3 * PAGE + 1)),
        (0x77, 0x33)
    );
    pager.release().unwrap();
}

#[test]
fn what_the_file_lacks_cannot_be_mapped() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(64 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    let pager = arm(&target);
    for number in [10, 11, 13] {
        place(&file, number, 1);
    }
    let refused = pager.map(run(0, 10, 4)).unwrap_err();
    assert!(matches!(refused, PagerError::NotInFile(_)), "{refused}");
    assert_eq!(target.orders.get(0, 11), 1, "those before it are mapped");
    place(&file, 12, 1);
    pager.map(run(0, 10, 4)).unwrap();
    assert_eq!((target.orders.get(0, 12), target.orders.get(0, 13)), (1, 1));
    pager.release().unwrap();
}

#[test]
fn a_poisoned_page_is_a_memory_error() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(16 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    let pager = arm(&target);
    place(&file, 1, 0x11);
    pager.map(page(1)).unwrap();
    pager.poison(run(0, 0, 16)).unwrap();
    assert_eq!(target.orders.get(0, 1), 0x11, "what was there stays");
    assert!(
        target
            .orders
            .answer(Command::Get { block: 0, page: 2 })
            .is_err()
    );
    let status = target.child.wait(0);
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGBUS);
}

/// Has a process of its own arm a pager and read a fault; gives the number of its descriptor inside `target` when it has.
fn doomed_pager(target: &Target) -> (Child, std::fs::File) {
    let (stretches, pid) = (share_out(&target.blocks, 1).remove(0), target.pid());
    let (tell, mut told) = pipe();
    let child = sys::fork(move || {
        let pager = UffdPager::arm(pid, stretches, None).unwrap();
        told.write_all(&pager.inside().to_le_bytes()).unwrap();
        next_fault(&pager);
        told.write_all(&[1]).unwrap();
        thread::sleep(LIMIT);
    });
    (child, tell)
}

fn number(from: &mut std::fs::File) -> i32 {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes).unwrap();
    i32::from_le_bytes(bytes)
}

#[test]
fn a_successor_serves_what_a_killed_pager_had_read() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(64 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    let stretches = share_out(&target.blocks, 1).remove(0);
    let pid = target.pid();
    let (child, mut told) = doomed_pager(&target);
    let inside = number(&mut told);
    let orders = &mut target.orders;
    let read = thread::scope(|scope| {
        let toucher = scope.spawn(|| orders.get(0, 9));
        told.read_exact(&mut [0]).unwrap();
        drop(child);
        thread::sleep(A_WHILE);
        assert!(!toucher.is_finished(), "it waits for a successor");
        let pager = UffdPager::adopt(pid, stretches.clone(), inside).unwrap();
        assert_eq!(next_fault(&pager).page, 9);
        place(&file, 9, 0x99);
        pager.map(page(9)).unwrap();
        let read = toucher.join().unwrap();
        pager.release().unwrap();
        read
    });
    assert_eq!(read, 0x99);
    assert!(!is_registered(pid));
    let gone = UffdPager::adopt(pid, stretches, inside).unwrap_err();
    assert!(matches!(gone, PagerError::NotThere { .. }), "{gone}");
}

/// The guard is real: without the descriptor inside, a guest whose daemon is killed reads zeroes where its data should be.
#[test]
fn without_the_descriptor_inside_a_killed_pager_corrupts() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(64 * PAGE);
    let mut target = Target::new(&[&file], vec![]);
    let (child, mut told) = doomed_pager(&target);
    let descriptor = u64::try_from(number(&mut told)).unwrap();
    target.tell(Command::Close { descriptor });
    let orders = &mut target.orders;
    let read = thread::scope(|scope| {
        let toucher = scope.spawn(|| orders.get(0, 9));
        told.read_exact(&mut [0]).unwrap();
        drop(child);
        toucher.join().unwrap()
    });
    assert_eq!(read, 0);
}

#[test]
fn several_pagers_share_a_guest() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(256 * PAGE);
    let target = &mut Target::new(&[&file], vec![]);
    let shares = share_out(&target.blocks, 3);
    let pid = target.pid();
    let pagers: Vec<UffdPager> = shares
        .into_iter()
        .map(|share| UffdPager::arm(pid, share, None).unwrap())
        .collect();
    assert_eq!(pagers.len(), 3);
    let (done, file) = (AtomicBool::new(false), &file);
    thread::scope(|scope| {
        for pager in &pagers {
            let done = &done;
            scope.spawn(move || {
                let mut faults = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    pager
                        .faults(&mut faults, Duration::from_millis(20))
                        .unwrap();
                    for fault in faults.drain(..) {
                        place(file, fault.page, fault.page as u8 | 1);
                        pager.map(page(fault.page)).unwrap();
                    }
                }
            });
        }
        for number in 0..256 {
            assert_eq!(target.orders.get(0, number), number as u8 | 1);
        }
        done.store(true, Ordering::SeqCst);
    });
    for pager in pagers {
        pager.release().unwrap();
    }
    assert_eq!(process::userfaultfds(pid).unwrap(), 0);
}

#[test]
fn huge_pages() {
    skip_unless!(is_root(), "needs root");
    let Some(reserved) = HugePages::reserve(4) else {
        return;
    };
    let file = RamFile::at(&reserved.mount.0, 4 * HUGE, HUGE);
    let mut target = Target::new(&[&file], vec![]);
    target.write(0, 1, 1);
    let pager = arm(&target);
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (1, true), 0xB1),
        0xB1
    );
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (2, false), 0xB2),
        0xB2
    );
    pager.release().unwrap();
}

/// A QEMU without privileges: its userfaultfd is made from a device that it was given.
#[test]
fn a_process_without_privileges_is_served_by_the_device() {
    skip_unless!(is_root(), "needs root");
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let Ok(device) = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
    else {
        println!("SKIPPED: this kernel has no /dev/userfaultfd");
        return;
    };
    let file = RamFile::tmpfs(16 * PAGE);
    // The target inherits the device under the same number.
    let mut target = Target::new(&[&file], vec![]);
    let pid = target.pid();
    let everybody = sysctl.is_ok_and(|sysctl| sysctl.trim() == "1");
    // Root of a container may be nobody to the kernel.
    let privileged = UffdPager::arm(pid, share_out(&target.blocks, 1).remove(0), None);
    assert_eq!(may_see_kernel_faults(pid).unwrap(), privileged.is_ok());
    if let Ok(pager) = privileged {
        pager.release().unwrap();
    }
    target.tell(Command::BecomeNobody);
    let stretches = || share_out(&target.blocks, 1).remove(0);
    assert_eq!(may_see_kernel_faults(pid).unwrap(), everybody);
    assert_eq!(
        find_device(pid, device.as_fd()).unwrap(),
        Some(device.as_raw_fd())
    );
    assert_eq!(find_device(pid, file.file.as_fd()).unwrap(), None);
    let device = device.as_raw_fd();
    if !everybody {
        let refused = UffdPager::arm(pid, stretches(), None).unwrap_err();
        assert!(
            refused.to_string().contains("/dev/userfaultfd"),
            "{refused}"
        );
    }
    let pager = UffdPager::arm(pid, stretches(), Some(device)).unwrap();
    assert_eq!(
        touch_and_serve(&mut target, &file, &pager, (3, false), 0xC3),
        0xC3
    );
    pager.release().unwrap();
}

#[test]
fn a_process_that_ends_is_noticed() {
    skip_unless!(is_root(), "needs root");
    let file = RamFile::tmpfs(16 * PAGE);
    let target = Target::new(&[&file], vec![]);
    let pager = arm(&target);
    file.file.write_all_at(&[1], 0).unwrap();
    target.child.signal(libc::SIGKILL);
    target
        .child
        .wait(libc::__WALL | libc::WNOWAIT | libc::WEXITED);
    let begun = Instant::now();
    let gone = loop {
        assert!(begun.elapsed() < LIMIT);
        if let Err(error) = pager.faults(&mut Vec::new(), Duration::from_millis(20)) {
            break error;
        }
    };
    assert!(matches!(gone, PagerError::Gone(_)), "{gone}");
    let gone = pager.map(page(0)).unwrap_err();
    assert!(matches!(gone, PagerError::Gone(_)), "{gone}");
    pager.release().unwrap();
}
