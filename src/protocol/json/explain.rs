//! What is wrong with the members of a JSON object, for the author of a client.

use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::closest::closest;

/// Most characters of an unknown key that are repeated.
const SHOWN_MAX: usize = 32;

/// A member that an object may have.
#[derive(Debug)]
pub struct Known {
    pub key: &'static str,
    pub is_string: bool,
}

/// Whether a JSON text is an object.
pub fn is_object(text: &str) -> bool {
    text.trim_start().starts_with('{')
}

/// The first fault in a valid JSON text that should be an object with these members: it is none, or
/// it has an unknown key or a value of the wrong type.
pub fn fault(text: &str, known: &[Known]) -> Option<String> {
    if is_object(text) {
        return serde_json::Deserializer::from_str(text).deserialize_map(Members(known)).ok()?;
    }
    let kind = match text.trim_start().bytes().next()? {
        b'[' => "an array",
        b'"' => "a string",
        b't' | b'f' => "a boolean",
        b'n' => "null",
        _ => "a number",
    };
    Some(format!("send a JSON object: this is {kind}"))
}

struct Members<'a>(&'a [Known]);

impl<'de> Visitor<'de> for Members<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Option<String>, A::Error> {
        let mut first = None;
        while let Some((key, value)) = members.next_entry::<String, &RawValue>()? {
            if first.is_none() {
                first = self.fault(&key, value.get());
            }
        }
        Ok(first)
    }
}

impl Members<'_> {
    fn fault(&self, key: &str, value: &str) -> Option<String> {
        match self.0.iter().find(|known| known.key == key) {
            Some(known) if known.is_string && !value.starts_with('"') => {
                Some(format!("\"{key}\" must be a string"))
            }
            Some(_) => None,
            None => Some(self.unknown(key)),
        }
    }

    fn unknown(&self, key: &str) -> String {
        let keys = || self.0.iter().map(|known| known.key);
        let mut shown: String = key.chars().take(SHOWN_MAX).collect();
        if shown.len() < key.len() {
            shown.push('…');
        }
        match closest(key, keys()) {
            Some(meant) => format!("unknown key {shown:?}: did you mean \"{meant}\"?"),
            None => format!("unknown key {shown:?}: the keys are {}", keys().collect::<Vec<_>>().join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_key_that_is_wrong() {
        let known = [Known { key: "text", is_string: true }, Known { key: "ref", is_string: false }];
        for (text, expected) in [
            (r#"{"txt":"hi"}"#, r#"unknown key "txt": did you mean "text"?"#),
            (r#"{"Ref":1,"txt":1}"#, r#"unknown key "Ref": did you mean "ref"?"#),
            (r#"{"ref":[],"body":1}"#, r#"unknown key "body": the keys are text, ref"#),
            (r#" {"a\"\n\u202e":1}"#, r#"unknown key "a\"\n\u{202e}": the keys are text, ref"#),
            (r#"{"text": 5}"#, r#""text" must be a string"#),
            (r#"["ping"]"#, "send a JSON object: this is an array"),
            ("\n\"hi\"", "send a JSON object: this is a string"),
            ("null", "send a JSON object: this is null"),
            ("-1", "send a JSON object: this is a number"),
        ] {
            assert_eq!(fault(text, &known).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(fault(r#"{"text":"a","ref":1}"#, &known), None);
        let long = fault(&format!(r#"{{"{}":1}}"#, "\u{202e}".repeat(100_000)), &known).unwrap();
        assert!(long.len() < 500 && long.contains('…'), "{long}");
    }
}
