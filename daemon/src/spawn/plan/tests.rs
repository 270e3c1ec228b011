//! What is made of command lines: those that people and libvirt write, and those that nobody should.
#![allow(clippy::unwrap_used)]

use super::*;

mod random;

const POLICY: &str = "user = 'qemu'\ntaps = ['vnet*']\n\
    [binaries]\nqemu-system-x86_64 = '/usr/bin/qemu-system-x86_64'\n\
    [paths]\n'/images' = '/mnt/images'\n'/run/vm' = '/run/guests'\n\
    [memory-directories]\n'/dev/shm' = '/dev/shm/pagecopy'\n\
    [bridges]\nbr0 = 'br-guests'\n";
const RAM: &str = "memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/web,share=on";

fn ask(words: &[&str]) -> Ask {
    let mut arguments = vec!["/opt/qemu/bin/qemu-system-x86_64".to_owned()];
    arguments.extend(words.iter().map(|&word| word.to_owned()));
    Ask {
        id: Uuid::from_u128(7),
        arguments,
        machine: None,
    }
}

fn made_under(policy: &str, words: &[&str]) -> Result<Plan, Failure> {
    let words = [words, &["-object", RAM]].concat();
    plan(&Policy::parse(policy).unwrap(), &ask(&words), 9)
}

fn made(words: &[&str]) -> Result<Plan, Failure> {
    made_under(POLICY, words)
}

/// The words that the source's become, without those that are ours.
fn become_of(words: &[&str]) -> Vec<String> {
    let plan = made(words).unwrap_or_else(|failure| panic!("{words:?}: {failure:?}"));
    let at = plan
        .arguments
        .iter()
        .position(|word| word == "-object")
        .unwrap();
    plan.arguments[..at].to_vec()
}

fn refused(words: &[&str]) -> Failure {
    let failure = match made(words) {
        Ok(plan) => panic!("{words:?} is taken: {:?}", plan.arguments),
        Err(failure) => failure,
    };
    assert!(!failure.remedy.is_empty(), "{failure:?}");
    failure
}

