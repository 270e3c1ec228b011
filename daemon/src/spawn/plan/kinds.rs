//! The options whose words decide what QEMU opens: disks, objects, networks, character devices. Each kind must be one that the policy names.

use super::{OUR_ID, Planner, REPORT, ram_prefix, refuse, shown};
use crate::failure::Failure;
use crate::spawn::words::Props;

impl Planner<'_> {
    pub(super) fn disk(&mut self, value: &str, implied: Option<&str>) -> Result<String, Failure> {
        let is_node = implied.is_some();
        let mut props = self.parse(value, implied)?;
        props.each(|key, value| {
            let name = key.rsplit('.').next().unwrap_or(key);
            match name {
                "driver" | "format" => {
                    let list = &self.policy.block_drivers;
                    self.one_of("block-drivers", list, Some(value.to_owned()))?;
                    Ok(None)
                }
                // The name of another node.
                "file" if is_node => {
                    self.without_path(value)?;
                    Ok(None)
                }
                _ => self.property(key, value),
            }
        })?;
        Ok(props.write())
    }

    pub(super) fn object(&mut self, value: &str) -> Result<String, Failure> {
        let mut props = self.parse(value, Some("qom-type"))?;
        let kind = props.get("qom-type");
        self.one_of("objects", &self.policy.objects, kind.clone())?;
        if kind.as_deref() != Some("memory-backend-file") {
            props.each(|key, value| self.property(key, value))?;
            return Ok(props.write());
        }
        let path = props.get("mem-path").unwrap_or_default();
        let folder = self.policy.memory_directory(&path).ok_or_else(|| {
            refuse(
                format!("no folder of the destination stands for that of the RAM file {}", shown(&path)),
                "add its folder to [memory-directories] of the policy (spawn-policy) at the destination",
            )
        })?;
        if !matches!(
            props.get("share").as_deref(),
            Some("on" | "yes" | "true" | "y")
        ) {
            return Err(refuse(
                "RAM that is not shared cannot be moved",
                "add share=on",
            ));
        }
        let id = props.get("id").unwrap_or_default();
        let name = |c: char| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '_'
            }
        };
        let number = self.plan.ram.len();
        let file = folder.join(format!(
            "{}{number}-{}",
            ram_prefix(self.ask.id),
            id.chars().take(64).map(name).collect::<String>()
        ));
        props.remove("mem-path");
        props.each(|key, value| self.property(key, value))?;
        props.set("mem-path", &file.to_string_lossy());
        self.plan.ram.push(file);
        Ok(props.write())
    }

    pub(super) fn netdev(&mut self, value: &str) -> Result<String, Failure> {
        let mut props = self.parse(value, Some("type"))?;
        let kind = props.get("type").unwrap_or_default();
        self.one_of("netdevs", &self.policy.netdevs, Some(kind.clone()))?;
        match kind.as_str() {
            "bridge" => self.bridge(&mut props)?,
            "tap" if props.get("br").is_some() || props.get("helper").is_some() => {
                self.bridge(&mut props)?;
            }
            "tap" => {
                let name = props.get("ifname").ok_or_else(|| {
                    refuse(
                        "QEMU would make a tap device and run a script for it",
                        "name the device (ifname=…, the same at the destination) and say script=no,downscript=no",
                    )
                })?;
                self.one_of("taps", &self.policy.taps, Some(name))?;
                for script in ["script", "downscript"] {
                    if props.get(script).is_none_or(|path| path != "no") {
                        self.notice(format!("{script} of a tap device: no script is run here"));
                    }
                    props.set(script, "no");
                }
            }
            _ => {}
        }
        props.each(|key, value| self.property(key, value))?;
        Ok(props.write())
    }

    fn bridge(&mut self, props: &mut Props) -> Result<(), Failure> {
        let bridge = props.get("br").unwrap_or_else(|| "br0".to_owned());
        let here = self.policy.bridges.get(&bridge).ok_or_else(|| {
            refuse(
                format!("no bridge of the destination stands for {}", shown(&bridge)),
                "add it to [bridges] of the policy (spawn-policy) at the destination",
            )
        })?;
        props.set("br", here);
        props.remove("helper");
        self.plan.bridged = true;
        Ok(())
    }

    /// `None`: it goes with the monitor that it is of.
    pub(super) fn chardev(&mut self, value: &str) -> Result<Option<String>, Failure> {
        let mut props = self.parse(value, Some("backend"))?;
        let id = props.get("id").unwrap_or_default();
        if id.starts_with(OUR_ID) || self.monitors.contains(&id) {
            return Ok(None);
        }
        let backend = props.get("backend");
        self.one_of("chardevs", &self.policy.chardevs, backend.clone())?;
        match backend.as_deref() {
            Some("stdio") => {
                self.notice(format!(
                    "the character device {id} on standard input: nobody is there"
                ));
                return Ok(Some(format!("backend=null,id={}", id.replace(',', ",,"))));
            }
            Some("socket") => {
                if props.get("path").is_none() {
                    return Err(refuse(
                        "only unix sockets are known",
                        "give it a path=… that the policy allows",
                    ));
                }
                let server = props.get("server");
                if matches!(server.as_deref(), Some("on" | "yes" | "true" | "y")) {
                    // Nobody else would let QEMU start.
                    props.remove("nowait");
                    props.set_flag("wait", false);
                }
            }
            _ => {}
        }
        props.each(|key, value| self.property(key, value))?;
        Ok(Some(props.write()))
    }

    pub(super) fn serial(&mut self, value: &str) -> Result<String, Failure> {
        let value = value.strip_prefix("mon:").unwrap_or(value);
        let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
        match (kind, rest) {
            ("none" | "null" | "pty" | "vc", "") => Ok(value.to_owned()),
            ("stdio", "") => {
                self.notice("the serial port on standard input: nobody is there".to_owned());
                Ok("null".to_owned())
            }
            ("chardev", id) => self.without_path(id).map(|()| value.to_owned()),
            ("vc", size) => self.without_path(size).map(|()| value.to_owned()),
            ("file", path) => Ok(format!("file:{}", self.path(path)?)),
            ("unix", socket) => {
                let mut words = socket.split(',');
                let path = self.path(words.next().unwrap_or_default())?;
                if path.contains(',') {
                    return Err(refuse("there is a comma in the path", REPORT));
                }
                let is_server = words.any(|word| matches!(word, "server" | "server=on"));
                let server = if is_server { ",server=on,wait=off" } else { "" };
                Ok(format!("unix:{path}{server}"))
            }
            _ => Err(refuse(
                "this kind of character device is not known",
                "use none, null, pty, file:PATH, unix:PATH,server=on or chardev:ID",
            )),
        }
    }
}
