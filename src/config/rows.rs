//! A row for each setting. Flags, variables, `--help`, `--check` and the table in
//! docs/configuration.md are made from it.

use std::fmt::Write;

use super::args::Flag;
use super::settings::Settings;
use super::wrap;

pub(super) use super::settings::ROWS;

/// One setting.
pub(super) struct Row {
    /// Name and placeholder.
    pub flag: Flag,
    /// As it would be written; empty if there is none.
    pub default: &'static str,
    /// Heading of its group in `--help`.
    pub group: &'static str,
    /// Lines of the description, in Markdown.
    pub help: &'static [&'static str],
    /// Link to more, in docs/; empty if there is none.
    #[cfg_attr(not(test), expect(dead_code, reason = "only the test that checks docs/ reads it"))]
    pub see: &'static str,
    /// The effective value as it would be written. Secrets are hidden.
    pub show: fn(&Settings) -> String,
}

/// Declares [`Settings`], with a field for each row, and [`ROWS`]. The doc comment of a field is
/// its description in `--help` and docs/.
macro_rules! settings {
    ($(
        $group:literal
        $(
            $(#[doc = $help:literal])+
            $field:ident: $type:ty {
                name: $name:literal,
                value: $value:literal,
                default: $default:literal,
                parse: $parse:expr,
                show: $show:expr,
                $(see: $see:literal,)?
                $(old_name: $old_name:literal,)?
            }
        )+
    )+) => {
        /// Everything that can be set, checked.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Settings {
            $($(
                $(#[doc = $help])+
                pub $field: $type,
            )+)+
            /// The limit on open files of this process, if it can be read. Not a setting, but read
            /// together with them.
            pub open_files: Option<u32>,
            /// Available memory. Not a setting either.
            pub memory: Memory,
        }

        /// All settings, in the order shown.
        pub(super) static ROWS: &[Row] = &[
            $($(
                Row {
                    flag: Flag { name: $name, value: $value, old_name: concat!($($old_name)?) },
                    default: $default,
                    group: $group,
                    help: &[$($help),+],
                    see: concat!($($see)?),
                    show: $show,
                },
            )+)+
        ];

        impl Settings {
            /// Every setting's own value.
            pub(super) fn read(input: &mut Input) -> Settings {
                Settings {
                    $($($field: input.value($name, $default, $parse),)+)+
                    open_files: open_file_limit().and_then(|limit| u32::try_from(limit).ok()),
                    memory: Memory::read(),
                }
            }
        }
    };
}
pub(super) use settings;

impl Row {
    /// `FANFARE_MAX_MESSAGE_SIZE`
    pub fn variable(&self) -> String {
        variable(self.flag.name)
    }

    /// `--max-message-size SIZE`
    fn usage(&self) -> String {
        format!("{} {}", self.flag.with_dashes(), self.flag.value).trim_end().to_owned()
    }

    fn shown_default(&self) -> &'static str {
        if self.default.is_empty() { "none" } else { self.default }
    }

    /// The description: its text, and each item of a list (`- `) alone.
    fn paragraphs(&self) -> Vec<String> {
        let mut paragraphs: Vec<String> = Vec::new();
        let mut continues = false;
        for line in self.help.iter().map(|line| line.trim()).filter(|line| !line.is_empty()) {
            let is_item = line.starts_with("- ");
            match paragraphs.last_mut() {
                Some(text) if continues && !is_item => *text += &format!(" {line}"),
                _ => paragraphs.push(line.to_owned()),
            }
            continues = !is_item;
        }
        paragraphs
    }
}

/// Prefix of every environment variable.
pub(super) const PREFIX: &str = "FANFARE_";

/// The environment variable of the setting `name`.
pub(super) fn variable(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase().replace('-', "_"))
}

/// Every flag of `fanfare` without a subcommand.
pub fn flags() -> Vec<Flag> {
    let others = ["check", "version", "help"].map(|name| Flag::new(name, ""));
    ROWS.iter().map(|row| row.flag).chain(others).collect()
}

/// Columns of `--help`: those of a terminal.
const WIDTH: usize = 80;
/// Columns before a description in `--help`.
const INDENT: usize = 6;

/// The text of `--help`.
pub(super) fn help() -> String {
    let mut text = format!(
        "fanfare {}: WebSocket fan-out server\n\n\
         Usage: fanfare [--NAME VALUE | --NAME=VALUE]...\n       \
         fanfare bench URL     loads and checks a WebSocket server\n       \
         fanfare doctor ...    checks this host and its Redis\n       \
         fanfare token ...     makes a token for tests\n       \
         fanfare help COMMAND  explains a command\n\n\
         Each setting is a flag or an environment variable; the flag wins.\n\
         TIME is a whole number and ms, s, m, h or d. SIZE is a whole number of bytes,\n\
         or with KiB, MiB, GiB, KB, MB or GB.\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut group = "";
    for row in ROWS {
        if row.group != group {
            group = row.group;
            let _ = write!(text, "\n{group}\n");
        }
        let _ = writeln!(text, "  {:<39}{}", row.usage(), row.variable());
        let mut paragraphs = row.paragraphs();
        let last = paragraphs.last_mut().expect("every setting is described");
        *last += &format!(" Default: {}.", row.shown_default());
        for paragraph in paragraphs {
            for line in wrap(&paragraph.replace('`', ""), WIDTH - INDENT) {
                let _ = writeln!(text, "{:INDENT$}{line}", "");
            }
        }
    }
    text.push_str(
        "\nOther\n  \
         --check       Check every setting, print the effective values and exit.\n  \
         --version     Print the version and exit.\n  \
         --help        Print this and exit.\n\n\
         If a setting is wrong, fanfare exits with code 2 before it opens anything.\n",
    );
    text
}

/// The table of docs/configuration.md.
#[cfg(test)]
pub(super) fn markdown() -> String {
    let mut table = "| flag | variable | default | meaning |\n|---|---|---|---|\n".to_owned();
    for row in ROWS {
        let paragraphs = row.paragraphs();
        let paragraphs = paragraphs.iter().map(|text| text.strip_prefix("- ").unwrap_or(text));
        let mut meaning = paragraphs.collect::<Vec<_>>().join("<br>");
        if !row.see.is_empty() {
            let _ = write!(meaning, " See {}.", row.see);
        }
        let settings = [&row.usage(), &row.variable(), row.shown_default()].map(|cell| format!("`{cell}`"));
        let cells = settings.iter().chain([&meaning]).map(|cell| cell.replace('|', r"\|"));
        let _ = writeln!(table, "| {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    table
}
