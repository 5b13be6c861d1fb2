//! The JSON that events may hold: I-JSON (RFC 7493), so that every client can read every event.
//!
//! RFC 8259 leaves open how parsers treat repeated names, half a surrogate pair, numbers too large
//! for a double, and deep nesting. Parsers differ, and some fail. [`check`] rejects all of these.
//! The Lua function `fanfare_publish` has the same rule; `tests/json_cases.txt` lists cases for
//! both.

use std::ops::Range;

pub mod explain;

/// Most levels of arrays and objects in an event, the event itself included. Parsers recurse and
/// have a limit: .NET's is 64, Ruby's 100, serde_json's 127.
pub const DEPTH_MAX: usize = 64;

/// Longest number, in characters. A double takes 24, a 256-bit integer 78. Python rejects integers
/// of more than 4,300 digits, Java's Jackson numbers of more than 1,000.
pub const NUMBER_MAX: usize = 128;

/// Why a text is not valid JSON for events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault}, at byte {at}")]
pub struct BadJson {
    pub fault: Fault,
    /// Offset in the text, in bytes.
    pub at: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("not JSON (RFC 8259)")]
    Syntax,
    #[error("not UTF-8")]
    NotUtf8,
    #[error("an object has two members of the same name")]
    RepeatedName,
    #[error("a \\u escape is half of a surrogate pair")]
    LoneSurrogate,
    #[error("a number is too large for a double")]
    NumberTooLarge,
    #[error("a number has more than {NUMBER_MAX} characters")]
    NumberTooLong,
    #[error("an event has more than {DEPTH_MAX} levels of arrays and objects")]
    TooDeep,
}

/// Members of the outermost object that have a meaning for the server, also if their names have
/// escapes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Members<'a> {
    pub id: bool,
    pub to: bool,
    /// The `type`, as JSON.
    pub kind: Option<&'a str>,
}

/// Checks that `text` is one JSON value that every client can parse, with at most `depth_max`
/// levels.
pub fn check(text: &[u8], depth_max: usize) -> Result<(), BadJson> {
    members(text, depth_max).map(drop)
}

/// As [`check`], and returns the members that have a meaning.
pub fn members(text: &[u8], depth_max: usize) -> Result<Members<'_>, BadJson> {
    let at_byte = |fault, at| BadJson { fault, at };
    let text = std::str::from_utf8(text).map_err(|error| at_byte(Fault::NotUtf8, error.valid_up_to()))?;
    let mut scanner = Scanner {
        text: text.as_bytes(),
        at: 0,
        names: Vec::new(),
        unescaped: Vec::new(),
        inside_outermost: depth_max.checked_sub(1),
        members: Members::default(),
        kind: None,
    };
    if let Err(fault) = scanner.document(depth_max) {
        return Err(at_byte(fault, scanner.at));
    }
    Ok(Members { kind: scanner.kind.map(|kind| &text[kind]), ..scanner.members })
}

/// Scans a text once, in O(n log n) at worst: names are compared by sorting, without hashing.
struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
    /// Names in the open objects, the innermost last.
    names: Vec<Name>,
    /// The names that have escapes, decoded.
    unescaped: Vec<u8>,
    /// How many levels may be opened inside the outermost object.
    inside_outermost: Option<usize>,
    members: Members<'static>,
    /// Where the outermost object's `type` is.
    kind: Option<Range<usize>>,
}

/// The place of a name: in the text, or past its end in `unescaped`. It has eight bytes, since the
/// shortest member has six.
#[derive(Clone, Copy)]
struct Name {
    start: u32,
    length: u32,
}

impl Name {
    fn bytes<'a>(self, text: &'a [u8], unescaped: &'a [u8]) -> &'a [u8] {
        match (self.start as usize).checked_sub(text.len()) {
            None => &text[self.start as usize..][..self.length as usize],
            Some(start) => &unescaped[start..][..self.length as usize],
        }
    }
}

/// Up to this many names of an object are compared pairwise.
const PAIRWISE_MAX: usize = 12;

