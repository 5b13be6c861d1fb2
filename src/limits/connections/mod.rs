//! How many connections: of the whole node, of one address, of one user. Shards share the counts; they are touched
//! when a connection comes, is named and ends, never on the way out.
//!
//! Whoever is over a cap still waits for a moment on the doorstep, so that its request gets a real answer. The
//! doorstep is small: when it is full too, the accept loop answers at once.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};

use bytes::Bytes;
use ipnet::IpNet;

use crate::config::{self, Cap, Settings};
use crate::http::Response;
use crate::limits::allowances::Allowances;
use crate::limits::rate::{Allowance, Client};
use crate::protocol::close::CloseReason;

/// Most connections of one address, unless said otherwise: a large office behind one address has fewer, and a
/// program that opens more is one to talk about. Loopback is free, since a proxy on the same machine may not be named.
pub const PER_ADDRESS: u32 = 1024;

/// Most connections of one user, unless said otherwise, and only where tokens say who that is: without them a
/// stranger could lock out anyone whose name it takes.
pub const PER_USER: u32 = 100;

/// Seconds after which one who found no place may come again.
const RETRY_AFTER: &str = "5";

/// Bytes of an IPv6 address that count as one client: the /56 that a customer of an access network usually gets
/// (RIPE-690 recommends /56 or /48). Counted by /64 such a customer would have 256 times the cap of an address.
const IPV6_PREFIX: usize = 7;

/// The client of a connection, as it is counted: an IPv4 address, or the /56 of an IPv6 one, so that a client gains
/// nothing by using another of its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// IPv4, also when it came mapped into IPv6.
    V4([u8; 4]),
    /// The first bytes of an IPv6 address.
    V6([u8; IPV6_PREFIX]),
}

impl Address {
    fn is_loopback(self) -> bool {
        match self {
            Address::V4([first, ..]) => first == 127,
            Address::V6(prefix) => prefix == [0; IPV6_PREFIX], // of ::1; no other host has it
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Address {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Address::V4(ip.octets()),
            IpAddr::V6(ip) => {
                let prefix = ip.octets().first_chunk().copied();
                Address::V6(prefix.expect("an address is longer than its prefix"))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Address::V4(octets) => Ipv4Addr::from(octets).fmt(f),
            Address::V6(_) if self.is_loopback() => Ipv6Addr::LOCALHOST.fmt(f),
            Address::V6(prefix) => {
                let mut octets = [0; 16];
                octets[..IPV6_PREFIX].copy_from_slice(&prefix);
                write!(f, "{}/{}", Ipv6Addr::from(octets), 8 * IPV6_PREFIX)
            }
        }
    }
}

/// What is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitReached {
    /// The node: `--max-connections`.
    Node,
    /// The client's address: `--max-connections-per-ip`.
    Address,
    /// The user: `--max-connections-per-user`.
    User,
}

impl LimitReached {
    /// Why the connection ends.
    pub fn reason(self) -> CloseReason {
        match self {
            LimitReached::Node => CloseReason::NodeLimit,
            LimitReached::Address => CloseReason::IpLimit,
            LimitReached::User => CloseReason::UserLimit,
        }
    }

    /// The HTTP answer; made once, since it may be needed often.
    pub fn answer(self) -> Bytes {
        static ANSWERS: LazyLock<[Bytes; 3]> = LazyLock::new(|| {
            [
                (503, "this node has all the connections it may have: try another, or later"),
                (429, "too many connections from this address: close some, or try later"),
                (429, "too many connections of this user: close some, or try later"),
            ]
            .map(|(status, text)| {
                Response::line(status, text).with("Retry-After", RETRY_AFTER).to_closing_bytes()
            })
        });
        ANSWERS[self as usize].clone()
    }
}

/// What a connection holds of the counts, from accept to the end of its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionSlot {
    /// A seat: it comes from a trusted proxy, which has not named a client, and is counted for nobody.
    Proxy,
    /// A seat, counted for this address.
    Client(Address),
    /// No seat, for this reason: it waits on the doorstep until its request can be answered.
    Rejecting {
        /// What is full.
        limit: LimitReached,
        /// It comes from a trusted proxy.
        proxy: bool,
        /// Its client is another than its peer, by the word of a trusted proxy.
        reported: bool,
    },
}

