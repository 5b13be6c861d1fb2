//! The keys of clients' tokens and of the admin listener, read from files at start and again at
//! SIGHUP.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use ring::hmac;
use ring::rand::SystemRandom;

use crate::auth::token::Key;
use crate::config::{SettingError, Settings};
use crate::http::Head;

/// Longest key file, in bytes. An RSA key of 8192 bits takes 1.6 KiB.
const FILE_MAX: u64 = 64 * 1024;

/// Shortest `--admin-key`, in bytes, since it can be guessed over the network.
const ADMIN_KEY_MIN: usize = 16;

/// Read permission for every user of the machine (chmod(1)).
const OTHERS_READ: u32 = 0o004;

/// Every current key. Immutable: a reload makes a new set.
#[derive(Debug)]
pub struct Keys {
    admin: Option<AdminKey>,
    /// Tokens must be signed by one of these.
    pub tokens: Vec<Key>,
    /// Files with secrets that every user of the machine can read.
    exposed: Vec<PathBuf>,
}

/// The current keys and their files. Read once a handshake, never while events are written.
#[derive(Debug)]
pub struct KeyRing {
    admin_file: Option<PathBuf>,
    token_files: Vec<PathBuf>,
    current: RwLock<Arc<Keys>>,
}

impl KeyRing {
    /// Reads every key file that the settings name.
    ///
    /// # Errors
    /// Every file that can't be read or holds no key. Errors never quote the content.
    pub fn load(settings: &Settings) -> Result<KeyRing, Vec<SettingError>> {
        let ring = KeyRing {
            admin_file: settings.admin_key.clone(),
            token_files: settings.jwt_key.clone(),
            current: RwLock::new(Arc::new(Keys { admin: None, tokens: Vec::new(), exposed: Vec::new() })),
        };
        ring.reload()?;
        Ok(ring)
    }

    /// Rereads the files. If any of them is wrong, the keys stay as they are.
    ///
    /// # Errors
    /// As [`KeyRing::load`].
    pub fn reload(&self) -> Result<(), Vec<SettingError>> {
        let mut errors = Vec::new();
        let admin = self
            .admin_file
            .as_deref()
            .and_then(|path| load_key("admin-key", path, AdminKey::parse, &mut errors));
        let tokens: Vec<Key> = self
            .token_files
            .iter()
            .filter_map(|path| load_key("jwt-key", path, Key::parse, &mut errors))
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        let token_secrets = self.token_files.iter().zip(&tokens).filter(|(_, key)| key.is_secret());
        let secrets = self.admin_file.iter().chain(token_secrets.map(|(path, _)| path));
        let exposed = secrets.filter(|path| is_exposed(path)).cloned().collect();
        let keys = Arc::new(Keys { admin, tokens, exposed });
        *self.current.write().expect("nothing panics while holding it") = keys;
        Ok(())
    }

    /// Logs a warning for each file with a secret that every user of the machine can read.
    pub fn warn_of_exposed_files(&self) {
        for path in &self.current().exposed {
            let advice = format!("chmod o-r {}", path.display());
            tracing::warn!(path = %path.display(), advice, "every user of this machine can read a secret");
        }
    }

    /// The current keys.
    pub fn current(&self) -> Arc<Keys> {
        self.current.read().expect("nothing panics while holding it").clone()
    }

    /// Whether there are files to reread.
    pub fn has_files(&self) -> bool {
        self.admin_file.is_some() || !self.token_files.is_empty()
    }

    /// Whether clients need a token.
    pub fn requires_token(&self) -> bool {
        !self.token_files.is_empty()
    }
}

impl Keys {
    /// Whether requests to the admin listener need a key.
    pub fn requires_admin_key(&self) -> bool {
        self.admin.is_some()
    }

    /// Whether this request may use the admin listener.
    pub fn allows_admin(&self, head: &Head<'_>) -> bool {
        let Some(key) = &self.admin else { return true };
        head.count("authorization") == 1 && bearer(head).is_some_and(|given| key.matches(given))
    }
}

/// The token in `Authorization: Bearer` (RFC 6750 section 2.1).
pub fn bearer<'a>(head: &Head<'a>) -> Option<&'a str> {
    let (scheme, rest) = head.header("authorization")?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim_start())
}

/// Kept as its HMAC under a random key, so that the time of a comparison reveals nothing about it.
struct AdminKey {
    random: hmac::Key,
    tag: hmac::Tag,
}

impl AdminKey {
    fn parse(content: &[u8]) -> Result<AdminKey, String> {
        let key = content.trim_ascii();
        if key.len() < ADMIN_KEY_MIN || !key.iter().all(u8::is_ascii_graphic) {
            return Err(format!(
                "must contain one line of at least {ADMIN_KEY_MIN} ASCII letters, digits and symbols"
            ));
        }
        let random = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .map_err(|_| "the system's random number generator failed".to_owned())?;
        let tag = hmac::sign(&random, key);
        Ok(AdminKey { random, tag })
    }

    fn matches(&self, given: &str) -> bool {
        hmac::verify(&self.random, given.as_bytes(), self.tag.as_ref()).is_ok()
    }
}

impl std::fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminKey")
    }
}

fn is_exposed(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.permissions().mode() & OTHERS_READ != 0)
}

/// Reads one file. An error is added under the name of its setting.
fn load_key<T>(
    name: &str,
    path: &Path,
    parse: impl Fn(&[u8]) -> Result<T, String>,
    errors: &mut Vec<SettingError>,
) -> Option<T> {
    let result = read(path).and_then(|content| parse(&content));
    result
        .map_err(|problem| {
            let setting = format!("--{name} {}", path.display());
            errors.push(SettingError { setting, problem });
        })
        .ok()
}

/// Reads a key file. Only a regular file is accepted: opening a FIFO blocks until it has a writer.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    let found = fs::metadata(path).map_err(|error| format!("can't be opened: {error}"))?;
    if !found.is_file() {
        return Err("must be a regular file".into());
    }
    let file = File::open(path).map_err(|error| format!("can't be opened: {error}"))?;
    file.take(FILE_MAX + 1).read_to_end(&mut content).map_err(|error| format!("can't be read: {error}"))?;
    if content.len() as u64 > FILE_MAX {
        return Err(format!("is too long for a key file: at most {FILE_MAX} bytes"));
    }
    Ok(content)
}
