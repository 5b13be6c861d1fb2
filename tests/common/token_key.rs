//! A key file for `--jwt-key`, and tokens signed with it.

use std::process::Command;

use super::process::Directory;

pub struct TokenKey(Directory);

impl TokenKey {
    pub fn new() -> TokenKey {
        let key = TokenKey(Directory::new());
        std::fs::write(key.path(), "0123456789abcdef0123456789abcdef").expect("a key file");
        key
    }

    pub fn path(&self) -> String {
        self.0.path().join("jwt.key").to_str().expect("UTF-8").to_owned()
    }

    pub fn token(&self, user: &str, flags: &[&str]) -> String {
        token(&self.path(), user, flags)
    }
}

/// A token made by `fanfare token` with a key file and these flags.
pub fn token(key: &str, user: &str, flags: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    let output = command.args(["token", "--user", user, "--jwt-key", key]).args(flags).output();
    let output = output.expect("the binary can be run");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8").trim_end().to_owned()
}