impl ConnectionSlot {
    /// Whether its peer is a trusted proxy, who may name the client.
    pub fn is_proxy(self) -> bool {
        matches!(self, ConnectionSlot::Proxy | ConnectionSlot::Rejecting { proxy: true, .. })
    }

    /// Why it has no seat.
    pub fn limit_reached(self) -> Option<LimitReached> {
        match self {
            ConnectionSlot::Rejecting { limit, .. } => Some(limit),
            ConnectionSlot::Proxy | ConnectionSlot::Client(_) => None,
        }
    }
}

/// The counts and their caps.
#[derive(Debug)]
pub struct ConnectionLimits {
    trusted: Box<[IpNet]>,
    max_counted: u32,
    max_rejecting: u32,
    per_address: Cap,
    /// `None`: users are not counted.
    per_user: Option<u32>,
    counted: AtomicU32,
    rejecting: AtomicU32,
    addresses: Mutex<HashMap<Address, u32>>,
    /// By hash: two users in 2^64 would share a cap, and a name is too long to keep twice.
    users: Mutex<HashMap<u64, u32>>,
    hasher: RandomState,
    /// Whose connections share an allowance.
    client: Client,
    /// The allowances of all clients.
    pub allowances: Allowances,
}

impl ConnectionLimits {
    /// Nobody is there yet.
    pub fn new(settings: &Settings) -> ConnectionLimits {
        ConnectionLimits {
            trusted: settings.trusted_proxy.clone().into(),
            max_counted: settings.connection_limit(),
            max_rejecting: config::rejection_slots(settings.connection_limit()),
            per_address: settings.max_connections_per_ip,
            per_user: match settings.max_connections_per_user {
                Cap::Auto => (!settings.jwt_key.is_empty()).then_some(PER_USER),
                Cap::Off => None,
                Cap::Most(most) => Some(most.get()),
            },
            counted: AtomicU32::new(0),
            rejecting: AtomicU32::new(0),
            addresses: Mutex::default(),
            users: Mutex::default(),
            hasher: RandomState::new(),
            client: Client::of(settings),
            allowances: Allowances::new(settings),
        }
    }

