//! The mark in each published event: a number and the time at which it was due.
//!
//! A mark is `~`, the tag of the run, the number and the time in base 36, and `~`: 18 characters
//! that no protocol escapes, so it is found in whatever a server makes of an event. Marks of other
//! runs, such as those that a server keeps as history, are ignored. Padding brings the event to its
//! size.

/// Bytes of a mark.
pub const MARK: usize = 18;

/// Tags of runs are below this.
pub const TAGS: u32 = 36 * 36;

const TAG_DIGITS: usize = 2;
const NUMBER_DIGITS: usize = 6;
const TIME_DIGITS: usize = 8;

/// A published event, as found in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// From 1, +1 per event of a run.
    pub number: u32,
    /// When it was due, in microseconds since the run started.
    pub due: u64,
}

impl Mark {
    /// The text of an event of `size` bytes in the run with this tag; at least the mark.
    pub fn text(self, tag: u32, size: usize) -> String {
        let mut text = String::with_capacity(size.max(MARK));
        text.push('~');
        put(&mut text, tag.into(), TAG_DIGITS);
        put(&mut text, u64::from(self.number), NUMBER_DIGITS);
        put(&mut text, self.due, TIME_DIGITS);
        text.push('~');
        while text.len() < size {
            text.push('x');
        }
        text
    }

    fn parse(bytes: &[u8], tag: u32) -> Option<Mark> {
        let [b'~', digits @ .., b'~'] = bytes else { return None };
        let (of_run, digits) = digits.split_at_checked(TAG_DIGITS)?;
        if read(of_run)? != u64::from(tag) {
            return None;
        }
        let (number, time) = digits.split_at_checked(NUMBER_DIGITS)?;
        let number = u32::try_from(read(number)?).ok()?;
        Some(Mark { number, due: read(time)? })
    }
}

fn put(text: &mut String, value: u64, digits: usize) {
    for digit in (0..digits).rev() {
        let value = value / 36_u64.pow(digit as u32) % 36;
        text.push(char::from(b"0123456789abcdefghijklmnopqrstuvwxyz"[value as usize]));
    }
}

fn read(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'z' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value * 36 + u64::from(digit))
    })
}

/// Finds the marks in payloads. It looks first where it found the last one: servers put events into
/// the same frame each time.
#[derive(Debug)]
pub struct Finder {
    tag: u32,
    offset: usize,
}

impl Finder {
    /// Finds marks of the run with this tag.
    pub fn new(tag: u32) -> Finder {
        Finder { tag, offset: 0 }
    }

    /// The first mark in these bytes, and the bytes after it.
    pub fn find<'b>(&mut self, payload: &'b [u8]) -> Option<(Mark, &'b [u8])> {
        let at =
            |start: usize| payload.get(start..start + MARK).and_then(|bytes| Mark::parse(bytes, self.tag));
        if let Some(mark) = at(self.offset) {
            return Some((mark, &payload[self.offset + MARK..]));
        }
        let starts = payload.iter().enumerate().filter(|(_, byte)| **byte == b'~');
        let (start, mark) = starts.map(|(start, _)| start).find_map(|start| Some((start, at(start)?)))?;
        self.offset = start;
        Some((mark, &payload[start + MARK..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_marks_wherever_they_are() {
        let marks = [(1, 0), (999_999, 77), (2_000_000_000, 36_u64.pow(8) - 1)];
        let marks = marks.map(|(number, due)| Mark { number, due });
        let mut finder = Finder::new(47);
        for mark in marks {
            for (before, size) in [("", 0), ("{\"text\":\"", 18), ("~~", 300), ("~0", 19)] {
                let payload = format!("{before}{}\"}}", mark.text(47, size));
                let (found, rest) = finder.find(payload.as_bytes()).unwrap();
                assert_eq!(found, mark, "{payload}");
                assert_eq!(rest.len(), size.saturating_sub(MARK) + 2);
            }
        }
        for other in ["", "~", "{\"type\":\"ping\"}", "~1b00000100000000x", "~1c00000100000000~"] {
            assert_eq!(finder.find(other.as_bytes()), None, "{other}");
        }
    }
}