#[test]
fn a_guest_of_every_day() {
    let plan = made(&[
        "-machine",
        "q35,memory-backend=ram0",
        "-cpu",
        "host,+avx2",
        "-m",
        "1G",
        "-smp",
        "2,maxcpus=4",
        "-name",
        "web/1,debug-threads=on",
        "-uuid",
        "c0ffee00-0000-0000-0000-000000000000",
        "-drive",
        "file=/images/web.qcow2,if=none,id=d0,format=qcow2,cache=none",
        "-device",
        "virtio-blk-pci,drive=d0,bootindex=1",
        "-netdev",
        "tap,id=n0,ifname=vnet3,script=/etc/qemu-ifup,vhost=on",
        "-device",
        "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
        "-object",
        "rng-random,id=r,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=r",
        "-chardev",
        "socket,id=ga,path=/run/vm/web.ga,server=on",
        "-qmp",
        "unix:/run/vm/web.qmp,server=on,wait=off",
        "-pidfile",
        "/run/vm/web.pid",
        "-daemonize",
        "-display",
        "gtk",
        "-kernel",
        "/images/vmlinuz",
        "-append",
        "root=/dev/vda quiet",
        "-enable-kvm",
    ])
    .unwrap();
    assert_eq!(
        plan.binary,
        std::path::Path::new("/usr/bin/qemu-system-x86_64")
    );
    let text = plan.arguments.join(" ");
    for expected in [
        "-machine type=q35,memory-backend=ram0 -cpu host,+avx2 -m 1G",
        "-name guest=web/1,debug-threads=on",
        "-drive file=/mnt/images/web.qcow2,if=none,id=d0,format=qcow2,cache=none",
        "-netdev type=tap,id=n0,ifname=vnet3,script=no,vhost=on,downscript=no",
        "-object qom-type=rng-random,id=r,filename=/dev/urandom",
        "-chardev backend=socket,id=ga,path=/run/guests/web.ga,server=on,wait=off",
        "-display none -kernel /mnt/images/vmlinuz -append root=/dev/vda quiet -enable-kvm",
        "-object qom-type=memory-backend-file,id=ram0,size=1G,share=on,mem-path=/dev/shm/pagecopy/\
         pagecopy-00000000-0000-0000-0000-000000000007-0-ram0",
        "-no-user-config -S -incoming defer -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-chardev socket,id=pagecopy-00000000-0000-0000-0000-000000000007,fd=9,server=on,wait=off \
         -mon chardev=pagecopy-00000000-0000-0000-0000-000000000007,mode=control",
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    for gone in ["web.qmp", "web.pid", "daemonize", "qemu-ifup", "gtk"] {
        assert!(!text.contains(gone), "{gone} is in {text}");
    }
    assert_eq!(plan.mapped["/images/web.qcow2"], "/mnt/images/web.qcow2");
    assert!(
        plan.opened
            .contains(&("/mnt/images/vmlinuz".into(), "/mnt/images".into()))
    );
    assert!(plan.notices.iter().any(|notice| notice.contains("gtk")));
}

#[test]
fn what_libvirt_writes() {
    let words = become_of(&[
        "-device",
        r#"{"driver":"virtio-blk-pci","drive":"fmt","id":"disk0"}"#,
        "-blockdev",
        r#"{"driver":"file","filename":"/images/a.img","node-name":"proto","auto-read-only":true}"#,
        "-blockdev",
        r#"{"node-name":"fmt","driver":"raw","file":"proto"}"#,
        "-chardev",
        "socket,id=charmonitor,fd=30,server=on,wait=off",
        "-mon",
        "chardev=charmonitor,id=monitor,mode=control",
        "-sandbox",
        "on",
        "-msg",
        "timestamp=on",
        "-overcommit",
        "mem-lock=off",
        "-boot",
        "strict=on",
        "-global",
        "ICH9-LPC.disable_s3=1",
        "-no-user-config",
        "-nodefaults",
        "-no-shutdown",
    ])
    .join(" ");
    assert!(
        words.contains(r#""filename":"/mnt/images/a.img""#),
        "{words}"
    );
    assert!(words.contains(r#""file":"proto""#), "{words}");
    assert!(
        !words.contains("charmonitor") && !words.contains("fd=30"),
        "{words}"
    );
    let json = r#"{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/dev/shm/libvirt/1/pc.ram","share":true,"size":1073741824}"#;
    let plan = plan(&Policy::parse(POLICY).unwrap(), &ask(&["-object", json]), 9).unwrap();
    assert_eq!(plan.ram.len(), 1);
    assert!(plan.ram[0].ends_with("pagecopy-00000000-0000-0000-0000-000000000007-0-pc.ram"));
    assert!(plan.arguments.join(" ").contains(r#""size":1073741824"#));
}

#[test]
fn a_guest_that_was_started_so_moves_on() {
    let first = made(&["-nodefaults", "-m", "1G"]).unwrap();
    let mut again = ask(&[]);
    again.id = Uuid::from_u128(8);
    let word = |word: &String| word.replace("/dev/shm/pagecopy/", "/dev/shm/");
    again.arguments.extend(first.arguments.iter().map(word));
    let second = plan(&Policy::parse(POLICY).unwrap(), &again, 5).unwrap();
    assert_eq!(second.arguments.len(), first.arguments.len());
    let text = second.arguments.join(" ");
    assert!(!text.contains("000000000007"), "{text}");
}

#[test]
fn nothing_is_executed() {
    for words in [
        ["-plugin", "/images/x.so"],
        ["-netdev", "bridge,id=n,br=br1"],
        ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.1:1-cmd:sh"],
        ["-netdev", "tap,id=n"],
        ["-netdev", "tap,id=n,ifname=eth0"],
        ["-incoming-exec", "exec:sh"],
        ["-semihosting-config", "enable=on"],
        ["-device", "loader,file=/etc/passwd"],
        ["-chardev", "pipe,id=c,path=/images/x"],
        ["-serial", "exec:sh"],
        ["-run", "x"],
        ["-readconfig", "/images/x.cfg"],
        ["-set", "device.x.y=z"],
    ] {
        refused(&words);
    }
    // A helper is never the source's.
    let plan = made(&["-netdev", "bridge,id=n,br=br0,helper=/images/evil"]).unwrap();
    let text = plan.arguments.join(" ");
    assert!(
        plan.bridged && text.contains("br=br-guests") && !text.contains("evil"),
        "{text}"
    );
    assert!(text.contains("elevateprivileges=children"), "{text}");
}

#[test]
fn no_path_is_opened_that_the_policy_does_not_name() {
    for words in [
        ["-drive", "file=/etc/shadow"],
        ["-drive", "file=/images/../etc/shadow"],
        ["-drive", "file=relative.img"],
        ["-drive", "file=nbd:10.0.0.1:1,format=raw"],
        ["-drive", "file=json:{\"driver\":\"nbd\"}"],
        ["-drive", "file=/images/a,file=/etc/shadow"],
        ["-drive", "driver=nbd,host=10.0.0.1"],
        ["-drive", "file.driver=ssh,file.path=/images/x"],
        ["-drive", r#"{"x":"a,file=nbd:10.0.0.1:80,b=c"}"#],
        ["-drive", "file=/dev/fdset/1"],
        ["-drive", "file=fat:rw:/images"],
        ["-blockdev", "driver=vvfat,dir=/images"],
        ["-blockdev", "driver=file,filename=/etc/shadow,node-name=a"],
        [
            "-blockdev",
            r#"{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}"#,
        ],
        ["-blockdev", r#"{"driver":"raw","file":"/etc/shadow"}"#],
        ["-cdrom", "/etc/shadow"],
        ["-kernel", "vmlinuz"],
        ["-bios", "../../etc/shadow"],
        ["-bios", "/etc/shadow"],
        ["-device", "virtio-net-pci,romfile=/etc/shadow"],
        ["-global", "virtio-net-pci.romfile=/etc/shadow"],
        [
            "-global",
            "driver=virtio-net-pci,property=romfile,value=/etc/shadow",
        ],
        ["-global", "driver=virtio-net-pci,property=fd,value=5"],
        [
            "-global",
            "driver=virtio-net-pci,property=x/images/y,value=5",
        ],
        ["-machine", "q35,firmware=/etc/shadow"],
        ["-machine", "q35,dumpdtb=x"],
        ["-smbios", "file=/etc/shadow"],
        ["-smbios", "type=11,path=/etc/shadow"],
        ["-fw_cfg", "name=opt/a,file=/etc/shadow"],
        ["-object", "rng-random,id=r,filename=/etc/shadow"],
        ["-object", "secret,id=s,file=/etc/shadow"],
        [
            "-object",
            "memory-backend-file,id=r,size=1G,mem-path=/etc,share=on",
        ],
        [
            "-object",
            "memory-backend-file,id=r,size=1G,mem-path=/dev/shm/a,share=off",
        ],
        ["-chardev", "file,id=c,path=/etc/shadow"],
        ["-chardev", "null,id=c,logfile=/etc/shadow"],
        ["-chardev", "socket,id=c,host=0.0.0.0,port=1"],
        ["-chardev", "socket,id=c,path=/images/x,abstract=on"],
        ["-chardev", "socket,id=c,fd=5"],
        ["-serial", "file:/etc/shadow"],
        ["-serial", "tcp::1,server"],
        ["-serial", "unix:/etc/x,server"],
        ["-serial", "/dev/ttyS0"],
        ["-device", "vfio-pci,host=01:00.0"],
        ["-device", "virtio-net-pci,vhostfd=3"],
        ["-vnc", ":1"],
        ["-fsdev", "local,id=f,path=/images"],
        ["-accel", "kvm,device=/dev/sda"],
        ["-net", "user"],
    ] {
        refused(&words);
    }
}

#[test]
fn what_is_not_understood_is_refused_with_what_would_help() {
    assert!(refused(&["-no-such-option"]).remedy.contains("receive"));
    assert!(refused(&["disk.img"]).what.contains("no option"));
    let cut = plan(
        &Policy::parse(POLICY).unwrap(),
        &ask(&["-object", RAM, "-m"]),
        9,
    )
    .unwrap_err();
    assert!(cut.what.contains("-m is the last word"), "{cut:?}");
    let failure = refused(&["-device", "vfio-pci,host=01:00.0"]);
    assert!(
        failure.remedy.contains("devices of the policy"),
        "{failure:?}"
    );
    assert!(refused(&["-append", "a\nb"]).what.contains("control"));
    let mut other = ask(&["-object", RAM]);
    other.arguments[0] = "/bin/sh".to_owned();
    let failure = plan(&Policy::parse(POLICY).unwrap(), &other, 9).unwrap_err();
    assert!(failure.remedy.contains("[binaries]"), "{failure:?}");
    other.arguments.clear();
    assert!(plan(&Policy::parse(POLICY).unwrap(), &other, 9).is_err());
    let failure = plan(&Policy::parse(POLICY).unwrap(), &ask(&["-m", "1G"]), 9).unwrap_err();
    assert!(failure.what.contains("RAM"), "{failure:?}");
}

#[test]
fn an_option_that_the_policy_leaves_out_is_refused() {
    let policy = format!("options = ['object', 'm']\n{POLICY}");
    made_under(&policy, &["-m", "1G"]).unwrap();
    let failure = made_under(&policy, &["-device", "virtio-rng-pci"]).unwrap_err();
    assert!(
        failure.what.contains("-device") && failure.remedy.contains("options"),
        "{failure:?}"
    );
    // How QEMU is run is not the source's to say, so it needs no permission.
    made_under(
        &policy,
        &[
            "-daemonize",
            "-monitor",
            "stdio",
            "-D",
            "/x",
            "-runas",
            "root",
        ],
    )
    .unwrap();
}

#[test]
fn the_machine_is_named_in_full() {
    let mut short = ask(&["-M", "q35,accel=tcg", "-object", RAM]);
    short.machine = Some("pc-q35-7.2".to_owned());
    let policy = Policy::parse(POLICY).unwrap();
    let text = plan(&policy, &short, 9).unwrap().arguments.join(" ");
    assert!(text.contains("-M type=pc-q35-7.2,accel=tcg"), "{text}");
    short.arguments.drain(1..3);
    let text = plan(&policy, &short, 9).unwrap().arguments.join(" ");
    assert!(text.contains("-machine pc-q35-7.2"), "{text}");
    short.machine = Some("pc,firmware=x".to_owned());
    assert!(plan(&policy, &short, 9).is_err());
}

#[test]
fn standard_input_and_screens_are_not_there() {
    let text = become_of(&[
        "-nographic",
        "-serial",
        "mon:stdio",
        "-chardev",
        "stdio,id=s,mux=on",
    ])
    .join(" ");
    assert_eq!(text, "-serial null -chardev backend=null,id=s");
    let plan = made(&["-nographic"]).unwrap();
    assert!(
        plan.arguments
            .join(" ")
            .contains("-display none -serial null -monitor none")
    );
}

#[test]
fn a_monitors_device_goes_with_it_and_one_that_others_use_stays() {
    let alone = become_of(&[
        "-chardev",
        "socket,id=m,path=/run/vm/q,server=on",
        "-mon",
        "m",
    ]);
    assert!(alone.is_empty(), "{alone:?}");
    let shared = become_of(&[
        "-chardev",
        "socket,id=m,path=/run/vm/q,server=on,mux=on",
        "-mon",
        "chardev=m",
        "-serial",
        "chardev:m",
    ]);
    assert_eq!(shared.len(), 4, "{shared:?}");
}

#[test]
fn a_long_word_is_not_shown_at_length() {
    let failure = refused(&["-drive", &format!("file=/{}", "x".repeat(100_000))]);
    assert!(failure.what.len() < 1000, "{} bytes", failure.what.len());
}
