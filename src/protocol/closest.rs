//! Suggestions for mistyped names: of flags, variables, query parameters and keys.

/// Most letters in which a typing error differs from the name that was meant.
const DISTANCE_MAX: usize = 2;

/// The part of a name's letters that may differ: of `token` one, of `channel` two. In shorter names
/// other words are as near as typing errors.
const DISTANCE_PART: usize = 3;

/// Least number of letters of an abbreviation.
const ABBREVIATION_MIN: usize = 3;

/// The same for a [`typing_error`]: of `channel` one. `story` differs from `history` by two.
const ERROR_PART: usize = 4;

/// In shorter names a changed letter makes another word: `taken` is not a `token`.
const CHANGED_MIN: usize = 6;

/// Longest name that is compared, in bytes: names from clients cost little.
const LENGTH_MAX: usize = 64;

/// The known name that a mistyped one is nearest to, if any is near: a name with other case or
/// separators, with few other letters, cut off, or longer by less than its own length.
pub fn closest<T: AsRef<str>>(given: &str, known: impl IntoIterator<Item = T>) -> Option<T> {
    nearest(given, known, nearness)
}

/// The question for the author of a mistyped name.
pub fn advice<T: AsRef<str>>(given: &str, known: impl IntoIterator<Item = T>) -> Option<String> {
    closest(given, known).map(|meant| format!("did you mean {}?", meant.as_ref()))
}

/// As [`closest`], among names that others may use, too, with names of their own: one with few
/// other letters or cut off, but none that is another word or has one more (`token_type`).
pub fn typing_error<T: AsRef<str>>(given: &str, known: impl IntoIterator<Item = T>) -> Option<T> {
    nearest(given, known, error_nearness)
}

fn nearest<T: AsRef<str>>(
    given: &str,
    known: impl IntoIterator<Item = T>,
    nearness: fn(&[char], &[char]) -> Option<usize>,
) -> Option<T> {
    if given.len() > LENGTH_MAX {
        return None;
    }
    let given: Vec<_> = letters(given).collect();
    let mut nearest: Option<(usize, T)> = None;
    for name in known {
        let distance = nearness(&given, &letters(name.as_ref()).collect::<Vec<_>>());
        if let Some(distance) = distance
            && nearest.as_ref().is_none_or(|(least, _)| distance < *least)
        {
            nearest = Some((distance, name));
        }
    }
    nearest.map(|(_, name)| name)
}

/// Whether two names differ at most in case and separators.
pub fn is_variant(a: &str, b: &str) -> bool {
    letters(a).eq(letters(b))
}

/// The letters of a name without case and separators.
fn letters(name: &str) -> impl Iterator<Item = char> {
    name.chars().filter(|c| !matches!(c, '-' | '_')).map(|c| c.to_ascii_lowercase())
}

/// In how many letters two names differ, if they are near.
fn nearness(given: &[char], known: &[char]) -> Option<usize> {
    let missing = given.len().abs_diff(known.len());
    let (shorter, longer) = if given.len() < known.len() { (given, known) } else { (known, given) };
    if shorter.len() >= ABBREVIATION_MIN && missing < shorter.len() && longer.starts_with(shorter) {
        return Some(missing);
    }
    distance_within(DISTANCE_PART, given, known)
}

/// As [`nearness`], for a [`typing_error`].
fn error_nearness(given: &[char], known: &[char]) -> Option<usize> {
    let missing = known.len().saturating_sub(given.len());
    if given.len() >= ABBREVIATION_MIN && missing < given.len() && known.starts_with(given) {
        return Some(missing);
    }
    let is_changed = given.len() == known.len() && given != known;
    distance_within(ERROR_PART, given, known).filter(|_| !is_changed || known.len() >= CHANGED_MIN)
}

/// In how many letters two names differ, if they are no more than one in `part` of the known name.
fn distance_within(part: usize, given: &[char], known: &[char]) -> Option<usize> {
    let most = DISTANCE_MAX.min(known.len() / part);
    if given.len().abs_diff(known.len()) > most {
        return None;
    }
    Some(distance(given, known)).filter(|distance| *distance <= most)
}

/// Number of letters to add, remove, change, or swap with their neighbour (optimal string
/// alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut next = vec![i + 1];
        for j in 0..b.len() {
            let changed = row[j] + usize::from(a[i] != b[j]);
            let mut least = changed.min(row[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                least = least.min(before[j - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_letters_that_differ() {
        for (a, b, apart) in [
            ("", "", 0),
            ("", "abc", 3),
            ("listn", "listen", 1),
            ("lisetn", "listen", 1),
            ("kitten", "sitting", 3),
        ] {
            let [a, b] = [a, b].map(|name| letters(name).collect::<Vec<_>>());
            assert_eq!((distance(&a, &b), distance(&b, &a)), (apart, apart), "{a:?} {b:?}");
        }
    }

    #[test]
    fn finds_the_name_that_was_meant() {
        let known = ["channel", "lastEventId", "token", "--listen", "text", "to"];
        for (given, meant) in [
            ("chanel", "channel"),
            ("Channel", "channel"),
            ("hcannel", "channel"),
            ("channels", "channel"),
            ("channel_name", "channel"),
            ("chan", "channel"),
            ("lastEventID", "lastEventId"),
            ("last_event_id", "lastEventId"),
            ("Last-Event-ID", "lastEventId"),
            ("lastevntid", "lastEventId"),
            ("lastEvent", "lastEventId"),
            ("tokn", "token"),
            ("tokne", "token"),
            ("tok", "token"),
            ("--listn", "--listen"),
            ("txt", "text"),
            ("TO", "to"),
        ] {
            assert_eq!(closest(given, known), Some(meant), "{given}");
        }
        for given in ["channel_name", "channel_id", "change", "tokne"] {
            assert_eq!(typing_error(given, known), None, "{given}");
        }
        for (given, meant) in [("chamnel", "channel"), ("chan", "channel"), ("tokn", "token"), ("To-", "to")]
        {
            assert_eq!(typing_error(given, known), Some(meant), "{given}");
        }
        let long = "channel".to_owned() + &"_".repeat(LENGTH_MAX);
        for given in ["", "_", "t", "v", "open", "tone", "topic", "user", "last", "cb", "id", "--port", &long]
        {
            assert_eq!(closest(given, known), None, "{given}");
        }
    }
}