    /// Whether this is a proxy that may name its clients.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.trusted.iter().any(|net| net.contains(&ip))
    }

    /// A connection has come. Only the accept loop calls this. To be given back with [`ConnectionLimits::leave`].
    ///
    /// # Errors
    /// What is full, when there is no room on the doorstep either.
    pub fn acquire(&self, peer: IpAddr) -> Result<ConnectionSlot, LimitReached> {
        let proxy = self.trusts(peer);
        let address = Address::from(peer);
        let limit = if self.counted.load(Relaxed) >= self.max_counted {
            LimitReached::Node
        } else if proxy || self.count(address) {
            self.counted.fetch_add(1, Relaxed);
            return Ok(if proxy { ConnectionSlot::Proxy } else { ConnectionSlot::Client(address) });
        } else {
            LimitReached::Address
        };
        if self.rejecting.load(Relaxed) >= self.max_rejecting {
            return Err(limit);
        }
        self.rejecting.fetch_add(1, Relaxed);
        Ok(ConnectionSlot::Rejecting { limit, proxy, reported: false })
    }

    /// A trusted proxy names the client of its connection. Whoever has no seat keeps its reason.
    ///
    /// # Errors
    /// The client's address is full, and so is the rejecting: it is to be answered at once.
    pub fn name_client(
        &self,
        connection_slot: &mut ConnectionSlot,
        client: IpAddr,
    ) -> Result<(), LimitReached> {
        debug_assert!(connection_slot.is_proxy(), "{connection_slot:?} names nobody");
        let proxy = self.trusts(client); // its own address is never counted
        match connection_slot {
            ConnectionSlot::Rejecting { limit, .. } => {
                *connection_slot = ConnectionSlot::Rejecting { limit: *limit, proxy, reported: true }
            }
            _ if proxy => {}
            _ if self.count(client.into()) => *connection_slot = ConnectionSlot::Client(client.into()),
            _ => {
                self.counted.fetch_sub(1, Relaxed);
                *connection_slot =
                    ConnectionSlot::Rejecting { limit: LimitReached::Address, proxy, reported: true };
                if self.rejecting.fetch_add(1, Relaxed) >= self.max_rejecting {
                    return Err(LimitReached::Address);
                }
            }
        }
        Ok(())
    }

    /// A connection's socket has ended. `user` is empty unless [`ConnectionLimits::acquire_user`] took it.
    pub fn release(&self, connection_slot: ConnectionSlot, user: &str) {
        match connection_slot {
            ConnectionSlot::Rejecting { .. } => {
                self.rejecting.fetch_sub(1, Relaxed);
            }
            ConnectionSlot::Proxy => {
                self.counted.fetch_sub(1, Relaxed);
            }
            ConnectionSlot::Client(address) => {
                self.counted.fetch_sub(1, Relaxed);
                discount(&self.addresses, &address);
            }
        }
        if self.per_user.is_some() && !user.is_empty() {
            discount(&self.users, &self.hasher.hash_one(user));
        }
    }

    /// Counts one more connection of this user; false when that would be too many.
    pub fn acquire_user(&self, user: &str) -> bool {
        self.per_user.is_none_or(|most| add(&self.users, self.hasher.hash_one(user), most))
    }

    /// The allowance of the client of this connection. `None`: the connection shares with no other. Without tokens that
    /// holds for loopback, since a proxy on the same machine may not forward client addresses, and for a proxy's own
    /// connections.
    pub fn allowance(&self, connection_slot: ConnectionSlot, user: &str) -> Option<Arc<Allowance>> {
        match (self.client, connection_slot) {
            (Client::User, _) => Some(self.allowances.get(user)),
            (Client::Address, ConnectionSlot::Client(address)) if !address.is_loopback() => {
                Some(self.allowances.get(address))
            }
            (Client::Address, _) => None,
        }
    }

    /// Counts a new channel of this client; false if it has named too many. Where its connections are not limited, new
    /// channels are not either.
    pub fn take_channel(&self, client: &Allowance) -> bool {
        let connections = match self.client {
            Client::User => self.per_user,
            Client::Address => self.most_of_address(),
        };
        connections.is_none_or(|most| client.take_channel(most, self.allowances.now()))
    }

    /// Counts one more connection of this address; false when that would be too many.
    fn count(&self, address: Address) -> bool {
        let is_free = self.per_address == Cap::Auto && address.is_loopback();
        let most = self.most_of_address().filter(|_| !is_free);
        add(&self.addresses, address, most.unwrap_or(u32::MAX))
    }

    /// Most connections of an address that is not loopback.
    fn most_of_address(&self) -> Option<u32> {
        match self.per_address {
            Cap::Auto => Some(PER_ADDRESS),
            Cap::Off => None,
            Cap::Most(most) => Some(most.get()),
        }
    }
}

fn add<K: Hash + Eq>(counts: &Mutex<HashMap<K, u32>>, key: K, most: u32) -> bool {
    let mut counts = counts.lock().expect("nothing panics while holding it");
    let count = counts.entry(key).or_insert(0);
    let room = *count < most;
    *count += u32::from(room);
    room
}

fn discount<K: Hash + Eq>(counts: &Mutex<HashMap<K, u32>>, key: &K) {
    let mut counts = counts.lock().expect("nothing panics while holding it");
    let count = counts.get_mut(key).expect("whoever leaves was counted");
    *count -= 1;
    if *count == 0 {
        counts.remove(key);
    }
}

#[cfg(test)]
mod tests;
