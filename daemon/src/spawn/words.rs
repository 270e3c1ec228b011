//! QEMU's command line as QEMU reads it: options, comma lists with `,,` for a comma, and the JSON that some options take.
//!
//! What is read is written again from what was understood, in one form (`key=value` throughout), so that QEMU cannot read
//! anything else into it than was looked at.

use std::fmt::Write as _;

use serde_json::Value;

/// The value of one option that takes properties.
#[derive(Clone, Debug, PartialEq)]
pub enum Props {
    /// `key=value,…`.
    List(Vec<Prop>),
    /// `{"key": value, …}`.
    Json(serde_json::Map<String, Value>),
}

/// One property of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prop {
    /// Its name.
    pub key: String,
    /// `None` for a word that stands alone, such as `readonly`, or `+avx2`.
    pub value: Option<String>,
}

impl Props {
    /// Reads the value of an option. A first word without `=` is the value of `implied`, where the option has such a key;
    /// JSON is read where QEMU does, for a `{` at the start.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str, implied: Option<&str>, json: bool) -> Result<Props, String> {
        if json && text.starts_with('{') {
            return match serde_json::from_str(text) {
                Ok(Value::Object(map)) => {
                    check_names(&Value::Object(map.clone()))?;
                    Ok(Props::Json(map))
                }
                Ok(_) => Err("it is JSON, and no object".to_owned()),
                Err(error) => Err(format!("it is no JSON: {error}")),
            };
        }
        let mut list = Vec::new();
        for (at, piece) in pieces(text).into_iter().enumerate() {
            list.push(prop(piece, implied.filter(|_| at == 0))?);
        }
        Ok(Props::List(list))
    }

    /// The value of a property of the outermost level, where there is one that is text or can be shown as such. As QEMU
    /// does, the last one of a list counts.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            Props::List(list) => {
                let found = list.iter().rfind(|prop| prop.key == key)?;
                Some(found.value.clone().unwrap_or_else(|| "on".to_owned()))
            }
            Props::Json(map) => map.get(key).and_then(scalar),
        }
    }

    /// A property that a list has twice, if there is one: which of them counts is not the same for all options.
    pub fn repeated(&self) -> Option<&str> {
        let Props::List(list) = self else {
            return None;
        };
        list.iter()
            .enumerate()
            .find(|(at, prop)| list[..*at].iter().any(|other| other.key == prop.key))
            .map(|(_, prop)| prop.key.as_str())
    }

    /// Sets a property, in the place of all of that name.
    pub fn set(&mut self, key: &str, value: &str) {
        match self {
            Props::List(list) => {
                let at = list.iter().position(|prop| prop.key == key);
                list.retain(|prop| prop.key != key);
                let prop = Prop {
                    key: key.to_owned(),
                    value: Some(value.to_owned()),
                };
                list.insert(at.unwrap_or(list.len()).min(list.len()), prop);
            }
            Props::Json(map) => {
                map.insert(key.to_owned(), value.into());
            }
        }
    }

    /// Sets a property that is true or false.
    pub fn set_flag(&mut self, key: &str, on: bool) {
        match self {
            Props::List(_) => self.set(key, if on { "on" } else { "off" }),
            Props::Json(map) => {
                map.insert(key.to_owned(), on.into());
            }
        }
    }

    /// Removes a property.
    pub fn remove(&mut self, key: &str) {
        match self {
            Props::List(list) => list.retain(|prop| prop.key != key),
            Props::Json(map) => {
                map.remove(key);
            }
        }
    }

    /// Shows every property, at whatever depth, to `look`: its name (`a.b` for one inside another) and its value as text,
    /// which it may replace.
    ///
    /// # Errors
    /// The first that `look` gives.
    pub fn each<E>(
        &mut self,
        mut look: impl FnMut(&str, &str) -> Result<Option<String>, E>,
    ) -> Result<(), E> {
        match self {
            Props::List(list) => {
                for prop in list {
                    let value = prop.value.as_deref().unwrap_or("on");
                    if let Some(new) = look(&prop.key, value)? {
                        prop.value = Some(new);
                    }
                }
                Ok(())
            }
            Props::Json(map) => each_of_map("", map, &mut look),
        }
    }

    /// As QEMU reads it.
    pub fn write(&self) -> String {
        match self {
            Props::List(list) => {
                let words = list.iter().map(|prop| match &prop.value {
                    Some(value) => format!("{}={}", prop.key, value.replace(',', ",,")),
                    None => prop.key.clone(),
                });
                words.collect::<Vec<_>>().join(",")
            }
            Props::Json(map) => Value::Object(map.clone()).to_string(),
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        _ => None,
    }
}

type Look<'a, E> = &'a mut dyn FnMut(&str, &str) -> Result<Option<String>, E>;

fn each_of_map<E>(
    prefix: &str,
    map: &mut serde_json::Map<String, Value>,
    look: Look<'_, E>,
) -> Result<(), E> {
    for (key, value) in map.iter_mut() {
        let mut path = prefix.to_owned();
        // A String takes all that is written to it.
        let _ = write!(path, "{}{key}", if prefix.is_empty() { "" } else { "." });
        each_of_value(&path, value, look)?;
    }
    Ok(())
}

