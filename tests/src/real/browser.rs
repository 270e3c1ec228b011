//! Chromium without a screen, driven over a pipe by its DevTools protocol, and a tunnel by which it reaches a daemon's API.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::{PATIENCE, Scratch, eventually};

/// Chromium's words: a browser has one page here.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    stdin: ChildStdin,
    messages: Receiver<Value>,
    session: String,
    last: u64,
    /// What the page's console said, and what the browser refused it.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts it with a profile of its own.
    pub fn start(scratch: &Scratch) -> Browser {
        let profile = scratch.folder("chromium");
        // It takes its pipe as descriptors 3 and 4, which a shell makes of those that a child has.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 0</dev/null 1>&2", "sh"])
            // Without its sandbox, which root cannot have; the page is our own.
            .args([
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args(["--disable-dev-shm-usage", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(profile.join("log")).expect("a log file"))
            .spawn()
            .expect("chromium can be called: scripts/install brings it");
        let stdin = child.stdin.take().expect("it is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, messages) = channel();
        thread::spawn(move || {
            loop {
                let mut message = Vec::new();
                let read = stdout.read_until(0, &mut message).unwrap_or(0);
                message.pop();
                let Ok(message) = serde_json::from_slice(&message) else {
                    return;
                };
                if read == 0 || sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Browser {
            child,
            stdin,
            messages,
            session: String::new(),
            last: 0,
            complaints: Vec::new(),
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().expect("an id").to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Calls a method of the protocol, and returns what it answers.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let text = message.to_string() + "\0";
        self.stdin
            .write_all(text.as_bytes())
            .expect("chromium takes it");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left);
            let message = message.unwrap_or_else(|error| panic!("no answer to {method}: {error}"));
            if message["id"] == self.last {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.listen(&message);
        }
    }

    /// Keeps what the page or the browser has to complain about.
    fn listen(&mut self, message: &Value) {
        let kinds = [
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        ];
        if message["method"]
            .as_str()
            .is_some_and(|method| kinds.contains(&method))
        {
            self.complaints.push(message["params"].to_string());
        }
    }

    /// Opens a page in a window that is `width` wide, in CSS pixels, light or dark.
    pub fn open(&mut self, url: &str, width: u32, dark: bool) {
        self.look_like(width, dark);
        self.call("Page.navigate", json!({ "url": url }));
        self.wait("document.readyState === 'complete'");
    }

    /// Makes the window so wide, light or dark.
    pub fn look_like(&mut self, width: u32, dark: bool) {
        let size =
            json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": features }),
        );
    }

    /// What an expression is on the page; a promise is waited for.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", asked);
        let thrown = &answer["exceptionDetails"];
        assert!(thrown.is_null(), "{expression}: {thrown}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true on the page.
    pub fn wait(&mut self, expression: &str) {
        let is_true = eventually(PATIENCE, || match self.value(expression) {
            Value::Bool(true) => Ok(()),
            other => Err(format!("{expression} is {other}")),
        });
        if let Err(why) = is_true {
            let shown = self.value("document.body.innerText");
            panic!("{why}; the page shows: {shown}; {:?}", self.complaints);
        }
    }

    /// Draws the page into a file, where `PAGECOPY_SCREENSHOTS` names a folder.
    pub fn draw(&mut self, name: &str) {
        let Some(folder) = std::env::var_os("PAGECOPY_SCREENSHOTS").map(PathBuf::from) else {
            return;
        };
        let how = json!({ "format": "png", "captureBeyondViewport": true });
        let drawn = self.call("Page.captureScreenshot", how);
        let text = folder.join(format!("{name}.base64"));
        fs::write(&text, drawn["data"].as_str().expect("a picture")).expect("a file");
        let png = fs::File::create(folder.join(format!("{name}.png"))).expect("a file");
        let status = Command::new("base64")
            .arg("-d")
            .arg(&text)
            .stdout(png)
            .status();
        assert!(status.expect("base64 can be called").success());
        fs::remove_file(text).expect("it is there");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its other processes end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address of this machine that leads to a unix socket, as `ssh -L` makes one. It lasts as long as the test.
pub fn tunnel(to: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let to = to.to_owned();
    thread::spawn(move || {
        for browser in listener.incoming().flatten() {
            if let Ok(daemon) = UnixStream::connect(&to) {
                // Either end's end ends both.
                let _ = join(browser, daemon);
            }
        }
    });
    address
}

fn join(browser: TcpStream, daemon: UnixStream) -> io::Result<()> {
    let (mut from_browser, mut to_daemon) = (browser.try_clone()?, daemon.try_clone()?);
    let (mut from_daemon, mut to_browser) = (daemon, browser);
    thread::spawn(move || {
        let _ = io::copy(&mut from_browser, &mut to_daemon);
        let _ = to_daemon.shutdown(std::net::Shutdown::Both);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut from_daemon, &mut to_browser);
        let _ = to_browser.shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}
