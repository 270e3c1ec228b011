//! Who is measured beside whom, and how each is set.

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    OursPlain,
    QemuPlain,
    QemuPlainMultifd,
    OursTls,
    QemuTls,
    QemuTlsMultifd,
    OursPostcopy,
    OursHybrid,
    QemuPostcopy,
    QemuPreempt,
}

impl Contender {
    /// Those of pre-copy, in the order of the table.
    pub(crate) const PRECOPY: [Contender; 6] = [
        Contender::OursPlain,
        Contender::QemuPlain,
        Contender::QemuPlainMultifd,
        Contender::OursTls,
        Contender::QemuTls,
        Contender::QemuTlsMultifd,
    ];
    /// Those of post-copy.
    pub(crate) const POSTCOPY: [Contender; 4] = [
        Contender::OursPostcopy,
        Contender::OursHybrid,
        Contender::QemuPostcopy,
        Contender::QemuPreempt,
    ];

    /// Whether pagecopy moves it.
    pub(crate) fn is_ours(self) -> bool {
        use Contender::{OursHybrid, OursPlain, OursPostcopy, OursTls};
        matches!(self, OursPlain | OursTls | OursPostcopy | OursHybrid)
    }

    /// Whether the link is encrypted.
    pub(crate) fn has_tls(self) -> bool {
        use Contender::{OursTls, QemuTls, QemuTlsMultifd};
        matches!(self, OursTls | QemuTls | QemuTlsMultifd)
    }

    /// Whether the guest runs at the destination before its memory is there.
    pub(crate) fn is_postcopy(self) -> bool {
        Contender::POSTCOPY.contains(&self)
    }

    /// Options of `pagecopy migrate`.
    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Contender::OursPostcopy => &["--mode", "postcopy"],
            Contender::OursHybrid => &["--mode", "hybrid", "--postcopy-after", "1"],
            _ => &["--mode", "precopy"],
        }
    }

    /// Capabilities of QEMU's.
    pub(crate) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Contender::QemuPlainMultifd | Contender::QemuTlsMultifd => &["multifd", "events"],
            Contender::QemuPostcopy => &["postcopy-ram", "events"],
            Contender::QemuPreempt => &["postcopy-ram", "postcopy-preempt", "events"],
            _ => &["events"],
        }
    }

    /// As the table shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Contender::OursPlain => "pagecopy, tcp x2",
            Contender::QemuPlain => "QEMU, tcp",
            Contender::QemuPlainMultifd => "QEMU, multifd x2",
            Contender::OursTls => "pagecopy, tls x2",
            Contender::QemuTls => "QEMU, tls",
            Contender::QemuTlsMultifd => "QEMU, multifd x2 + tls",
            Contender::OursPostcopy => "pagecopy, postcopy",
            Contender::OursHybrid => "pagecopy, hybrid",
            Contender::QemuPostcopy => "QEMU, postcopy",
            Contender::QemuPreempt => "QEMU, postcopy-preempt",
        }
    }
}
