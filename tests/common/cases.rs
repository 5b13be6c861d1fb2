//! The cases of `tests/json_cases.txt`, which hold for every way to publish an event.

/// A JSON value, and whether an event with it is accepted.
#[derive(Clone, Debug)]
pub struct Case {
    /// `ok`, or the kind of error.
    pub verdict: &'static str,
    /// The value. It may be invalid UTF-8.
    pub value: Vec<u8>,
}

impl Case {
    /// The event of this value.
    pub fn event(&self) -> Vec<u8> {
        [b"{\"data\":", &self.value[..], b"}"].concat()
    }

    /// Words that every error of this kind contains; `None` if the event is accepted.
    pub fn error(&self) -> Option<&'static str> {
        Some(match self.verdict {
            "ok" => return None,
            "syntax" => "not JSON",
            "utf8" => "UTF-8",
            "name" => "two members of the same name",
            "surrogate" => "surrogate",
            "large" => "too large for a double",
            "long" => "more than 128 characters",
            "deep" => "64 levels",
            other => panic!("there is no verdict {other}"),
        })
    }

    /// A name for failure messages.
    pub fn name(&self) -> String {
        let text = self.value.escape_ascii().to_string();
        format!("{} {}", self.verdict, if text.len() > 200 { &text[..200] } else { &text })
    }
}

pub fn cases() -> Vec<Case> {
    let lines = include_str!("../json_cases.txt").lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let case = |line: &'static str| {
        let (verdict, text) = line.split_once(' ').expect("a verdict, a space, a text");
        Case { verdict, value: expand(text) }
    };
    lines.map(case).collect()
}

/// Replaces `<0A>` by a byte and `<3*[>` by a repeated character.
fn expand(text: &str) -> Vec<u8> {
    let mut value = Vec::new();
    let mut rest = text;
    while let Some((plain, marked)) = rest.split_once('<') {
        let (mark, after) = marked.split_once('>').expect("a mark ends with >");
        value.extend_from_slice(plain.as_bytes());
        match mark.split_once('*') {
            Some((count, text)) => value.extend(text.repeat(count.parse().expect("a number")).bytes()),
            None => value.push(u8::from_str_radix(mark, 16).expect("a byte in hexadecimal")),
        }
        rest = after;
    }
    value.extend_from_slice(rest.as_bytes());
    value
}
