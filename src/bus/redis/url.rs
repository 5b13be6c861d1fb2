//! From `--redis` to fred's configuration.

use std::env;

use fred::rustls_native_certs::load_native_certs;
use fred::types::config::Config;

use super::errors::readable;
use crate::config::{RedisUrl, SettingError};

/// Variables that name other CA certificates than those of the system (openssl(1)).
const CA_VARIABLES: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// fred's configurations for this URL: one, or one for each node of a cluster that it names. For
/// TLS it reads the CA certificates.
pub fn configs(url: &RedisUrl) -> Result<Vec<Config>, SettingError> {
    let configs = url.servers().into_iter().map(|server| {
        Config::from_url(&server).map_err(|error| SettingError {
            setting: format!("--redis {url}"),
            problem: readable(error.details()),
        })
    });
    configs.collect()
}

/// Checks that CA certificates are installed, if the URL needs any.
///
/// # Errors
/// The variable that names other CA certificates than those of the system, or `--redis`.
pub fn check_ca_certificates(url: &RedisUrl) -> Result<(), SettingError> {
    if !url.0.starts_with("rediss") {
        return Ok(());
    }
    let found = load_native_certs();
    let problem = match found.errors.first() {
        Some(error) => error.to_string(),
        None if found.certs.is_empty() => {
            "no CA certificates found, so the certificate of Redis can't be verified: set \
             SSL_CERT_FILE to a PEM file, or install ca-certificates"
                .into()
        }
        None => return Ok(()),
    };
    let named = CA_VARIABLES.into_iter().find(|name| {
        env::var(name)
            .is_ok_and(|path| !path.is_empty() && (found.errors.is_empty() || problem.contains(&path)))
    });
    let setting = named.map_or_else(|| format!("--redis {url}"), str::to_owned);
    Err(SettingError { setting, problem })
}
