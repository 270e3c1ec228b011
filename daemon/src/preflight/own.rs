//! What each side finds out about itself. One thing that is not as it should be does not keep the others from being looked at.

use std::path::Path;
use std::time::Duration;

use pagecopy::preflight::{Facts, Line, Verdict, Whose};
use tokio::time::timeout;

use super::{guest, host, memory};
use crate::failure::Failure;
use crate::qemu::discover::{self, refuse_if_tracked, refuse_other_writers};
use crate::qemu::{Block, Guest, settings};
use crate::qmp::Qmp;
use crate::service::Service;
use crate::session::blocking;
use crate::units::show_bytes;

/// How long QEMU may take when a migration waits for what it says.
const COMPARE_LIMIT: Duration = Duration::from_secs(5);

/// The line of the QEMU that waits for the guest.
pub(super) const RECEIVER: &str = "receiver";

/// What a side has found out about itself.
pub(crate) struct Own {
    /// To be compared.
    pub(crate) facts: Facts,
    /// The guest's memory, where it could be looked at.
    pub(super) guest: Option<Guest>,
}

impl Own {
    fn new(service: &Service, side: Whose) -> Own {
        let facts = Facts {
            host: service.config.name.clone(),
            boot: host::boot(),
            lines: host::lines(side),
            qemu: None,
        };
        Own { facts, guest: None }
    }

    /// Whether nothing of it would make a migration fail.
    pub(super) fn is_fit(&self) -> bool {
        let mut lines = self.facts.lines.iter();
        lines.all(|line| line.verdict != Verdict::Fail)
    }

    /// The guest's memory, in bytes; 0 where it is not known.
    pub(super) fn ram(&self) -> u64 {
        let blocks = self.guest.iter().flat_map(|guest| &guest.blocks);
        blocks.map(|block| block.spec.size).sum()
    }

    fn add(&mut self, line: Line) {
        self.facts.lines.push(line);
    }

    /// A check passed, with what was `found`, or failed.
    fn check(&mut self, check: &str, side: Whose, found: &str, checked: Result<(), Failure>) {
        self.add(match checked {
            Ok(()) => Line::pass(check, side, found),
            Err(failure) => Line::fail(check, side, failure.what, failure.remedy),
        });
    }

    /// The guest's memory, and who else is there.
    async fn look_at_memory(&mut self, qmp: &Qmp, side: Whose) {
        let guest = match discover::found(qmp).await {
            Ok(guest) => guest,
            Err(failure) => return self.check("ram", side, "", Err(failure)),
        };
        for block in &guest.blocks {
            self.add(Line::pass("ram", side, in_words(block)));
        }
        let Guest {
            pid,
            version,
            blocks,
            ..
        } = guest.clone();
        let others = blocking(move || refuse_other_writers(pid, version, &blocks)).await;
        let none = "no VFIO, vDPA or vhost-user device, and no other process";
        self.check("writers", side, none, others);
        let tracked = blocking(move || refuse_if_tracked(pid)).await;
        self.check("userfaultfd", side, "none is in use", tracked);
        self.guest = Some(guest);
    }

    async fn ask_qemu(&mut self, qmp: &Qmp, side: Whose) {
        match guest::facts(qmp, self.guest.as_ref()).await {
            Ok(facts) => self.facts.qemu = Some(facts),
            Err(failure) => self.check("qemu", side, "", Err(failure)),
        }
    }
}

fn in_words(block: &Block) -> String {
    let system = match block.spec.page_size {
        4096 => "tmpfs",
        _ => "hugetlbfs",
    };
    format!(
        "{}: {} in {} on {system}, pages of {} KiB, shared",
        block.spec.name,
        show_bytes(block.spec.size),
        block.mapping.path.display(),
        block.spec.page_size >> 10
    )
}

/// Looks at the guest that would leave, and its host.
pub(super) async fn source(service: &Service, socket: &Path) -> Own {
    let side = Whose::Source;
    let mut own = Own::new(service, side);
    let qmp = match Qmp::connect(socket).await {
        Ok(qmp) => qmp,
        Err(failure) => {
            own.check("qmp", side, "", Err(failure));
            return own;
        }
    };
    own.check("guest", side, "it runs", discover::runs(&qmp).await);
    let capabilities = settings::check(&qmp).await;
    own.check("capabilities", side, &settings::needed(), capabilities);
    let leaves = discover::may_leave(&qmp).await;
    own.check("blockers", side, "QEMU has none", leaves);
    own.look_at_memory(&qmp, side).await;
    if let Some(guest) = &own.guest {
        let found = if guest.direct_io {
            "a disk does it: what it reads is waited for, and sent at the stop"
        } else {
            "no disk does it"
        };
        own.add(Line::pass("direct-io", side, found));
    }
    own.ask_qemu(&qmp, side).await;
    own
}

/// Looks at the QEMU that waits here for `vm`, and its host. `ram` is the guest's memory as its source told it.
pub(crate) async fn destination(service: &Service, vm: &str, ram: u64) -> Own {
    let side = Whose::Destination;
    let mut own = Own::new(service, side);
    match waits(service, vm).await {
        Err(failure) => own.check(RECEIVER, side, "", Err(failure)),
        Ok(qmp) => {
            let takes = discover::takes_a_guest(&qmp).await;
            own.check(RECEIVER, side, "a QEMU waits for the guest", takes);
            let capabilities = settings::check(&qmp).await;
            own.check("capabilities", side, &settings::needed(), capabilities);
            own.look_at_memory(&qmp, side).await;
            if let Some(pid) = own.guest.as_ref().map(|guest| guest.pid) {
                let started = blocking(move || discover::started_to_wait(pid)).await;
                own.check("incoming", side, "-S -incoming defer", started);
                own.add(match service.userfaultfd.try_out(&qmp, pid).await {
                    Ok(()) => Line::pass("post-copy", side, "page faults can be served"),
                    Err(why) => Line::warn("post-copy", side, why.what, why.remedy),
                });
            }
            own.ask_qemu(&qmp, side).await;
        }
    }
    let room = memory::lines(service, own.guest.as_ref(), ram);
    own.facts.lines.extend(room);
    own
}

/// What a migration that begins is compared in, of the QEMU that waits here for `vm`; nothing of it where none does or where it does
/// not answer, which is said when the guest comes.
pub(crate) async fn compared(service: &Service, vm: &str) -> Facts {
    let mut facts = Facts {
        host: service.config.name.clone(),
        boot: host::boot(),
        ..Facts::default()
    };
    let asked = async {
        // Closed, it would only mean that nobody waits for his turn.
        let _turn = service.compared.acquire().await;
        let qmp = waits(service, vm).await.ok()?;
        let (guest, asked) = tokio::join!(discover::found(&qmp), guest::ask(&qmp));
        Some(asked.ok()?.facts(&qmp, guest.ok().as_ref()).await)
    };
    facts.qemu = timeout(COMPARE_LIMIT, asked).await.ok().flatten();
    facts
}

/// The QEMU that waits for `vm`.
async fn waits(service: &Service, vm: &str) -> Result<Qmp, Failure> {
    service.refuse_if_receiving(vm)?;
    let receiver = service.store.receivers.get(vm);
    let receiver = receiver.ok_or_else(|| {
        crate::failure::operator(
            format!("no QEMU waits here for {vm:?}"),
            format!(
                "start one there with -S -incoming defer, and run: pagecopy receive --vm {vm} --qmp SOCKET"
            ),
        )
    })?;
    service.refuse_in_doubt(vm, &receiver.qmp)?;
    Qmp::connect(&receiver.qmp).await
}
