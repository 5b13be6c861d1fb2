//! Patterns of channel names, in settings.

use std::fmt;

use super::event::ChannelName;

/// A channel, or all whose names start with a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChannelPattern {
    Name(ChannelName),
    /// At least one character, in front of a `*`.
    Prefix(ChannelName),
}

impl ChannelPattern {
    pub fn parse(text: &str) -> Option<ChannelPattern> {
        match text.strip_suffix('*') {
            Some(prefix) => ChannelName::parse(prefix).map(ChannelPattern::Prefix),
            None => ChannelName::parse(text).map(ChannelPattern::Name),
        }
    }

    pub fn matches(&self, channel: &ChannelName) -> bool {
        match self {
            ChannelPattern::Name(name) => name == channel,
            ChannelPattern::Prefix(prefix) => channel.as_str().starts_with(prefix.as_str()),
        }
    }
}

impl fmt::Display for ChannelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChannelPattern::Name(name) => name.fmt(f),
            ChannelPattern::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_names_and_prefixes() {
        let matches = |pattern: &str, channel: &str| {
            let pattern = ChannelPattern::parse(pattern).expect("a pattern");
            pattern.matches(&ChannelName::parse(channel).expect("a name"))
        };
        assert!(matches("support", "support") && !matches("support", "support.1"));
        assert!(matches("support.*", "support.1") && matches("support.*", "support."));
        assert!(!matches("support.*", "support"));
        for none in ["", "*", "a*b", "a**", "a b", "a b*"] {
            assert_eq!(ChannelPattern::parse(none), None, "{none}");
        }
    }
}