fn each_of_value<E>(path: &str, value: &mut Value, look: Look<'_, E>) -> Result<(), E> {
    match value {
        Value::Object(map) => each_of_map(path, map, look),
        Value::Array(list) => list
            .iter_mut()
            .try_for_each(|item| each_of_value(path, item, look)),
        other => {
            let shown = scalar(other).unwrap_or_default();
            if let Some(new) = look(path, &shown)? {
                *other = Value::String(new);
            }
            Ok(())
        }
    }
}

/// The text between single commas, not unescaped yet.
fn pieces(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let (mut found, mut from, mut at) = (Vec::new(), 0, 0);
    while at < bytes.len() {
        if bytes[at] == b',' {
            if bytes.get(at + 1) == Some(&b',') {
                at += 1;
            } else {
                found.push(&text[from..at]);
                from = at + 1;
            }
        }
        at += 1;
    }
    found.push(&text[from..]);
    found
}

fn prop(piece: &str, implied: Option<&str>) -> Result<Prop, String> {
    let unescaped = |text: &str| text.replace(",,", ",");
    let end = piece.find(['=', ',']);
    match (
        end.map(|end| (end, piece.as_bytes().get(end) == Some(&b'='))),
        implied,
    ) {
        (Some((end, true)), _) => {
            let key = checked_key(&piece[..end])?;
            Ok(Prop {
                key,
                value: Some(unescaped(&piece[end + 1..])),
            })
        }
        (_, Some(implied)) => Ok(Prop {
            key: implied.to_owned(),
            value: Some(unescaped(piece)),
        }),
        (None, None) => Ok(Prop {
            key: checked_key(piece)?,
            value: None,
        }),
        (Some(_), None) => Err(format!("{piece:?} is no property")),
    }
}

/// Names of properties are no other in JSON than in a list.
fn check_names(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(map) => map.iter().try_for_each(|(key, value)| {
            checked_key(key)?;
            check_names(value)
        }),
        Value::Array(list) => list.iter().try_for_each(check_names),
        _ => Ok(()),
    }
}

fn checked_key(key: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.+#".contains(c);
    if key.is_empty() || !key.chars().all(good) {
        return Err(format!("{key:?} is no name of a property"));
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn list(text: &str, implied: Option<&str>) -> Props {
        Props::parse(text, implied, true).unwrap()
    }

    #[test]
    fn a_list_is_read_as_qemu_reads_it_and_written_in_one_form() {
        let props = list(
            "virtio-blk-pci,drive=d0,serial=a,,b=c,write-cache",
            Some("driver"),
        );
        assert_eq!(props.get("driver").unwrap(), "virtio-blk-pci");
        assert_eq!(props.get("serial").unwrap(), "a,b=c");
        assert_eq!(props.get("write-cache").unwrap(), "on");
        assert_eq!(
            props.write(),
            "driver=virtio-blk-pci,drive=d0,serial=a,,b=c,write-cache"
        );
        // A comma in the first word belongs to the implied value, with whatever follows it.
        assert_eq!(list("a,,b=c,d=e", Some("file")).write(), "file=a,,b=c,d=e");
        assert_eq!(list("file=x,file=y", None).get("file").unwrap(), "y");
    }

    #[test]
    fn what_is_written_is_read_as_the_same() {
        for text in ["a=,,,,", "a=1,,,b=2", "q35,accel=tcg", "x,y=,z", "a=b==c"] {
            let once = list(text, Some("type"));
            assert_eq!(list(&once.write(), Some("type")), once, "{text}");
        }
    }

    #[test]
    fn what_qemu_might_read_in_another_way_is_refused() {
        for text in [
            "", "a=1,", "a=1,b,,c", "a=1,,,", "a b=1", "a=1,=2", "a=1,/etc",
        ] {
            assert!(Props::parse(text, None, true).is_err(), "{text:?}");
        }
        for text in ["{", "{}x", "[1]", r#"{"a":[{"/etc":1}]}"#] {
            assert!(Props::parse(text, None, true).is_err(), "{text:?}");
        }
        assert!(Props::parse("{\"a\":1}", None, false).is_err());
    }

    #[test]
    fn json_is_looked_at_to_its_depth() {
        let mut props = list(
            r#"{"driver":"raw","file":{"driver":"file","filename":"/a","locks":[{"path":"/b"}]},"n":5}"#,
            None,
        );
        let mut seen = Vec::new();
        props
            .each(|key, value| {
                seen.push(format!("{key}={value}"));
                Ok::<_, ()>((value == "/b").then(|| "/c".to_owned()))
            })
            .unwrap();
        for expected in [
            "driver=raw",
            "file.filename=/a",
            "file.locks.path=/b",
            "n=5",
        ] {
            assert!(seen.iter().any(|it| it == expected), "{expected}: {seen:?}");
        }
        assert!(props.write().contains(r#""path":"/c""#));
    }

    #[test]
    fn properties_are_set_and_removed() {
        let mut props = list("tap,script=/x,id=n,script=/y", Some("type"));
        props.set("script", "no");
        props.set_flag("vhost", true);
        props.remove("id");
        assert_eq!(props.write(), "type=tap,script=no,vhost=on");
    }
}
