//! The far end: answers, and otherwise has its memory written and read.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use ::tests::real::cpu_seconds;
use bytes::Bytes;
use transport::rdma::{self, Memory, Settings};
use transport::{Address, Channel, Event, Listener, Op, Regions, Security, Token};

use super::end::{CALL, memory};
use super::perftest::Server;
use super::talk::{Answer, Ask, PATIENCE, hear, say};

const LISTENS: &str = "listening at ";

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Serves one near end after the other.
pub(super) fn serve(at: SocketAddr) -> Result<(), String> {
    let listener = Listener::bind(&Address::Tcp(at)).map_err(text)?;
    if let Address::Tcp(address) = listener.local_address() {
        println!("{LISTENS}{address}");
    }
    let regions = memory();
    loop {
        let Some(pending) = listener.accept(PATIENCE).map_err(text)? else {
            continue;
        };
        let admitted = pending.establish(&Security::Plaintext, PATIENCE, |_, _| Ok(Regions::new()));
        let ended = match admitted {
            Ok((_, _, mut control)) => answer_all(control.as_mut(), at, &regions),
            Err(error) => Err(text(error)),
        };
        if let Err(error) = ended {
            eprintln!("the near end is gone: {error}");
        }
    }
}

/// Answers until the near end is gone.
fn answer_all(control: &mut dyn Channel, at: SocketAddr, regions: &Regions) -> Result<(), String> {
    // The one that was asked for last; ends with the next one.
    let mut server = None;
    loop {
        let ask: Ask = match hear(control, None) {
            Ok(ask) => ask,
            Err(error) if error.contains("closed") => return Ok(()),
            Err(error) => return Err(error),
        };
        let answer = match ask {
            Ask::Cpu => Ok(Answer::Cpu(cpu_seconds(std::process::id()))),
            Ask::Channel { rdma: true } => over_rdma(at, regions).map(Answer::Listening),
            Ask::Channel { rdma: false } => over_tcp(at, regions).map(Answer::Listening),
            Ask::Perftest(test) => {
                drop(server.take());
                Server::start(&test).map(|started| {
                    server = Some(started);
                    Answer::Started
                })
            }
        };
        say(control, &answer.unwrap_or_else(Answer::Failed))?;
    }
}

fn over_tcp(at: SocketAddr, regions: &Regions) -> Result<SocketAddr, String> {
    let any = SocketAddr::new(at.ip(), 0);
    let listener = Listener::bind(&Address::Tcp(any)).map_err(text)?;
    let Address::Tcp(address) = listener.local_address() else {
        return Err("a listener without an address".to_owned());
    };
    let regions = regions.clone();
    std::thread::spawn(move || {
        let pending = listener.accept(PATIENCE).map_err(text)?;
        let pending = pending.ok_or("nobody has called over TCP")?;
        let admit = |_: &_, _: &_| Ok(regions);
        let (_, _, channel) = pending
            .establish(&Security::Plaintext, PATIENCE, admit)
            .map_err(text)?;
        echo(channel)
    });
    Ok(address)
}

fn over_rdma(at: SocketAddr, regions: &Regions) -> Result<SocketAddr, String> {
    let mut listener = rdma::Listener::bind(SocketAddr::new(at.ip(), 0)).map_err(text)?;
    let address = listener.local_address();
    let memory = Memory::new(regions, Settings::default());
    std::thread::spawn(move || {
        let pending = listener.accept(PATIENCE).map_err(text)?;
        let pending = pending.ok_or("nobody has called over RDMA")?;
        let admit = |call: &rdma::Call| match call.knows(&CALL.secret) {
            true => Ok(memory),
            false => Err("another caller".to_owned()),
        };
        let (_, channel) = pending.establish(PATIENCE, admit).map_err(text)?;
        echo(Box::new(channel))
    });
    Ok(address)
}

/// Sends each message back, until the near end is gone.
fn echo(mut channel: Box<dyn Channel>) -> Result<(), String> {
    loop {
        if let Some(Event::Message(bytes)) = channel.poll(None).map_err(text)? {
            let again = Op::Send(Bytes::clone(&bytes));
            channel.submit(Token(0), again).map_err(text)?;
        }
    }
}

/// The far end as a process of this host's, which ends with this.
pub(super) struct Child {
    child: std::process::Child,
    address: SocketAddr,
}

impl Child {
    pub(super) fn start(at: SocketAddr) -> Result<Child, String> {
        let program = std::env::current_exe().map_err(text)?;
        let (ip, port) = (at.ip().to_string(), at.port().to_string());
        let words = ["--transport", "rdma", "--listen", &ip, "--port", &port];
        let mut command = Command::new(program);
        let mut child = command
            .args(words)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(text)?;
        }
        let address = line.trim().strip_prefix(LISTENS);
        match address.and_then(|address| address.parse().ok()) {
            Some(address) => Ok(Child { child, address }),
            None => {
                // It has said why on the terminal.
                let _ = child.kill();
                Err("the far end does not listen".to_owned())
            }
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It has none to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
