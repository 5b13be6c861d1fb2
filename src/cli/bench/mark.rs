//! The mark in each published event: a number and the time at which it was due.
//!
//! A mark is `~`, the number and the time in base 36, and `~`: 16 characters that no protocol
//! escapes, so it is found in whatever a server makes of an event. Padding brings the event to its
//! size.

/// Bytes of a mark.
pub const MARK: usize = 16;

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
    /// The text of an event of `size` bytes; at least the mark.
    pub fn text(self, size: usize) -> String {
        let mut text = String::with_capacity(size.max(MARK));
        text.push('~');
        put(&mut text, u64::from(self.number), NUMBER_DIGITS);
        put(&mut text, self.due, TIME_DIGITS);
        text.push('~');
        while text.len() < size {
            text.push('x');
        }
        text
    }

    fn parse(bytes: &[u8]) -> Option<Mark> {
        let [b'~', digits @ .., b'~'] = bytes else { return None };
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
#[derive(Debug, Default)]
pub struct Finder {
    offset: usize,
}

impl Finder {
    /// The first mark in these bytes, and the bytes after it.
    pub fn find<'b>(&mut self, payload: &'b [u8]) -> Option<(Mark, &'b [u8])> {
        let at = |start: usize| payload.get(start..start + MARK).and_then(Mark::parse);
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
        let mut finder = Finder::default();
        for mark in marks {
            for (before, size) in [("", 0), ("{\"text\":\"", 16), ("~~", 300), ("~0", 17)] {
                let payload = format!("{before}{}\"}}", mark.text(size));
                let (found, rest) = finder.find(payload.as_bytes()).unwrap();
                assert_eq!(found, mark, "{payload}");
                assert_eq!(rest.len(), size.saturating_sub(MARK) + 2);
            }
        }
        for other in ["", "~", "{\"type\":\"ping\"}", "~000001000000~", "~00000100000000x"] {
            assert_eq!(finder.find(other.as_bytes()), None, "{other}");
        }
    }
}
