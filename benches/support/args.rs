//! `--name value` arguments.

use std::collections::HashMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

/// The arguments given on the command line.
pub struct Args(HashMap<String, String>);

impl Args {
    /// Reads the command line. `known` lists every argument with its help; `--help` prints them and
    /// exits. Cargo's own `--bench` is ignored.
    pub fn read(known: &[(&str, &str)]) -> Result<Args> {
        let mut given = HashMap::new();
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench").peekable();
        while let Some(word) = words.next() {
            if word == "--help" {
                for (name, help) in known {
                    println!("  --{name:<14} {help}");
                }
                std::process::exit(0);
            }
            let Some(name) = word.strip_prefix("--") else {
                bail!("unexpected argument {word:?}; see --help")
            };
            ensure!(known.iter().any(|(known, _)| *known == name), "unknown argument --{name}; see --help");
            let value = words.next_if(|word| !word.starts_with("--"));
            given.insert(name.to_owned(), value.unwrap_or_default()); // a switch has none
        }
        Ok(Args(given))
    }

    /// The value of `--name`, or the default.
    pub fn get<T: FromStr>(&self, name: &str, default: T) -> Result<T> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text.parse().ok().with_context(|| format!("--{name} can't be {text:?}")),
        }
    }

    /// The value of `--name`, if given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}
