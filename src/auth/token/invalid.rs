//! Why a token is not accepted.

use std::fmt;

use crate::config::show_rounded;

/// Why a token is not accepted, for operators. Clients don't learn it, since it would help to guess.
/// It holds no text of the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InvalidToken {
    /// It is not a JWT, in this part.
    Malformed(&'static str),
    /// No key has its algorithm.
    Algorithm {
        /// The algorithm in its header, if that is a known one.
        named: Option<&'static str>,
        /// The algorithms of the keys.
        accepted: Vec<&'static str>,
    },
    /// No key of this algorithm verifies its signature.
    Signature(&'static str),
    /// A claim is missing or wrong. The signature is valid, as for all that follow.
    Claim(&'static str),
    OtherUser,
    Expired {
        /// How long ago.
        seconds: u64,
    },
    NotYetValid {
        /// For how long.
        seconds: u64,
    },
}

impl InvalidToken {
    /// A label for the log.
    pub fn label(&self) -> &'static str {
        match self {
            InvalidToken::Malformed(_) => "malformed",
            InvalidToken::Algorithm { .. } => "algorithm",
            InvalidToken::Signature(_) => "signature",
            InvalidToken::Claim(_) => "claim",
            InvalidToken::OtherUser => "other_user",
            InvalidToken::Expired { .. } => "expired",
            InvalidToken::NotYetValid { .. } => "not_yet_valid",
        }
    }
}

impl fmt::Display for InvalidToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidToken::Malformed(part) => f.write_str(part),
            InvalidToken::Algorithm { named, accepted } => write!(
                f,
                "alg in its header is {}, and --jwt-key has keys for {} only",
                named.unwrap_or("missing or unknown"),
                accepted.join(", "),
            ),
            InvalidToken::Signature("HS256") => f.write_str(
                "no secret in --jwt-key verifies its signature (HS256): another secret signed it. The \
                 secret is the text of the file, not decoded and without its line end",
            ),
            InvalidToken::Signature(algorithm) => {
                write!(f, "no key in --jwt-key verifies its signature ({algorithm}): another key signed it")
            }
            InvalidToken::Claim(problem) => f.write_str(problem),
            InvalidToken::OtherUser => f.write_str("sub is another user than the one in the path"),
            InvalidToken::Expired { seconds } => {
                write!(f, "it expired {} ago (exp)", show_rounded(*seconds as f64))
            }
            InvalidToken::NotYetValid { seconds } => write!(
                f,
                "it becomes valid in {} (nbf): check the clock of its issuer",
                show_rounded(*seconds as f64)
            ),
        }
    }
}