impl Scanner<'_> {
    fn document(&mut self, depth_max: usize) -> Result<(), Fault> {
        if u32::try_from(self.text.len()).is_err() {
            return Err(Fault::Syntax); // far beyond --max-message-size, and beyond the numbers in Name
        }
        self.skip_blanks();
        self.value(depth_max)?;
        self.skip_blanks();
        if self.at < self.text.len() { Err(Fault::Syntax) } else { Ok(()) }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    /// Steps over `byte` if it comes next.
    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn skip_blanks(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// Reads a value; `depth` levels may be opened. Recurses no deeper than that.
    fn value(&mut self, depth: usize) -> Result<(), Fault> {
        match self.peek() {
            Some(b'"') => self.string().map(drop),
            Some(b'{' | b'[') if depth == 0 => Err(Fault::TooDeep),
            Some(b'{') => self.object(depth - 1),
            Some(b'[') => self.array(depth - 1),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            _ => Err(Fault::Syntax),
        }
    }

    fn literal(&mut self, literal: &[u8]) -> Result<(), Fault> {
        if !self.text[self.at..].starts_with(literal) {
            return Err(Fault::Syntax);
        }
        self.at += literal.len();
        Ok(())
    }

    fn array(&mut self, depth: usize) -> Result<(), Fault> {
        self.at += 1;
        self.skip_blanks();
        if self.take(b']') {
            return Ok(());
        }
        loop {
            self.skip_blanks();
            self.value(depth)?;
            self.skip_blanks();
            if self.take(b']') {
                return Ok(());
            }
            if !self.take(b',') {
                return Err(Fault::Syntax);
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), Fault> {
        self.at += 1;
        self.skip_blanks();
        if self.take(b'}') {
            return Ok(());
        }
        let (first, unescaped) = (self.names.len(), self.unescaped.len());
        loop {
            self.skip_blanks();
            let name = self.name()?;
            self.names.push(name);
            self.skip_blanks();
            if !self.take(b':') {
                return Err(Fault::Syntax);
            }
            self.skip_blanks();
            let value = self.at;
            self.value(depth)?;
            if self.inside_outermost == Some(depth) {
                self.note_member(name, value);
            }
            self.skip_blanks();
            if self.take(b'}') {
                break;
            }
            if !self.take(b',') {
                return Err(Fault::Syntax);
            }
        }
        if self.has_repeated_name(first) {
            return Err(Fault::RepeatedName);
        }
        self.names.truncate(first);
        self.unescaped.truncate(unescaped);
        Ok(())
    }

    /// Reads a name; gives its place, for comparison.
    fn name(&mut self) -> Result<Name, Fault> {
        if self.peek() != Some(b'"') {
            return Err(Fault::Syntax);
        }
        let open = self.at;
        let (start, length) = if self.string()? {
            let name: String =
                serde_json::from_slice(&self.text[open..self.at]).map_err(|_| Fault::Syntax)?;
            let start = self.text.len() + self.unescaped.len();
            self.unescaped.extend_from_slice(name.as_bytes());
            (start, name.len())
        } else {
            (open + 1, self.at - open - 2)
        };
        let narrow = |number| u32::try_from(number).map_err(|_| Fault::Syntax);
        Ok(Name { start: narrow(start)?, length: narrow(length)? })
    }

    /// Notes a member of the outermost object whose value starts at byte `value`.
    fn note_member(&mut self, name: Name, value: usize) {
        match name.bytes(self.text, &self.unescaped) {
            b"id" => self.members.id = true,
            b"to" => self.members.to = true,
            b"type" => self.kind = Some(value..self.at),
            _ => {}
        }
    }

    /// Whether two of the names from `first` on are the same.
    fn has_repeated_name(&mut self, first: usize) -> bool {
        let (text, unescaped) = (self.text, &self.unescaped[..]);
        let bytes = |name: &Name| name.bytes(text, unescaped);
        let names = &mut self.names[first..];
        if names.len() <= PAIRWISE_MAX {
            let same = |a: &Name, b: &Name| a.length == b.length && bytes(a) == bytes(b);
            return (1..names.len()).any(|at| names[..at].iter().any(|name| same(name, &names[at])));
        }
        names.sort_unstable_by(|a, b| a.length.cmp(&b.length).then_with(|| bytes(a).cmp(bytes(b))));
        names.windows(2).any(|pair| bytes(&pair[0]) == bytes(&pair[1]))
    }

    /// Reads a string; gives whether it has escapes.
    fn string(&mut self) -> Result<bool, Fault> {
        self.at += 1;
        let mut escapes = false;
        loop {
            self.skip_plain();
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(escapes);
                }
                Some(b'\\') => {
                    escapes = true;
                    self.escape()?;
                }
                _ => return Err(Fault::Syntax), // the end, or a control character
            }
        }
    }

    /// Skips the plain bytes of a string, sixteen at a time.
    fn skip_plain(&mut self) {
        let special = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
        let rest = &self.text[self.at..];
        let any = |chunk: &&[u8]| chunk.iter().fold(false, |any, byte| any | special(*byte));
        let plain = 16 * rest.chunks_exact(16).take_while(|chunk| !any(chunk)).count();
        let tail = rest[plain..].iter().take_while(|byte| !special(**byte)).count();
        self.at += plain + tail;
    }

    fn escape(&mut self) -> Result<(), Fault> {
        match self.text.get(self.at + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 2,
            Some(b'u') => match self.code_unit(self.at)? {
                0xD800..=0xDBFF => match self.code_unit(self.at + 6) {
                    Ok(0xDC00..=0xDFFF) => self.at += 12,
                    _ => return Err(Fault::LoneSurrogate),
                },
                0xDC00..=0xDFFF => return Err(Fault::LoneSurrogate),
                _ => self.at += 6,
            },
            _ => return Err(Fault::Syntax),
        }
        Ok(())
    }

    /// The UTF-16 code unit of the escape at byte `at`: `\u` and four digits.
    fn code_unit(&self, at: usize) -> Result<u16, Fault> {
        let Some([b'\\', b'u', digits @ ..]) = self.text.get(at..at + 6) else { return Err(Fault::Syntax) };
        digits.iter().try_fold(0, |unit, digit| {
            let digit = char::from(*digit).to_digit(16).ok_or(Fault::Syntax)?;
            Ok(unit << 4 | digit as u16)
        })
    }

    fn number(&mut self) -> Result<(), Fault> {
        let start = self.at;
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        let exponent = matches!(self.peek(), Some(b'e' | b'E'));
        if exponent {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        let number = &self.text[start..self.at];
        if number.len() > NUMBER_MAX {
            return Err(Fault::NumberTooLong);
        }
        // Without an exponent a number of so few digits is far below the largest double, 1.8e308.
        let is_finite =
            |number| std::str::from_utf8(number).is_ok_and(|text| text.parse().is_ok_and(f64::is_finite));
        if exponent && !is_finite(number) {
            return Err(Fault::NumberTooLarge);
        }
        Ok(())
    }

    /// Reads one digit or more.
    fn digits(&mut self) -> Result<(), Fault> {
        let count = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(Fault::Syntax) } else { Ok(()) }
    }
}

#[cfg(test)]
#[path = "../../../tests/common/cases.rs"]
pub(crate) mod cases;

#[cfg(test)]
mod tests;
